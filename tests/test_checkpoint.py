"""Whole folders or none, complete checkpoints only, and one state dict from any ZeRO stage."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

import ranks
from bitdistill.distributed import checkpoint
from bitdistill.distributed.checkpoint import latest_checkpoint, mark_complete, save_folder_atomically


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


# ---- save_folder_atomically


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_new_folder_replaces_the_old_one(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(checkpoint, "_exchange", lambda a, b: False)
    for text in ("one", "two"):
        with save_folder_atomically(tmp_path / "deep" / "model") as folder:
            write(folder, weights=text)
            (folder / "sub").mkdir()
            write(folder / "sub", part=text)
            if text == "two":
                assert (tmp_path / "deep" / "model" / "weights").read_text() == "one"
        assert (tmp_path / "deep" / "model" / "weights").read_text() == text
        assert read(tmp_path / "deep" / "model" / "sub") == {"part": text}
    assert os.listdir(tmp_path / "deep") == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_after_an_error_all_is_as_before(tmp_path, error):
    with save_folder_atomically(tmp_path / "model") as folder:
        write(folder, weights="good")
    with pytest.raises(error), save_folder_atomically(tmp_path / "model") as folder:  # noqa: PT012
        write(folder, weights="half")
        raise error
    assert read(tmp_path / "model") == {"weights": "good"}
    assert os.listdir(tmp_path) == ["model"]


def test_the_first_save_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), save_folder_atomically(tmp_path / "model"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_every_file_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch):
    events = []
    real_fsync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append("rename"), real_rename(a, b))[1])
    with save_folder_atomically(tmp_path / "model") as folder:
        write(folder, a="1", b="2")
    names = [Path(event).name for event in events]
    assert set(names[: names.index("rename")]) == {"a", "b", ".model.unfinished"}
    assert names[-1] == tmp_path.name


def save_and_die(when: str, target: Path) -> None:
    """Saves a new folder and kills its own process at the moment that `when` names."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    exchange, rename = checkpoint._exchange, Path.rename
    if when == "before the exchange":
        checkpoint._exchange = die
    if when == "after the exchange":
        checkpoint._exchange = lambda a, b: (exchange(a, b), die())
    if when == "between two renames":
        checkpoint._exchange = lambda a, b: False
        Path.rename = lambda a, b: (rename(a, b), die())
    with save_folder_atomically(target) as folder:
        write(folder, weights="new")
        if when == "while writing":
            die()
        write(folder, more="new")
    os._exit(0)  # not reached


@pytest.mark.parametrize("when", ["while writing", "before the exchange", "after the exchange", "between two renames"])
def test_killed_at_any_point_one_whole_folder_is_there(tmp_path, when):
    """SIGKILL in a forked child; afterwards the name shows the old or the new folder, and the next save works."""
    with save_folder_atomically(tmp_path / "model") as folder:
        write(folder, weights="old", more="old")
    child = os.fork()
    if child == 0:
        save_and_die(when, tmp_path / "model")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    whole = [{"weights": text, "more": text} for text in ("old", "new")]
    if when == "between two renames":  # the one window of file systems that cannot exchange: the old one is beside
        assert not (tmp_path / "model").exists()
        with pytest.raises(RuntimeError), save_folder_atomically(tmp_path / "model"):
            raise RuntimeError
        assert read(tmp_path / "model") == whole[0]
    else:
        assert read(tmp_path / "model") == whole[when == "after the exchange"]
    with save_folder_atomically(tmp_path / "model") as folder:
        write(folder, weights="next")
    assert read(tmp_path / "model") == {"weights": "next"}
    assert os.listdir(tmp_path) == ["model"]


def test_a_failing_exchange_is_an_error_not_a_guess(tmp_path):
    with pytest.raises(OSError, match="No such file") as caught:
        checkpoint._exchange(tmp_path / "a", tmp_path / "b")
    assert caught.value.errno == errno.ENOENT


# ---- complete checkpoints


def make_checkpoint(folder: Path, step: int, complete: bool) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    write(path, trainer_state="{}", weights="w" * step)
    write(path / "global_step", part="p")
    if complete:
        mark_complete(path)
    return path


def test_the_newest_complete_checkpoint_by_number(tmp_path, capsys):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None
    make_checkpoint(tmp_path, 9, complete=True)
    newest = make_checkpoint(tmp_path, 10, complete=True)
    write(tmp_path, **{"checkpoint-notes": "", "checkpoint-": ""})
    (tmp_path / "checkpoint-99-old").mkdir()
    assert latest_checkpoint(tmp_path) == newest
    assert capsys.readouterr().out == ""


def test_unfinished_and_damaged_ones_are_skipped_and_said(tmp_path, capsys):
    good = make_checkpoint(tmp_path, 10, complete=True)
    make_checkpoint(tmp_path, 20, complete=False)
    write(make_checkpoint(tmp_path, 30, complete=True), weights="short")
    (make_checkpoint(tmp_path, 40, complete=True) / "global_step" / "part").unlink()
    assert latest_checkpoint(tmp_path) == good
    said = capsys.readouterr().out.splitlines()
    assert ["checkpoint-40: skipped, global_step/part is missing" in said[0], len(said)] == [True, 3]
    assert "checkpoint-30: skipped, weights has 5 bytes instead of 30" in said[1]
    assert "checkpoint-20: skipped, unfinished" in said[2]


