"""What kernels/gpu/swiglu_quantize.py launches in production."""

from bitdistill.kernels.gpu.swiglu_quantize import _swiglu_norm_backward, _swiglu_norm_quantize, chunk_tile, gated_tile
from gpu_launches.launch import Launch


def production_launches() -> list[Launch]:
    """The MLPs of Qwen3 0.6B, 1.7B and 4B."""
    launches = []
    pointers = dict.fromkeys(("dy_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr"), "*bf16")
    pointers |= dict.fromkeys(("gain_ptr", "scale_ptr", "rstd_ptr", "part_ptr"), "*fp32")
    pointers |= {"codes_ptr": "*i8"}
    numbers = dict.fromkeys(("N", "dy_stride", "gate_stride", "up_stride", "run"), "i32")
    types = {**pointers, **numbers, "eps": "fp32"}
    for I in (3072, 6144, 9728):
        for gelu in (False, True):
            for kernel, tile in (_swiglu_norm_quantize, gated_tile(I)), (_swiglu_norm_backward, chunk_tile(I)):
                ROWS, BLOCK, num_warps, *chunks = tile
                names = [name for name in kernel.arg_names if name in types]
                launches.append(
                    Launch(
                        kernel=kernel,
                        shape=f"N 16384, I {I}, {'gelu' if gelu else 'silu'}{', blocks' if I == 6144 and not chunks else ''}",
                        signature={name: types[name] for name in names},
                        constexprs={"I": I, "GELU": gelu, "NORM": True, "ROWS": ROWS, "BLOCK": BLOCK}
                        | ({"CHUNKS": chunks[0]} if chunks else {"ACT_BLOCKS": I == 6144}),
                        num_warps=num_warps,
                        aligned=tuple(name for name in names if name not in ("eps", "run")),
                    )
                )
    return launches
