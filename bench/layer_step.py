"""BitLinear forward and backward beside nn.Linear, in one process: what bench/cpu_training.py starts for each instruction set.

    python bench/layer_step.py '{"rounds": 7, "tokens": 1024}'
    python bench/layer_step.py '{"rounds": 15, "clock": "process_time", "parts": true}'

It runs the seven projections of a layer of SmolLM2-135M's shape in turn, with every gradient, on 1,024 tokens. It prints
JSON: the seconds of each round for nn.Linear in fp32 and, where there are instructions for it, in bf16, and for BitLinear
"exact" and "fast", timed alternately. With "parts" it prints the median seconds of the parts of "exact" and "fast" instead:
compiled kernels by their names, oneDNN's int8 products, float products of the exact gradients, the rest.
"""

import functools
import json
import os
import statistics
import sys
import time
from collections import defaultdict

import torch

from bitdistill.distributed import allocator
from bitdistill.kernels.cpu import bit_linear, training_gradients, training_products
from bitdistill.kernels.cpu.bf16 import WITHOUT_BF16
from bitdistill.kernels.cpu.choices import ISA
from bitdistill.student.layers import BitLinear, use_backward
from bitdistill.student.sharing import WeightCodes

SHAPES = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))  # (in, out)


def layers(kind: str, seed: int = 0) -> torch.nn.ModuleList:
    """The projections as nn.Linear or BitLinear, without biases."""
    torch.manual_seed(seed)
    made = [torch.nn.Linear(width, out, bias=False) for width, out in SHAPES]
    if kind == "linear bf16":
        made = [layer.bfloat16() for layer in made]
    if not kind.startswith("linear"):
        made = [BitLinear(layer) for layer in made]
    result = torch.nn.ModuleList(made)
    if not kind.startswith("linear"):
        use_backward(result, kind)
    return result


def work(kind: str, tokens: int):
    """One forward and backward pass through all of them, each on an input of its own."""
    model = layers(kind)
    dtype = model[0].weight.dtype
    inputs = [torch.randn(tokens, width, dtype=torch.float32).to(dtype).requires_grad_() for width, _ in SHAPES]
    gradients = [torch.randn(tokens, out, dtype=torch.float32).to(dtype) for _, out in SHAPES]
    codes = None if kind.startswith("linear") else WeightCodes(model)

    def run() -> None:
        for x, grad, layer in zip(inputs, gradients, model, strict=True):
            x.grad = layer.weight.grad = None
            layer(x).backward(grad)

    def step() -> None:
        if codes is None:
            return run()
        with codes.hold():  # the codes are made in it, as once in an optimizer step
            run()

    return step


def measure(rounds: int, tokens: int, clock) -> dict[str, list[float]]:
    """Seconds of each round, by `clock`."""
    kinds = ["linear fp32", "linear bf16", "exact", "fast"]
    if os.environ.get(ISA, "").upper() in WITHOUT_BF16:
        kinds.remove("linear bf16")  # without instructions for it: seconds
    works = {kind: work(kind, tokens) for kind in kinds}
    found: dict[str, list[float]] = {kind: [] for kind in works}
    for run in works.values():
        run()
    for turn in range(rounds):
        for kind in list(works) if turn % 2 else reversed(works):
            started = clock()
            works[kind]()
            found[kind].append(clock() - started)
    return found


def measure_parts(rounds: int, tokens: int, clock) -> dict[str, dict[str, float]]:
    """Median seconds of each part of a pass, by `clock`."""
    spent: dict[str, float] = defaultdict(float)

    def time_calls(module, name: str) -> None:
        function = getattr(module, name)

        @functools.wraps(function)
        def timed(*arguments, **options):
            started = clock()
            result = function(*arguments, **options)
            spent[arguments[0].__name__ if name == "share_rows" else name] += clock() - started
            return result

        setattr(module, name, timed)

    for module in (bit_linear, training_products, training_gradients):
        time_calls(module, "share_rows")
    for module, name in ((torch, "_int_mm"), (training_gradients, "_float_dx"), (training_gradients, "_float_dw")):
        time_calls(module, name)
    medians = {}
    for kind in ("exact", "fast"):
        run, found = work(kind, tokens), defaultdict(list)
        run()
        for _ in range(rounds):
            spent.clear()
            started = clock()
            run()
            everything = clock() - started
            for part, seconds in [*spent.items(), ("rest", everything - sum(spent.values())), ("all", everything)]:
                found[part].append(seconds)
        medians[kind] = {part: statistics.median(seconds) for part, seconds in found.items()}
    return medians


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    allocator.keep_freed_memory()  # as in training: else the pages of every result are made anew
    way = measure_parts if given.get("parts") else measure
    clock = getattr(time, given.get("clock", "perf_counter"))
    print(json.dumps(way(given["rounds"], given.get("tokens", 1024), clock)))
