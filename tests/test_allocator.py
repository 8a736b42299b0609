"""Freed memory stays with the process: the next block of its size costs no page faults."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

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


HUGE = """
import re
import sys
from pathlib import Path
from pathlib import Path

import numpy as np
from bitdistill.distributed import allocator

allocator.OVERCOMMIT = Path(sys.argv[1])
kept = allocator.keep_freed_memory()
block = np.ones(2**24)
pages = re.search(r"AnonHugePages: *([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())
size = re.search(r"VmData:\\s*([0-9]+) kB", Path("/proc/self/status").read_text())
print(kept, int(pages[1]) // 1024, int(size[1]) // 1024)
"""
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HALF = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**21  # MiB


def run_with(overcommit, limit=None):
    """Whether memory is kept, MiB of the process in huge pages, and MiB that it has reserved."""
    environment = {name: value for name, value in os.environ.items() if name not in allocator.VARIABLES}
    limits = (lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))) if limit else None
    said = subprocess.run(
        [sys.executable, "-c", HUGE, overcommit],
        env=environment,
        preexec_fn=limits,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, pages, reserved = said.stdout.split()
    return kept, int(pages), int(reserved)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_large_blocks_lie_in_huge_pages(tmp_path):
    if not ENABLED.is_file() or "[never]" in ENABLED.read_text():
        pytest.skip("this machine gives no huge pages")
    (tmp_path / "heuristic").write_text("0\n")
    kept, pages, reserved = run_with(str(tmp_path / "heuristic"))
    assert kept == "True"
    assert reserved >= HALF
    if pages == 0:
        pytest.skip("no unbroken 2 MiB are free on this machine")
    assert pages <= 128 + 64  # of a block of 128 MiB: what was not touched has none


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_nothing_is_reserved_where_addresses_are_counted(tmp_path):
    (tmp_path / "strict").write_text("2\n")
    (tmp_path / "heuristic").write_text("0\n")
    kept, _, reserved = run_with(str(tmp_path / "strict"))
    assert kept == "True"
    assert reserved < HALF
    kept, _, reserved = run_with(str(tmp_path / "heuristic"), limit=2**40)
    assert kept == "True"
    assert reserved < HALF
