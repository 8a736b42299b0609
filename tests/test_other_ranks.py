"""A stage goes on where it stopped on another number of ranks, at another ZeRO stage, with DeepSpeed or without it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ranks
from bitdistill.commands.consolidate import consolidate
from bitdistill.distributed import adopt, presets, process_group, saved_state
from bitdistill.errors import UserError
from bitdistill.stages import RunDirectory

STEPS, HALF = 12, 6  # the second half begins in the first epoch and ends in the second: 32 rows, 4 of them a step

TWO_RANKS = """
import gc, json, sys
from pathlib import Path
from bitdistill.distributed import process_group
process_group.initialize("cpu")
import test_other_ranks as test

found = {}
for zero in (0, 2, 3):
    found[f"2 ranks, {zero}"] = test.train(Path(f"two-{zero}"), zero)
for name, zero in (("two-2", 3), ("two-3", 2), ("two-0", 2), ("two-2", 1), ("one", 2), ("one", 3), ("one", 0)):
    found[f"{name} to {zero}"] = test.train(test.halfway(Path(name), f"to-{zero}"), zero, resume=True)
if process_group.is_main():
    Path(sys.argv[-1]).write_text(json.dumps(found))
process_group.shutdown()
"""


def train(folder: Path, zero: int | None, resume: bool = False) -> dict:
    """The losses of each step and the weights' fingerprint of a stage on these ranks; what rank 0 knows."""
    from datasets import Dataset

    from bitdistill.distributed.checkpoint import full_state_dict
    from bitdistill.training.distill import fine_tune
    from bitdistill.training.trainer import release, training_arguments

    section = None if zero is None else presets.deepspeed_config(zero, precision="fp32", device="cpu")
    tokens = [row["input_ids"].tolist() for row in ranks.tiny_data()]
    rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    arguments = training_arguments(
        folder, deepspeed=section, seed=0, report_to=[], max_steps=STEPS, save_steps=HALF, logging_steps=1,
        per_device_train_batch_size=4 // process_group.world_size(), learning_rate=1e-2, lr_scheduler_type="cosine",
        adam_epsilon=1e-3,  # else rounding decides about the steps of weights whose gradient is next to nothing
    )  # fmt: skip
    trainer, facts = fine_tune(
        ranks.tiny_model(), rows, arguments, pad_token_id=0, stage="teacher", run_dir=folder, resume=resume
    )
    state = full_state_dict(trainer.model_wrapped)
    release(trainer)
    if not process_group.is_main():
        return {}
    torch.save(state, folder / "state.pt")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"resumed_from": facts["resumed_from"]} | {
        name: [line[name] for line in lines] for name in ("step", "loss", "learning_rate")
    }


def halfway(folder: Path, name: str) -> Path:
    """A copy of a finished stage's folder as if it had been killed while it wrote its last checkpoint. Rank 0 copies."""
    copy = folder.with_name(f"{folder.name}-{name}")
    if process_group.is_main():
        shutil.copytree(folder, copy)
        (copy / f"checkpoint-{STEPS}" / "complete.json").unlink()
    process_group.barrier()
    return copy


def assert_equal(found: dict, folder: Path, expected: dict, expected_folder: Path) -> None:
    """Within the rounding of sums: of the losses, the learning rates and the weights."""
    assert found["step"] == expected["step"] == list(range(1, STEPS + 1))
    assert found["learning_rate"] == expected["learning_rate"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=5e-6)
    a, b = torch.load(folder / "state.pt"), torch.load(expected_folder / "state.pt")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_every_layout_goes_on_from_every_other(tmp_path, capsys):
    process_group.initialize("cpu", alone=True)
    undisturbed = train(tmp_path / "one", None)
    outcome = ranks.run(tmp_path, TWO_RANKS)
    for name, losses in outcome.found.items():
        start, _, zero = name.partition(" to ")
        folder = tmp_path / f"{start}-to-{zero}" if zero else tmp_path / f"two-{name[-1]}"
        assert_equal(losses, folder, undisturbed, tmp_path / "one")
        if zero:
            assert losses["resumed_from"] == f"checkpoint-{HALF}"
    said = [line for line in outcome.stdout.splitlines() if "continues at checkpoint-6" in line]
    assert said[0].endswith("written on 2 ranks at ZeRO 1 or 2, now on 2 ranks at ZeRO 3; 4 rows per step as before")
    assert len(said) == 7
    assert said[3].endswith("checkpoint-6")  # ZeRO 1 reads what ZeRO 2 wrote, and the other way round
    assert said[4].endswith("written on 1 rank without ZeRO, now on 2 ranks at ZeRO 2; 4 rows per step as before")
    for zero in (0, 2, 3):
        copy = halfway(tmp_path / f"two-{zero}", "to-one")
        assert_equal(train(copy, None, resume=True), copy, undisturbed, tmp_path / "one")
    assert "written on 2 ranks at ZeRO 3, now on 1 rank without ZeRO" in capsys.readouterr().out
    for name in ("one", "two-0", "two-2", "two-3"):
        assert_consolidated(tmp_path / name, tmp_path / "run" / name)
    assert "a full-precision model of 20,672 weights in float32" in capsys.readouterr().out


