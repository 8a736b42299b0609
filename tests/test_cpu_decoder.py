"""The compiled decoder: right for every family (against PyTorch and against float64), bit-equal however it is run."""

import _thread
import dataclasses
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from bitdistill.kernels.cpu import decoder as decoder_module
from bitdistill.kernels.cpu.decoder import Decoder, KVCache, Table
from decoder_models import Float64Decoder, decoder_model, random_model
from tiny_students import CONFIGS, prompt, student

LENGTH = 20


def logits(model, ids, threads=1, dtype="fp32", **options):
    """(T, V) of one sequence in one call."""
    with Decoder(model, threads) as decoder:
        return decoder.forward(ids, [0] * len(ids), range(len(ids)), KVCache(model, 1, len(ids), dtype), **options)


# --- right --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["two", "all", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name, norms):
    """Tightly against float64, for PyTorch within its own distance from float64.

    Between two arithmetics an activation near a rounding boundary gets the neighboring code now and then, which moves
    the logits of that row and of the later ones by some hundredths: then another seed must show the tight bound.
    """
    errors = []
    for seed in range(4):
        torch_model = student(name, norms, seed)
        with torch.no_grad():
            for table in {torch_model.model.embed_tokens.weight, torch_model.lm_head.weight}:
                table.copy_(table.half().float())  # what an fp16 table holds
            ids = prompt(LENGTH, seed)
            theirs = torch_model(torch.tensor([ids])).logits[0].numpy()
        model = decoder_model(torch_model, ternary=("base3", "2bit")[seed % 2])
        want = Float64Decoder(model)(ids)
        got = logits(model, ids)
        assert np.isfinite(got).all()
        ours, torchs = (np.abs(x - want).max() / want.std() for x in (got, theirs))
        assert ours < 0.3, "more than a flipped code"
        errors.append((ours, torchs))
        if ours < 1e-5 and torchs < 1e-5:
            return
    assert min(ours for ours, _ in errors) < 1e-5, errors
    assert min(torchs for _, torchs in errors) < 1e-5, errors


@pytest.mark.parametrize("table", ["fp16", "int8", "int4", "2bit", "base3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_table(table, tied):
    errors = []
    for seed in range(3):
        model = random_model(table=table, seed=seed)
        if not tied:
            model = dataclasses.replace(model, head=random_model(table=table, seed=100 + seed).head)
        ids = prompt(LENGTH, seed)
        want = Float64Decoder(model)(ids)
        errors.append(np.abs(logits(model, ids) - want).max() / want.std())
    assert min(errors) < 3e-5, errors  # a 16-bit code of the last activations that flips costs 1e-5


@pytest.mark.parametrize("ternary", ["2bit", "base3"])
@pytest.mark.parametrize(("hidden", "heads", "kv_heads", "head_dim"), [(90, 3, 1, 30), (50, 5, 5, 6), (33, 2, 2, 256)])
def test_odd_sizes(ternary, hidden, heads, kv_heads, head_dim):
    errors = []
    for seed in range(3):
        model = random_model(
            hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, intermediate=71, vocabulary=97,
            ternary=ternary, table="fp16", seed=seed,
        )  # fmt: skip
        ids = prompt(LENGTH, seed)
        want = Float64Decoder(model)(ids)
        errors.append(np.abs(logits(model, ids, threads=2) - want).max() / want.std())
    assert min(errors) < 1e-5, errors


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 0.05), ("int8", 0.1)])
def test_small_caches_cost_what_they_round(dtype, bound):
    """test_cpu_attention.py has the arithmetic of each cache exactly; here, that rounded keys and values stay a small
    disturbance of the logits (relative to their spread, root mean square)."""
    model = random_model(table="fp16", head_dim=64)
    ids = prompt(60)
    exact = logits(model, ids)
    difference = logits(model, ids, dtype=dtype) - exact
    assert 0 < np.sqrt(np.square(difference).mean()) / exact.std() < bound


# --- the same, however it is run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_model():
    return random_model(window=40, table="int4", kv_heads=1, head_dim=24)


@pytest.fixture(scope="module")
def long_ids():
    return prompt(100)


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def whole(long_model, long_ids, dtype):
    return logits(long_model, long_ids, dtype=dtype)


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_threads_do_not_matter(long_model, long_ids, whole, dtype, threads):
    np.testing.assert_array_equal(logits(long_model, long_ids, threads, dtype), whole)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("cuts", [range(1, 100), [1, 2, 33, 34, 70], [99], [64]])
