"""Bad input of every kind: one line that says what was expected, what came and what to do, with the right exit status and
without a traceback. The table is bad_inputs.py. Commands run in this process; a few once more in one of their own."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats  # noqa: F401 -- before `generate` leaves it out, for it would be missing in later tests
import torch
import yaml
from bad_inputs import TABLE, Case
from tiny_gguf import TOKENS, model_of
from transformers import PreTrainedTokenizerFast

from bitdistill import cli, train
from bitdistill.distributed import process_group
from bitdistill.export.write import write_packed
from bitdistill.student.loading import save_language_model, tokenizer_settings
from bitdistill.student.refine import refine, save_student

WORLD = "--model base --task task.yaml --train_file rows.jsonl --validation_file rows.jsonl --corpus corpus.txt"
QUICK = "--recipe quick --stage check --output_dir out --report_to [] --distill.relation_layers [-1]"
REVIEWS = """kind: classification
prompt: "{text}\\nIt was"
truncate_column: text
label_column: label
labels: {0: bad, 1: good}
"""
SUMMARIES = """kind: generation
prompt: "{text}\\nSummary:"
truncate_column: text
target_column: summary
max_new_tokens: 60
"""
CASES = [pytest.param(case, id=f"{kind}: {case.name}") for kind, cases in TABLE.items() for case in cases]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of tiny_gguf's models."""
    from test_loading import tokenizer

    return tokenizer(TOKENS)


@pytest.fixture(scope="module")
def right_world(tmp_path_factory) -> Path:
    """The folder that bad_inputs.py describes."""
    root, tokenizer, model = tmp_path_factory.mktemp("right"), byte_tokenizer(), model_of("qwen3")
    save_language_model(root / "base", model, model.state_dict(), tokenizer=tokenizer, dtype=torch.float32)
    (root / "task.yaml").write_text(REVIEWS, encoding="utf-8")
    (root / "summaries.yaml").write_text(SUMMARIES, encoding="utf-8")
    reviews = [json.dumps({"text": f"the {number} things", "label": number % 2}) for number in range(8)]
    (root / "rows.jsonl").write_text("\n".join(reviews), encoding="utf-8")
    summaries = [json.dumps({"text": "the thing in the thing", "summary": "x" * (8 + 70 * n)}) for n in range(2)]
    (root / "summaries.jsonl").write_text("\n".join(summaries), encoding="utf-8")
    (root / "corpus.txt").write_text("the thing in the thing\n" * 400, encoding="utf-8")
    (root / "prompts.txt").write_text("the thing\nin the thing\n", encoding="utf-8")
    refine(model, norms="none")
    run, text = root / "run", tokenizer.backend_tokenizer.to_str().encode()
    save_student(run / "distill", model, tokenizer, model.state_dict())
    (run / "export").mkdir()
    (run / "evaluate").mkdir()
    metadata = {"tokenizer": tokenizer_settings(tokenizer)}
    write_packed(run / "export/student.safetensors", model, tokenizer_json=text, metadata=metadata)
    write_packed(root / "bare.safetensors", model)
    settings = {"model": "base", "task": "task.yaml", "validation_file": "rows.jsonl", "max_length": 64}
    (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (run / "metrics.jsonl").write_text('{"stage": "distill", "step": 1, "loss": 2.0}\n', encoding="utf-8")
    (run / "evaluate/predictions.jsonl").write_text('{"text": "the thing", "label": 1}\n', encoding="utf-8")
    return root


@pytest.fixture
def world(right_world, tmp_path, monkeypatch) -> Path:
    """A copy to spoil, as the current folder; what an entry changes for its process is put back."""
    root = Path(shutil.copytree(right_world, tmp_path / "world"))
    monkeypatch.chdir(root)
    variables, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    yield root
    process_group.shutdown()
    os.environ.clear()
    os.environ |= variables
    signal.signal(signal.SIGTERM, handler)


def arguments_of(command: str) -> tuple[str, list[str]]:
    """("train" or "bitdistill", what stands after it)."""
    first, *rest = shlex.split(command)
    if first == "train":
        return "train", [*shlex.split(f"{WORLD} {QUICK}"), *rest]
    return ("train", rest) if first == "train.py" else ("bitdistill", [first, *rest])


def call(command: str, monkeypatch, capsys) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command in this process."""
    program, arguments = arguments_of(command)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    capsys.readouterr()
    try:
        status = (train if program == "train" else cli).main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def check(case: Case, status: int, stdout: str, stderr: str) -> None:
    """One line, the words in it, and the status."""
    assert status == case.status, f"{status}\n{stdout}\n{stderr}"
    assert "Traceback" not in stdout + stderr
    lines = [line for line in stderr.splitlines() if line.startswith("bitdistill: ") and "compiles" not in line]
    if case.status == 0:
        assert not lines
        return
    assert len(lines) == 1, stderr
    assert re.search(r": expected .+; got .+\. \S.*[.?]\)?$|^bitdistill: \d+ problems: ", lines[0]), lines[0]
    for word in case.words.split("|"):
        assert word in lines[0], f"{word!r} is not in {lines[0]}"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_is_one_line(case, world, monkeypatch, capsys):
    case.spoil(world)
    check(case, *call(case.command, monkeypatch, capsys))


IN_PROCESSES = ("model: weights cut short", "command: generate: a file cut short")


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PROCESSES)
def test_the_same_in_a_process_of_its_own(name, world):
    case = {f"{kind}: {case.name}": case for kind, cases in TABLE.items() for case in cases}[name]
    case.spoil(world)
    program, arguments = arguments_of(case.command)
    module = "bitdistill.train" if program == "train" else "bitdistill.cli"
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    check(case, done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_rows_are_checked_again_as_tokens_of_a_trimmed_vocabulary(world, monkeypatch, capsys):
    """More and smaller pieces than before: what does not fit now is said before the teacher is trained, and at once again."""
    rows = [json.dumps({"text": "x", "label": number % 2}) for number in range(8)]
    (world / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (world / "task.yaml").write_text(REVIEWS.replace("{text}", "123 123 123 123 {text}"), encoding="utf-8")
    command = "train --refine.vocabulary trimmed --refine.vocabulary_threshold 1000 --max_steps 1 --max_length 26"
    command += " --pretrain.block_size 32"
    status, _, said = call(command, monkeypatch, capsys)
    assert status == 0, said
    for _ in range(2):
        status, printed, said = call(f"{command} --stage all", monkeypatch, capsys)
        assert status == 2, said
        assert "max_length: expected room for the template" in said
        assert "teacher: runs" not in printed
    assert "trim: runs" not in printed
    assert (world / "out/trim/done.json").is_file()


def test_the_table_is_large_and_its_names_are_different():
    names = [parameter.id for parameter in CASES]
    assert len(names) > 300
    assert len(set(names)) == len(names)
