"""The process group: one call before anything else, which works in the same way under `deepspeed`, `torchrun` and plain
`python`.

    deepspeed train.py                as many ranks as GPUs; without a GPU one (or one per NUMA node, if numactl exists)
    deepspeed --num_gpus 2 train.py   two ranks; on a machine without GPU two gloo processes
    python train.py                   one rank

One rank on a CPU has no other rank to share with. It may do without a process group and without DeepSpeed (`alone`), whose
bookkeeping takes longer than the arithmetic of a small model.

DeepSpeed's launcher passes `--local_rank=N` to the script; `without_local_rank(sys.argv[1:])` removes it again.

**No rank may hang because another one failed.** A rank that fails must end: let the exception leave the process, and never
catch it to continue. The launcher looks once per second. When a rank has ended with a non-zero exit code, it ends all
others and returns that code. So a check that only rank 0 can make is made, and raises its error, on rank 0.

**Nothing is compiled.** On a CPU, DeepSpeed builds a shared-memory extension with c++ and ninja while it initializes. This
takes 36 to 75 s, and a build that is killed leaves a lock on which the next run hangs. `initialize` marks the extension as
unavailable before that; gloo alone gives the same numbers.
"""

import logging
import os
import socket
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bitdistill.cpus import available_cpus
from bitdistill.distributed import allocator
from bitdistill.errors import UserError

# How long a rank waits for the others: rank 0 may tokenize a corpus in that time. A *failed* rank is noticed by the
# launcher within a second, this only bounds a silent hang.
PATIENCE = timedelta(hours=2)
# Below this hidden size a model trains with one thread. Measured by bench/small_models.py (docs/log.md, 2026-11-29).
SMALL_WIDTH = 256
_share: int | None = None  # threads of this rank; None where the user has decided


def ranks_started() -> int:
    """The number of ranks that a launcher started, 1 without one; known before `initialize`.

    Raises:
        UserError: WORLD_SIZE is no number.
    """
    return _number("WORLD_SIZE") if os.environ.get("RANK") and os.environ.get("WORLD_SIZE") else 1


def initialize(device: str, alone: bool = False) -> None:
    """Makes this process a rank of its group, sized to its share of the machine, and quiet unless it is rank 0.

    Call it once, before a Trainer, `TrainingArguments` or a teacher is made. Afterwards: the process group exists,
    torch uses available CPUs / local ranks threads (unless OMP_NUM_THREADS is set), stdout of all ranks but 0 is discarded
    (stderr, and with it every traceback, is kept), and the libraries' INFO lines are off.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl; the device number is LOCAL_RANK).
        alone: no process group and no DeepSpeed; for one rank on a CPU. Everything below then works as for any one rank.

    Raises:
        UserError: device "cuda" without a GPU for this rank; or a launcher's variables that do not fit together.
    """
    assert device in ("cpu", "cuda"), device
    assert not dist.is_initialized(), "initialize() is called once, before everything else"
    local_rank, local_ranks = _find_place()
    if device == "cpu":
        allocator.keep_freed_memory()
    if alone:
        assert (device, ranks_started()) == ("cpu", 1), "only one rank on a CPU can be alone"
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # accelerate would make a process group of them
            os.environ.pop(name, None)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed where it is installed
        _use_threads(local_ranks)
        _quieten(is_rank_0=True)
        return

    if device == "cuda":
        _use_gpu(local_rank, local_ranks)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed takes a GPU that happens to be there
    _use_threads(local_ranks)
    _quieten(is_rank_0=os.environ["RANK"] == "0")
    _join_group(device)


def _use_gpu(local_rank: int, local_ranks: int) -> None:
    if torch.cuda.device_count() <= local_rank:
        raise UserError(
            "device",
            expected=f"a GPU for each of {local_ranks} local ranks",
            got=str(torch.cuda.device_count()),
            do="Start fewer ranks (deepspeed --num_gpus N), or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU.",
        )
    torch.cuda.set_device(local_rank)
    if ranks_started() == 1 and (gpus := torch.cuda.device_count()) > 1:
        say(
            f"one process uses one of {gpus} GPUs: deepspeed --module bitdistill.train, with the same options, uses all"
        )


def _join_group(device: str) -> None:
    import deepspeed

    let_checkpoints_in()
    if device == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device == "cuda" else "gloo",
            auto_mpi_discovery=False,
            timeout=PATIENCE,
            verbose=False,
        )
    except dist.DistNetworkError as error:
        raise UserError(
            "MASTER_PORT",
            expected=f"a free port {os.environ['MASTER_PORT']} on {os.environ['MASTER_ADDR']}",
            got=f"one that another run may be using ({str(error).splitlines()[0]})",
            do="Give this run its own: deepspeed --master_port 29600 bitdistill/train.py ...",
        ) from error


