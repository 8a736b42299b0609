"""What kernels/gpu/groups.py launches in production."""

import triton.language as tl

from bitdistill.kernels.gpu.groups import CHUNK, ROWS, TILES, WARPS, WIDE_TILES, _grouped_linear, _quantize_groups
from bitdistill.kernels.gpu.matmul import GROUP
from bitdistill.kernels.numerics import ACT_BLOCK
from gpu_launches.launch import Launch


def production_launches() -> list[Launch]:
    """At the widths of Qwen3 1.7B's MLP: groups of every size, blocks, and both."""
    types = {"weight_ptr": "*fp32", "codes_ptr": "*i8", "scale_ptr": "*fp32"}
    types |= dict.fromkeys(("O", "I", "G", "columns"), "i32")
    sizes = {"DTYPE": tl.float32, "ROWS": ROWS, "CHUNK": CHUNK}
    aligned = tuple(name for name in types if name != "G")
    launches = [Launch(_quantize_groups, "O 6144, I 2048, groups of 128", types, sizes, WARPS, aligned=aligned)]
    for columns, blocks in ((64, False), (128, False), (256, False), (128, True), (0, True)):
        unit = ACT_BLOCK if blocks else columns
        for tile in TILES if unit <= 128 else WIDE_TILES:
            constants = {"ACT_BLOCKS": blocks, "GROUPED": columns > 0, "SEGMENTS": 0 if columns else 2}
            constants |= {"HAS_BIAS": False, "UNIT": unit, "UNITS": max(1, columns // unit)}
            constants |= {"BLOCK_N": tile.rows, "BLOCK_O": tile.columns, "GROUP": GROUP}
            pointers = {"a_ptr": "*i8", "a_scale_ptr": "*fp32", "b_ptr": "*i8", "b_scale_ptr": "*fp32"}
            pointers |= {"bias_ptr": "*fp32", "y_ptr": "*bf16"}
            strides = ("a_stride", "b_stride", "y_stride")
            numbers = dict.fromkeys(("N", "O", "I", "B", "G", *strides, "end_0", "end_1"), "i32")
            what = f"{f'groups of {columns}' if columns else 'one scale'}{', blocks' if blocks else ''}"
            launches.append(
                Launch(
                    _grouped_linear,
                    f"N 16384, O 12288, I 2048, {what}, {tile.rows}x{tile.columns}",
                    pointers | numbers,
                    constants,
                    tile.num_warps,
                    tile.num_stages,
                    int8_dot=True,
                    aligned=(*pointers, "N", "O", "I", *strides),
                )
            )
    return launches
