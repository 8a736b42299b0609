"""What kernels/gpu/decode_rows.py launches in production."""

import triton

from bitdistill.kernels.gpu.decode_rows import (
    LOGITS_BLOCK,
    _embed_kernel,
    _gated_kernel,
    _logits_kernel,
    _next_token_kernel,
    _residual_norm_kernel,
    row_warps,
)
from gpu_launches.launch import Launch


def production_launches() -> list[Launch]:
    """Widths of Qwen3 0.6B and 4B, with every branch that these models take; an int8 and a float16 head."""
    launches = []
    product = {"acc_ptr": "*i32", "acc_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32", "bias_ptr": "*fp32"}
    scaled = product | {"acc_ptr": "*fp32"}  # of decode_groups.py
    sizes = dict.fromkeys(("N", "I", "P"), "i32")
    for model, hidden, intermediate, splits in (("0.6B", 1024, 3072, 6), ("4B", 2560, 9728, 5)):
        for form, planes, blocks in (("codes", 1, False), ("codes", 1, True), ("int8", 2, False), ("fp16", 2, False)):
            block = triton.next_power_of_2(hidden)
            launches.append(
                Launch(
                    _residual_norm_kernel,
                    f"Qwen3 {model}, hidden {hidden}, {form}{', blocks' if blocks else ''}",
                    {
                        "x_ptr": "*fp32",
                        **(scaled if blocks else product),
                        "post_gain_ptr": "*fp32",
                        "gain_ptr": "*fp32",
                        "subln_ptr": "*fp32",
                    }
                    | {"input_scale_ptr": "*fp32"}
                    | {"codes_ptr": "*fp16" if form == "fp16" else "*i8", "act_scale_ptr": "*fp32", **sizes}
                    | {"eps": "fp32", "subln_eps": "fp32"},
                    {"SPLITS": 1 if blocks else splits, "BIAS": False, "POST": False, "NORM": True, "SUBLN": False}
                    | {"PLANES": planes, "DIVIDED": False, "ACT_BLOCKS": blocks, "FORM": form, "BLOCK": block},
                    num_warps=row_warps(block),
                    aligned=("x_ptr", "acc_ptr", "weight_scale_ptr", "gain_ptr", "codes_ptr", "I", "P"),
                )
            )
        block = triton.next_power_of_2(intermediate)
        for blocks in (False, True):
            launches.append(
                Launch(
                    _gated_kernel,
                    f"Qwen3 {model}, intermediate {intermediate}{', blocks' if blocks else ', input scales'}",
                    (scaled if blocks else product)
                    | {"subln_ptr": "*fp32", "input_scale_ptr": "*fp32", "codes_ptr": "*i8", "act_scale_ptr": "*fp32"}
                    | {**sizes, "subln_eps": "fp32"},
                    {"SPLITS": 1, "BIAS": False, "UP_PLANE": 0, "SILU": True, "SUBLN": True}
                    | {"DIVIDED": not blocks, "ACT_BLOCKS": blocks, "BLOCK": block},
                    num_warps=row_warps(block),
                    aligned=("acc_ptr", "weight_scale_ptr", "subln_ptr", "input_scale_ptr", "codes_ptr", "I", "P"),
                )
            )
    for bits, kind in ((8, "*i8"), (16, "*fp16"), (4, "*i8"), (2, "*i8")):
        launches.append(
            Launch(
                _embed_kernel,
                f"hidden 2560, {bits} bits",
                {"ids_ptr": "*i32", "table_ptr": kind, "scale_ptr": "*fp16" if bits == 4 else "*fp32"}
                | {"x_ptr": "*fp32", "I": "i32", "W": "i32", "embedding_scale": "fp32"},
                {"BITS": bits, "PAIRS": 40 if bits == 4 else 0, "BLOCK": 4096},
                num_warps=row_warps(4096),
                aligned=("ids_ptr", "table_ptr", "scale_ptr", "x_ptr", "I", "W"),
            )
        )
    launches.append(
        Launch(
            _logits_kernel,
            "V 151936",
            {"acc_ptr": "*i32", "act_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32", "logits_ptr": "*fp32"}
            | {"best_ptr": "*fp32", "word_ptr": "*i32", "N": "i32", "V": "i32"}
            | {"high_factor": "fp32", "low_factor": "fp32"},
            {"SPLITS": 1, "SCALED": True, "BLOCK": LOGITS_BLOCK},
            aligned=("acc_ptr", "weight_scale_ptr", "logits_ptr", "V"),
        )
    )
    launches.append(
        Launch(
            _next_token_kernel,
            "V 151936",
            {"best_ptr": "*fp32", "word_ptr": "*i32", "ids_ptr": "*i32", "positions_ptr": "*i32"}
            | {"blocks": "i32", "last_position": "i32"},
            {"BLOCK": 256},
            num_warps=1,
            aligned=("best_ptr", "word_ptr", "ids_ptr", "positions_ptr"),
        )
    )
    return launches
