"""Measures the packed products alone: GEMV from memory and from the cache, and GEMM, beside torch in fp32, bf16 and int8.

    python bench/cpu_kernels.py [--rows 3072] [--columns 1024] [--threads 1 2] [--rounds 7] [--json FILE]

GEMV "cold" multiplies different matrices of 256 MB in turn, so that every byte comes from memory; "hot" repeats one matrix.
Rates are weights per second (for a GEMM multiply-adds, of two operations each): medians with their spread over alternating
rounds, beside the read bandwidth measured in each round. Accumulators are checked against numpy before anything is timed.
"torch int8" is `torch._int_mm`, oneDNN's int8 product, which takes more than 16 tokens.
"""

from bitdistill.distributed import openmp

openmp.wait_briefly()  # before anything loads torch

import argparse
import sys
import threading
import time

import numpy as np
import torch
from torch.nn import functional as F

from bitdistill.kernels import packing as layout
from bitdistill.kernels.cpu import activations, matmul, unpacking
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.instructions import FEATURES
from measure import Bandwidth, cores, machine, summary, table, write_json

COLD_BYTES = 256 * 2**20
BITS = {"2bit": 2.0, "base3": 1.6}
CODE = {"2bit": unpacking.TWO_BIT, "base3": unpacking.BASE3}
GEMM_TOKENS = (8, 16, 64, 256)


@jit
def _walk(weights, size, count, packing, out_features, in_features, records, stride, tokens, acc, acc_stride, scratch):
    """`count` products in turn, each with its own weights."""
    groups = (out_features + 15) // 16
    for index in range(count):
        matmul.gemm(
            weights + index * size, packing, in_features, records, stride, tokens, acc, acc_stride, 0,
            groups, scratch,
        )  # fmt: skip


def aligned(shape: tuple[int, int], dtype: type) -> np.ndarray:
    """Zeros that begin at a multiple of 64 bytes, as the runtime's working memory does."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    buffer = np.zeros(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


class Product:
    """One thread's share of the work: its own weights, activations and accumulators."""

    def __init__(self, rows: int, columns: int, packing: str, tokens: int, copies: int, seed: int):
        generator = np.random.default_rng(seed)
        codes = generator.integers(-1, 2, (rows, columns)).astype(np.int8)
        packed = layout.pack(codes, packing)
        self.weights = np.tile(packed, copies)
        self.size, self.copies, self.packing = packed.nbytes, copies, packing
        self.rows, self.columns, self.tokens = rows, columns, tokens
        stride = activations.record_bytes(columns)
        self.records = aligned((tokens, stride), np.uint8)
        x = generator.standard_normal((tokens, columns)).astype(np.float32)
        for token in range(tokens):
            activations.quantize_activation(x[token].ctypes.data, columns, self.records[token].ctypes.data)
        self.acc = aligned((tokens, layout.row_groups(rows) * 16), np.int32)
        self.scratch = np.empty(matmul.SCRATCH_BYTES, np.uint8)
        self.run(1)
        act_codes = self.records[:, activations.CODES : activations.CODES + columns].view(np.int8)
        want = act_codes.astype(np.int64) @ codes.T.astype(np.int64)
        assert (self.acc[:, :rows] == want).all(), f"{packing}: accumulators differ from numpy"

    def run(self, products: int) -> None:
        """`products` products, from cold or hot weights."""
        while products > 0:
            count = min(products, self.copies)
            _walk(
                self.weights.ctypes.data, self.size, count, CODE[self.packing], self.rows, self.columns,
                self.records.ctypes.data, self.records.shape[1], self.tokens, self.acc.ctypes.data, self.acc.shape[1],
                self.scratch.ctypes.data,
            )  # fmt: skip
            products -= count


