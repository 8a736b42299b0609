"""The CPU runtime: its logits against the plain forward, its texts alone, in company and from the prompt cache, its ends."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM

from bitdistill.errors import UserError
from bitdistill.evaluation import scoring
from bitdistill.export.write import write_packed
from bitdistill.kernels.cpu.decoder import Decoder
from bitdistill.runtime import base, batching
from bitdistill.runtime import cpu as runtime
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.packed_file import read_packed
from bitdistill.runtime.plain import plain_logits
from bitdistill.runtime.sampling import Sampler, Sampling
from bitdistill.runtime.slots import Slots
from bitdistill.runtime.text_stream import TextStream
from bitdistill.student.refine import refine
from tiny_students import CONFIGS, prompt, student

DATA = Path(os.environ.get("BITDISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def byte_tokenizer():
    """A token a byte, so that every non-ASCII character spans tokens; ids 0..255 are bytes, 256 begins a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return tokenizer


def packed_runtime(folder, model, threads=1, kv_cache="fp32", context=None, **options):
    write_packed(folder / "s", model, **options)
    return Runtime(folder / "s", threads, kv_cache, context)


def file_embedding(model, packed):
    """The student with the embedding that the file holds, so that only float noise remains."""
    with torch.no_grad():
        for name in packed.config.tables():
            model.get_submodule(name).weight.copy_(torch.from_numpy(packed.table(name)))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """One that never ends a text by itself."""
    model = student("qwen3")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return packed_runtime(tmp_path_factory.mktemp("runtime"), model)


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["two", "all", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_plain_forwards(tmp_path, name, norms):
    """Single tokens, where an ulp seldom flips a code; then texts past every window, as near as the flips allow."""
    got = packed_runtime(tmp_path, student(name, norms))
    texts = [[token] for token in range(3, 33)]
    differences = [
        np.abs(got.logits(ids) - want).max() / want.std()
        for ids, want in zip(texts, plain_logits(got.model, texts), strict=True)
    ]
    assert max(differences) < 0.2
    assert sum(difference < 5e-5 for difference in differences) >= 20
    want = plain_logits(got.model, [prompt(40)])[0]
    logits = got.logits(prompt(40))
    assert (logits.dtype, logits.shape) == (np.float32, want.shape)
    assert np.sqrt(np.mean((logits - want) ** 2)) < 0.05 * want.std()


@pytest.mark.parametrize("embedding", ["fp16", "int8", "int4", "ternary"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("packing", ["2bit", "base3"])
def test_file_formats(tmp_path, name, embedding, packing):
    got = packed_runtime(tmp_path, student(name), embedding=embedding, packing=packing)
    texts = [[token] for token in range(3, 23)]
    wants = plain_logits(got.model, texts)
    differences = [np.abs(got.logits(ids) - want).max() / want.std() for ids, want in zip(texts, wants, strict=True)]
    assert np.median(differences) < 2e-4  # integer tables take x in steps of 1 / 32512 of its peak


def test_packing_threads_and_cuts_do_not_change_a_bit(tmp_path):
    model, ids = student("qwen3"), prompt(9)
    want = packed_runtime(tmp_path, model, packing="base3").logits(ids)
    for threads in (1, 2, 3):
        got = packed_runtime(tmp_path, model, packing="2bit", threads=threads)
        np.testing.assert_array_equal(got.logits(ids), want)
        np.testing.assert_array_equal(got.logits(ids, last_only=True), want[-1:])
        cache = got.new_cache(9)
        parts = [got.logits(ids[a:b], cache=cache) for a, b in itertools.pairwise([0, 4, 5, 6, 9])]
        np.testing.assert_array_equal(np.concatenate(parts), want)
        assert cache.length == 9


@pytest.mark.parametrize("kv_cache", ["bf16", "int8"])
def test_kv_cache_formats(tmp_path, kv_cache):
    """Near fp32, not equal, and smaller."""
    model, ids = student("qwen3"), prompt(40)
    full = packed_runtime(tmp_path, model)
    small = Runtime(tmp_path / "s", 1, kv_cache)
    want, got = full.logits(ids), small.logits(ids)
    assert 0 < np.sqrt(np.mean((got - want) ** 2)) < 0.2 * want.std()
    assert small.new_cache(64).keys_values.nbytes < 0.7 * full.new_cache(64).keys_values.nbytes


def test_the_file_is_used_from_its_memory_map(tmp_path):
    got = packed_runtime(tmp_path, student("qwen3"))
    weight = got._decoder_model.layers[0].up.weight
    base = weight
    while isinstance(base, np.ndarray) and base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not weight.flags.writeable
    assert read_packed(tmp_path / "s").config == got.model.config
    assert got.file_bytes == (tmp_path / "s").stat().st_size


# --- one text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_the_plain_forwards_and_transformers(tmp_path, name):
    """Over the whole context; up to the first near-tie, from where on they may tell different stories."""
    model, ids = student(name), prompt(26)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    got = packed_runtime(tmp_path, model)
    file_embedding(model, got.model)
    ours = list(got.generate_ids(ids, 38))
    assert (len(ours), got.stats.stopped_by) == (38, "length")
    logits = plain_logits(got.model, [(ids + ours)[:-1]])[0][len(ids) - 1 :]
    top = np.sort(logits, axis=1)
    near_ties = np.flatnonzero(top[:, -1] - top[:, -2] < 0.05 * logits.std())
    sure = near_ties[0] if len(near_ties) else 38
    assert sure >= 2
    agree = logits.argmax(axis=1) == ours
    assert agree[:sure].all()
    assert agree.mean() > 0.8
    with torch.no_grad():
        output = model.generate(torch.tensor([ids]), max_new_tokens=38, do_sample=False, pad_token_id=0)
    assert output[0, len(ids) :].tolist()[:sure] == ours[:sure]


def test_end_of_text_and_context(tmp_path):
    model = student("qwen3")
    got = packed_runtime(tmp_path, model)
    ids = prompt(60)
    assert len(list(got.generate_ids(ids, 100))) <= 5
    model.generation_config.eos_token_id = list(range(97))
    got = packed_runtime(tmp_path, model)
    assert list(got.generate_ids(ids, 100)) == []
    assert got.stats.stopped_by == "eos"
    assert got.stats.new_tokens == 0
    model.generation_config.eos_token_id = [96]
    model.lm_head.weight.data[96] = 0
    got = packed_runtime(tmp_path, model)
    whole = list(got.generate_ids(ids, 100))
    assert len(whole) == 5  # the 64th position still predicts a 65th token
    assert got.stats.stopped_by == "context"
    short = packed_runtime(tmp_path, model, context=62)
    assert list(short.generate_ids(ids, 100)) == whole[:3]
    assert short.stats.stopped_by == "context"
    with pytest.raises(UserError, match="at most 62 tokens; got 63"):
        list(short.generate_ids(prompt(63), 1))
    assert [a.stopped_by for a in short.generate_batch([ids, ids[:3]], 4)] == ["context", "length"]


def test_sampling_settings_reach_the_sampler(qwen3):
    ids = prompt(5)

    def said(**options):
        return list(qwen3.generate_ids(ids, 20, Sampling(**options)))

    plain = said()
    assert said(temperature=1.0, top_k=1, seed=3) == plain
    assert said(temperature=1.0, top_p=0.0, seed=3) == plain
    assert said(temperature=1.0, min_p=1.0, seed=3) == plain
    assert said(temperature=1e-6, seed=3) == plain
    first = said(temperature=3.0, seed=1)
    assert said(temperature=3.0, seed=1) == first
    assert said(temperature=3.0, seed=2) != first
    new = said(repetition_penalty=1e6)
    assert len(set(new)) == 20
    assert not set(new) & set(ids)


def test_stats(qwen3):
    qwen3.forget()
    ids = prompt(10)
    assert len(list(qwen3.generate_ids(ids, 6))) == 6
    stats, config = qwen3.stats, qwen3.model.config
    assert (stats.prompt_tokens, stats.cached_tokens, stats.new_tokens, stats.decoded_tokens) == (10, 0, 6, 5)
    assert stats.prompt_seconds > 0
    assert stats.tokens_per_second == 5 / stats.decode_seconds
    assert stats.prompt_tokens_per_second == 10 / stats.prompt_seconds
    position = 2 * 4 * config.num_key_value_heads * config.head_dim  # of one layer, at least: rows may be padded
    assert stats.kv_read_bytes >= 3 * position * sum(range(11, 16))
    assert stats.kv_cache_bytes == qwen3._slots.cache.nbytes
    assert stats.kv_read_bytes * qwen3._slots.cache.padded_capacity == stats.kv_cache_bytes * sum(range(11, 16))
    packed = sum(t.nbytes for name, t in qwen3.model.tensors.items() if name.endswith("_packed"))
    assert stats.weight_bytes == packed + 97 * 64 * 2
    assert stats.read_bytes_per_token == stats.weight_bytes + stats.kv_read_bytes / 5
    assert 0 < stats.resident_bytes == qwen3.resident_bytes


# --- the prompt cache -------------------------------------------------------------------------------------------------


def fed(monkeypatch):
    """Records the rows of every call of a decoder: [(token, slot, position), ...]."""
    calls, forward = [], Decoder.forward

    def recording(self, ids, slots, positions, *args, **options):
        calls.append(list(zip(ids, slots, positions, strict=True)))
        return forward(self, ids, slots, positions, *args, **options)

    monkeypatch.setattr(Decoder, "forward", recording)
    return calls


def test_a_known_beginning_is_not_computed_again(qwen3, monkeypatch):
    ids = prompt(20)
    qwen3.forget()
    want = list(qwen3.generate_ids(ids, 8))
    calls = fed(monkeypatch)
    assert list(qwen3.generate_ids(ids, 8)) == want
    assert [position for _, _, position in calls[0]] == [19]  # the last token, for its logits
    assert qwen3.stats.cached_tokens == 19
    turn = [*ids, *want, 5, 6]  # a further turn of a conversation: all but the last token of the answer is there
    calls.clear()
    got = list(qwen3.generate_ids(turn, 4))
    assert [position for _, _, position in calls[0]] == [27, 28, 29]
    other = [*ids[:7], 9, 9]
    calls.clear()
    after = list(qwen3.generate_ids(other, 4))
    assert [position for _, _, position in calls[0]] == [7, 8]
    qwen3.forget()
    assert list(qwen3.generate_ids(turn, 4)) == got
    qwen3.forget()
    assert list(qwen3.generate_ids(other, 4)) == after
    assert qwen3.stats.cached_tokens == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=6), min_size=1, max_size=8), st.integers(1, 3))