def test_a_changed_byte_is_noticed_and_the_one_before_is_used(tmp_path, capsys):
    good = make_checkpoint(tmp_path, 10, complete=True)
    write(make_checkpoint(tmp_path, 20, complete=True), weights="w" * 19 + "v")
    (make_checkpoint(tmp_path, 30, complete=True) / "complete.json").write_text('{"world_size": 1, "fi')
    assert latest_checkpoint(tmp_path) == good
    said = capsys.readouterr().out
    assert "checkpoint-30: skipped, its complete.json is damaged" in said
    assert "checkpoint-20: skipped, weights is damaged: its checksum" in said
    # They no longer count when old checkpoints are deleted; an unfinished one would be of no use to anybody.
    make_checkpoint(tmp_path, 40, complete=False)
    assert latest_checkpoint(tmp_path) == good
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "damaged-checkpoint-20", "damaged-checkpoint-30"]


def test_who_wrote_a_checkpoint_does_not_matter(tmp_path):
    """What becomes of one that was written on other ranks: test_other_ranks.py."""
    path = make_checkpoint(tmp_path, 10, complete=True)
    marker = json.loads((path / "complete.json").read_text())
    (path / "complete.json").write_text(json.dumps(marker | {"world_size": 4}))
    assert latest_checkpoint(tmp_path) == path
    assert checkpoint.ranks_of(path) == 4


# ---- full_state_dict


def test_state_dict_of_a_plain_model_is_a_copy_in_fp32():
    import torch

    model = ranks.tiny_model()
    expected = {name: tensor.clone() for name, tensor in model.bfloat16().state_dict().items()}
    state = checkpoint.full_state_dict(model)
    model.model.embed_tokens.weight.data.zero_()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name].float()) for name in expected)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]


def test_state_dict_keeps_integer_buffers():
    import torch

    model = torch.nn.BatchNorm1d(3)
    model.num_batches_tracked += 2**25 + 1  # not an fp32 number
    assert checkpoint.full_state_dict(model)["num_batches_tracked"] == 2**25 + 1


TRAIN = """
import json, sys
from pathlib import Path
import ranks
from bitdistill.distributed import checkpoint, process_group, presets

process_group.initialize("cpu")
import torch
from transformers import TrainerCallback

class Mark(TrainerCallback):
    def on_save(self, args, state, control, **_):
        checkpoint.mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

found = {"marks": []}
for zero in (0, 1, 2, 3):
    config = presets.deepspeed_config(zero, precision="fp32", device="cpu")
    out = Path(f"out{zero}")
    saving = {"save_strategy": "steps", "save_steps": 2} if zero in (1, 3) else {}
    trainer = ranks.tiny_trainer(ranks.tiny_arguments(out, config, **saving), [Mark()])
    trainer.train()
    state = checkpoint.full_state_dict(trainer.model_wrapped)
    inner = checkpoint.full_state_dict(trainer.model)  # the model inside the engine gives the same
    assert (state is None) == (not process_group.is_main())
    if process_group.is_main():
        assert all(torch.equal(state[name], inner[name]) for name in state)
        assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
        torch.save(state, f"state{zero}.pt")
        found[f"losses {zero}"] = ranks.losses(trainer)
    if saving:
        # As if the run had been killed while it wrote its last checkpoint: go on from the one before.
        process_group.barrier()
        if process_group.is_main():
            (out / f"checkpoint-{ranks.STEPS}" / "complete.json").unlink()
        process_group.barrier()
        last = checkpoint.latest_checkpoint(out)
        trainer = ranks.tiny_trainer(ranks.tiny_arguments(out, config, **saving), [Mark()])
        trainer.train(resume_from_checkpoint=str(last))
        again = checkpoint.full_state_dict(trainer.model_wrapped)
        if process_group.is_main():
            found[f"resumed {zero}"] = [last.name, all(torch.equal(state[name], again[name]) for name in state)]
            files = json.loads((last / "complete.json").read_text())["files"]
            found[f"files {zero}"] = sorted(Path(name).name for name in files)
if process_group.is_main():
    Path(sys.argv[-1]).write_text(json.dumps(found))
process_group.shutdown()
"""


@pytest.mark.slow
def test_two_ranks_of_every_stage_equal_one_plain_process(tmp_path):
    """Losses and gathered weights after 4 steps; and a run that goes on from a checkpoint ends bit-identical."""
    import torch

    found = ranks.run(tmp_path, TRAIN).found
    plain_losses, plain_state = ranks.plain_training()
    start = ranks.tiny_model().state_dict()
    for zero in (0, 1, 2, 3):
        assert found[f"losses {zero}"] == pytest.approx(plain_losses, abs=2e-6)
        state = torch.load(tmp_path / f"state{zero}.pt")
        assert list(state) == list(plain_state)
        for name, value in plain_state.items():
            assert not torch.equal(state[name], start[name]), name  # it has learned
            # Adam's g / (|g| + 1e-8) turns the rounding of a gradient near 0 into 1e-5, of steps of 1e-2:
            # additive noise of 1e-7 of the largest gradient moves plain torch as far.
            torch.testing.assert_close(state[name], value, atol=5e-5, rtol=0)
    for zero in (1, 3):
        assert found[f"resumed {zero}"] == ["checkpoint-2", True]
        assert {"trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= set(found[f"files {zero}"])
        assert sum(name.endswith("optim_states.pt") for name in found[f"files {zero}"]) == 2
