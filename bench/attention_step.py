"""Attention in training on a CPU, forward and backward: the project's kernel beside PyTorch's, in one process.

    OMP_NUM_THREADS=1 python bench/attention_step.py [--rounds 9] [--clock thread_time] [--json FILE]

Both do the same random queries, keys and values in turn, causal, with grouped key/value heads. `--clock thread_time` counts
the processor's seconds of one thread, for a machine that others use as well.
"""

from bitdistill.distributed import allocator, openmp

openmp.wait_briefly()  # before anything loads torch

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from bitdistill.kernels.cpu.training_attention import attention
from measure import machine, table, write_json

# B, H, G, T, D: a step of stage 2 and one of fine-tuning with SmolLM2-135M, a longer block of it, and wider heads.
SHAPES = ((8, 9, 3, 128, 64), (32, 9, 3, 22, 64), (1, 9, 3, 1024, 64), (2, 16, 8, 256, 128))


def by_torch(q, k, v):
    """Causal attention as transformers calls it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def ours(q, k, v):
    """The same by the kernel."""
    return attention(q, k, v, None, q.shape[3] ** -0.5)


def seconds(function, inputs, dout, clock) -> tuple[float, float]:
    """Of the forward and of the backward pass."""
    begin = clock()
    out = function(*inputs)
    between = clock()
    torch.autograd.grad(out, inputs, dout)
    return between - begin, clock() - between


def measured(shape: tuple[int, ...], dtype: torch.dtype, rounds: int, clock) -> dict[str, list]:
    """name -> (forward, backward) of each round, after one that is not counted."""
    B, H, G, T, D = shape
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(B, T, heads, D).to(dtype).transpose(1, 2) for heads in (H, G, G, H))
    inputs, found = [x.requires_grad_() for x in (q, k, v)], {}
    for turn in range(rounds + 1):
        for function in (ours, by_torch):
            times = seconds(function, inputs, dout, clock)
            if turn:
                found.setdefault(function.__name__, []).append(times)
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=("perf_counter", "thread_time"), default="perf_counter")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    allocator.keep_freed_memory()  # as in training
    rows, kept = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            found = measured(shape, dtype, given.rounds, getattr(time, given.clock))
            kept.append({"dtype": str(dtype), "shape": shape, "seconds": found})
            cells, medians = [], {}
            for name, times in found.items():
                for part, values in zip(("forward", "backward"), zip(*times, strict=True), strict=True):
                    medians[name, part] = statistics.median(values)
                    low, high = 1e3 * min(values), 1e3 * max(values)
                    cells.append(f"{1e3 * medians[name, part]:.1f} [{low:.1f}, {high:.1f}]")
            both = [sum(medians[name, part] for part in ("forward", "backward")) for name in ("by_torch", "ours")]
            rows.append(
                [str(dtype).removeprefix("torch."), "x".join(map(str, shape)), *cells, f"{both[0] / both[1]:.2f}"]
            )
    names = [f"{who}, {part}" for who in ("ours", "torch") for part in ("forward", "backward")]
    print(f"{torch.get_num_threads()} threads; ms, median [min, max]")
    print(table([["dtype", "B x H x G x T x D", *names, "times as fast"], *rows], "<<" + ">" * 5))
    if given.json:
        write_json(
            given.json, {"machine": machine(), "threads": torch.get_num_threads(), "clock": given.clock, "rows": kept}
        )


if __name__ == "__main__":
    main()
