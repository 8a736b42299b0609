"""What kernels/gpu/decode.py launches in production."""

import triton

from bitdistill.kernels.gpu.decode import (
    DECODE_ROWS,
    INT4_GROUP,
    INT4_ROWS,
    _accumulate_int4_kernel,
    _accumulate_kernel,
    _tile,
    splits_of,
)
from gpu_launches.launch import Launch


def production_launches() -> list[Launch]:
    """Qwen3 0.6B and 4B, one row and 16 and a prompt, with the assembly of NVIDIA parts and the plain twin of AMD's."""
    nvidia, amd = ("sm_80", "sm_90", "sm_100"), ("gfx942",)
    launches = []
    products = (
        # N, O, I, bits
        (1, 4096, 1024, 2),  # 0.6B q, k, v
        (1, 1024, 3072, 2),  # 0.6B down
        (1, 19456, 2560, 2),  # 4B gate, up
        (16, 2560, 9728, 2),  # 4B down
        (512, 19456, 2560, 2),
        (2, 151936, 1024, 8),
        (2, 151936, 2560, 8),
        (32, 151936, 1024, 8),
        (2, 151936, 1024, 16),
    )
    for rows, out_features, in_features, bits in products:
        width = in_features // 4 if bits == 2 else in_features
        tile = _tile(rows, out_features, width, bits)
        splits = splits_of(rows, out_features, width, bits)
        steps = triton.cdiv(width, tile.block_w)
        kinds = ("*fp16", "*fp16", "*fp32") if bits == 16 else ("*i8", "*i8", "*i32")
        for targets in (nvidia, amd):
            launches.append(
                Launch(
                    _accumulate_kernel,
                    f"N {rows}, O {out_features}, I {in_features}, {bits} bits",
                    dict(zip(("act_ptr", "weight_ptr", "acc_ptr"), kinds, strict=True))
                    | dict.fromkeys(("N", "O", "W", "act_stride", "acc_stride"), "i32"),
                    {
                        "BITS": bits,
                        "ASM": targets is nvidia,
                        "STEPS": triton.cdiv(steps, splits),
                        "BLOCK_N": tile.block_n,
                        "BLOCK_O": tile.block_o,
                        "BLOCK_W": tile.block_w,
                    },
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    int8_dot=bits != 16,
                    aligned=("act_ptr", "weight_ptr", "acc_ptr", "O", "W", "act_stride", "acc_stride"),
                    only=targets,
                )
            )
    for in_features in (1024, 2560):
        for targets in (nvidia, amd):
            launches.append(
                Launch(
                    _accumulate_int4_kernel,
                    f"N 2, O 151936, I {in_features}, 4 bits",
                    {"act_ptr": "*i8", "weight_ptr": "*i8", "group_scale_ptr": "*fp16", "acc_ptr": "*fp32"}
                    | dict.fromkeys(("N", "O", "act_stride"), "i32"),
                    {
                        "ASM": targets is nvidia,
                        "PAIRS": in_features // (2 * INT4_GROUP),
                        "BLOCK_N": DECODE_ROWS,
                        "BLOCK_O": INT4_ROWS,
                        "GROUP": INT4_GROUP,
                    },
                    num_warps=4,
                    num_stages=4,
                    int8_dot=True,
                    aligned=("act_ptr", "weight_ptr", "group_scale_ptr", "acc_ptr", "O", "act_stride"),
                    only=targets,
                )
            )
    return launches
