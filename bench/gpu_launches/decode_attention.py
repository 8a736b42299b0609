"""What kernels/gpu/decode_attention.py launches in production."""

from bitdistill.kernels.gpu.decode_attention import (
    MAX_SPLITS,
    _attend_kernel,
    _block_s,
    _merge_kernel,
    _rope_and_cache_kernel,
)
from bitdistill.kernels.gpu.decode_rows import row_warps
from gpu_launches.launch import Launch


def production_launches() -> list[Launch]:
    """Qwen3 0.6B (16 heads) and 4B (32), both with 8 key/value heads of 128, one token and a piece of a prompt; and a
    Gemma3 head of 256."""
    launches = []
    i32 = dict.fromkeys(("N", "C"), "i32")
    cache = {"keys_ptr": "*bf16", "values_ptr": "*bf16"}
    product = {"acc_ptr": "*i32", "act_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32", "bias_ptr": "*fp32"}
    for what, kind in (("", "*i32"), (", scaled", "*fp32")):
        launches.append(
            Launch(
                _rope_and_cache_kernel,
                f"16 + 2 * 8 heads of 128{what}",
                product
                | {"acc_ptr": kind}
                | dict.fromkeys(("q_gain_ptr", "k_gain_ptr", "cos_ptr", "sin_ptr"), "*fp32")
                | {"positions_ptr": "*i32", "slots_ptr": "*i32", "q_ptr": "*fp32", **cache, **i32, "eps": "fp32"},
                {
                    "SPLITS": 1 if what else 2,
                    "BIAS": False,
                    "OWN_PLANES": False,
                    "NORM": True,
                    "H": 16,
                    "K": 8,
                    "D": 128,
                    "BLOCK": 64,
                },
                num_warps=1,
                aligned=("acc_ptr", "weight_scale_ptr", "q_gain_ptr", "k_gain_ptr", "q_ptr", "keys_ptr", "values_ptr"),
            )
        )
    for heads, kv_heads, width, tokens in ((16, 8, 128, 1), (16, 8, 128, 16), (4, 1, 256, 1), (4, 1, 256, 4)):
        block_r = max(16, tokens * heads // kv_heads)
        launches.append(
            Launch(
                _attend_kernel,
                f"{heads}/{kv_heads} heads of {width}, {tokens} tokens a tile",
                {"q_ptr": "*fp32", **cache, "positions_ptr": "*i32", "slots_ptr": "*i32"}
                | {"mixed_ptr": "*fp32", "peak_ptr": "*fp32", "sum_ptr": "*fp32", **i32, "scale": "fp32"},
                {"WINDOW": 0, "TOKENS": tokens, "H": heads, "K": kv_heads, "D": width, "PRECISION": "tf32"}
                | {"BLOCK_R": block_r, "BLOCK_S": _block_s(width), "BLOCK_D": width},
                num_warps=4,
                num_stages=3,
                aligned=("q_ptr", "keys_ptr", "values_ptr", "mixed_ptr", "C"),
            )
        )
    for heads, blocks in ((16, False), (32, False), (32, True)):
        block = heads * 128
        launches.append(
            Launch(
                _merge_kernel,
                f"{heads} heads of 128{', blocks' if blocks else ''}",
                {"mixed_ptr": "*fp32", "peak_ptr": "*fp32", "sum_ptr": "*fp32", "subln_ptr": "*fp32"}
                | {
                    "input_scale_ptr": "*fp32",
                    "codes_ptr": "*i8",
                    "act_scale_ptr": "*fp32",
                    "N": "i32",
                    "P": "i32",
                    "subln_eps": "fp32",
                },
                {"SPLITS": MAX_SPLITS, "SUBLN": True, "H": heads, "D": 128, "BLOCK": block}
                | {"DIVIDED": False, "ACT_BLOCKS": blocks},
                num_warps=row_warps(block),
                aligned=("mixed_ptr", "peak_ptr", "sum_ptr", "subln_ptr", "codes_ptr", "P"),
            )
        )
    return launches
