"""Processes that begin with the libraries loaded.

A fresh Python spends several seconds on importing torch, transformers and DeepSpeed, longer than most tests need for what
they test. The processes of this module are forked from a server (multiprocessing's own) that has imported them and does
nothing else. What a user starts himself, a launcher or a command, is tested with processes that are started as he does.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from bitdistill.distributed.process_group import free_port

LIBRARIES = ["deepspeed", "datasets", "bitdistill.train", "transformers.trainer", "scipy.stats", "matplotlib.pyplot"]
LIBRARIES += [
    "transformers.models.qwen3.modeling_qwen3",
    "bitdistill.kernels.cpu.bit_linear",
    "torch.utils.tensorboard",
]
FIXED = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # read when the libraries are imported

# With a GPU every process imports the libraries itself: they choose their device then, and CUDA does not survive a fork.
_forks = not torch.cuda.is_available()
_context = multiprocessing.get_context("forkserver" if _forks else "spawn")
if _forks:
    _context.set_forkserver_preload(LIBRARIES)


@dataclass
class Finished:
    """What a group of ranks left: the exit status, 0 or that of the first rank that failed, and all that they wrote."""

    code: int
    stdout: str
    stderr: str


def _start(
    arguments: Sequence[str], folder: Path, environment: dict[str, str], stdout: Path, stderr: Path
) -> BaseProcess:
    """Starts `python ARGUMENTS...` in `folder`, with a process group of its own; what it writes is appended to two files."""
    environment, before = environment | (FIXED if _forks else {}), dict(os.environ)
    given = ([str(part) for part in arguments], str(folder), environment, str(stdout), str(stderr))
    process = _context.Process(target=_become, args=given)
    os.environ |= environment  # inherited by the server, which the first call starts, or by the process
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ |= before
    return process


def run(
    arguments: Sequence[str],
    folder: Path,
    ranks: int | None = None,
    environment: dict[str, str] | None = None,
    limit_seconds: float = 400,
) -> Finished:
    """Runs a script on `ranks` ranks with the variables that DeepSpeed's launcher sets; None: as one process without them.

    Args:
        arguments: the script and its arguments. folder: the current folder of the ranks.
        environment: all variables; by default those of this process.
        limit_seconds: then all are killed and the test fails.
    """
    environment = dict(os.environ) if environment is None else environment
    group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes, deadline = [], time.monotonic() + limit_seconds
    with tempfile.TemporaryDirectory() as output:
        written = (Path(output, "stdout"), Path(output, "stderr"))
        try:
            for rank in range(ranks or 1):
                own = {} if ranks is None else group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                script, *rest = arguments
                options = [] if ranks is None else [f"--local_rank={rank}"]
                processes.append(_start([script, *options, *rest], folder, environment | own, *written))
            code = _first_failure(processes, deadline)
        finally:
            for process in processes:
                _end(process)
        return Finished(code, *(path.read_text(encoding="utf-8", errors="replace") for path in written))


def _end(process: BaseProcess) -> None:
    """Ends a process and all that it started."""
    with suppress(ProcessLookupError):  # gone, or so young that it has no group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _first_failure(processes: list[BaseProcess], deadline: float) -> int:
    """Waits until all have ended or one has failed; a rank that waits for a failed one would wait for long."""
    while True:
        codes = [process.exitcode for process in processes]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        if time.monotonic() > deadline:
            raise TimeoutError(f"{sum(code is None for code in codes)} of {len(codes)} ranks still run")
        time.sleep(0.02)


def _become(arguments: list[str], folder: str, environment: dict[str, str], stdout: str, stderr: str) -> None:
    """In the forked process: what a new one would be."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
