"""Memory that a training step has freed stays with the process, so that the next step finds it, in pages of two megabytes.

glibc's malloc hands every large block back to the system as soon as it is freed. A step of a small model on a CPU frees and
asks for gigabytes, each page of which the system then fills with zeros anew: an eighth of the step.

A step also reads and writes each of those gigabytes several times, and a processor knows the places of a few thousand pages
at once: of 4 KiB, those are a few megabytes. On pages of 2 MiB a step takes a tenth less time. Linux gives them at the first
touch to memory that asked for them before, so the heap is made large at once, asks, and is touched as it is needed.
"""

import ctypes
import os
import resource
from pathlib import Path

# mallopt's numbers: the largest free top of the heap that is kept, -1 for any; how many blocks may lie outside the heap; by how
# much more than is needed the heap grows.
TRIM_THRESHOLD, MMAP_MAX, TOP_PAD = -1, -4, -2
GROWTH_BYTES = 2**26
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")  # the user's own

MADV_HUGEPAGE, HUGE_PAGE = 14, 2**21
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
STRICT = "2"  # every reserved byte is taken from what other processes may have


def keep_freed_memory() -> bool:
    """Lets malloc keep freed blocks of any size for later ones, in this process.

    Returns: whether it does: not where the C library is another than glibc, or the user has set one of VARIABLES.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        kept = all([libc.mallopt(TRIM_THRESHOLD, -1), libc.mallopt(MMAP_MAX, 0), libc.mallopt(TOP_PAD, GROWTH_BYTES)])
    except (OSError, AttributeError):
        return False
    if kept:
        _ask_for_huge_pages(libc)
    return kept


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Lets the heap grow by half of the machine's memory, none of which is touched, and asks for huge pages there.

    Nothing is done where addresses are counted as if they were memory: under limits of the process, and where Linux is strict."""
    limited = any(
        resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    )
    try:
        if limited or OVERCOMMIT.read_text(encoding="utf-8").strip() == STRICT:
            return
    except OSError:  # another system than Linux
        return
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block:
        begin = -(-block // HUGE_PAGE) * HUGE_PAGE
        whole = (block + size - begin) // HUGE_PAGE * HUGE_PAGE
        libc.madvise(begin, whole, MADV_HUGEPAGE)  # where it cannot, it stays as it was
        libc.free(block)