def test_cutting_a_prompt_into_calls_does_not_matter(long_model, long_ids, whole, dtype, cuts, threads):
    cache, bounds = KVCache(long_model, 1, 100, dtype), [0, *cuts, 100]
    with Decoder(long_model, threads) as decoder:
        parts = [
            decoder.forward(long_ids[start:stop], [0] * (stop - start), range(start, stop), cache)
            for start, stop in itertools.pairwise(bounds)
        ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_blocks_inside_a_call_do_not_matter(long_model, long_ids, whole, dtype, monkeypatch):
    monkeypatch.setattr(decoder_module, "ROWS_PER_BLOCK", 7)
    np.testing.assert_array_equal(logits(long_model, long_ids, 2, dtype), whole)
    some = [0, 6, 7, 50, 99]
    np.testing.assert_array_equal(logits(long_model, long_ids, 2, dtype, wanted=some), whole[some])


def test_sequences_side_by_side_do_not_matter(long_model, long_ids, whole, dtype):
    """Three slots: one gets its prompt while the others decode, rows in any order of slots."""
    cache = KVCache(long_model, 3, 100, dtype)
    fed, got = [0, 0, 0], [[], [], []]
    rng = np.random.default_rng(0)
    with Decoder(long_model, 2) as decoder:
        while min(fed) < 100:
            rows = []
            for slot in rng.permutation(3):
                size = int(rng.choice([0, 1, 1, 17]))
                rows += [(slot, position) for position in range(fed[slot], min(100, fed[slot] + size))]
                fed[slot] = min(100, fed[slot] + size)
            rows = [row for turn in zip(rows[::2], rows[1::2], strict=False) for row in turn] + rows[
                len(rows) // 2 * 2 :
            ]
            if rows:
                slots, positions = zip(*rows, strict=True)
                rows = decoder.forward([long_ids[p] for p in positions], slots, positions, cache)
                for slot, row in zip(slots, rows, strict=True):
                    got[slot].append(row)
    for slot in range(3):
        np.testing.assert_array_equal(np.stack(got[slot]), whole)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (6, 3)])
def test_spans_shared_among_threads_do_not_matter(heads, kv_heads, dtype):
    """A long prompt, one token at a time and a ragged batch: what one thread computes, however many share it."""
    length = 1100  # three spans; of one layer a row sees all, of the other 600 positions
    model = random_model(window=600, heads=heads, kv_heads=kv_heads, head_dim=24, table="fp16", hidden=64)
    ids, ends = prompt(length), [1, 2, 300, 511, 512, 513, 812, 1023, 1024, 1025, 1099]
    cache, slots = KVCache(model, len(ends), length, dtype), range(len(ends))
    with Decoder(model, 1) as decoder:
        want = decoder.forward(ids, [0] * length, range(length), cache)
    for slot in slots[1:]:
        cache.copy(0, slot, length)
    last = [ids[position] for position in ends]
    for threads in (2, 3, 7):
        with Decoder(model, threads) as decoder:
            assert decoder._parts.size == 0
            batch = decoder.forward(last, slots, ends, cache)
            np.testing.assert_array_equal(batch, want[ends])
            alone = [decoder.forward([ids[p]], [slot], [p], cache)[0] for slot, p in zip(slots, ends, strict=True)]
            np.testing.assert_array_equal(np.stack(alone), want[ends])
            few = decoder.forward(ids[-5:], [3] * 5, range(length - 5, length), cache)
            np.testing.assert_array_equal(few, want[-5:])
            assert decoder._parts.size > 0
            assert not decoder._arrived.any()
            np.testing.assert_array_equal(decoder.forward(ids, [1] * length, range(length), cache), want)


def test_slots_are_copied_cut_back_and_used_again(long_model, long_ids, whole, dtype):
    cache = KVCache(long_model, 2, 100, dtype)
    other = prompt(100, seed=5)
    with Decoder(long_model) as decoder:
        decoder.forward(other, [1] * 100, range(100), cache, wanted=[])  # slot 1 is full of something else
        decoder.forward(long_ids, [0] * 100, range(100), cache, wanted=[])
        cache.copy(0, 1, 37)
        got = decoder.forward(long_ids[37:], [1] * 63, range(37, 100), cache)
        np.testing.assert_array_equal(got, whole[37:])
        again = decoder.forward(long_ids[50:60], [0] * 10, range(50, 60), cache)  # back to position 50
        np.testing.assert_array_equal(again, whole[50:60])
        larger = KVCache(long_model, 3, 200, dtype)
        larger.copy(0, 2, 41, cache)
        got = decoder.forward(long_ids[41:], [2] * 59, range(41, 100), larger)
        np.testing.assert_array_equal(got, whole[41:])


