"""What kernels/gpu/norm_quantize.py launches in production."""

from bitdistill.kernels.gpu.norm_quantize import _rms_norm_backward, _rms_norm_quantize, backward_tile
from bitdistill.kernels.gpu.quantize import row_tile
from gpu_launches.launch import Launch


def production_launches() -> list[Launch]:
    """Inputs of attention and MLP at Qwen3 0.6B and 4B, and wider ones."""
    launches = []
    pointers = dict.fromkeys(("x_ptr", "dy_ptr", "dx_ptr"), "*bf16")
    pointers |= dict.fromkeys(("gain_ptr", "scale_ptr", "rstd_ptr", "part_ptr"), "*fp32")
    pointers |= {"codes_ptr": "*i8"}
    numbers = dict.fromkeys(("N", "x_stride", "dy_stride", "run"), "i32")
    types = {**pointers, **numbers, "eps": "fp32"}
    for I in (1024, 2560, 4096, 8192):
        for kernel, tile in (_rms_norm_quantize, row_tile(I)), (_rms_norm_backward, backward_tile(I)):
            ROWS, BLOCK, num_warps, *twice = tile
            names = [name for name in kernel.arg_names if name in types]
            launches.append(
                Launch(
                    kernel=kernel,
                    shape=f"N 16384, I {I}{', blocks' if I == 4096 and not twice else ''}",
                    signature={name: types[name] for name in names},
                    constexprs={"I": I, "ROWS": ROWS, "BLOCK": BLOCK}
                    | ({"TWICE": twice[0]} if twice else {"ACT_BLOCKS": I == 4096}),
                    num_warps=num_warps,
                    aligned=tuple(name for name in names if name not in ("eps", "run")),
                )
            )
    return launches