def let_checkpoints_in() -> None:
    """DeepSpeed's checkpoints hold these objects of its own beside tensors: torch.load may make them, and no others."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])


def shutdown() -> None:
    """Leaves the process group, if there is one. At the end of an entry point, after a success only."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _find_place() -> tuple[int, int]:
    """(local rank, local ranks) of this process from the launcher's variables, completed in os.environ.

    Without RANK and WORLD_SIZE the process is alone. A cluster that starts one process per machine (Kubernetes) gives
    no LOCAL_RANK; SLURM and Open MPI have names of their own for it.
    """
    if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return 0, 1
    rank, ranks = _number("RANK"), _number("WORLD_SIZE")
    if not rank < ranks:
        do = "Unset RANK and WORLD_SIZE for a single process, or start the run with deepspeed or torchrun."
        raise UserError("RANK", expected=f"a number below WORLD_SIZE, which is {ranks}", got=str(rank), do=do)
    if ranks == 1:
        os.environ["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or "127.0.0.1"
        os.environ["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(free_port())
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            do = "Set it to the first machine's, or start the run with deepspeed or torchrun."
            raise UserError(name, expected=f"where {ranks} ranks meet", got="none", do=do)
    _number("MASTER_PORT")
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    local_rank = next((_number(name) for name in names if os.environ.get(name)), 0)
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed and transformers read it
    return local_rank, local_world_size()


def _number(name: str) -> int:
    """A launcher's variable. Raises UserError when it is no number."""
    text = os.environ[name]
    if not text.isdecimal():
        do = "Unset it for a single process, or start the run with deepspeed or torchrun."
        raise UserError(name, expected="a number, as a launcher sets it", got=repr(text), do=do)
    return int(text)


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def without_local_rank(arguments: list[str]) -> list[str]:
    """The command line without the `--local_rank=N` that DeepSpeed's launcher puts in front of it.

    Older launchers of torch write `--local-rank=N`, or the number as an argument of its own. The environment says the same.
    """
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif name in ("--local_rank", "--local-rank"):
            skip = not equals
        else:
            kept.append(argument)
    return kept


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """The number of ranks on this machine, as the launcher says; 1 without one."""
    # LOCAL_SIZE is DeepSpeed's name, LOCAL_WORLD_SIZE torchrun's.
    return max(1, next((_number(n) for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if os.environ.get(n)), 1))


def is_main() -> bool:
    """Whether this is rank 0: the one that prints and writes files."""
    return rank() == 0


def say(text: str) -> None:
    """Prints a line on rank 0, above any progress bar."""
    if is_main():
        from tqdm.auto import tqdm

        tqdm.write(text)


def barrier() -> None:
    """Waits until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(value: float | Tensor) -> float | Tensor:
    """The sum over all ranks of a number (summed in fp64) or of a tensor (same shape and dtype on each rank).

    Returns: a float or a new tensor; the same on every rank. The argument is not changed.
    """
    if isinstance(value, Tensor):
        total = value.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        return total
    return float(all_reduce_sum(torch.tensor(value, dtype=torch.float64, device=device())))


def gather(value: Any) -> list[Any]:
    """What each rank gives, in the order of the ranks; the same on every rank. For messages: small, and seldom."""
    if not dist.is_initialized():
        return [value]
    found = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def require_nvme(nvme_path: str | Path) -> None:
    """Checks that parameters or optimizer state can be offloaded to `nvme_path`.

    DeepSpeed's async_io extension is the one thing that is compiled, on first use (up to five minutes): it needs libaio
    with its header, a C++ compiler and ninja.

    Raises:
        UserError: the folder cannot be written to, or async_io cannot be built: what to install.
    """
    path = Path(nvme_path)
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise UserError("nvme_path", expected="a writable folder", got=str(path), do="Create it on a fast disk.")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "offload",
            expected="DeepSpeed's async_io for 'nvme'",
            got="a machine on which it cannot be built",
            do="Install libaio (Debian, Ubuntu: apt install libaio-dev; Fedora: dnf install libaio-devel), g++ and ninja, "
            "or use offload 'cpu'.",
        )


def device() -> str:
    """Where the tensors lie that ranks exchange: "cuda" with nccl, else "cpu"."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def _use_threads(local_ranks: int) -> None:
    """This rank's share of the cores, unless the user has decided."""
    global _share
    if not os.environ.get("OMP_NUM_THREADS"):
        _share = max(1, available_cpus() // local_ranks)
        os.environ["OMP_NUM_THREADS"] = str(_share)  # for child processes
        torch.set_num_threads(_share)


def fit_threads(width: int) -> int:
    """Gives a small model one thread, and any other this rank's share of the cores.

    The products of a small model are over before a second thread has begun. It gains little on a machine of its own, and
    where another process keeps a core busy, every step waits for the thread that has no core (`bench/busy.py`).

    Args:
        width: the hidden size of the widest model that takes part in a step.

    Returns: torch's threads from now on. Where OMP_NUM_THREADS was set before `initialize`, they stay as they are.
    """
    if _share is not None:
        torch.set_num_threads(1 if width < SMALL_WIDTH else _share)
    return torch.get_num_threads()


def _quieten(is_rank_0: bool) -> None:
    """Progress bars and tables are what the user came for: the libraries speak from WARNING on, ranks > 0 on stderr."""
    import datasets
    import transformers

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("torch.distributed").setLevel(logging.WARNING)
    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()  # one for each file that is read or written, in the middle of ours
    # DeepSpeed calls collectives that torch renamed: one warning per call, many per step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not is_rank_0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- for the life of the process
        transformers.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        warnings.simplefilter("ignore")