class TorchProduct:
    """The same for `F.linear`; its threads are torch's own, so that one object serves all threads."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, tokens: int, copies: int):
        self.weights = [(torch.randn(rows, columns) * 0.02).to(dtype) for _ in range(copies)]
        self.x = torch.randn(tokens, columns).to(dtype)

    def run(self, products: int) -> None:
        """`products` products."""
        with torch.inference_mode():
            for index in range(products):
                F.linear(self.x, self.weights[index % len(self.weights)])


class TorchIntegers:
    """The same for int8 codes, `torch._int_mm`."""

    def __init__(self, rows: int, columns: int, tokens: int):
        self.weight = torch.randint(-1, 2, (rows, columns), dtype=torch.int8).t()
        self.codes = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8)

    def run(self, products: int) -> None:
        """`products` products."""
        with torch.inference_mode():
            for _ in range(products):
                torch._int_mm(self.codes, self.weight)


def rate(workers: list, products: int, multiply_adds: float) -> float:
    """Multiply-adds a second over all workers, each in a thread of its own."""
    threads = [threading.Thread(target=worker.run, args=(products,)) for worker in workers]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(workers) * products * multiply_adds / (time.perf_counter() - started)


def main() -> int:
    """Checks, measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores()}))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rows, columns = arguments.rows, arguments.columns
    report = {"machine": machine(), "features": FEATURES, "shape": [rows, columns], "results": []}
    cells = [["what", "threads", "Gweights/s", "GB/s", "of stream"]]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        bandwidth = Bandwidth(threads)
        cases = []  # (label, bytes per weight or None, workers, products per timing, tokens)
        for packing in BITS:
            width = BITS[packing] / 8
            copies = max(1, int(COLD_BYTES / (rows * columns * width)))
            workers = [Product(rows, columns, packing, 1, copies, seed) for seed in range(threads)]
            cases.append((f"{packing} GEMV cold", width, workers, copies, 1))
            workers = [Product(rows, columns, packing, 1, 1, seed) for seed in range(threads)]
            cases.append((f"{packing} GEMV hot", width, workers, 400, 1))
        for tokens in GEMM_TOKENS:
            for packing in ("2bit", "base3"):
                workers = [Product(rows, columns, packing, tokens, 1, seed) for seed in range(threads)]
                cases.append((f"{packing} GEMM, {tokens} tokens", None, workers, max(1, 400 // tokens), tokens))
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            copies = max(1, COLD_BYTES // (rows * columns * dtype.itemsize))
            cases.append(
                (f"torch {name} GEMV cold", dtype.itemsize, [TorchProduct(rows, columns, dtype, 1, copies)], copies, 1)
            )
            for tokens in GEMM_TOKENS:
                worker = TorchProduct(rows, columns, dtype, tokens, 1)
                cases.append((f"torch {name} GEMM, {tokens} tokens", None, [worker], max(1, 100 // tokens), tokens))
        for tokens in GEMM_TOKENS:
            if tokens > 16:
                worker = TorchIntegers(rows, columns, tokens)
                cases.append((f"torch int8 GEMM, {tokens} tokens", None, [worker], max(1, 400 // tokens), tokens))
        rates, streams = {label: [] for label, *_ in cases}, []
        for turn in range(-1, arguments.rounds):
            streams.append(bandwidth.gigabytes_per_second())
            for label, _, workers, products, tokens in cases:
                measured = rate(workers, products, rows * columns * tokens)
                if turn >= 0:
                    rates[label].append(measured)
        stream = summary(streams[1:])
        for label, width, *_ in cases:
            one = {"what": label, "threads": threads, "rate": summary(rates[label]), "stream": stream}
            report["results"].append(one)
            middle = one["rate"]["median"]
            speed = f"{middle / 1e9:.1f} [{one['rate']['min'] / 1e9:.1f}, {one['rate']['max'] / 1e9:.1f}]"
            moved = middle * width / 1e9 if width else None
            share = f"{100 * moved / stream['median']:.0f} %" if width and "cold" in label else "-"
            cells.append([label, str(threads), speed, f"{moved:.1f}" if moved else "-", share])
        print(
            f"{threads} threads: read bandwidth {stream['median']:.1f} GB/s [{stream['min']:.1f}, {stream['max']:.1f}]"
        )
    print(f"{rows} x {columns}, {FEATURES}; weights per second, of a GEMM multiply-adds per second; median [min, max]")
    print(table(cells, "<>>>>"))
    if arguments.json:
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