def test_slots_hold_what_they_say(prompts, count):
    """Against a cache that is only a table of tokens: what a slot claims to hold is always there."""

    class Tokens:
        slots, capacity, padded_capacity, nbytes = count, 8, 8, 8 * count

        def __init__(self):
            self.rows = [[None] * 8 for _ in range(count)]

        def copy(self, source, target, length):
            self.rows[target][:length] = self.rows[source][:length]

    cache = Tokens()
    slots, running = Slots(cache, [None]), []
    for number, ids in enumerate(prompts):
        expected = slots.shared(ids)
        slot = slots.take(ids)
        known = len(slots.ids[slot])
        assert known == expected < len(ids)
        cache.rows[slot][known : len(ids)] = ids[known:]
        slots.ids[slot] = list(ids)
        running.append(slot)
        assert len(set(running)) == len(running) == slots.busy
        for held, row in zip(slots.ids, cache.rows, strict=True):
            assert row[: len(held)] == held
        if number % 2 or len(running) == count:
            slots.give_back(running.pop(0))


def test_more_room_is_made_when_it_is_needed(qwen3, monkeypatch):
    """And what was known is taken along."""
    monkeypatch.setattr(base, "MIN_CAPACITY", 8)
    long, short = prompt(30), prompt(4, seed=1)
    qwen3.forget()
    want = list(qwen3.generate_ids(long, 20)), list(qwen3.generate_ids(short, 2))
    qwen3.forget()
    assert list(qwen3.generate_ids(short, 2)) == want[1]
    assert qwen3._slots.cache.capacity == 8
    assert list(qwen3.generate_ids(long, 2)) == want[0][:2]
    assert qwen3._slots.cache.capacity == 32
    assert list(qwen3.generate_ids(long, 20)) == want[0]
    assert qwen3._slots.cache.capacity == 64
    assert qwen3.stats.cached_tokens == 29
    answers = {answer.index: answer for answer in qwen3.generate_batch([short, long, long], 20, slots=3)}
    assert qwen3._slots.cache.slots == 3
    assert answers[0].token_ids[:2] == want[1]
    assert [answers[i].token_ids for i in (1, 2)] == [want[0]] * 2
    assert [answers[i].cached_tokens for i in (1, 2)] == [29, 29]
    assert list(qwen3.generate_ids(prompt(60, seed=3), 2))
    assert len(qwen3._slots.ids) == 3


