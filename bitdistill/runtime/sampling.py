"""From logits to the next token: the largest, or drawn from the part of the distribution that a few settings leave. numpy
only.

The settings have transformers' names, mean what its LogitsProcessors of these names do, and are applied in the order in
which its `generate` applies them:

    1. repetition_penalty   tokens of the prompt and of the answer so far: l / r where l >= 0, l * r where l < 0
    2. temperature          l / temperature; 0 means: take the largest, and stop here
    3. top_k                keep the k largest (and what ties with the k-th)
    4. top_p                keep the likeliest tokens until their probabilities reach p, the one that reaches it included
    5. min_p                keep tokens of at least min_p times the likeliest one's probability
    6. draw                 from the softmax of what is left

A setting that could not have an effect (top_k without a temperature) is refused. Numerics: fp32 as in transformers, with
sums in fp64. Of equal logits at the border of top_p the lower ids stay; in transformers that depends on its sort.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitdistill.errors import UserError

DRAW_BLOCK = 1024  # tokens; a cumulative sum over a whole vocabulary takes longer than all the rest


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy decoding.

    Args:
        temperature: 0 takes the likeliest token; above 0 draws.
        top_k: at least 1; None keeps all.
        top_p: 0 to 1; 1 keeps all.
        min_p: 0 to 1; 0 keeps all.
        repetition_penalty: above 0; 1 is none, above 1 makes repetitions rarer. Also of greedy decoding.
        seed: of the draws.

    Raises:
        UserError: a setting out of its range, or top_k, top_p or min_p without a temperature.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        finite = math.isfinite
        for field, expected, right in (
            ("temperature", "a number of 0 or more (0 is greedy)", finite(self.temperature) and self.temperature >= 0),
            ("top_k", "at least 1, or nothing to keep all tokens", self.top_k is None or self.top_k >= 1),
            ("top_p", "a number from 0 to 1", 0 <= self.top_p <= 1),
            ("min_p", "a number from 0 to 1", 0 <= self.min_p <= 1),
            (
                "repetition_penalty",
                "a number above 0 (1 is none)",
                finite(self.repetition_penalty) and self.repetition_penalty > 0,
            ),
            ("seed", "0 or more", self.seed >= 0),
        ):
            if not right:
                raise UserError(
                    field, expected=expected, got=str(getattr(self, field)), do="Give a number in this range."
                )
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0):
            raise UserError(
                "temperature",
                expected="a number above 0 where top_k, top_p or min_p is given",
                got="0, which takes the likeliest token whatever they say",
                do="Give a temperature, such as 1, or leave them out.",
            )


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        sampling: the settings.
        prompt_ids: the prompt, whose tokens count as repeated.
        vocabulary: V.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], vocabulary: int):
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = None
        if sampling.repetition_penalty != 1:
            self._seen = np.zeros(vocabulary, bool)
            self._seen[np.asarray(prompt_ids, np.int64)] = True

    def choose(self, logits: np.ndarray) -> int:
        """The next token.

        Args:
            logits: float32 (V,); left as they are.
        """
        if self._seen is not None:
            logits = penalize_repetition(logits, self._seen, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            token = draw(warp(logits, self.sampling), self._random.random())
        if self._seen is not None:
            self._seen[token] = True
        return token


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last dimension, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def penalize_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """``l / penalty`` where l >= 0, ``l * penalty`` where l < 0, of the tokens that were seen.

    Args:
        logits: float32 (V,). seen: bool (V,).
        penalty: above 1 makes repetitions rarer.

    Returns: float32 (V,), a copy. Numerics: transformers' RepetitionPenaltyLogitsProcessor bit for bit.
    """
    factor = np.float32(penalty)
    logits = logits.copy()
    repeated = logits[seen]
    logits[seen] = np.where(repeated < 0, repeated * factor, repeated / factor)
    return logits


def warp(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Steps 2 to 5 of the module's list: the scores whose softmax is drawn from; -inf is out.

    Args:
        logits: float32 (V,).
        sampling: which of the steps apply.

    Returns: float32 (V,), the largest 0 (softmax does not see a shift, and tiny temperatures do not overflow).
    """
    with np.errstate(over="ignore"):  # a tiny temperature: all but the largest are -inf
        scores = (logits - logits.max()) / np.float32(max(sampling.temperature, np.finfo(np.float32).tiny))
    if sampling.top_k is not None:
        scores = keep_top_k(scores, sampling.top_k)
    if sampling.top_p < 1:
        scores = keep_top_p(scores, sampling.top_p)
    if sampling.min_p > 0:
        scores = keep_min_p(scores, sampling.min_p)
    return scores


def keep_top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """-inf for all scores (float32 (V,)) below the k-th largest; what ties with it stays."""
    if k >= len(scores):
        return scores
    return np.where(scores < np.partition(scores, -k)[-k], np.float32(-np.inf), scores)


def keep_top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """-inf for all but the smallest set of likeliest tokens whose probabilities sum to p or more; at least one stays.

    Args:
        scores: float32 (V,).
        p: the probability that the kept tokens reach together.

    Only candidates are sorted: tokens below (1 - p) / V in probability sum to less than 1 - p together, so the likelier
    ones reach p without them.
    """
    weights = np.exp(scores - scores.max())
    total = weights.sum(dtype=np.float64)
    candidates = np.flatnonzero(weights >= (1 - p) / len(scores) * total)
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    sorted_weights = weights[order].astype(np.float64)
    before = sorted_weights.cumsum() - sorted_weights  # of all likelier tokens
    kept = order[before < p * total]
    kept = order[:1] if len(kept) == 0 else kept
    result = np.full_like(scores, -np.inf)
    result[kept] = scores[kept]
    return result


def keep_min_p(scores: np.ndarray, min_p: float) -> np.ndarray:
    """-inf for all scores (float32 (V,)) less probable than min_p times the likeliest: ``s < max s + ln(min_p)``."""
    return np.where(scores < scores.max() + np.float32(math.log(min_p)), np.float32(-np.inf), scores)


def draw(scores: np.ndarray, uniform: float) -> int:
    """A token of probability softmax(scores), by the inverse of the cumulative distribution: first of blocks, then in one.

    Args:
        scores: float32 (V,), the largest finite. uniform: in [0, 1).
    """
    kept = np.flatnonzero(scores > -np.inf)
    if len(kept) < len(scores):  # few are left of a vocabulary
        return int(kept[draw(scores[kept], uniform)])
    weights = np.exp(scores - scores.max())
    sums = np.add.reduceat(weights, np.arange(0, len(weights), DRAW_BLOCK), dtype=np.float64).cumsum()
    target = min(uniform * sums[-1], np.nextafter(sums[-1], 0))  # below the total even after rounding
    # What is the first above a number has a weight: neither a block nor a token of weight 0 is found.
    block = int(np.searchsorted(sums, target, side="right"))
    start = block * DRAW_BLOCK
    inside = weights[start : start + DRAW_BLOCK].astype(np.float64).cumsum()
    place = np.searchsorted(inside, target - (sums[block - 1] if block else 0), side="right")
    if place == len(inside):  # the two ways of adding up differ by an ulp
        place = np.flatnonzero(weights[start : start + DRAW_BLOCK])[-1]
    return start + int(place)
