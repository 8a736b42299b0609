"""What kernels/gpu/quantize.py launches in production."""

import triton.language as tl

from bitdistill.kernels.gpu.quantize import (
    TILE_I,
    TILE_O,
    TILE_WARPS,
    _quantize_activation,
    _quantize_weights,
    row_tile,
)
from gpu_launches.launch import Launch


def production_launches() -> list[Launch]:
    """Qwen3 0.6B and 4B: inputs of attention and MLP; fp32 masters."""
    launches = []
    rows = {
        "x_ptr": "*bf16",
        "codes_ptr": "*i8",
        "scale_ptr": "*fp32",
        "N": "i32",
        "x_stride": "i32",
    }
    for width in (1024, 2560, 9728, 16_384):
        ROWS, BLOCK, num_warps = row_tile(width)
        for blocks in (False, True):
            constexprs = {"I": width, "ACT_BLOCKS": blocks, "ROWS": ROWS, "BLOCK": BLOCK}
            shape = f"N 16384, I {width}{', blocks' if blocks else ''}"
            launches.append(Launch(_quantize_activation, shape, rows, constexprs, num_warps, aligned=tuple(rows)))
    weights = dict.fromkeys(("address_ptr", "shape_ptr"), "*i64")
    weights |= dict.fromkeys(("item_ptr", "counter_ptr"), "*i32") | {"partial_ptr": "*fp64"}
    weights |= {"codes_ptr": "*i8", "scale_ptr": "*fp32"}
    constexprs = {"DTYPE": tl.float32, "ALIGNED": True, "TILE_O": TILE_O, "TILE_I": TILE_I}
    launches.append(Launch(_quantize_weights, "fp32", weights, constexprs, TILE_WARPS, aligned=tuple(weights)))
    return launches
