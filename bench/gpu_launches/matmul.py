"""What kernels/gpu/matmul.py launches in production."""

import triton.language as tl

from bitdistill.kernels.gpu.matmul import (
    FP32_TILES,
    GRADIENT_TILES,
    GROUP,
    INT8_TILES,
    Tile,
    _grad_input,
    _grad_weight,
    _int8_linear,
)
from gpu_launches.launch import Launch

ROWS = -1  # in the place of the number of segments: one scale for each row of the weights


def production_launches() -> list[Launch]:
    """The three products at the widths of Qwen3 0.6B (q, k, v in one) and 1.7B (MLP), for bench/gpu_compile.py."""
    launches = []
    for part in INT8_TILES:
        launches += [_launch(_int8_linear, tile, part, 3, "*bf16") for tile in INT8_TILES[part]]
        launches.append(_launch(_int8_linear, INT8_TILES[part][0], part, 0, "*fp32"))
        launches.append(_launch(_int8_linear, INT8_TILES[part][0], part, ROWS, "*bf16"))
        for dy, tiles in (("*bf16", GRADIENT_TILES[part]), ("*fp32", FP32_TILES)):
            for tile in tiles:
                launches += [_launch(_grad_input, tile, part, 3, dy), _launch(_grad_weight, tile, part, 0, dy)]
    return launches


def _launch(kernel, tile: Tile, part: str, segments: int, dtype: str) -> Launch:
    """One of the three kernels with a tile; dtype is y's, or dY's."""
    blocks = {_int8_linear: "NOI", _grad_input: "NIO", _grad_weight: "OIN"}[kernel]
    constants = {"EVEN": True, "GROUP": GROUP}
    constants |= {f"BLOCK_{letter}": n for letter, n in zip(blocks, (tile.rows, tile.columns, tile.inner), strict=True)}
    if kernel is _int8_linear:
        constants |= {"SEGMENTS": segments, "HAS_BIAS": segments == 3}
        pointers = {"a_ptr": "*i8", "a_scale_ptr": "*fp32", "b_ptr": "*i8", "b_scale_ptr": "*fp32", "bias_ptr": "*fp32"}
        pointers |= {"y_ptr": dtype}
        integers = ("a_stride", "b_stride", "y_stride", "end_0", "end_1")
    else:
        constants |= {"DOT": tl.bfloat16 if dtype == "*bf16" else tl.float32}
        pointers = {"dy_ptr": dtype, "codes_ptr": "*i8", "scale_ptr": "*fp32"}
        if kernel is _grad_input:
            constants |= {"SEGMENTS": segments}
            pointers |= {"dx_ptr": dtype}
            integers = ("dy_stride", "codes_stride", "dx_stride", "end_0", "end_1")
        else:
            pointers |= {"dw_ptr": "*fp32"}
            integers = ("dy_stride", "codes_stride", "dw_stride")
    signature = pointers | dict.fromkeys(("N", "O", "I", *integers), "i32")
    widths = "O 4096 (q, k, v), I 1024" if segments else "O 6144, I 2048"
    return Launch(
        kernel,
        f"N 16384, {widths}, {dtype[1:]}, {tile.rows}x{tile.columns}",
        signature,
        constants,
        tile.num_warps,
        tile.num_stages,
        int8_dot=kernel is _int8_linear,
        wgmma=kernel is _int8_linear or dtype == "*bf16",
        aligned=tuple(signature),
        only=(part,),
    )