@pytest.mark.parametrize("kv_cache", ["fp32", "bf16", "int8"])
def test_a_server_s_cache_grows_with_its_sequences(tmp_path, monkeypatch, kv_cache):
    """And not with the context; sequences that are being computed go on, and what has ended can be used again."""
    monkeypatch.setattr(base, "MIN_CAPACITY", 8)
    model = student("qwen3")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.config.max_position_embeddings = 128
    got = packed_runtime(tmp_path, model, kv_cache=kv_cache)
    prompts, counts = [prompt(3), prompt(6, seed=1), prompt(25, seed=2)], [5, 20, 30]
    want = [list(got.generate_ids(ids, count)) for ids, count in zip(prompts, counts, strict=True)]
    batch = got.new_batch(3)
    requests = [got.new_request(ids, count, Sampling()) for ids, count in zip(prompts, counts, strict=True)]
    capacities = []
    for request in requests:  # each joins while those before it are being computed
        batch.waiting.append(request)
        for _ in range(4):
            list(batch.step())
        capacities.append(batch._slots.cache.capacity)
    assert capacities == [8, 16, 32]
    while batch:
        list(batch.step())
    assert batch._slots.cache.capacity == 64 < got.context
    assert [request.ids[request.prompt_tokens :] for request in requests] == want
    again = got.new_request(requests[2].ids[:50], 1, Sampling())
    batch.waiting.append(again)
    while batch:
        list(batch.step())
    assert (again.cached_tokens, again.ids[-1]) == (49, requests[2].ids[50])


