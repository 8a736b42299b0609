"""Sampling against transformers' processors, hand examples, and the distribution that comes out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bitdistill.errors import UserError
from bitdistill.runtime import sampling
from bitdistill.runtime.sampling import Sampler, Sampling

INF = np.float32(np.inf)
# Steps of 1/8, far above float noise, so that no threshold is met by rounding alone; and many ties.
LOGITS = hnp.arrays(np.float32, st.integers(1, 60), elements=st.integers(-80, 80).map(lambda x: x / 8))


def probabilities(scores):
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return weights / weights.sum()


def hf(processor, logits, ids=(0,)):
    return processor(torch.tensor([list(ids)]), torch.from_numpy(logits)[None].clone())[0].numpy()


def kept(scores):
    return set(np.flatnonzero(scores > -np.inf).tolist())


# --- each setting -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.sampled_from([0.5, 0.9, 1.1, 1.3, 5.0]), st.data())
def test_repetition_penalty_is_transformers(logits, penalty, data):
    ids = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1))
    seen = np.isin(np.arange(len(logits)), ids)
    before = logits.copy()
    got = sampling.penalize_repetition(logits, seen, penalty)
    np.testing.assert_array_equal(got, hf(RepetitionPenaltyLogitsProcessor(penalty), logits, ids))
    np.testing.assert_array_equal(logits, before)


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.integers(1, 70))
def test_top_k_is_transformers(logits, k):
    np.testing.assert_array_equal(sampling.keep_top_k(logits, k), hf(TopKLogitsWarper(k), logits))


@settings(max_examples=200, deadline=None)
@given(LOGITS, st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.77, 0.9, 0.95, 0.999, 1.0]))
def test_top_p_is_transformers_but_for_ties(logits, p):
    got, want = sampling.keep_top_p(logits, p), hf(TopPLogitsWarper(p), logits)
    assert (got[got > -INF] == logits[got > -INF]).all()
    sorted_got, sorted_want = np.sort(got), np.sort(want)  # which of equal scores is cut is left open there
    # A sum that meets p to a few ulp may fall to either side: then the sets differ by tokens around that boundary.
    shares = np.sort(probabilities(logits))[::-1]
    boundary = np.abs(np.cumsum(shares) - p).min() < 1e-6
    if not boundary:
        np.testing.assert_array_equal(sorted_got, sorted_want)
    # and the definition itself
    chosen = sorted(kept(got), key=lambda i: (-logits[i], i))
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert chosen == order[: len(chosen)]
    mass = probabilities(logits)[chosen]
    assert mass.sum() >= p - 1e-6
    assert len(chosen) == 1 or mass[:-1].sum() < p + 1e-6


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.sampled_from([0.01, 0.07, 0.33, 0.9, 1.0]))
def test_min_p_is_transformers(logits, min_p):
    np.testing.assert_array_equal(sampling.keep_min_p(logits, min_p), hf(MinPLogitsWarper(min_p), logits))


def test_by_hand():
    """Probabilities 0.5, 0.25, 0.125, 0.125."""
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    assert kept(sampling.keep_top_k(logits, 1)) == {0}
    assert kept(sampling.keep_top_k(logits, 3)) == {0, 1, 2, 3}  # the third ties with the fourth
    assert kept(sampling.keep_top_p(logits, 0.49)) == {0}
    assert kept(sampling.keep_top_p(logits, 0.51)) == {0, 1}
    assert kept(sampling.keep_top_p(logits, 0.8)) == {0, 1, 2}  # of the tie the lower id
    assert kept(sampling.keep_top_p(logits, 0.9)) == {0, 1, 2, 3}
    assert kept(sampling.keep_min_p(logits, 0.4)) == {0, 1}
    assert kept(sampling.keep_min_p(logits, 0.51)) == {0}
    got = sampling.penalize_repetition(np.array([2, -2, 3], np.float32), np.array([True, True, False]), 2.0)
    np.testing.assert_array_equal(got, [1, -4, 3])


# --- all together -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
        {"temperature": 1.5, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 0.8},
        {"temperature": 0.3},
        {"temperature": 2.0, "top_p": 0.95},
    ],
)
def test_the_whole_chain_is_transformers(options):
    """In its order, on logits like a model's: the same tokens stay, their probabilities within a few ulp."""
    rng = np.random.default_rng(0)
    chosen = Sampling(**options)
    for _ in range(20):
        logits = rng.normal(scale=4, size=5000).astype(np.float32)
        ids = rng.integers(0, 5000, 300)
        chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(chosen.repetition_penalty))])
        chain.append(TemperatureLogitsWarper(float(chosen.temperature)))
        if chosen.top_k:
            chain.append(TopKLogitsWarper(chosen.top_k))
        if chosen.top_p < 1:
            chain.append(TopPLogitsWarper(chosen.top_p))
        if chosen.min_p:
            chain.append(MinPLogitsWarper(chosen.min_p))
        want = hf(chain, logits, ids)
        seen = np.isin(np.arange(5000), ids)
        got = sampling.warp(sampling.penalize_repetition(logits, seen, chosen.repetition_penalty), chosen)
        assert len(kept(got) ^ kept(want)) <= 1  # a cumulative sum in fp32 there, in fp64 here
        both = sorted(kept(got) & kept(want))
        # scores reach 70, where fp32 has steps of 7.6e-6, and each side rounds a few times
        np.testing.assert_allclose(probabilities(got[both]), probabilities(want[both]), rtol=4e-5)