def assert_consolidated(folder: Path, run: Path) -> None:
    """`bitdistill consolidate` gives the weights that the ranks had, bit for bit, in a folder that transformers loads."""
    checkpoint = run / "checkpoints" / "teacher" / f"checkpoint-{STEPS}"
    shutil.copytree(folder / f"checkpoint-{STEPS}", checkpoint)
    (run / "refine").mkdir()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0})), eos_token="<eos>")
    tokenizer.save_pretrained(run / "refine")
    for source, output in ((run, run / "whole"), (checkpoint, run / "again")):
        consolidate(str(source), str(output))
        model, expected = AutoModelForCausalLM.from_pretrained(output), torch.load(folder / "state.pt")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="output: expected a new folder"):
        consolidate(str(run), str(run / "whole"))
    consolidate(str(run), str(run / "half"), dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(run / "half" / "model.safetensors").values()} == {torch.bfloat16}
    (checkpoint / "complete.json").unlink()
    with pytest.raises(UserError, match="which is not: unfinished"):
        consolidate(str(checkpoint), str(run / "more"))


def test_parts_of_a_parameter_are_put_together_and_padding_is_left_out():
    state = saved_state.SavedState(shapes={"w": torch.Size([7, 1])})
    numbers = torch.arange(7.0)
    state.pieces["w", saved_state.MASTER] = [numbers[:4], torch.cat([numbers[4:], torch.zeros(1)])]
    assert torch.equal(state.whole("w"), numbers[:, None])
    assert state.part("w", saved_state.MASTER, 3, 5).tolist() == [3, 4]
    assert state.part("w", saved_state.MASTER, 6, 9).tolist() == [6]
    assert state.part("w", saved_state.MASTER, 9, 12).tolist() == []
    state.pieces["w", saved_state.MASTER].pop()
    with pytest.raises(AssertionError, match="w: master is not whole"):
        state.whole("w")


def test_a_new_rank_begins_with_the_random_state_of_rank_0(tmp_path):
    for number in (0, 1):
        (tmp_path / f"rng_state_{number}.pth").write_text(str(number))
    (tmp_path / "new").mkdir()
    adopt._copy_random_states(tmp_path, tmp_path / "new", 3)
    assert [(tmp_path / "new" / f"rng_state_{rank}.pth").read_text() for rank in range(3)] == ["0", "1", "0"]
    adopt._copy_random_states(tmp_path, tmp_path / "new", 1)
    assert (tmp_path / "new" / "rng_state.pth").read_text() == "0"


def test_the_rows_of_a_step_stay_those_with_which_a_stage_was_begun(tmp_path):
    directory, settings = RunDirectory(tmp_path, {"teacher": ()}, ["teacher"]), {"teacher": {"learning_rate": 1}}
    assert directory.step_rows("teacher", settings, 4) is None
    directory.open_checkpoints("teacher", {"settings": settings, "inputs": {}})
    for step, rows in ((2, 16), (10, 8)):
        checkpoint = directory.checkpoints("teacher") / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "complete.json").write_text('{"world_size": 3}')
        (checkpoint / "bitdistill_state.json").write_text(json.dumps({"step_rows": rows}))
    assert directory.step_rows("teacher", settings, 4) == 8
    (checkpoint / "bitdistill_state.json").write_text("{}")  # as earlier versions wrote it
    assert directory.step_rows("teacher", settings, 4) == 12
    assert directory.step_rows("teacher", {"teacher": {"learning_rate": 2}}, 4) is None
    shutil.rmtree(tmp_path / "checkpoints")
    with directory.result("teacher", settings, {"step_rows": 32}):
        pass
    assert directory.step_rows("teacher", settings, 4) == 32
