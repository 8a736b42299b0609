"""The ternary product on a CPU, plain: numpy and two small Numba kernels over the 2-bit bytes of packing.py.

    acc = act_codes @ weight_codes.T        exact integers, int32 (N, O)

One token (decoding): `_gemv` reads the packed bytes as they lie, also from a read-only memory map, and sums
``act * (code + 1)``; the sum of the activations comes off at the end. Several tokens (a prompt): blocks of rows are
unpacked to fp32 and multiplied by BLAS, which is exact because every partial sum is an integer below 2**24.

A first version: plain loops that LLVM vectorises, some 10 Gweights/s a core; no SIMD intrinsics.
Numba's cache does not see changes in other files, so the kernels call nothing outside this one.
Shape suffixes: N tokens, I in_features, O out_features.
"""

from concurrent.futures import Executor
from itertools import pairwise

import numpy as np
from numba import njit

from bitdistill.kernels.numerics import ACT_MAX, EPSILON, MAX_EXACT_IN_FEATURES


def pack_2bit(codes: np.ndarray) -> np.ndarray:
    """Row-addressable 2-bit bytes of this first version: byte j of a row holds columns j, j + B, j + 2B, j + 3B."""
    rows, columns = codes.shape
    width = -(-columns // 4)
    fields = np.ones((rows, 4, width), np.uint8)
    fields.reshape(rows, 4 * width)[:, :columns] = codes + np.int8(1)
    return fields[:, 0] | fields[:, 1] << 2 | fields[:, 2] << 4 | fields[:, 3] << 6


ROWS_PER_BLOCK = 256  # unpacked to fp32 at once for BLAS: 1 MB at 1024 columns, inside the second-level cache
MIN_WEIGHTS_PER_TASK = 2**19  # a thread pool's hand-over costs some 20 us; this many weights take 50


def quantize_activation(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-token absmax int8, ``kernels/reference.py:quantize_activation`` in numpy.

    Args:
        x: float32 (N, I).

    Returns: (act_codes int8 (N, I), act_scale float32 (N, 1)). Numerics: bit for bit the reference.
    """
    assert x.dtype == np.float32, x.dtype
    peak = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(EPSILON))
    codes = np.clip(np.rint(x * (np.float32(ACT_MAX) / peak)), -128, 127).astype(np.int8)
    return codes, peak / np.float32(ACT_MAX)


def ternary_accumulate(act_codes: np.ndarray, packed: np.ndarray, pool: Executor | None = None, tasks: int = 1):
    """``act_codes @ weight_codes.T`` from the 2-bit bytes.

    Args:
        act_codes: int8 (N, I).
        packed: uint8 (O, ceil(I / 4)) from `packing.pack_2bit`, C-contiguous, also read-only. Trusted to be valid.
        pool: threads that share the rows of a one-token product, `tasks` at a time; None works in the calling thread.

    Returns: int32 (N, O). Numerics: exact.
    """
    tokens, in_features = act_codes.shape
    rows, width = packed.shape
    assert width == -(-in_features // 4), f"packed: {width} bytes a row do not hold {in_features} columns"
    if tokens == 1:
        act = np.zeros(4 * width, np.int8)  # zero where the row is padded
        act[:in_features] = act_codes[0]
        out = np.empty((1, rows), np.int32)
        tasks = max(1, min(tasks, rows * in_features // MIN_WEIGHTS_PER_TASK))
        if pool is None or tasks == 1:
            _gemv(packed, act, out[0])
            return out
        bounds = [rows * task // tasks for task in range(tasks + 1)]
        parts = [pool.submit(_gemv, packed[start:stop], act, out[0, start:stop]) for start, stop in pairwise(bounds)]
        for part in parts:
            part.result()
        return out
    exact = np.float32 if in_features <= MAX_EXACT_IN_FEATURES else np.float64
    act = act_codes.astype(exact)
    out = np.empty((tokens, rows), np.int32)
    block = np.empty((min(rows, ROWS_PER_BLOCK), 4 * width), exact)
    for start in range(0, rows, ROWS_PER_BLOCK):
        stop = min(start + ROWS_PER_BLOCK, rows)
        _unpack(packed[start:stop], block)
        out[:, start:stop] = act @ block[: stop - start, :in_features].T
    return out


# The four quarters of a row are separate slices below: with one array and `act[width + j]` Numba's check for negative
# indices keeps LLVM from vectorising, at half the speed.


@njit(nogil=True, cache=True)
def _gemv(packed, act, out):
    """out[o] = sum over columns of act * code. Integers only; no fastmath."""
    width = packed.shape[1]
    act0, act1, act2, act3 = act[:width], act[width : 2 * width], act[2 * width : 3 * width], act[3 * width :]
    total = np.int32(0)
    for column in range(act.size):
        total += act[column]
    for o in range(packed.shape[0]):
        row = packed[o]
        acc = np.int32(0)
        for j in range(width):
            byte = row[j]
            acc += (
                np.int32(act0[j]) * np.int32(byte & 3)
                + np.int32(act1[j]) * np.int32((byte >> 2) & 3)
                + np.int32(act2[j]) * np.int32((byte >> 4) & 3)
                + np.int32(act3[j]) * np.int32(byte >> 6)
            )
        out[o] = acc - total


@njit(nogil=True, cache=True)
def _unpack(packed, block):
    """block[o] = the codes of row o as floats, with the padding columns."""
    width = packed.shape[1]
    for o in range(packed.shape[0]):
        row = packed[o]
        for quarter in range(4):
            codes = block[o, quarter * width : (quarter + 1) * width]
            for j in range(width):
                codes[j] = np.int32((row[j] >> (2 * quarter)) & 3) - np.int32(1)
