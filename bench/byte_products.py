"""The int8 products of training in vector registers (kernels/cpu/byte_tiles.py): how fast this processor can multiply, and does.

    OMP_NUM_THREADS=1 python bench/byte_products.py [--rounds 9] [--json FILE]
    BITDISTILL_CPU_FEATURES=avx512_vbmi ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 OMP_NUM_THREADS=1 python bench/byte_products.py

"one tile" multiplies one tile of sums again and again from the first-level cache, which is the limit of the others. The products
are those of a layer of SmolLM2-135M on 1,024 tokens, one plane of codes, int32 sums, beside torch's fp32 and int8 ones. GOPS
(two operations each multiply-add) of one thread's processor time: the best of the rounds, which take turns.
"""

from bitdistill.distributed import allocator, openmp

openmp.wait_briefly()  # before anything loads torch

import argparse
import sys
import time
from collections.abc import Callable

import torch

from bitdistill.kernels.cpu import byte_tiles, training_products
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.instructions import FEATURES
from bitdistill.kernels.cpu.tiles import TILES
from bitdistill.kernels.cpu.training_products import Ternary, multiply_tiles, tiles_of_columns
from measure import machine, table, write_json

SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576))  # (in, out)
TOKENS, DEPTH, REPEATS = 1024, 9, 20000


@jit
def _dense_again(count, left, right, depth, starts, out):
    for _ in range(count):
        byte_tiles.multiply_tile(
            left, 64 * depth, 64, byte_tiles.ROWS, right, 0, depth, starts, out, 256, byte_tiles.SUMS, 0, 0, 0
        )


@jit
def _ternary_again(count, left, right, depth, starts, out):
    for _ in range(count):
        byte_tiles.multiply_ternary_tile(
            left, 64 * depth, 64, byte_tiles.ROWS, right, 0, depth, starts, out, 256, byte_tiles.SUMS, 0, 0, 0
        )


def one_tile(kernel: Callable) -> tuple[Callable[[], object], float]:
    """A tile of sums, REPEATS times, and the operations."""
    left, right, out = (torch.zeros(1 << 16, dtype=torch.int8) for _ in range(3))
    starts = torch.zeros(16, dtype=torch.int32)

    def work() -> None:
        kernel(REPEATS, left.data_ptr(), right.data_ptr(), DEPTH, starts.data_ptr(), out.data_ptr())

    return work, 2.0 * REPEATS * 64 * DEPTH * byte_tiles.ROWS * byte_tiles.COLUMNS


def products(in_features: int, out_features: int) -> dict[str, Callable[[], object]]:
    """Forward by each way, and the product of the weight's gradient; checked before they are timed."""
    codes, gradient = (
        torch.randint(-127, 128, (TOKENS, width), dtype=torch.int8) for width in (in_features, out_features)
    )
    weight = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)
    ternary = Ternary(weight, torch.ones(1), (out_features,))
    x, w = codes.float(), weight.float()
    ways = {"fp32": lambda: x @ w.t()}
    for name in training_products.METHODS:
        ways[f"forward, {name}"] = lambda name=name: training_products.ternary_product("forward", codes, ternary, name)
        assert torch.equal(ways[f"forward, {name}"]().float(), x @ w.t()), name
    left, right = gradient.t().contiguous(), tiles_of_columns(codes, False)
    sums, shape = torch.empty(weight.shape, dtype=torch.int32), (out_features, TOKENS)
    ways["dW, tiles"] = lambda: multiply_tiles(left, shape, right, sums, False)
    assert torch.equal(ways["dW, tiles"]().long(), left.long() @ codes.long())
    if training_products.dense_products_are_exact():
        ways["dW, onednn"] = lambda: training_products.dense_product(gradient, codes)
    return ways


def best(works: dict[str, tuple[Callable[[], object], float]], rounds: int) -> dict[str, float]:
    """GOPS of each."""
    seconds = dict.fromkeys(works, float("inf"))
    for turn in range(rounds + 1):
        for name, (work, _) in works.items():
            started = time.thread_time()
            work()
            if turn:  # the first one compiles
                seconds[name] = min(seconds[name], time.thread_time() - started)
    return {name: works[name][1] / taken / 1e9 for name, taken in seconds.items()}


def main() -> int:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    allocator.keep_freed_memory()  # as in training
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tiles = {}
    if not TILES:
        tiles["one tile"] = one_tile(_dense_again)
        if byte_tiles.BY_PAIRS:
            tiles["one tile, ternary"] = one_tile(_ternary_again)
    found = best(tiles, arguments.rounds)
    cells = [["product", "GOPS"], *([name, f"{value:.0f}"] for name, value in found.items())]
    for in_features, out_features in SHAPES:
        operations = 2.0 * TOKENS * in_features * out_features
        works = {name: (work, operations) for name, work in products(in_features, out_features).items()}
        for name, value in best(works, arguments.rounds).items():
            found[f"{in_features} x {out_features}, {name}"] = value
            cells.append([f"{in_features} x {out_features}, {name}", f"{value:.0f}"])
    print(f"{FEATURES}, {TOKENS} tokens, one thread")
    print(table(cells, "<>"))
    if arguments.json:
        write_json(arguments.json, {"machine": machine(), "features": FEATURES, "gops": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
