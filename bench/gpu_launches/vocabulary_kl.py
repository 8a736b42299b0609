"""What kernels/gpu/vocabulary_kl.py launches in production."""

from bitdistill.kernels.gpu.vocabulary_kl import _dense_rows, _rest_rows, _tile
from gpu_launches.launch import Launch


def production_launches() -> list[Launch]:
    """Qwen3's vocabulary: distillation, plain cross-entropy, and the words beside cached ones."""
    V = 151_936
    common = {"z_ptr": "*bf16", "target_ptr": "*i64", "z_stride": "i32"}
    common |= {"ce_weight": "fp32", "kl_weight": "fp32", "inverse_temperature": "fp32"}
    dense = common | {"t_ptr": "*bf16", "ce_ptr": "*fp32", "kl_ptr": "*fp32", "t_stride": "i32"}
    pointers = ("kept_max_ptr", "kept_sum_ptr", "kept_sum_tau_ptr", "p_rest_ptr", "stats_ptr")
    rest = common | dict.fromkeys(pointers, "*fp32")
    launches = []
    for N in (2048, 32):
        block, warps = _tile(N, V)
        for kernel, what, signature, flags in (
            (_dense_rows, "CE + KL", dense, {"DISTILL": True}),
            (_dense_rows, "CE", dense, {"DISTILL": False}),
            (_rest_rows, "beside cached words", rest, {}),
        ):
            launches.append(
                Launch(
                    kernel=kernel,
                    shape=f"N {N}, V {V}, {what}",
                    signature=signature,
                    constexprs={"V": V, "GRADIENT": True, "BLOCK": block} | flags,
                    num_warps=warps,
                    aligned=tuple(name for name in signature if name.endswith(("_ptr", "_stride"))),
                )
            )
    return launches
