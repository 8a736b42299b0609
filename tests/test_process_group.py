"""The process group: under the launcher, without it, and when one rank fails."""

import os
import socket
import subprocess
import sys

import pytest
import torch

import ranks
from bitdistill.distributed import process_group
from bitdistill.errors import UserError

HELLO = """
import json, os, sys
from pathlib import Path
from bitdistill.distributed import process_group

process_group.initialize("cpu")
import torch
print(f"printed by {process_group.rank()}")
numbers = torch.tensor([process_group.rank(), 10], dtype=torch.int64)
total = process_group.all_reduce_sum(numbers)
found = {
    "world_size": process_group.world_size(),
    "is_main": process_group.is_main(),
    "sum": process_group.all_reduce_sum(process_group.rank() + 1e-9),
    "tensor": total.tolist(),
    "unchanged": numbers.tolist(),
    "mains": process_group.all_reduce_sum(float(process_group.is_main())),
    "threads": torch.get_num_threads(),
    "arguments": process_group.without_local_rank(sys.argv[1:-1]),
    "backend": torch.distributed.get_backend(),
}
process_group.barrier()
if process_group.is_main():
    Path(sys.argv[-1]).write_text(json.dumps(found))
if "fail" in sys.argv:
    process_group.barrier()
    if process_group.rank() == 1:
        raise RuntimeError("rank 1 had an accident")
    process_group.barrier()  # rank 0 waits here for a rank that will never come
process_group.shutdown()
"""


@pytest.mark.slow
def test_one_failing_rank_ends_the_others_and_its_error_is_seen(tmp_path):
    """Two ranks: all that works is found, then rank 1 fails while rank 0 waits for it."""
    outcome = ranks.run(tmp_path, HELLO, "fail", check=False, launcher=ranks.DEEPSPEED)
    assert outcome.code == 1
    assert "RuntimeError: rank 1 had an accident" in outcome.stderr
    assert "printed by 0" in outcome.stdout
    assert "printed by 1" not in outcome.stdout
    found = outcome.found
    assert found["world_size"] == 2
    assert found["sum"] == pytest.approx(1 + 2e-9, abs=1e-15)  # fp64
    assert found["tensor"] == [1, 20]
    assert found["unchanged"] == [0, 10]
    assert found["mains"] == 1
    assert found["arguments"] == ["fail"]
    assert found["backend"] == "gloo"


@pytest.mark.slow
def test_plain_python_is_one_rank(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    outcome = ranks.run(tmp_path, HELLO, "--stage", "all", ranks=None, threads=None, fresh=True)
    assert outcome.found["world_size"] == 1
    assert outcome.found["sum"] == 1e-9
    assert outcome.found["arguments"] == ["--stage", "all"]
    assert outcome.found["threads"] == len(os.sched_getaffinity(0))
    assert "printed by 0" in outcome.stdout
    assert "WARNING" not in outcome.stdout + outcome.stderr


@pytest.mark.slow
def test_alone_there_is_no_group_and_everything_else_is_the_same(tmp_path):
    """One rank on a CPU, also when a launcher started it: the same facts as with a group, and transformers sees no group."""
    alone = """
import os
from bitdistill.distributed import process_group
started = process_group.ranks_started()
process_group.initialize("cpu", alone=True)
import json, sys
from pathlib import Path
import torch
from accelerate import PartialState
found = {"started": started, "group": torch.distributed.is_initialized(), "sum": process_group.all_reduce_sum(2.0)}
found |= {"world_size": process_group.world_size(), "is_main": process_group.is_main()}
found |= {"processes": PartialState(cpu=True).num_processes}
found["type"] = str(PartialState().distributed_type)
process_group.barrier()
Path(sys.argv[-1]).write_text(json.dumps(found))
process_group.shutdown()
"""
    found = ranks.run(tmp_path, alone, ranks=1, launcher=ranks.DEEPSPEED).found
    assert found == {
        "started": 1, "group": False, "sum": 2.0, "world_size": 1, "is_main": True, "processes": 1, "type": "DistributedType.NO"
    }  # fmt: skip


def test_a_small_model_gets_one_thread_and_others_the_share_of_their_rank(monkeypatch):
    given = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    monkeypatch.setattr(process_group, "_share", 6)
    for width in (64, process_group.SMALL_WIDTH - 1, process_group.SMALL_WIDTH, 4096, 64):
        process_group.fit_threads(width)
    assert given == [1, 1, 6, 6, 1]

    monkeypatch.setattr(process_group, "_share", None)  # OMP_NUM_THREADS was given
    assert process_group.fit_threads(64) == torch.get_num_threads()
    assert len(given) == 5


def test_without_a_group_every_function_is_the_identity():
    assert process_group.rank() == 0
    assert process_group.is_main()
    assert process_group.world_size() == 1
    assert process_group.all_reduce_sum(2.5) == 2.5
    process_group.barrier()
    process_group.shutdown()


def test_cuda_without_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, str(int(name == "WORLD_SIZE")))  # restored afterwards
    with pytest.raises(UserError, match=r"^device: expected a GPU for each of .+; got 0\. .+ CPU\.$"):
        process_group.initialize("cuda")


@pytest.mark.parametrize(("ranks", "gpus", "said"), [(1, 2, True), (1, 1, False), (2, 2, False)])
def test_one_process_beside_other_gpus_says_how_to_use_them(monkeypatch, capsys, ranks, gpus, said):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    process_group._use_gpu(0, ranks)
    assert ("deepspeed --module bitdistill.train" in capsys.readouterr().out) == said


def test_nvme_folder_must_exist(tmp_path):
    with pytest.raises(UserError, match=r"^nvme_path: expected a writable folder"):
        process_group.require_nvme(tmp_path / "absent")


@pytest.mark.slow
def test_nvme_says_what_to_install(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    if AsyncIOBuilder().is_compatible(verbose=False):
        process_group.require_nvme(tmp_path)
    else:
        with pytest.raises(UserError, match="apt install libaio-dev"):
            process_group.require_nvme(tmp_path)


def test_local_rank_is_taken_away_and_nothing_else():
    assert process_group.without_local_rank(["--local_rank=3", "--stage", "all", "--zero=2"]) == [
        "--stage",
        "all",
        "--zero=2",
    ]


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        script = "from bitdistill.distributed import process_group; process_group.initialize('cpu')"
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
    assert result.returncode == 1
    assert f"UserError: MASTER_PORT: expected a free port {port}" in result.stderr
    assert "--master_port" in result.stderr
