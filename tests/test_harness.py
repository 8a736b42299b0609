"""lm-evaluation-harness and our own scoring on the same rows with the same prompts: the same likelihoods, the same answers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'bitdistill[eval]'")
from lm_eval.api.instance import Instance

from bitdistill.data.tasks import encode_prompts, load_rows, load_task
from bitdistill.errors import UserError
from bitdistill.evaluation.harness import PackedLM, harness_model, harness_task, run_harness, stock_task
from bitdistill.evaluation.score import score_rows
from bitdistill.evaluation.scoring import classify, torch_logits
from bitdistill.export.write import write_packed
from bitdistill.prompts import Task, label_tokens, prompt_texts
from bitdistill.runtime.cpu import Runtime
from bitdistill.student.loading import load_language_model, load_tokenizer, packed_tokenizer, tokenizer_settings
from bitdistill.student.refine import refine

DATA = Path(os.environ.get("BITDISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "sst2").is_dir(), reason=f"no sst2 under {DATA}; set BITDISTILL_DATA"),
]


@pytest.fixture(scope="module")
def rows():
    return load_rows(load_task("sst2"), "validation", str(DATA / "sst2" / "validation.jsonl"), limit=24)


@pytest.fixture(scope="module")
def teacher():
    return load_language_model(DATA / "models" / "base-6m").eval(), load_tokenizer(DATA / "models" / "base-6m")


@pytest.fixture(scope="module")
def packed(teacher, tmp_path_factory):
    """The base model made ternary, untrained: its answers are poor, and the same for whoever asks."""
    tokenizer, path = teacher[1], tmp_path_factory.mktemp("packed") / "student.safetensors"
    model = load_language_model(DATA / "models" / "base-6m")
    refine(model)
    text = Tokenizer.from_file(str(DATA / "models" / "base-6m" / "tokenizer.json")).to_str()
    metadata = {"setting": "BitDistill", "tokenizer": tokenizer_settings(tokenizer)}
    write_packed(path, model, tokenizer_json=text.encode(), metadata=metadata)
    runtime = Runtime(path, 1)
    return runtime, packed_tokenizer(runtime.model)


@pytest.mark.parametrize("kind", ["teacher", "packed"])
def test_the_same_answers_on_the_same_rows(kind, rows, request):
    model, tokenizer = request.getfixturevalue(kind)
    task = load_task("sst2")
    ours = score_rows(model, task, rows, tokenizer, max_length=512, batch_size=8, name="ours")
    [line] = run_harness(model, tokenizer, [harness_task(task, rows, tokenizer)])
    assert (line["metric"], line["rows"]) == ("acc", len(rows))
    assert 100 * line["value"] == pytest.approx(ours.score, abs=1e-9)
    assert line["stderr"] > 0
    texts = prompt_texts(task, list(rows), tokenizer)
    pairs = [(text, f" {word}") for text in texts for word in task.words]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    theirs = np.array([value for value, _ in harness_model(model, tokenizer).loglikelihood(asked)])
    prompts, cut = encode_prompts(task, rows, tokenizer, 512)
    assert cut == 0
    words = label_tokens(task, tokenizer)
    if kind == "packed":
        likelihoods = model.classify(prompts, words)
    else:
        _, likelihoods = classify(torch_logits(model, 0), prompts, words)
    np.testing.assert_allclose(theirs.reshape(-1, 2), likelihoods, rtol=0, atol=2e-4)
    answers = [task.words[i] for i in theirs.reshape(-1, 2).argmax(axis=1)]
    assert answers == ours.predictions


def test_the_harness_own_prompt_on_our_rows(teacher, rows):
    [stock] = stock_task("sst2", rows)
    assert len(stock.eval_docs) == len(rows)
    assert "Question: Is this sentence positive or negative?" in stock.doc_to_text(rows[0])
    [line] = run_harness(*teacher, [stock])
    assert line["rows"] == len(rows)
    assert stock_task("no_such_task_anywhere") is None


def test_long_continuations_and_texts(packed, monkeypatch):
    """Pieces of any size give the same sum; greedy is True exactly for what greedy decoding says."""
    runtime, tokenizer = packed
    model = PackedLM(runtime, tokenizer)
    context, text = (
        tokenizer("A film that")["input_ids"],
        tokenizer(" is not for everyone who likes boats")["input_ids"],
    )
    said = list(runtime.generate_ids(context, 5))
    requests = [(("", ""), context, text), (("", ""), context, said), (("", ""), context[:2], text[:1])]
    whole = model._loglikelihood_tokens(requests)
    logits = torch.from_numpy(runtime.logits(context + text[:-1])).double()[len(context) - 1 :]
    expected = logits.log_softmax(-1)[range(len(text)), text].sum().item()
    assert whole[0][0] == pytest.approx(expected, abs=1e-3)
    assert [greedy for _, greedy in whole[:2]] == [False, True]
    monkeypatch.setattr("bitdistill.evaluation.harness.ROWS_AT_A_TIME", 2)
    for (ours, greedy), (again, same) in zip(whole, model._loglikelihood_tokens(requests), strict=True):
        assert ours == pytest.approx(again, abs=1e-3)
        assert greedy == same
    [rolled] = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("A film that is not",), 0)])
    ids = tokenizer("A film that is not")["input_ids"]
    [(alone, _)] = model._loglikelihood_tokens([(("", ""), [model.prefix_token_id], ids)])
    assert rolled == pytest.approx(alone, abs=1e-3)
    settings = {"until": ["\n"], "max_gen_toks": 5}
    [generated] = model.generate_until([Instance("generate_until", {}, ("A film that", settings), 0)])
    assert tokenizer.decode(said).startswith(generated)


def test_generation_tasks_are_refused(teacher):
    task = Task("s", "generation", "{text}:", "text", target_column="summary")
    with pytest.raises(UserError, match="classification"):
        harness_task(task, None, teacher[1])


def test_offline_it_says_what_to_do(tmp_path):
    code = "from bitdistill.evaluation.harness import stock_task; stock_task('arc_easy')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "UserError: lm_eval: expected the data of arc_easy from the hub" in done.stderr
    assert "--validation_file" in done.stderr.splitlines()[-1]
