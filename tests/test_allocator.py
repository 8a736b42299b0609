"""Freed memory stays with the process: the next block of its size costs no page faults."""

import os
import platform
import subprocess
import sys

import pytest

from bitdistill.distributed import allocator

COUNT = """
import resource
import numpy as np
from bitdistill.distributed.allocator import keep_freed_memory

print(keep_freed_memory())
for turn in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = np.ones(2**24)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del block
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
@pytest.mark.parametrize("own", [None, *allocator.VARIABLES])
def test_a_freed_block_is_found_again_unless_the_user_decided(own):
    environment = {name: value for name, value in os.environ.items() if name not in allocator.VARIABLES}
    if own:
        environment[own] = "131072"
    said = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True)
    kept, faults = said.stdout.split()
    assert kept == str(own is None)
    if own is None:
        assert int(faults) < 100  # of 32,768 pages
