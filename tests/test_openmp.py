"""Waiting OpenMP threads sleep soon: set before torch is loaded, and never over the user's own value."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitdistill.distributed import openmp

ROOT = Path(__file__).resolve().parents[1]
# Prints what the variables were when torch was first looked for.
WATCH = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ENTRIES = {
    "bitdistill/train.py": [],
    "bitdistill/cli.py": ["env"],
    "bench/cpu_kernels.py": [],
    "tests/conftest.py": [],
    "bench/suite/__init__.py": [],
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_sets_it_before_torch(entry):
    unset = {name: value for name, value in os.environ.items() if name not in (*openmp.BRIEFLY, openmp.ACTIVE)}
    command = [sys.executable, "-c", WATCH, str(ROOT / entry), *ENTRIES[entry]]
    seen = subprocess.run(command, env=unset, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    assert seen == [openmp.BRIEFLY["GOMP_SPINCOUNT"], openmp.BRIEFLY["KMP_BLOCKTIME"]]


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"])
def test_the_users_own_value_stays(monkeypatch, name):
    for variable in (*openmp.BRIEFLY, openmp.ACTIVE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "7")
    before = dict(os.environ)
    openmp.wait_briefly()
    assert os.environ[name] == "7"
    if name == "OMP_WAIT_POLICY":
        assert dict(os.environ) == before
    for variable in openmp.BRIEFLY:  # what wait_briefly() itself set is undone at the end of the test
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