# --- many texts -------------------------------------------------------------------------------------------------------


def alone(got, ids, index, count, options):
    got.forget()
    return list(got.generate_ids(ids, count, Sampling(**{**options, "seed": options.get("seed", 0) + index})))


@pytest.mark.parametrize("rows", [256, 5])
@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.1}])
def test_texts_in_company_are_those_alone(qwen3, monkeypatch, slots, options, rows):
    """Lengths that end at different times, prompts with common beginnings, pieces of prompts among decoding rows."""
    monkeypatch.setattr(batching, "ROWS_PER_STEP", rows)
    monkeypatch.setattr(batching, "WORTH_WAITING", 4)
    shared = prompt(21, seed=9)
    prompts = [
        prompt(1),
        prompt(30, seed=1),
        shared,
        [*shared, 5],
        [*shared, 6, 7],
        prompt(17, seed=2),
        shared[:12],
        shared,
    ]
    wants = [alone(qwen3, ids, index, 12, options) for index, ids in enumerate(prompts)]
    qwen3.forget()
    calls = fed(monkeypatch)
    answers = list(qwen3.generate_batch(prompts, 12, Sampling(**options), slots=slots))
    assert sorted(answer.index for answer in answers) == list(range(len(prompts)))
    for answer in answers:
        assert answer.token_ids == wants[answer.index]
        assert (answer.prompt_tokens, answer.stopped_by) == (len(prompts[answer.index]), "length")
        assert answer.text is None
    assert max(len(call) for call in calls) <= max(rows, slots + 1)
    assert len({slot for call in calls for _, slot, _ in call}) <= slots
    assert qwen3.stats.cached_tokens >= 2 * 21 + 11  # the shared beginning was computed once
    assert qwen3.stats.new_tokens == 12 * len(prompts)
    assert qwen3._slots.busy == 0


def test_a_queue_fills_the_slots_as_they_become_free(tmp_path, monkeypatch):
    model = student("qwen3")
    got = packed_runtime(tmp_path, model)
    prompts = [prompt(4 + index % 3, seed=index) for index in range(12)]
    calls = fed(monkeypatch)
    answers = list(got.generate_batch(prompts, 10, slots=4))
    together = [len({slot for _, slot, _ in call}) for call in calls]
    assert len(answers) == 12
    assert max(together) == 4
    full = together[:-10]  # until the queue is empty: never fewer than four
    assert full
    assert set(full) == {4}


