"""Memory that a training step has freed stays with the process, so that the next step finds it.

glibc's malloc hands every large block back to the system as soon as it is freed. A step of a small model on a CPU frees and
asks for gigabytes, each page of which the system then fills with zeros anew: an eighth of the step.
"""

import ctypes
import os

# mallopt's numbers: the largest free top of the heap that is kept, -1 for any; how many blocks may lie outside the heap; by how
# much more than is needed the heap grows.
TRIM_THRESHOLD, MMAP_MAX, TOP_PAD = -1, -4, -2
GROWTH_BYTES = 2**26
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")  # the user's own


def keep_freed_memory() -> bool:
    """Lets malloc keep freed blocks of any size for later ones, in this process.

    Returns: whether it does: not where the C library is another than glibc, or the user has set one of VARIABLES.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(TRIM_THRESHOLD, -1), mallopt(MMAP_MAX, 0), mallopt(TOP_PAD, GROWTH_BYTES)])
