"""How threads of OpenMP wait for each other: set before torch is loaded, by every entry.

At the end of each parallel loop torch's threads wait for the slowest one by spinning, for a fifth of a second and more. On a
machine that does anything else as well, the thread they wait for is not running, and those that spin are why: one other busy
process made a training step 25 times slower. After a short spin a waiting thread sleeps now and leaves its core to the others.
"""

import os

BRIEFLY = {
    "GOMP_SPINCOUNT": "10000",  # GNU's, which torch's wheels bring along: turns of the loop, some 10 to 100 microseconds
    "KMP_BLOCKTIME": "1",  # LLVM's and Intel's, also in torch built with MKL: milliseconds; theirs is 200
}
ACTIVE = "OMP_WAIT_POLICY"  # the standard's own; a user who sets it has decided


def wait_briefly() -> None:
    """Lets waiting OpenMP threads spin for a short time only, in this process and those that it starts.

    The libraries read these variables when they are loaded, so call it before anything imports torch. Whatever the user has
    set (GOMP_SPINCOUNT, KMP_BLOCKTIME, or OMP_WAIT_POLICY for both) stays as it is.
    """
    if ACTIVE not in os.environ:
        for name, value in BRIEFLY.items():
            os.environ.setdefault(name, value)