def test_unfinished_iterators_side_by_side(qwen3):
    """Each keeps its slot; a second one makes new room rather than disturb the first."""
    a, b = prompt(6), prompt(9, seed=1)
    wants = [list(qwen3.generate_ids(ids, 10)) for ids in (a, b)]
    qwen3.forget()
    both = zip(qwen3.generate_ids(a, 10), qwen3.generate_ids(b, 10), strict=True)
    assert list(map(list, zip(*both, strict=True))) == wants


@pytest.mark.parametrize("when", ["close", "interrupt", "failure"])
def test_cancelled_generation_leaves_the_runtime_usable(qwen3, monkeypatch, when):
    ids = prompt(12)
    qwen3.forget()
    want = list(qwen3.generate_ids(ids, 10))
    qwen3.forget()
    stream = qwen3.generate_ids(ids, 10)
    assert [next(stream) for _ in range(3)] == want[:3]
    if when == "close":
        stream.close()
    else:
        error = KeyboardInterrupt if when == "interrupt" else RuntimeError
        forward = Decoder.forward

        def failing(self, *args, **options):
            forward(self, *args, **options)
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "forward", failing)
            with pytest.raises(error):
                next(stream)
    assert qwen3.stats.stopped_by == "cancelled"
    assert qwen3._slots.busy == 0
    assert list(qwen3.generate_ids(ids, 10)) == want
    batch = qwen3.generate_batch([ids, ids[:5], ids[:8]], 10, slots=2)
    next(batch)
    batch.close()
    assert qwen3._slots.busy == 0
    assert list(qwen3.generate_ids(ids, 10)) == want


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[[5], [6], [90]], [[5, 6], [7], [5, 8], [9, 9, 9]], [[4]]])
def test_classify_is_the_likelihood_of_the_labels(qwen3, labels):
    few_shot = prompt(25, seed=3)
    prompts = [[*few_shot, *prompt(1 + seed, seed=seed)] for seed in range(5)] + [few_shot, prompt(3), few_shot]
    qwen3.forget()
    got = qwen3.classify(prompts, labels)
    computed = qwen3.stats.prompt_tokens - qwen3.stats.cached_tokens
    # The five that begin with few_shot may each compute its last token, while its double computes it once more.
    assert computed <= 25 + 3 + sum(1 + seed for seed in range(5)) + 1 + 5
    for row, ids in zip(got, prompts, strict=True):
        for value, label in zip(row, labels, strict=True):
            cache = qwen3.new_cache(64)
            logits = qwen3.logits([*ids, *label], cache=cache)[len(ids) - 1 : -1].astype(np.float64)
            log_p = logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
            log_p -= logits.max(axis=1, keepdims=True)
            np.testing.assert_allclose(value, log_p[np.arange(len(label)), label].sum(), rtol=1e-12)
    np.testing.assert_array_equal(qwen3.classify(prompts[:2], labels), got[:2])  # from what is known already
    assert qwen3.classify([], labels).shape == (0, len(labels))
    assert qwen3.classify(prompts, []).shape == (len(prompts), 0)
    assert qwen3.classify(prompts, labels, progress=reversed).tolist() == got.tolist()


