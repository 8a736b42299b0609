"""Rows of a tensor in compiled code: sixteen values at a time with any remainder, shared among as many threads as torch
uses.

`share_rows` gives them to the threads of team.py, which sleep soon after the work is done: they and torch's OpenMP threads do not
compete for the cores for long.

A part of the rows begins at a multiple of BLOCK, whatever the number of threads. Kernels that sum over rows keep one partial
sum per block, so a result does not depend on the number of threads.
"""

import operator
from collections.abc import Callable

import numba
import torch
from torch import Tensor

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import (
    LANES,
    load,
    load_bf16,
    load_first,
    load_first_bf16,
    store,
    store_bf16,
    store_first,
    store_first_bf16,
)
from bitdistill.kernels.cpu.team import team

BLOCK = 64  # rows
COMPILED = (torch.float32, torch.bfloat16)  # what kernels read
LEAST = 1 << 16  # elements; fewer are done in the calling thread


@jit
def get(address, count, half):
    """The first `count` of 16 floats at an address, zeros in the other lanes; as bf16 where `half`."""
    if half:
        return load_bf16(address) if count >= LANES else load_first_bf16(address, count)
    return load(address) if count >= LANES else load_first(address, count)


@jit
def put(address, value, count, half):
    """Writes the first `count` of 16 floats; as bf16 where `half`."""
    if half:
        if count >= LANES:
            store_bf16(address, value)
        else:
            store_first_bf16(address, value, count)
    elif count >= LANES:
        store(address, value)
    else:
        store_first(address, value, count)


def rows_of(x: Tensor) -> tuple[Tensor, int, int, bool]:
    """x as (N, I) with neighboring columns in a dtype that the kernels read; its address, row stride in bytes, is it bf16."""
    x = x.detach()
    if x.dtype not in COMPILED:
        x = x.float()
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    return rows, rows.data_ptr(), rows.stride(0) * rows.element_size(), rows.dtype == torch.bfloat16


def share_rows(kernel: Callable, rows: int, width: int, *arguments, block: int = BLOCK) -> None:
    """``kernel(first, last, *arguments)`` over rows 0 .. rows - 1, in as many threads as torch uses.

    Args:
        kernel: compiled with `jit`; writes nothing that another block's rows write.
        rows, width: of the work; too little is done in the calling thread.
        arguments: numbers.
        block: `first` is a multiple of it, and `last` too except at the end.
    """
    arguments = tuple(map(operator.pos, arguments))  # +True is 1
    threads = torch.get_num_threads()
    if threads > 1 and rows > block and rows * width >= LEAST and not numba.config.DISABLE_JIT:
        team(threads).share(kernel, rows, block, arguments)
    elif rows:
        kernel(0, rows, *arguments)
