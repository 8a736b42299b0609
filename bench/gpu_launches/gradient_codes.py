"""What kernels/gpu/gradient_codes.py launches in production."""

from bitdistill.kernels.gpu.gradient_codes import BLOCK_N, BLOCK_O, PADDING, WARPS, _codes, _peaks, _transpose
from gpu_launches.launch import Launch


def production_launches() -> list[Launch]:
    """At the width of Qwen3 1.7B's gate and up, for bench/gpu_compile.py."""
    scales = {"act_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32"}
    sizes = dict.fromkeys(("N", "O", "dy_stride", "end_0", "end_1"), "i32")
    blocks = {"ROW_SCALES": False, "BLOCK_N": BLOCK_N, "BLOCK_O": BLOCK_O}
    shape = "N 16384, O 12288"
    peaks = {"dy_ptr": "*bf16"} | scales | {"row_ptr": "*fp32", "column_ptr": "*fp32"} | sizes
    codes = {"dy_ptr": "*bf16"} | scales | {"row_scale_ptr": "*fp32", "column_scale_ptr": "*fp32"} | sizes
    codes |= {"row_ptr": "*i8", "column_ptr": "*i8", "column_stride": "i32", "seed": "i32"}
    transpose = {"x_ptr": "*i8", "y_ptr": "*i8"} | dict.fromkeys(("R", "C", "x_stride", "y_stride"), "i32")
    return [
        Launch(_peaks, shape, peaks, blocks, WARPS, aligned=tuple(peaks)),
        Launch(_codes, shape, codes, blocks, WARPS, aligned=tuple(name for name in codes if name != "seed")),
        Launch(_codes, f"{shape}, scales of rows", codes, blocks | {"ROW_SCALES": True}, WARPS, aligned=tuple(peaks)),
        Launch(_transpose, "16384x6144", transpose, {"BLOCK_R": PADDING, "BLOCK_C": 128}, 8, aligned=tuple(transpose)),
    ]
