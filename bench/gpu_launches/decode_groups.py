"""What kernels/gpu/decode_groups.py launches in production."""

from bitdistill.kernels.gpu.decode_groups import RUN, TILE_ROWS, _accumulate_groups_kernel, group_tile
from bitdistill.kernels.numerics import ACT_BLOCK
from gpu_launches.launch import Launch


def production_launches() -> list[Launch]:
    """Qwen3 0.6B and 4B, one row and 16 and a prompt; groups of every size, blocks, and both; with the assembly of NVIDIA parts
    and its plain twin for AMD's."""
    launches = []
    for rows, out_features, in_features, group, blocks in (
        (1, 1024, 3072, 64, False),  # 0.6B down
        (1, 1024, 3072, 128, True),
        (16, 6144, 1024, 128, False),  # 0.6B gate, up
        (1, 19456, 2560, 256, False),  # 4B gate, up
        (1, 19456, 2560, 0, True),
        (32, 2560, 9728, 256, True),
        (512, 19456, 2560, 64, False),
        (512, 19456, 2560, 256, True),
        (512, 19456, 2560, 256, False),
        (512, 19456, 2560, 0, True),
    ):
        block_n, block_o, warps, stages = group_tile(rows, out_features)
        pointers = {"act_ptr": "*i8", "act_scale_ptr": "*fp32", "weight_ptr": "*i8"}
        pointers |= {"weight_scale_ptr": "*fp16" if group else "*fp32", "y_ptr": "*fp32"}
        kind = f"{f'groups of {group}' if group else 'one scale'}{', blocks' if blocks else ''}"
        for targets in (("sm_80", "sm_90", "sm_100"), ("gfx942",)):
            launches.append(
                Launch(
                    _accumulate_groups_kernel,
                    f"N {rows}, O {out_features}, I {in_features}, {kind}",
                    pointers | dict.fromkeys(("N", "O", "P", "G", "y_stride"), "i32"),
                    {
                        "ASM": targets != ("gfx942",),
                        "ACT_BLOCKS": blocks,
                        "PIECES": group // ACT_BLOCK,
                        "RUNS": 1 if blocks else max(1, group // RUN),
                        "BLOCK_N": block_n,
                        "BLOCK_O": block_o,
                        "TILE": TILE_ROWS,
                        "PIECE": ACT_BLOCK,
                    },
                    num_warps=warps,
                    num_stages=stages,
                    int8_dot=True,
                    aligned=(*pointers, "O", "P", "y_stride"),
                    only=targets,
                )
            )
    return launches
