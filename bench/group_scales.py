"""What scales of rows and of groups of columns cost on a CPU: the compiled product with them, compared with one scale per
tensor.

    python bench/group_scales.py [--rounds N] [--only TEXT] [--json FILE]

Everything runs on one thread, and its processor time is counted. Weights are packed (base3 and 2bit); activations are
quantized beforehand, with their sums. A call is the product of one matrix with 1 token or with 64, scaled, with its result
written. The kinds take turns in every round. Printed are the median over the rounds of (seconds with one scale) / (seconds
of this kind), so 1.00 means as fast, and the median in microseconds. "cache" calls one matrix again and again; "memory"
goes through so many matrices that each comes from main memory.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from bitdistill.kernels import packing
from bitdistill.kernels.cpu.activations import quantize_activation, quantize_activation_blocks, record_bytes
from bitdistill.kernels.cpu.elementwise import scale_accumulators
from bitdistill.kernels.cpu.grouped import finish_grouped, finish_rows, grouped_gemm, write_group_sums
from bitdistill.kernels.cpu.matmul import SCRATCH_BYTES, gemm

KINDS = {
    "tensor": None,
    "row": 0,
    "group 256": 256,
    "group 128": 128,
    "group 64": 64,
    "blocks": 0,
    "blocks, group 64": 64,
}
BLOCKS = ("blocks", "blocks, group 64")  # of activations: these have a scale for each 32 columns of a token
SHAPES = ((1024, 1024), (3072, 1024), (1024, 3072))  # out_features, in_features: Qwen3 0.6B
MEMORY_BYTES = 128 * 2**20


class Product:
    """One matrix with `tokens` tokens, for every kind of scale.

    Args:
        rows, columns: out_features and in_features. packed: "2bit" or "base3". tokens: how many. copies: of the matrix.
    """

    def __init__(self, rows: int, columns: int, packed: str, tokens: int, copies: int):
        rng = np.random.default_rng(0)
        codes = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
        weight = packing.pack(codes, packed)
        self.rows, self.columns, self.tokens, self.packing = rows, columns, tokens, packing.PACKINGS.index(packed)
        self.weights = [weight.copy() for _ in range(copies)]
        self.scales = {}
        for kind, size in KINDS.items():
            if size is not None:
                one = np.full((rows, -(-columns // (size or columns))), 0.0625, np.float16)
                self.scales[kind] = [packing.pack_scales(one) for _ in range(copies)]
        x = rng.standard_normal((tokens, columns), np.float32)
        self.records = {}
        for kind, size in KINDS.items():
            records = self.records[kind] = np.zeros((tokens, record_bytes(columns)), np.uint8)
            for row, record in zip(x, records, strict=True):
                quantize = quantize_activation_blocks if kind in BLOCKS else quantize_activation
                quantize(row.ctypes.data, columns, record.ctypes.data)
                if size and kind not in BLOCKS:
                    write_group_sums(record.ctypes.data, columns, size)
        self.acc, self.out = np.empty((tokens, rows), np.int32), np.empty((tokens, rows), np.float32)
        self.scratch = np.empty(SCRATCH_BYTES, np.uint8)

    def run(self, kind: str, copy: int) -> None:
        """One product."""
        size, weight = KINDS[kind], self.weights[copy].ctypes.data
        records, stride, acc = self.records[kind].ctypes.data, self.records[kind].shape[1], self.acc.ctypes.data
        scales = 0 if size is None else self.scales[kind][copy].ctypes.data
        shared = (
            records,
            stride,
            self.tokens,
            acc,
            self.rows,
            0,
            packing.row_groups(self.rows),
            self.scratch.ctypes.data,
        )
        if kind == "blocks":
            grouped_gemm(weight, self.packing, self.columns, 0, 0, 1, *shared)
        elif size:
            grouped_gemm(weight, self.packing, self.columns, scales, size, int(kind in BLOCKS), *shared)
        else:
            gemm(weight, self.packing, self.columns, *shared)
        for n in range(self.tokens):
            source, target = acc + 4 * n * self.rows, self.out.ctypes.data + 4 * n * self.rows
            if kind == "blocks":
                finish_grouped(source, np.float32(0.01), 0, self.rows, target)
            elif size is None:
                scale_accumulators(source, np.float32(0.01), 0, self.rows, target)
            elif size == 0:
                finish_rows(source, np.float32(0.01), scales, 0, self.rows, target)
            else:
                finish_grouped(source, np.float32(0.01), 0, self.rows, target)


def measure(product: Product, copies: int, rounds: int) -> dict[str, dict[str, float]]:
    """{kind: {"microseconds", "speed"}}; speed is relative to one scale per tensor, the median over the rounds."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    calls = max(copies, 256 // product.tokens)  # a measurement takes a few milliseconds
    for kind in KINDS:
        product.run(kind, 0)
    for _ in range(rounds):
        for kind in KINDS:
            started = time.thread_time()
            for call in range(calls):
                product.run(kind, call % copies)
            seconds[kind].append((time.thread_time() - started) / calls)
    return {
        kind: {
            "microseconds": 1e6 * statistics.median(taken),
            "speed": statistics.median(one / own for one, own in zip(seconds["tensor"], taken, strict=True)),
        }
        for kind, taken in seconds.items()
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="products whose name has this in it: '1 token', 'cache', 'base3'")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    arguments = parser.parse_args()
    found = []
    print(f"{'product':<36}" + "".join(f"{kind:>18}" for kind in KINDS))
    for tokens, where in ((1, "cache"), (1, "memory"), (64, "cache")):
        for rows, columns in SHAPES:
            for packed in ("base3", "2bit"):
                size = packing.packed_bytes(rows, columns, packed)
                name = f"{rows} x {columns}, {tokens} token{'s' * (tokens > 1)}, {packed}, {where}"
                if arguments.only not in name:
                    continue
                copies = 1 if where == "cache" else -(-MEMORY_BYTES // size)
                result = measure(Product(rows, columns, packed, tokens, copies), copies, arguments.rounds)
                found.append({"product": name, **result})
                cells = (f"{one['speed']:.2f} {one['microseconds']:.0f} us" for one in result.values())
                print(f"{name:<36}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
