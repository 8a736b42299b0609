"""`bitdistill export` and `bitdistill check`: another tool's file is proved by that tool, or named unproven, or removed."""

import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_gguf_file import TEXTS, byte_level, student

from bitdistill.commands.export import export
from bitdistill.errors import UserError
from bitdistill.export import agreement, deliver
from bitdistill.export.agreement import compare_answers, tool_elsewhere
from bitdistill.export.tools import greedy, tool_answers, torch_answers
from bitdistill.student.refine import load_student, save_student


@pytest.fixture
def run(tmp_path):
    """A run directory with a finished student without SubLN and the rows that it was scored on."""
    model = student("llama", tie_word_embeddings=True)
    for parameter in model.parameters():
        parameter.data.mul_(0.3)  # near a trained model's: less sensitive to rounding than a random one
    save_student(tmp_path / "distill", model, byte_level())
    (tmp_path / "evaluate").mkdir()
    rows = [{"row": i, "sentence": text, "predictions": {}} for i, text in enumerate(TEXTS)]
    (tmp_path / "evaluate" / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_kl_by_hand():
    ours = [np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))]
    theirs = [np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))]
    found = compare_answers((ours, [[3, 4, 5, 6]]), (theirs, [[3, 4, 9, 6]]), [[0, 1]])
    assert found["mean_kl"] == pytest.approx(0.5 * (0.5 * np.log(2) + 0.5 * np.log(2 / 3)), abs=1e-6)
    assert found["same_top1"] == 0.5  # of 0.5 and 0.5 the first is taken, 0.75 is the second
    assert found["perplexity_ratio"] == pytest.approx(0.5 / 0.75)
    assert found["tokens"] == 2
    assert (found["greedy_tokens"], found["same_greedy"]) == (
        4,
        0.5,
    )  # the text after a difference has another beginning


def test_greedy_takes_the_likeliest_token_each_time():
    seen = []

    def step(token):
        seen.append(token)
        return np.eye(5)[(token + 2) % 5]

    assert greedy([7], np.eye(5)[1], 4, step) == [1, 3, 0, 2]
    assert seen == [1, 3, 0]


def test_answers_are_those_of_generate():
    """Logits of a prompt and its continuation, token by token over a cache, against transformers' own loop."""
    model, prompt = student("qwen3"), [5, 6, 7, 8]
    (logits,), (continuation,) = torch_answers(model, [prompt], 6)
    assert np.array_equal(logits, model(torch.tensor([prompt])).logits[0].detach().numpy())
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert continuation == expected[0, 4:].tolist()


def test_a_tool_in_another_environment(run):
    """The same answers from another process, which imports nothing of the project; and what goes wrong there, in a line."""
    deliver.deliver(run / "distill", "transformers", None, [], prove=False)
    folder, prompts = run / "export" / "student-transformers", [[5, 6, 7], [8, 9]]
    (logits, continuations), version = tool_elsewhere(sys.executable, "transformers", folder, prompts, 3, 1)
    assert version == f"transformers {transformers.__version__}"
    ours = tool_answers("transformers", folder, prompts, 3)
    assert all(np.array_equal(a, b) for a, b in zip(logits, ours[0], strict=True))
    assert continuations == ours[1]
    with pytest.raises(UserError, match="tool_python: expected an interpreter; got /no/such/python"):
        tool_elsewhere("/no/such/python", "transformers", folder, prompts, 3, 1)
    with pytest.raises(UserError, match="tool_python: expected answers of transformers"):
        tool_elsewhere(sys.executable, "transformers", run / "evaluate", prompts, 3, 1)


def test_transformers_proves_what_it_opens(run):
    result = deliver.deliver(run / "distill", "transformers", None, deliver.proof_texts(run))
    assert result["path"] == str(run / "export" / "student-transformers")
    assert result["proof"]["same_top1"] >= agreement.MIN_SAME_TOP1
    assert result["proof"]["tool"].startswith("transformers ")
    assert json.loads((run / "export" / "student-transformers" / "proof.json").read_text()) == result["proof"]


def test_a_file_that_disagrees_is_removed(run, monkeypatch):
    def wrong(format, path, prompts, new_tokens, threads):
        logits, continuations = torch_answers(student("llama"), prompts, new_tokens)
        return [np.roll(one, 1, axis=1) for one in logits], continuations

    monkeypatch.setattr(agreement, "tool_answers", wrong)
    with pytest.raises(UserError, match=r"mean KL of at most 0\.05.*was removed"):
        deliver.deliver(run / "distill", "transformers", None, deliver.proof_texts(run))
    assert not (run / "export" / "student-transformers").exists()


def one_scale_wrong(tensors):
    """Of one matrix: four times too large."""
    tensors["model.layers.0.mlp.down_proj.weight_scale"].mul_(4)


def rows_in_another_order(tensors):
    """Of one matrix, by one place, as an exporter does that permutes query rows where the tool does not."""
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].roll(1, 0).contiguous()


