"""`bitdistill export` and `bitdistill check`: another tool's file is proved by that tool, or named unproven, or removed."""

import json

import numpy as np
import pytest
from test_gguf_file import TEXTS, byte_level, student

from bitdistill.commands.export import check, export
from bitdistill.errors import UserError
from bitdistill.export import agreement, deliver
from bitdistill.export.agreement import compare_logits, student_logits
from bitdistill.student.refine import save_student
from tiny_students import CONFIGS


@pytest.fixture
def run(tmp_path):
    """A run directory with a finished student without SubLN and the rows that it was scored on."""
    model = student("llama", tie_word_embeddings=True)
    for parameter in model.parameters():
        parameter.data.mul_(0.3)  # near a trained model's: less sensitive to rounding than a random one
    save_student(tmp_path / "distill", model, byte_level())
    for name in ("export", "evaluate"):
        (tmp_path / name).mkdir()
    rows = [{"row": i, "sentence": text, "predictions": {}} for i, text in enumerate(TEXTS)]
    (tmp_path / "evaluate" / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_kl_by_hand():
    ours = [np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))]
    theirs = [np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))]
    found = compare_logits(ours, theirs, [[0, 1]])
    assert found["mean_kl"] == pytest.approx(0.5 * (0.5 * np.log(2) + 0.5 * np.log(2 / 3)), abs=1e-6)
    assert found["same_top1"] == 0.5  # of 0.5 and 0.5 the first is taken, 0.75 is the second
    assert found["perplexity_ratio"] == pytest.approx(0.5 / 0.75)
    assert found["tokens"] == 2


def test_transformers_proves_what_it_opens(run):
    result = deliver.deliver(run / "distill", "transformers", None, deliver.proof_texts(run))
    assert result["path"] == str(run / "export" / "student-transformers")
    assert result["proof"]["same_top1"] >= agreement.MIN_SAME_TOP1
    assert result["proof"]["tool"].startswith("transformers ")
    assert json.loads((run / "export" / "student-transformers" / "proof.json").read_text()) == result["proof"]


def test_a_file_that_disagrees_is_removed(run, monkeypatch):
    def wrong(format, path, prompts, threads):
        return [np.roll(logits, 1, axis=1) for logits in student_logits(student("llama"), prompts)]

    monkeypatch.setattr(agreement, "tool_logits", wrong)
    with pytest.raises(UserError, match=r"mean KL of at most 0\.05.*was removed"):
        deliver.deliver(run / "distill", "transformers", None, deliver.proof_texts(run))
    assert not (run / "export" / "student-transformers").exists()


def test_a_tool_that_is_not_installed_leaves_it_unproven(run, monkeypatch):
    monkeypatch.setattr(deliver, "tool_version", lambda format: None)
    result = deliver.deliver(run / "distill", "gguf", run / "x.gguf", deliver.proof_texts(run))
    assert result["proof"] is None
    assert result["unproven"] == "llama-cpp-python is not installed"
    assert (run / "x.gguf").is_file()


def test_llama_cpp_agrees(run):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python compiles for minutes; pip install 'bitdistill[gguf]'")
    result = deliver.deliver(run / "distill", "gguf", None, deliver.proof_texts(run))
    assert result["proof"]["mean_kl"] < agreement.MAX_MEAN_KL


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"format": "onnx"}, "format: expected one of gguf"),
        ({"format": "gguf", "output": "/no/such/folder/s.gguf"}, "output: expected a path in an existing folder"),
    ],
)
def test_refusals(run, options, match):
    with pytest.raises(UserError, match=match):
        deliver.deliver(run / "distill", texts=[], **{"output": None, **options})


def test_check_says_what_is_possible_before_training():
    config = CONFIGS["qwen3"]
    rows = {row["format"]: row for row in deliver.deployability(config, "two")}
    assert rows["packed"]["possible"]
    assert not rows["gguf"]["possible"]
    assert "refine.norms none" in rows["gguf"]["why"]
    assert not rows["mlx"]["possible"]
    assert all(row["possible"] for row in deliver.deployability(config, "none"))
    rows = {row["format"]: row for row in deliver.deployability(CONFIGS["llama_biases"], "two")}
    assert "biases" in rows["gguf"]["why"]


def test_commands(run, capsys):
    CONFIGS["llama"].save_pretrained(run)
    check(str(run), norms="two")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())  # the last column is folded
    assert "LM head to the" in shown
    assert "packed" in shown
    export(str(run), format="transformers")
    shown = capsys.readouterr().out
    assert "proved by transformers" in shown
    with pytest.raises(UserError, match="RUN: expected a run directory with a finished student"):
        export(str(run / "evaluate"), format="gguf")
