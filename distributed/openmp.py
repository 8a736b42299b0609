"""How threads of OpenMP wait for each other. Every entry sets this before torch is loaded.

At the end of each parallel loop, torch's threads wait for the slowest one by spinning, for a fifth of a second and longer.
When the machine is busy, the thread that they wait for may have no core to run on, precisely because the others spin: one
other busy process made a training step 25 times slower. With these settings a waiting thread sleeps after a short spin and
leaves its core to the others.
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
