"""Rows of a tensor in compiled code: sixteen values at a time with any remainder, shared among as many threads as torch
uses.

Training calls these kernels between torch's own operations, whose OpenMP threads are idle meanwhile. `share_rows` therefore
uses the calling thread and `torch.get_num_threads() - 1` Python threads, each in a nogil function on rows of its own. They
sleep as soon as the work is done: nobody spins, so the two sets of threads never compete for the cores for long.

The rows of a thread begin at a multiple of BLOCK, whatever the number of threads. Kernels that sum over rows keep one
partial sum per block, so a result does not depend on the number of threads.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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

BLOCK = 64  # rows
COMPILED = (torch.float32, torch.bfloat16)  # what kernels read
LEAST = 1 << 19  # elements a thread, below which waking it costs more than it saves


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


@functools.lru_cache(maxsize=1)
def _helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bitdistill-rows")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # a forked child has none of its parent's threads


def share_rows(kernel: Callable, rows: int, width: int, *arguments, block: int = BLOCK) -> None:
    """``kernel(first, last, *arguments)`` over rows 0 .. rows - 1, in as many threads as torch uses.

    Args:
        kernel: compiled with `jit`; writes nothing that another block's rows write.
        rows, width: of the work; too little is done in the calling thread.
        arguments: numbers.
        block: `first` is a multiple of it, and `last` too except at the end.
    """
    blocks = -(-rows // block)
    threads = max(1, min(torch.get_num_threads(), blocks, rows * width // LEAST))
    if threads == 1:
        if rows:
            kernel(0, rows, *arguments)
        return
    bounds = [min(rows, blocks * part // threads * block) for part in range(threads + 1)]
    helpers = _helpers(torch.get_num_threads() - 1)
    others = [helpers.submit(kernel, bounds[i], bounds[i + 1], *arguments) for i in range(1, threads)]
    kernel(bounds[0], bounds[1], *arguments)
    for other in others:
        other.result()
