"""Scores with confidence intervals: accuracy, ROUGE, BLEU, perplexity. One way of scoring for every kind of model.

* Classification: the label word with the largest likelihood, ``sum_t log p(word_t | prompt, word_<t)``, wins; of equal
  ones, the first. ``classify`` asks for logits through a small function such as ``torch_logits``. Words that differ only in
  their last token share a forward pass, so single-token words need one pass per row. The packed CPU runtime has its own
  ``classify`` with the same meaning, which computes the common beginnings of prompts once.
* Generation: greedy decoding, then ROUGE (rouge-score, stemmed, F1) and BLEU (sacrebleu, 13a), in percent. For ROUGE-Lsum a
  sentence ends at a line end, or after . ! or ? before white space.
* Intervals: Wilson for accuracy; percentile bootstrap over examples, with a fixed seed, for everything else. Two settings
  that were scored on the same rows are compared by ``paired_difference``, which is much sharper than two separate
  intervals.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.stats
import torch
from scipy.special import logsumexp
from torch import Tensor
from tqdm.auto import tqdm

from bitdistill.errors import UserError

RESAMPLES = 2000
CONFIDENCE = 0.95  # of every interval
SEED = 0  # of the resampling
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# (token lists of B rows, keep) -> float (B, keep, V): the logits at each row's last ``keep`` positions
LogitsOf = Callable[[list[list[int]], int], np.ndarray]


def torch_logits(model, pad_token_id: int) -> LogitsOf:
    """Logits of a Hugging Face causal LM, on its device, in float32.

    Rows are padded on the right, as in training, and the head is computed at the wanted positions only.
    """

    def logits_of(rows: list[list[int]], keep: int) -> np.ndarray:
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = torch.full((len(rows), int(lengths.max())), pad_token_id)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        wanted = lengths[:, None] - keep + torch.arange(keep)  # (B, keep)
        positions, places = wanted.unique(return_inverse=True)
        device = next(model.parameters()).device
        with evaluating(model):
            logits = model(
                input_ids=input_ids.to(device),
                attention_mask=mask.long().to(device),
                logits_to_keep=positions.to(device),
                use_cache=False,
            ).logits
        return logits[torch.arange(len(rows))[:, None], places].float().cpu().numpy()

    return logits_of


def classify(
    logits_of: LogitsOf,
    prompts: Sequence[list[int]],
    words: Sequence[list[int]],
    batch_size: int = 32,
    desc: str = "scoring",
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest word after each prompt.

    Args:
        logits_of: the model, as a function from token lists to logits.
        prompts: N token lists, from ``tasks.encode_prompts``. words: L token lists, from ``tasks.label_tokens``.
        batch_size: prompts at a time. desc: on the progress bar.

    Returns: (predictions int64 (N,), indices into ``words``; log-likelihoods float64 (N, L), natural logarithm).

    Numerics: log-softmax in float64 of the given logits.
    """
    likelihoods = np.zeros((len(prompts), len(words)))
    openings = sorted({tuple(word[:-1]) for word in words})  # one forward pass each
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # little padding; out of memory at once
    with tqdm(total=len(prompts), desc=desc) as progress:
        for begin in range(0, len(by_length), batch_size):
            batch = by_length[begin : begin + batch_size]
            for opening in openings:
                logits = logits_of([[*prompts[i], *opening] for i in batch], len(opening) + 1).astype(np.float64)
                total = logsumexp(logits, axis=-1)
                for column, word in enumerate(words):
                    if tuple(word[:-1]) == opening:
                        chosen = logits[:, np.arange(len(word)), word]  # (B, len(word))
                        likelihoods[batch, column] = (chosen - total).sum(axis=-1)
            progress.update(len(batch))
    return likelihoods.argmax(axis=1), likelihoods