def test_classify_is_scoring_classify(tmp_path):
    """The meaning of `scoring.classify`, which scores the torch models it is compared with."""
    model = student("llama")
    got = packed_runtime(tmp_path, model)
    file_embedding(model, got.model)
    prompts, labels = [[seed] for seed in range(3, 30)], [[5], [6]]
    want = scoring.classify(scoring.torch_logits(model, 0), prompts, labels)[1]
    assert np.median(np.abs(got.classify(prompts, labels) - want)) < 1e-4


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A runtime over single bytes: random text, much of it invalid UTF-8."""
    model = student("qwen3")
    model.resize_token_embeddings(257, mean_resizing=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    tokenizer = byte_tokenizer()
    got = packed_runtime(tmp_path_factory.mktemp("talker"), model, tokenizer_json=tokenizer.to_str().encode())
    return got, tokenizer


def test_generated_pieces_are_the_decoded_text(talker):
    got, tokenizer = talker
    for seed in range(6):
        ids = list(got.generate_ids(tokenizer.encode("Größe").ids, 30, Sampling(temperature=2.0, seed=seed)))
        pieces = list(got.generate("Größe", 30, Sampling(temperature=2.0, seed=seed)))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert all(pieces)
        assert got.stats.new_tokens == 30
        assert got.stats.prompt_tokens == 1 + len("Größe".encode())
        assert got.stats.stopped_by == "length"


def test_texts_of_a_batch_are_those_alone(talker):
    got, _ = talker
    prompts = ["Größe", "x", "", "Größe und", "yy"]
    stop = ["a", "\ufffd\ufffd"]
    answers = {a.index: a for a in got.generate_batch(prompts, 25, Sampling(temperature=1.5), stop, slots=3)}
    for index, text in enumerate(prompts):
        assert answers[index].text == "".join(got.generate(text, 25, Sampling(temperature=1.5, seed=index), stop))
        assert answers[index].stopped_by == got.stats.stopped_by
    assert "stop" in {answer.stopped_by for answer in answers.values()}


def scripted(monkeypatch, tokenizer, text):
    """Makes the runtime say `text`, byte by byte: what is tested is how ids become pieces."""
    ids = iter(tokenizer.encode(text, add_special_tokens=False).ids)
    monkeypatch.setattr(Sampler, "choose", lambda *_: next(ids))
    return len(text.encode())


def test_characters_are_never_torn(talker, monkeypatch):
    got, tokenizer = talker
    text = "aé€😀z"
    count = scripted(monkeypatch, tokenizer, text)
    assert list(got.generate("x", count)) == list(text)
    scripted(monkeypatch, tokenizer, text)
    assert "".join(got.generate("x", 5)) == "aé\ufffd"  # cut inside the euro sign: said, not dropped


STOPS = [
    ("END", "one EN two EN"),
    (["END", "two"], "one EN "),
    (["absent"], "one EN two ENENDthree"),
    (["ENDx", "three"], "one EN two ENEND"),
    (["", "e"], "on"),
    ((), "one EN two ENENDthree"),
    (["threee"], "one EN two ENENDthree"),
]


@pytest.mark.parametrize(("stop", "want"), STOPS)
def test_stop_strings(talker, monkeypatch, stop, want):
    got, tokenizer = talker
    count = scripted(monkeypatch, tokenizer, "one EN two ENENDthree")
    pieces = list(got.generate("x", count, stop=stop))
    assert "".join(pieces) == want
    assert got.stats.stopped_by == ("length" if want.endswith("three") else "stop")
    assert got._slots.busy == 0


@settings(max_examples=100, deadline=None)
@given(
    st.text("abé€😀", max_size=20),
    st.lists(st.text("abé€", min_size=1, max_size=4), max_size=3),
    st.integers(0, 3),
)
def test_text_stream(text, stop, cut):
    """Whatever the pieces: together the text up to the first stop string; and nothing goes out that may have to come back."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    ids = ids[: max(len(ids) - cut, 0)]
    stream, out = TextStream(tokenizer, [5, 6], stop), ""
    for token in ids:
        out += stream.feed(token)
        if stream.stopped:
            break
    out += stream.finish()
    whole = bytes_of(ids, tokenizer).decode(errors="replace")
    places = [whole.find(word) for word in stop if word in whole]
    ends = [place + len(word) for word in stop if (place := whole.find(word)) >= 0]
    if places:
        assert stream.stopped
        first_end = min(ends)  # the stop string that is complete first
        assert out == whole[: min(whole.find(word) for word in stop if word in whole[:first_end])]
    else:
        assert not stream.stopped
        assert out.rstrip("\ufffd") == whole.rstrip("\ufffd")
        assert ("\ufffd" in out) == ("\ufffd" in whole)


def bytes_of(ids, tokenizer):
    letters = {index: letter for letter, index in tokenizer.get_vocab().items()}
    backward = {letter: byte for byte, letter in byte_letters().items()}
    return bytes(backward[letters[i]] for i in ids)