@pytest.mark.parametrize("damage", [one_scale_wrong, rows_in_another_order])
def test_a_damaged_file_falls_below_the_bar(run, damage, monkeypatch):
    """The negative control of the proof: transformers itself opens the damaged file and answers wrongly."""
    save_student(run / "distill", student("llama", tie_word_embeddings=True), byte_level())
    write = deliver.write_hugging_face

    def damaged(path, *rest):
        written = write(path, *rest)
        tensors = load_file(path / "model.safetensors")
        damage(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return written

    proof = deliver.deliver(run / "distill", "transformers", run / "right", deliver.proof_texts(run))["proof"]
    assert proof["mean_kl"] < 0.2 * agreement.MAX_MEAN_KL
    monkeypatch.setattr(deliver, "write_hugging_face", damaged)
    with pytest.raises(UserError, match="was removed") as refused:
        deliver.deliver(run / "distill", "transformers", run / "wrong", deliver.proof_texts(run))
    assert float(refused.value.got.split()[0]) > 3 * agreement.MAX_MEAN_KL, refused.value.got
    assert not (run / "wrong").exists()


def test_a_tool_that_is_not_installed_leaves_it_unproven(run, monkeypatch):
    monkeypatch.setattr(deliver, "tool_version", lambda format: None)
    result = deliver.deliver(run / "distill", "gguf", run / "x.gguf", deliver.proof_texts(run))
    assert result["proof"] is None
    assert result["unproven"] == "llama-cpp-python is not installed"
    assert sorted(result["files"]) == ["Modelfile", "README.md", "x.gguf"]
    assert all(file.is_file() for file in result["files"].values())


def test_a_proof_is_never_left_beside_another_file(run, monkeypatch):
    """Of an earlier export under the same name: not beside an unproven one, and nothing at all where the new one was removed."""
    texts = deliver.proof_texts(run)
    beside = [run / f"x.gguf{ending}" for ending in (".README.md", ".Modelfile", ".proof.json")]
    monkeypatch.setattr(deliver, "tool_version", lambda format: "llama.cpp 1")
    monkeypatch.setattr(agreement, "tool_version", lambda format: "llama.cpp 1")
    trained = load_student(run / "distill").eval()
    monkeypatch.setattr(
        agreement, "tool_answers", lambda format, path, prompts, *rest: torch_answers(trained, prompts, 16)
    )
    assert deliver.deliver(run / "distill", "gguf", run / "x.gguf", texts)["proof"]["same_top1"] == 1
    assert all(file.is_file() for file in beside)
    result = deliver.deliver(run / "distill", "gguf", run / "x.gguf", texts, prove=False)
    assert not beside[-1].exists()
    assert sorted(result["files"]) == ["Modelfile", "README.md", "x.gguf"]

    def wrong(format, path, prompts, *rest):
        logits, continuations = torch_answers(trained, prompts, 16)
        return [np.roll(one, 1, axis=1) for one in logits], continuations

    monkeypatch.setattr(agreement, "tool_answers", wrong)
    with pytest.raises(UserError, match="was removed"):
        deliver.deliver(run / "distill", "gguf", run / "x.gguf", texts)
    assert not list(run.glob("x.gguf*"))


def python_with(module, variable):
    """An interpreter with a tool: this one, or that of the environment which a variable names."""
    if importlib.util.find_spec(module) is None and variable not in os.environ:
        pytest.skip(f"{module} is not installed here; {variable}=PYTHON of an environment with it runs this")
    return os.environ.get(variable)


def test_llama_cpp_agrees(run):
    python = python_with("llama_cpp", "BITDISTILL_LLAMA_CPP")  # compiles for minutes: pip install 'bitdistill[gguf]'
    result = deliver.deliver(run / "distill", "gguf", None, deliver.proof_texts(run), python=python)
    assert result["proof"]["mean_kl"] < agreement.MAX_MEAN_KL


def test_mlx_agrees(run):
    python = python_with("mlx_lm", "BITDISTILL_MLX")  # pip install "mlx[cpu]" mlx-lm
    result = deliver.deliver(run / "distill", "mlx", None, deliver.proof_texts(run), python=python)
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


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("config.yaml", "model: [1, 2]", "RUN .*config.yaml: expected a text for model; got"),
        ("config.yaml", "model: {", "RUN .*config.yaml: expected YAML"),
        (
            "evaluate/scores.json",
            '{"task": "a", "metric": "accuracy"}',
            "RUN: expected scores as the evaluation writes them",
        ),
        ("evaluate/scores.json", "[" * 100_000, "RUN: expected scores as the evaluation writes them"),
        ("evaluate/predictions.jsonl", "[" * 100_000, "predictions.jsonl: expected a JSON object a line"),
    ],
)
def test_a_damaged_run_is_a_line(run, name, content, match):
    (run / name).write_text(content)
    with pytest.raises(UserError, match=match):
        export(str(run), format="transformers")


def test_the_command(run, capsys):
    export(str(run), format="transformers")
    shown = capsys.readouterr().out
    assert "proved by transformers" in shown
    with pytest.raises(UserError, match="RUN: expected a run directory with a finished student"):
        export(str(run / "evaluate"), format="gguf")