def test_read_only_and_misaligned_weights():
    def displaced(value):
        if isinstance(value, np.ndarray) and value.ndim:
            raw = bytearray(value.nbytes + 1)
            raw[1:] = value.tobytes()
            array = np.frombuffer(raw, value.dtype, value.size, 1).reshape(value.shape)
            array.flags.writeable = False
            return array
        if dataclasses.is_dataclass(value):
            return dataclasses.replace(
                value, **{f.name: displaced(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        return [displaced(item) for item in value] if isinstance(value, list) else value

    for table in ("int4", "int8", "fp16"):
        model = random_model(table=table)
        ids = prompt(LENGTH)
        np.testing.assert_array_equal(logits(displaced(model), ids), logits(model, ids))


def test_nothing_compiled_gives_the_same(tmp_path):
    script = (
        "import numpy as np, decoder_models as d, test_cpu_decoder as t\n"
        "model = d.random_model(layers=1, hidden=32, intermediate=40, vocabulary=20, head_dim=8)\n"
        f"np.save({str(tmp_path / 'logits.npy')!r}, t.logits(model, [3, 7, 11], 2, 'int8'))"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, env=environment, check=True, timeout=300)
    model = random_model(layers=1, hidden=32, intermediate=40, vocabulary=20, head_dim=8)
    want = logits(model, [3, 7, 11], 2, "int8")
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), want, atol=1e-4 * want.std())


# --- calls ------------------------------------------------------------------------------------------------------------


def test_wanted_and_out(long_model, long_ids):
    cache = KVCache(long_model, 1, 100)
    whole = logits(long_model, long_ids)
    with Decoder(long_model, 2) as decoder:
        out = np.full((2, 97), np.nan, np.float32)
        assert decoder.forward(long_ids, [0] * 100, range(100), cache, wanted=[3, 98], out=out) is out
        np.testing.assert_array_equal(out, whole[[3, 98]])
        assert decoder.forward(long_ids[:1], [0], [0], cache, wanted=[]).shape == (0, 97)
        np.testing.assert_array_equal(decoder.forward(long_ids[:1], [0], [0], cache, wanted=[0]), whole[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [1, 97]}, "ids: expected 0 to 96; got 97"),
        ({"ids": [-1, 2]}, "ids: expected 0 to 96; got -1"),
        ({"ids": []}, "ids: expected at least one row"),
        ({"slots": [0, 2]}, "slots: expected 0 to 1; got 2"),
        ({"slots": [0]}, "slots: expected 2 numbers"),
        ({"positions": [0, 8]}, "positions: expected 0 to 7; got 8"),
        ({"positions": [3, 3]}, r"positions: expected rising positions in each slot; got \[3, 3\] in slot 0"),
        ({"wanted": [0, 2]}, "wanted: expected 0 to 1; got 2"),
        ({"wanted": [1, 0]}, "wanted: expected rising"),
        ({"out": np.empty((1, 97), np.float32)}, "out: expected writable float32"),
        ({"cache": "other"}, "cache: expected"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_before_anything_runs(change, message):
    model = random_model()
    cache = KVCache(model, 2, 8)
    call = {"ids": [1, 2], "slots": [0, 0], "positions": [0, 1], "cache": cache} | change
    if change.get("cache") == "other":
        call["cache"] = KVCache(random_model(layers=1), 2, 8)
    with Decoder(model) as decoder, pytest.raises(ValueError, match=message):
        decoder.forward(**call)
    assert not cache.keys.any()


def test_models_and_caches_that_do_not_fit_are_refused():
    model = random_model()

    def broken(**changes):
        return dataclasses.replace(model, layers=[dataclasses.replace(model.layers[0], **changes)])

    short = dataclasses.replace(model.layers[0].q, weight=model.layers[0].q.weight[:-1])
    for bad, message in (
        (broken(q=short), r"layers\[0\].q.weight: expected uint8"),
        (broken(down=model.layers[0].q), r"layers\[0\].down: expected \(out_features, in_features\)"),
        (broken(input_norm=np.ones(3, np.float32)), r"layers\[0\].input_norm: expected float32 \(64,\)"),
        (broken(rope=1), r"layers\[0\].rope: expected 0 to 0; got 1"),
        (broken(window=0), r"layers\[0\].window: expected at least 1"),
        (dataclasses.replace(model, activation="relu"), "activation: expected one of silu"),
        (dataclasses.replace(model, head_dim=15), "head_dim: expected an even number"),
        (dataclasses.replace(model, head=Table("int9", 97, 64, np.zeros(1))), "head.format: expected one of 2bit"),
        (dataclasses.replace(model, head=Table("int8", 97, 64, np.zeros(1))), "head.weight: expected int8"),
    ):
        with pytest.raises(ValueError, match=message):
            Decoder(bad)
    with pytest.raises(ValueError, match="threads: expected at least 1"):
        Decoder(model, 0)
    for arguments, message in (((0, 8), "slots"), ((1, 0), "capacity"), ((1, 8, "fp8"), "dtype: expected one of fp32")):
        with pytest.raises(ValueError, match=message):
            KVCache(model, *arguments)
    cache = KVCache(model, 2, 8)
    for arguments, message in (((0, 2, 1), "target_slot"), ((-1, 0, 1), "source_slot"), ((0, 1, 9), "length")):
        with pytest.raises(ValueError, match=message):
            cache.copy(*arguments)
    with pytest.raises(ValueError, match="length: expected 0 to 4"):
        cache.copy(0, 0, 5, KVCache(model, 1, 4))


def test_the_memory_of_a_cache():
    model = random_model(head_dim=32, kv_heads=2)
    positions = 2 * 2 * 2 * 64  # layers, slots, heads, positions
    assert KVCache(model, 2, 60, "fp32").nbytes == positions * 2 * 32 * 4
    assert KVCache(model, 2, 60, "bf16").nbytes == positions * 2 * 32 * 2
    assert KVCache(model, 2, 60, "int8").nbytes == positions * 2 * (32 + 4)


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where a shell started pytest in the background and had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupted_call_leaves_the_decoder_usable(long_model, long_ids, threads):
    want = logits(long_model, long_ids)
    cache = KVCache(long_model, 1, 100)
    with Decoder(long_model, threads) as decoder:

        def go_on(timer):
            timer.start()
            while True:
                decoder.forward(long_ids, [0] * 100, range(100), cache, wanted=[99])

        decoder.forward(long_ids, [0] * 100, range(100), cache)
        for delay in (0.001, 0.004, 0.009):
            timer = threading.Timer(delay, _thread.interrupt_main)
            with pytest.raises(KeyboardInterrupt):
                go_on(timer)
            timer.join()
            np.testing.assert_array_equal(decoder.forward(long_ids, [0] * 100, range(100), cache), want)


def test_two_callers_take_turns(long_model, long_ids):
    want = logits(long_model, long_ids)
    failures = []
    cache = KVCache(long_model, 2, 100)
    with Decoder(long_model, 2) as decoder:

        def call(slot):
            for _ in range(3):
                if not np.array_equal(decoder.forward(long_ids, [slot] * 100, range(100), cache), want):
                    failures.append(slot)

        callers = [threading.Thread(target=call, args=(slot,)) for slot in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert not failures


def test_profile_names_every_part(long_model, long_ids):
    for threads in (1, 2):
        with Decoder(long_model, threads) as decoder:
            parts = decoder.profile(long_ids[:5], [0] * 5, range(5), KVCache(long_model, 1, 5))
            for name in ("embedding", "norms", "qkv", "attention", "o", "gate_up", "down", "head"):
                assert 0 < parts[name] < 60
            assert decoder._call["profile"][0] == 0


def test_a_forgotten_decoder_ends_its_threads():
    decoder = Decoder(random_model(), 3)
    decoder.forward([1], [0], [0], KVCache(decoder.model, 1, 1))
    assert (
        sum(thread.name.startswith("bitdistill-") and "rows" not in thread.name for thread in threading.enumerate())
        == 2
    )
    del decoder
    gc.collect()
    assert not any(
        thread.name.startswith("bitdistill-") and "rows" not in thread.name for thread in threading.enumerate()
    )


def test_working_memory_is_counted():
    decoder = Decoder(random_model())
    memory = max(array.nbytes for array in decoder._keep if array.dtype == np.uint8)
    assert memory < decoder.scratch_bytes < memory + 20_000  # and the padded gains
