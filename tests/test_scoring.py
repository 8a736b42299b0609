"""Scores against sums written by hand, third parties, and transformers' own generate."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bitdistill.data import tasks
from bitdistill.errors import UserError
from bitdistill.evaluation import scoring
from bitdistill.prompts import Task, label_tokens

DATA = Path(os.environ.get("BITDISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(params=[(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)], ids=["llama", "qwen3"])
def model(request):
    config, kind = request.param
    torch.manual_seed(0)
    model = kind(config(**SIZES, **HEADS, initializer_range=0.3)).float()
    model.train()  # scoring has to switch, and to switch back
    return model


def prompts_of(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(4, 61, n).tolist() for n in lengths]


def by_hand(model, prompt, word) -> float:
    """Sum of log-probabilities in float64, one forward pass without padding, cache or options."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + word])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(word))


@pytest.mark.parametrize(
    "words", [[[5], [9], [20]], [[5, 6], [9]], [[5, 6, 7], [5, 6, 8], [5, 9], [30]]], ids=["one", "mixed", "shared"]
)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods_by_hand(model, words, batch_size):
    prompts = prompts_of([1, 7, 3, 12, 3, 1, 20])
    predictions, likelihoods = scoring.classify(scoring.torch_logits(model, 0), prompts, words, batch_size)
    assert model.training
    expected = np.array([[by_hand(model, prompt, word) for word in words] for prompt in prompts])
    np.testing.assert_allclose(likelihoods, expected, rtol=0, atol=2e-5)
    assert predictions.tolist() == expected.argmax(axis=1).tolist()


def test_single_token_words_cost_one_forward_pass_a_batch():
    calls = []

    def logits_of(rows, keep):
        calls.append((len(rows), keep))
        return np.zeros((len(rows), keep, 10), np.float32)

    predictions, likelihoods = scoring.classify(logits_of, [[1]] * 5, [[3], [4], [5]], batch_size=2)
    assert calls == [(2, 1), (2, 1), (1, 1)]
    assert predictions.tolist() == [0] * 5, "ties go to the first"
    np.testing.assert_allclose(likelihoods, -math.log(10))


def test_no_rows():
    predictions, likelihoods = scoring.classify(lambda *_: pytest.fail("nothing to ask"), [], [[3], [4]])
    assert predictions.shape == (0,)
    assert likelihoods.shape == (0, 2)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_is_the_argmax_token_by_token(model, batch_size):
    prompts = prompts_of([5, 2, 9, 4, 1])
    model.generation_config = GenerationConfig(repetition_penalty=50.0, max_length=3, do_sample=True)
    expected = []
    model.eval()
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        expected.append(ids[len(prompt) :])
    eos = expected[0][3]  # a token that ends at least the first answer early
    expected = [ids[: ids.index(eos)] if eos in ids else ids for ids in expected]
    model.train()
    assert scoring.generate_greedy(model, prompts, 6, eos, 0, batch_size) == expected
    assert model.training
    assert model.generation_config.repetition_penalty == 50.0


def test_perplexity_by_hand(model):
    blocks = torch.tensor(prompts_of([10] * 7))
    model.eval()
    with torch.no_grad():
        logprobs = model(input_ids=blocks).logits.double().log_softmax(-1)
    losses = [-logprobs[n, t, blocks[n, t + 1]].item() for n in range(7) for t in range(9)]
    result = scoring.perplexity(model, blocks, batch_size=3)
    assert result["tokens"] == 63
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result["low"] < result["perplexity"] < result["high"]