def generate_greedy(
    model,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    batch_size: int = 8,
    desc: str = "generating",
) -> list[list[int]]:
    """Greedy continuation of each prompt, without the EOS that ends it.

    `eos_token_id` is one token or several. The model's own generation_config is left aside
    (its repetition penalty would not be greedy decoding).
    """
    from transformers import GenerationConfig

    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad_token_id
    )
    device = next(model.parameters()).device
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with tqdm(total=len(prompts), desc=desc) as progress:
        for begin in range(0, len(by_length), batch_size):
            batch = by_length[begin : begin + batch_size]
            length = len(prompts[batch[0]])
            padding = [length - len(prompts[i]) for i in batch]  # on the left: all answers begin in one column
            rows = [[pad_token_id] * pad + list(prompts[i]) for i, pad in zip(batch, padding, strict=True)]
            mask = [[0] * pad + [1] * (length - pad) for pad in padding]
            with evaluating(model), _plain_generation(model):
                output = model.generate(
                    torch.tensor(rows, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    generation_config=settings,
                )
            for i, ids in zip(batch, output[:, length:].tolist(), strict=True):
                end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
                answers[i] = ids[:end]
            progress.update(len(batch))
    return answers


def perplexity(model, blocks: Tensor, batch_size: int = 8, desc: str = "perplexity") -> dict[str, float]:
    """``exp(mean NLL)`` of next tokens over blocks (N, T): N * (T - 1) predictions, each within its block.

    Args:
        model: a Hugging Face model.
        blocks: int64 (N, T), from ``corpus.token_blocks``; no padding.
        batch_size: blocks at a time. desc: on the progress bar.

    Returns: {"perplexity", "low", "high" (95 %, bootstrap over blocks), "loss" (nats per token), "tokens"}.

    Numerics: log-softmax in float32, the mean in float64.
    """
    return summarize_losses(block_losses(model, blocks, batch_size, desc), blocks.shape[0] * (blocks.shape[1] - 1))


def summarize_losses(losses: np.ndarray, tokens: int) -> dict[str, float]:
    """What `perplexity` returns, of the mean losses of blocks of one length, float64 (N,), on so many tokens in all."""
    mean, low, high = mean_interval(losses)
    return {"perplexity": math.exp(mean), "low": math.exp(low), "high": math.exp(high), "loss": mean, "tokens": tokens}


def block_losses(model, blocks: Tensor, batch_size: int = 8, desc: str = "perplexity") -> np.ndarray:
    """Mean next-token loss of each block in nats, float64 (N,); arguments and numerics as in `perplexity`."""
    device = next(model.parameters()).device
    losses = []
    for batch in tqdm(blocks.split(batch_size), desc=desc):
        batch = batch.to(device)
        with evaluating(model):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(loss.double().view(len(batch), -1).mean(dim=1).cpu())
    return torch.cat(losses).numpy()


def accuracy_interval(correct: np.ndarray) -> tuple[float, float, float]:
    """(share of True, low, high): Wilson's score interval of a proportion; fractions, not percent.

    Raises:
        UserError: no rows.
    """
    correct = np.asarray(correct, bool)
    if not len(correct):
        raise UserError("validation_file", expected="at least one row", got="none", do="Give rows to score.")
    interval = scipy.stats.binomtest(int(correct.sum()), len(correct)).proportion_ci(CONFIDENCE, method="wilson")
    return float(correct.mean()), float(interval.low), float(interval.high)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): percentile bootstrap over examples.

    Args:
        values: (N,) one number for each example.

    Raises:
        UserError: fewer than two examples, of which nothing can be resampled.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        do = "Score more rows."
        raise UserError(
            "validation_file", expected="at least two examples for an interval", got=str(len(values)), do=do
        )
    interval = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 10**7 // len(values)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(values.mean()), float(interval.low), float(interval.high)


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """(mean of ours - theirs, low, high) over the same rows in the same order: ``mean_interval`` of the differences.

    Args:
        ours, theirs: (N,) one score for each example (correct or not, ROUGE, ...).
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, "paired scores are of the same rows"
    return mean_interval(ours - theirs)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """F1 of ROUGE-1, -2, -L and -Lsum of each example, in percent: {name: float64 (N,)}."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, use_stemmer=True)
    pairs = zip(references, predictions, strict=True)
    scores = [scorer.score(_sentences(reference), _sentences(prediction)) for reference, prediction in pairs]
    return {name: np.array([100 * score[name].fmeasure for score in scores]) for name in ROUGE}


def bleu(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, float, float]:
    """(corpus BLEU in percent, low, high at 95 %): one reference each; the corpus is resampled, not sentence scores."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    parts = [metric.corpus_score([p], [[r]]) for p, r in zip(predictions, references, strict=True)]
    counts = np.array([[*part.counts, *part.totals, part.sys_len, part.ref_len] for part in parts])  # BLEU is of sums

    def score(rows: np.ndarray) -> float:
        *grams, system, reference = rows.sum(axis=0).tolist()
        return BLEU.compute_bleu(grams[:4], grams[4:], system, reference, smooth_method="exp").score

    generator = np.random.default_rng(SEED)
    resampled = [score(counts[generator.integers(len(counts), size=len(counts))]) for _ in range(RESAMPLES)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return score(counts), float(low), float(high)


def summarization_scores(
    predictions: Sequence[str], references: Sequence[str]
) -> dict[str, tuple[float, float, float]]:
    """{"bleu", "rouge1", "rouge2", "rougeL", "rougeLsum"}: each (score, low, high), in percent, 95 % intervals.

    Raises:
        UserError: fewer than two examples.
    """
    assert len(predictions) == len(references)
    intervals = {name: mean_interval(scores) for name, scores in rouge(predictions, references).items()}
    return {"bleu": bleu(predictions, references), **intervals}


def _sentences(text: str) -> str:
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())


@contextlib.contextmanager
def evaluating(model) -> Iterator[None]:
    """Evaluation mode without gradients; the mode it had comes back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _plain_generation(model) -> Iterator[None]:
    """``generate`` fills what a caller leaves open from the model's generation_config: an empty one, for a while."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