def test_draws_follow_the_probabilities():
    logits = np.array([1.0, 3.0, 2.0, 2.5, -np.inf], np.float32)
    sampler = Sampler(Sampling(temperature=0.5, top_k=3), [], 5)
    counts = np.bincount([sampler.choose(logits) for _ in range(20_000)], minlength=5) / 20_000
    weights = np.array([0, np.exp(6.0), np.exp(4.0), np.exp(5.0), 0])
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.012)


def test_draw_at_the_ends():
    scores = np.array([-np.inf, 0, -np.inf, 0, -np.inf], np.float32)
    assert sampling.draw(scores, 0.0) == 1
    assert sampling.draw(scores, 0.499) == 1
    assert sampling.draw(scores, 0.5) == 3
    assert sampling.draw(scores, np.nextafter(1.0, 0.0)) == 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_draw_over_several_blocks(data):
    """Against exact integers: weights are powers of two."""
    size = data.draw(st.sampled_from([1, 7, 8, 9, 40]))
    powers = data.draw(st.lists(st.integers(-3, 0) | st.none(), min_size=size, max_size=size))
    powers[data.draw(st.integers(0, size - 1))] = 0
    scores = np.array([-np.inf if power is None else power * np.log(2.0) for power in powers], np.float32)
    eighths = [0 if power is None else 2 ** (power + 3) for power in powers]
    number = data.draw(st.integers(0, sum(eighths) - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "DRAW_BLOCK", 8)
        got = sampling.draw(scores, (number + 0.5) / sum(eighths))
        assert got == next(i for i in range(size) if sum(eighths[: i + 1]) > number)
        assert eighths[sampling.draw(scores, 0.0)]
        assert eighths[sampling.draw(scores, float(np.nextafter(1.0, 0.0)))]


def test_seeds():
    logits = np.zeros(1000, np.float32)

    def drawn(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [], 1000)
        return [sampler.choose(logits) for _ in range(10)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_greedy_and_its_limits():
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = rng.normal(scale=5, size=300).astype(np.float32)
        best = int(logits.argmax())
        for options in ({}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 0.0}):
            assert Sampler(Sampling(**options), [1], 300).choose(logits) == best
        for temperature in (1e-6, 1e-38, 1e-300):
            assert Sampler(Sampling(temperature=temperature), [1], 300).choose(logits) == best
        assert Sampler(Sampling(temperature=1.0, min_p=1.0), [1], 300).choose(logits) == best


def test_repetition_counts_prompt_and_answer():
    sampler = Sampler(Sampling(repetition_penalty=2.0), [3], 4)
    logits = np.array([5, 4, 3, 6], np.float32)
    assert [sampler.choose(logits) for _ in range(4)] == [0, 1, 2, 3]  # 3 seen: 6 -> 3, ties with 2, which is lower
    np.testing.assert_array_equal(logits, [5, 4, 3, 6])


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"top_k": 5}),
        ("temperature", {"top_p": 0.5}),
        ("temperature", {"min_p": 0.5}),
        ("top_k", {"temperature": 1.0, "top_k": 0}),
        ("top_p", {"temperature": 1.0, "top_p": 1.1}),
        ("top_p", {"temperature": 1.0, "top_p": float("nan")}),
        ("min_p", {"temperature": 1.0, "min_p": -0.1}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("repetition_penalty", {"repetition_penalty": float("inf")}),
        ("seed", {"temperature": 1.0, "seed": -1}),
    ],
)
def test_refusals(field, options):
    with pytest.raises(UserError) as caught:
        Sampling(**options)
    assert caught.value.field == field