def wilson(k: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    middle, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return middle - half, middle + half


@pytest.mark.parametrize(("right", "rows"), [(0, 5), (5, 5), (1, 1), (1, 2), (600, 872)])
def test_wilson_interval(right, rows):
    correct = np.arange(rows) < right
    accuracy, low, high = scoring.accuracy_interval(correct)
    assert accuracy == accuracy_score(np.ones(rows), correct)
    assert (low, high) == pytest.approx(wilson(right, rows), abs=1e-12)
    assert low <= accuracy <= high


def test_intervals_of_nothing():
    with pytest.raises(UserError, match="at least one row"):
        scoring.accuracy_interval(np.array([], bool))
    with pytest.raises(UserError, match="at least two"):
        scoring.mean_interval(np.array([1.0]))


def test_mean_interval_is_near_the_normal_one_and_repeatable():
    values = np.random.default_rng(5).normal(3, 2, 500)
    mean, low, high = scoring.mean_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(500)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert scoring.mean_interval(values) == (mean, low, high)
    assert scoring.mean_interval(np.full(4, 2.5)) == (2.5, 2.5, 2.5)


def test_paired_difference_is_sharper_than_two_intervals():
    generator = np.random.default_rng(0)
    theirs = generator.random(400) < 0.5
    ours = theirs | (generator.random(400) < 0.1)  # right wherever they are, and in some rows more
    difference, low, high = scoring.paired_difference(ours, theirs)
    assert difference == pytest.approx(ours.mean() - theirs.mean())
    assert 0 < low < difference < high
    assert scoring.accuracy_interval(theirs)[2] > scoring.accuracy_interval(ours)[1], "apart, they overlap"
    assert scoring.paired_difference(ours, ours) == (0, 0, 0)


PREDICTIONS = [
    "The cat sat on the mat. It was warm!",
    "Nothing of this is right",
    "",
    "A man was running down the street.\nPolice say he was chased by dogs.",
]
REFERENCES = [
    "A cat was sitting on the mat.\nIt was very warm there.",
    "Completely different words",
    "Something was expected.",
    "Police say a man was chased by two dogs.\nHe was running down the main street.",
]


def test_rouge_1_by_hand():
    """Prediction 4 against reference 4: unigrams stemmed and clipped, F1."""
    prediction = ["a", "man", "was", "run", "down", "the", "street", "polic", "say", "he", "was", "chase", "by", "dog"]
    reference = [
        "polic",
        "say",
        "a",
        "man",
        "was",
        "chase",
        "by",
        "two",
        "dog",
        "he",
        "was",
        "run",
        "down",
        "the",
        "main",
        "street",
    ]
    overlap = sum(min(prediction.count(w), reference.count(w)) for w in set(prediction))
    f1 = 100 * 2 * overlap / (len(prediction) + len(reference))
    assert scoring.rouge(PREDICTIONS, REFERENCES)["rouge1"][3] == pytest.approx(f1)


def test_rouge_against_the_library_and_sentences():
    scores = scoring.rouge(PREDICTIONS, REFERENCES)
    scorer = RougeScorer(["rouge2", "rougeL"], use_stemmer=True)
    for i, (prediction, reference) in enumerate(zip(PREDICTIONS, REFERENCES, strict=True)):
        for name in ("rouge2", "rougeL"):
            assert scores[name][i] == pytest.approx(100 * scorer.score(reference, prediction)[name].fmeasure)
    assert scores["rougeLsum"][3] > scores["rougeL"][3], "sentences in another order cost Lsum nothing"
    assert scores["rougeLsum"][2] == scores["rouge1"][2] == 0, "an empty prediction"
    one_line = [text.replace("\n", " ") for text in PREDICTIONS]
    assert scoring.rouge(one_line, REFERENCES)["rougeLsum"].tolist() == scores["rougeLsum"].tolist()


def test_bleu_is_sacrebleus_corpus_bleu():
    score, low, high = scoring.bleu(PREDICTIONS, REFERENCES)
    assert score == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score, abs=1e-9)
    assert low <= score <= high
    assert scoring.bleu(REFERENCES, REFERENCES) == pytest.approx((100, 100, 100))
    assert scoring.bleu(["", ""], ["a b c d", "e"])[0] == sacrebleu.corpus_bleu(["", ""], [["a b c d", "e"]]).score == 0


def test_summarization_scores():
    scores = scoring.summarization_scores(PREDICTIONS, REFERENCES)
    assert list(scores) == ["bleu", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    for name in scoring.ROUGE:
        assert scores[name][0] == pytest.approx(scoring.rouge(PREDICTIONS, REFERENCES)[name].mean())
        assert 0 <= scores[name][1] <= scores[name][0] <= scores[name][2] <= 100


def test_real_model_and_rows():
    """Rows with padding, three-token words and the real tokenizer, against a row at a time by hand."""
    if not (DATA / "models/base-6m").is_dir() or not (DATA / "sst2").is_dir():
        pytest.skip(f"no models/base-6m or sst2 under {DATA}; set BITDISTILL_DATA")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "models/base-6m")
    model = AutoModelForCausalLM.from_pretrained(DATA / "models/base-6m")
    settings = {"prompt": "{sentence}\nSentiment:", "truncate_column": "sentence", "label_column": "label"}
    task = Task("sentiment", "classification", **settings, labels={0: "negative", 1: "positive"})
    rows = tasks.load_rows(task, "validation", file=DATA / "sst2/validation.jsonl", limit=12)
    prompts, _ = tasks.encode_prompts(task, rows, tokenizer, 64)
    words = label_tokens(task, tokenizer)
    assert [len(word) for word in words] == [3, 2]
    likelihoods = scoring.classify(scoring.torch_logits(model, tasks.pad_token(tokenizer)), prompts, words, 5)[1]
    expected = [[by_hand(model, prompt, word) for word in words] for prompt in prompts]
    np.testing.assert_allclose(likelihoods, expected, rtol=0, atol=5e-5)
