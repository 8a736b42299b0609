"""What scales of rows, of groups of columns and of blocks of activations cost in training on a CPU: one BitLinear, forward and
backward, on the kernels and in plain PyTorch, each compared with one scale per tensor and per token on the kernels.

    python bench/group_training.py [--rounds N] [--tokens N] [--json FILE]

The shapes are those of SmolLM2-135M. Weights are quantized beforehand, as for all micro-steps but the first of an optimizer step.
The kinds take turns in every round; printed are the medians in milliseconds, and the speed relative to the first kind.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from bitdistill.kernels import reference
from bitdistill.kernels.cpu import bit_linear

KINDS = {
    "tensor, token": (None, "token"),
    "row, token": (10_000, "token"),
    "group 64, token": (64, "token"),
    "group 128, token": (128, "token"),
    "tensor, block": (None, "block"),
    "group 64, block": (64, "block"),
}
SHAPES = ((576, 576), (1536, 576), (576, 1536))  # out_features, in_features


def on_kernels(x, weight, dy, columns, act_scale, ternary):
    """One step."""
    activation = bit_linear.quantize_input(x, act_scale)
    y = bit_linear.ternary_linear(x, activation, [weight], [], ternary, x.dtype, "exact")
    return torch.autograd.grad(y, [x, weight], dy)


def in_pytorch(x, weight, dy, columns, act_scale, parts):
    """One step of the reference."""
    return torch.autograd.grad(reference.bit_linear(x, weight, None, parts, columns, act_scale), [x, weight], dy)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    print("| product | " + " | ".join(KINDS) + " |\n|---" + "|---" * len(KINDS) + "|")
    for dtype in (torch.float32, torch.bfloat16):
        for O, I in SHAPES:
            torch.manual_seed(0)
            x = torch.randn(arguments.tokens, I).to(dtype).requires_grad_()
            weight, dy = torch.randn(O, I, requires_grad=True), torch.randn(arguments.tokens, O).to(dtype)
            works = {}
            for name, (columns, act_scale) in KINDS.items():
                own = bit_linear.ternarize([weight], columns)
                parts = own.weight_codes, own.weight_scale if columns else own.weight_scale[0]
                works["kernels", name] = (on_kernels, columns, act_scale, own)
                works["PyTorch", name] = (in_pytorch, min(columns, I) if columns else None, act_scale, parts)
            seconds = {key: [] for key in works}
            for turn in range(arguments.rounds + 1):  # the first one compiles and chooses
                for key, (step, *rest) in works.items():
                    started = time.perf_counter()
                    step(x, weight, dy, *rest)
                    seconds[key] += [time.perf_counter() - started] * (turn > 0)
            medians = {key: 1e3 * statistics.median(taken) for key, taken in seconds.items()}
            own = medians["kernels", "tensor, token"]
            for where in ("kernels", "PyTorch"):
                row = [medians[where, name] for name in KINDS]
                cells = " | ".join(f"{ms:.1f} ({own / ms:.2f})" for ms in row)
                print(f"| {O} x {I}, {str(dtype)[6:]}, {where} | {cells} |", flush=True)
                found.append(
                    {"shape": [O, I], "dtype": str(dtype), "where": where, "ms": dict(zip(KINDS, row, strict=True))}
                )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