def byte_letters():
    """GPT-2's visible letter of each byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


# --- refusals, and what is imported -----------------------------------------------------------------------------------


def test_refusals(talker, tmp_path):
    got, _ = talker
    bare = packed_runtime(tmp_path, student("qwen3"))
    cases = {
        "threads": lambda: Runtime(tmp_path / "s", threads=0),
        "kv_cache": lambda: Runtime(tmp_path / "s", kv_cache="int3"),
        "context": lambda: Runtime(tmp_path / "s", context=65),
        "RUN_OR_FILE": lambda: list(bare.generate("text")),
        "max_new_tokens": lambda: list(bare.generate_ids([3], max_new_tokens=0)),
        "slots": lambda: list(bare.generate_batch([[3]], slots=17)),
        "labels": lambda: bare.classify([[3]], [[5], []]),
        "prompt": lambda: bare.classify([[3] * 64], [[5], [6, 7]]),
    }
    for field, call in cases.items():
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.field == field
    for call in (lambda: list(bare.generate_batch(["text"])), lambda: list(bare.generate_batch([[3]], stop="x"))):
        with pytest.raises(UserError, match="with a tokenizer"):
            call()
    for ids in ([], [97], [-1], [3] * 65):
        calls = (bare.logits, lambda ids: list(bare.generate_ids(ids)), lambda ids: bare.classify([ids], [[3]]))
        for call in (*calls, lambda ids: list(bare.generate_batch([[3], ids]))):
            with pytest.raises(UserError, match=r"^prompt: expected"):
                call(ids)
    with pytest.raises(UserError, match="at most 64 tokens; got 101"):
        list(got.generate("x" * 100))
    cache = bare.new_cache(4)
    bare.logits([3, 4, 5], cache=cache)
    with pytest.raises(UserError, match="at most 4 tokens; got 5"):
        bare.logits([3, 4], cache=cache)


def test_a_cache_too_large_for_memory(qwen3, monkeypatch):
    def too_large(*_):
        raise MemoryError("Unable to allocate 2 TiB")

    qwen3.forget()
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "KVCache", too_large)
        with pytest.raises(UserError, match="a KV cache that fits into memory; got 2 x 64 positions"):
            list(qwen3.generate_batch([[3], [4]], 5))
    assert len(list(qwen3.generate_ids([3], 5))) == 5


# Numba itself looks for scipy and yaml.
HEAVY = {
    "torch",
    "transformers",
    "sklearn",
    "scipy.stats",
    "pandas",
    "jsonargparse",
    "datasets",
    "threadpoolctl",
    "tqdm",
}


def test_nothing_heavy_is_imported(tmp_path):
    """The library and the command: only numpy, Numba, safetensors and tokenizers."""
    tokenizer = byte_tokenizer().to_str().encode()
    model = student("gemma3")
    model.resize_token_embeddings(257, mean_resizing=False)
    write_packed(tmp_path / "s", model, tokenizer_json=tokenizer)
    script = f"""
import sys
from bitdistill.runtime.cpu import Runtime
r = Runtime(sys.argv[1], 1)
print(r.logits([3, 4, 5]).shape, len(list(r.generate_ids([3, 4], 5))), flush=True)
from bitdistill.cli import main
sys.argv = ["bitdistill", "generate", sys.argv[1], "text", "--max_new_tokens", "3", "--threads", "1", "--profile"]
assert main() == 0
loaded = {HEAVY!r} & set(sys.modules)
assert not loaded, loaded
"""
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "s"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("(3, 257) ")
    assert "text" in result.stdout
    assert "prompt tokens" in result.stderr
    assert "a step" in result.stderr


# --- a real model -----------------------------------------------------------------------------------------------------


def test_a_story_equals_transformers(tmp_path):
    """A real model: with rounded activations, the same greedy words wherever transformers' choice is not a near-tie."""
    folder = DATA / "models" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set BITDISTILL_DATA to the folder with the real models")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    refine(model)
    got = packed_runtime(tmp_path, model, tokenizer_json=(folder / "tokenizer.json").read_bytes())
    file_embedding(model, got.model)
    ids = got.tokenizer.encode("Once upon a time, there was").ids
    with torch.no_grad():
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=80, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    want = output.sequences[0, len(ids) :].tolist()
    margins = [float(top[0, 0] - top[0, 1]) for top in (logits.topk(2).values for logits in output.logits)]
    sure = next((i for i, margin in enumerate(margins) if margin < 0.5), 80)
    ours = list(got.generate_ids(ids, 80))
    assert ours[:sure] == want[:sure]
    decode = got.tokenizer.decode
    assert "".join(got.generate("Once upon a time, there was", 80)) == decode(ids + ours)[len(decode(ids)) :]
