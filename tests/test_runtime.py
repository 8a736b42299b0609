"""The CPU runtime against transformers: integers bit for bit, the function around them to float noise."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_students import CONFIGS, prompt, student
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM

from bitdistill.errors import UserError
from bitdistill.export.packed import read_packed, write_packed
from bitdistill.export.parity import _Unrounded, _unrounded
from bitdistill.kernels import cpu_matmul, packing, reference
from bitdistill.layers import bit_linears
from bitdistill.refine import refine
from bitdistill.runtime import PREFILL_TOKENS, Runtime

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


def packed_runtime(folder, model, kind=Runtime, threads=1, **options):
    write_packed(folder / "s", model, **options)
    return kind(folder / "s", threads=threads)


def file_embedding(model, runtime):
    """The student with the embedding that the file holds, so that only float noise remains."""
    with torch.no_grad():
        for name in runtime.model.config.tables():
            model.get_submodule(name).weight.copy_(torch.from_numpy(runtime.model.table(name)))


def hf_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(student, runtime that can leave activations unrounded), same embedding."""
    model = student(request.param)
    runtime = packed_runtime(tmp_path_factory.mktemp("runtime"), model, _Unrounded)
    file_embedding(model, runtime)
    return model, runtime


# --- integers, bit for bit --------------------------------------------------------------------------------------------

ACTIVATIONS = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=ACTIVATIONS))
def test_quantize_activation_is_the_reference(x):
    codes, scale = cpu_matmul.quantize_activation(x)
    want_codes, want_scale = reference.quantize_activation(torch.from_numpy(x))
    np.testing.assert_array_equal(codes, want_codes.numpy())
    np.testing.assert_array_equal(scale, want_scale.numpy())
    assert (codes.dtype, scale.dtype) == (np.int8, np.float32)


def test_quantize_activation_edges():
    """Zeros, numbers below the clamp, exact halves and a million random values."""
    halves = np.arange(-254, 255, dtype=np.float32)[None] / 2
    halves[0, 0] = 127  # the peak: scale 1, codes are the halves themselves, to even
    random = np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32)
    for x in (np.zeros((2, 5), np.float32), np.full((1, 3), 1e-7, np.float32), halves, random):
        codes, scale = cpu_matmul.quantize_activation(x)
        want_codes, want_scale = reference.quantize_activation(torch.from_numpy(x))
        np.testing.assert_array_equal(codes, want_codes.numpy())
        np.testing.assert_array_equal(scale, want_scale.numpy())


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 2), (5, 7), (257, 64), (600, 1001)])
@pytest.mark.parametrize("threads", [1, 3])
def test_ternary_accumulate_is_exact(monkeypatch, shape, tokens, threads):
    monkeypatch.setattr(cpu_matmul, "MIN_WEIGHTS_PER_TASK", 1000)
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, shape).astype(np.int8)
    act = rng.integers(-128, 128, (tokens, shape[1])).astype(np.int8)
    packed = packing.pack_2bit(codes)
    packed.flags.writeable = False
    want = act.astype(np.int64) @ codes.astype(np.int64).T
    with ThreadPoolExecutor(threads) as pool:
        got = cpu_matmul.ternary_accumulate(act, packed, pool if threads > 1 else None, threads)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, want)
    if shape[0]:
        np.testing.assert_array_equal(
            got, reference.ternary_accumulate(torch.from_numpy(act), torch.from_numpy(codes)).numpy()
        )


def test_ternary_accumulate_at_the_extremes():
    """The largest sums: all codes alike, activations -128, and more columns than fp32 sums exactly."""
    for columns, tokens in ((4096, 1), (4096, 3), (140_003, 1), (140_003, 2)):
        act = np.full((tokens, columns), -128, np.int8)
        act[:, ::3] = 127
        for code in (-1, 1):
            packed = packing.pack_2bit(np.full((2, columns), code, np.int8))
            want = act.astype(np.int64).sum(axis=1, keepdims=True) * code
            np.testing.assert_array_equal(cpu_matmul.ternary_accumulate(act, packed), np.repeat(want, 2, axis=1))


@pytest.mark.parametrize("packing_name", ["2bit", "base3"])
@pytest.mark.parametrize("name", ["qwen2", "llama_biases"])
def test_a_projection_without_subln_is_bit_for_bit(tmp_path, name, packing_name):
    model = student(name)
    runtime = packed_runtime(tmp_path, model, packing=packing_name, threads=2)
    for key, layer in bit_linears(model).items():
        if layer.subln is not None:
            continue
        x = torch.randn(5, layer.in_features)
        for rows in (x, x[:1]):
            with torch.no_grad():
                want = layer(rows).numpy()
            np.testing.assert_array_equal(runtime._project(rows.numpy(), [key])[0], want)


# --- the whole function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 9, 64])
def test_unrounded_logits_equal_transformers(pair, length):
    model, runtime = pair
    ids = prompt(length, seed=length)
    runtime.unrounded = True
    with _unrounded(model):
        want = hf_logits(model, ids)
    got = runtime.logits(ids)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5 * want.std())


@pytest.mark.parametrize("norms", ["all", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_unrounded_logits_with_other_norms(tmp_path, name, norms):
    model = student(name, norms)
    runtime = packed_runtime(tmp_path, model, _Unrounded)
    file_embedding(model, runtime)
    runtime.unrounded = True
    with _unrounded(model):
        want = hf_logits(model, prompt(17))
    np.testing.assert_allclose(runtime.logits(prompt(17)), want, rtol=0, atol=5e-5 * want.std())


def test_logits_equal_transformers_where_nothing_was_rounded_apart(pair):
    """With int8 activations an ulp now and then flips a code; a single token mostly has none."""
    model, runtime = pair
    runtime.unrounded = False
    exact = 0
    for token in range(3, 33):
        want, got = hf_logits(model, [token]), runtime.logits([token])
        difference = np.abs(got - want).max() / want.std()
        exact += difference < 5e-5
        assert difference < 0.2
    assert exact >= 20


@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 1, 8, 3], [20]])
def test_incremental_decoding_equals_the_whole_text(pair, pieces):
    _, runtime = pair
    ids = prompt(20, seed=5)
    runtime.unrounded = True
    whole = runtime.logits(ids)
    cache = runtime.new_cache(len(ids))
    parts, start = [], 0
    for size in pieces:
        parts.append(runtime.logits(ids[start : start + size], cache=cache))
        start += size
    assert cache.length == 20
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=5e-5 * whole.std())
    np.testing.assert_allclose(runtime.logits(ids, last_only=True), whole[-1:], rtol=0, atol=5e-5 * whole.std())


@pytest.mark.parametrize("piece", [1, 6, 7, 16])
def test_long_prompts_go_through_in_pieces(pair, monkeypatch, piece):
    _, runtime = pair
    ids = prompt(50, seed=6)
    runtime.unrounded = True
    assert len(ids) < PREFILL_TOKENS
    whole = runtime.logits(ids)
    monkeypatch.setattr("bitdistill.runtime.PREFILL_TOKENS", piece)
    np.testing.assert_allclose(runtime.logits(ids), whole, rtol=0, atol=5e-5 * whole.std())
    np.testing.assert_allclose(runtime.logits(ids, last_only=True), whole[-1:], rtol=0, atol=5e-5 * whole.std())


def test_greedy_decoding_equals_transformers(pair):
    """Over the whole context, so beyond every sliding window; unrounded, so that no near-tie depends on the machine."""
    model, runtime = pair
    runtime.unrounded = True
    ids = prompt(26)
    with _unrounded(model), torch.no_grad():
        output = model.generate(torch.tensor([ids]), max_new_tokens=38, do_sample=False, pad_token_id=0)
    want = output[0, len(ids) :].tolist()
    got = list(runtime.generate_ids(ids, max_new_tokens=38))
    if want[-1] == 2:
        want = want[:-1]
        assert runtime.stats["stopped_by"] == "eos"
    assert got == want


@pytest.mark.parametrize("embedding", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_embedding_formats(tmp_path, name, embedding):
    model = student(name)
    runtime = packed_runtime(tmp_path, model, _Unrounded, embedding=embedding)
    file_embedding(model, runtime)
    runtime.unrounded = True
    with _unrounded(model):
        want = hf_logits(model, prompt(12))
    np.testing.assert_allclose(runtime.logits(prompt(12)), want, rtol=0, atol=5e-5 * want.std())


def test_packing_and_threads_do_not_change_a_bit(tmp_path):
    model = student("qwen3")
    base3 = packed_runtime(tmp_path, model, packing="base3", threads=1).logits(prompt(9))
    np.testing.assert_array_equal(packed_runtime(tmp_path, model, packing="2bit", threads=3).logits(prompt(9)), base3)


def test_resident_bytes(tmp_path):
    model = student("qwen3")
    head = 97 * 64 * 4
    assert packed_runtime(tmp_path, model, packing="2bit").resident_bytes == head
    runtime = packed_runtime(tmp_path, model, packing="base3")
    rows = [layer.weight.shape for layer in bit_linears(model).values()]
    assert runtime.resident_bytes == head + sum(out * -(-columns // 4) for out, columns in rows)
    assert runtime.file_bytes == (tmp_path / "s").stat().st_size


# --- generation -------------------------------------------------------------------------------------------------------


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
    return packed_runtime(
        tmp_path_factory.mktemp("talker"), model, tokenizer_json=tokenizer.to_str().encode()
    ), tokenizer


def test_generated_pieces_are_the_decoded_text(talker):
    runtime, tokenizer = talker
    for seed in range(6):
        ids = list(runtime.generate_ids(tokenizer.encode("Größe").ids, 30, temperature=2.0, seed=seed))
        pieces = list(runtime.generate("Größe", 30, temperature=2.0, seed=seed))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert all(pieces)
        assert runtime.stats["new_tokens"] == 30
        assert runtime.stats["prompt_tokens"] == 1 + len("Größe".encode())
        assert runtime.stats["stopped_by"] == "length"


def scripted(monkeypatch, runtime, tokenizer, text):
    """Makes the runtime say `text`, byte by byte: what is tested is how ids become pieces."""
    ids = iter(tokenizer.encode(text, add_special_tokens=False).ids)
    monkeypatch.setattr("bitdistill.runtime._choose", lambda *_: next(ids))
    return len(text.encode())


def test_characters_are_never_torn(talker, monkeypatch):
    runtime, tokenizer = talker
    text = "aé€😀z"
    count = scripted(monkeypatch, runtime, tokenizer, text)
    assert list(runtime.generate("x", count)) == list(text)
    scripted(monkeypatch, runtime, tokenizer, text)
    assert "".join(runtime.generate("x", 5)) == "aé\ufffd"  # cut inside the euro sign: said, not dropped


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        ("END", "one EN two EN"),
        (["END", "two"], "one EN "),
        (["absent"], "one EN two ENENDthree"),
        (["ENDx", "three"], "one EN two ENEND"),
        (["", "e"], "on"),
        ((), "one EN two ENENDthree"),
        (["threee"], "one EN two ENENDthree"),
    ],
)
def test_stop_strings(talker, monkeypatch, stop, want):
    runtime, tokenizer = talker
    count = scripted(monkeypatch, runtime, tokenizer, "one EN two ENENDthree")
    pieces = list(runtime.generate("x", count, stop=stop))
    assert "".join(pieces) == want
    assert runtime.stats["stopped_by"] == ("length" if want.endswith("three") else "stop")


def test_sampling(talker):
    runtime, tokenizer = talker
    ids = tokenizer.encode("x").ids
    greedy = list(runtime.generate_ids(ids, 20))
    assert list(runtime.generate_ids(ids, 20, temperature=1.0, top_k=1, seed=3)) == greedy
    assert list(runtime.generate_ids(ids, 20, temperature=1e-6, seed=3)) == greedy
    first = list(runtime.generate_ids(ids, 20, temperature=3.0, seed=1))
    assert list(runtime.generate_ids(ids, 20, temperature=3.0, seed=1)) == first
    assert list(runtime.generate_ids(ids, 20, temperature=3.0, seed=2)) != first


def test_sampling_follows_the_probabilities():
    from bitdistill.runtime import _choose

    logits = np.array([1.0, 3.0, 2.0, 2.5, -np.inf], np.float32)
    rng = np.random.default_rng(0)
    counts = np.bincount([_choose(logits, 0.5, 3, rng) for _ in range(20_000)], minlength=5) / 20_000
    weights = np.array([0, np.exp(6.0), np.exp(4.0), np.exp(5.0), 0])
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.012)


def test_end_of_text_and_context(tmp_path):
    model = student("qwen3")
    runtime = packed_runtime(tmp_path, model)
    ids = prompt(60)
    assert len(list(runtime.generate_ids(ids, 100))) <= 5
    model.generation_config.eos_token_id = list(range(97))
    runtime = packed_runtime(tmp_path, model)
    assert list(runtime.generate_ids(ids, 100)) == []
    assert runtime.stats["stopped_by"] == "eos"
    model.generation_config.eos_token_id = [96]
    model.lm_head.weight.data[96] = 0
    runtime = packed_runtime(tmp_path, model)
    assert len(list(runtime.generate_ids(ids, 100))) == 5  # the 64th position still predicts a 65th token
    assert runtime.stats["stopped_by"] == "context"


def test_refusals(talker, tmp_path):
    runtime, _ = talker
    bare = packed_runtime(tmp_path, student("qwen3"))
    cases = {
        "threads": lambda: Runtime(tmp_path / "s", threads=0),
        "file": lambda: list(bare.generate("text")),
        "temperature": lambda: list(bare.generate_ids([3], temperature=-1)),
        "top_k": lambda: list(bare.generate_ids([3], temperature=1, top_k=0)),
        "max_new_tokens": lambda: list(bare.generate_ids([3], max_new_tokens=0)),
    }
    for field, call in cases.items():
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.field == field
    for ids in ([], [97], [-1], [3] * 65):
        for call in (bare.logits, lambda ids: list(bare.generate_ids(ids))):
            with pytest.raises(UserError, match=r"^prompt: expected"):
                call(ids)
    with pytest.raises(UserError, match="at most 64 tokens; got 101"):
        list(runtime.generate("x" * 100))
    cache = bare.new_cache(4)
    bare.logits([3, 4, 5], cache=cache)
    with pytest.raises(UserError, match="at most 4 tokens; got 5"):
        bare.logits([3, 4], cache=cache)


def test_neither_torch_nor_transformers(tmp_path):
    model = student("gemma3")
    write_packed(tmp_path / "s", model)
    script = (
        "import sys; from bitdistill.runtime import Runtime; r = Runtime(sys.argv[1]); "
        "print(r.logits([3, 4, 5]).shape, len(list(r.generate_ids([3, 4], 5)))); "
        "loaded = {'torch', 'transformers', 'sklearn', 'pandas'} & set(sys.modules); assert not loaded, loaded"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "s"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("(3, 97) ")


def test_a_story_equals_transformers(tmp_path):
    """A real model: with rounded activations, the same greedy words wherever transformers' choice is not a near-tie."""
    folder = DATA / "models" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set BITDISTILL_DATA to the folder with the real models")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    refine(model)
    runtime = packed_runtime(tmp_path, model, tokenizer_json=(folder / "tokenizer.json").read_bytes())
    file_embedding(model, runtime)
    ids = runtime.tokenizer.encode("Once upon a time, there was").ids
    with torch.no_grad():
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=80, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    want = output.sequences[0, len(ids) :].tolist()
    margins = [float(top[0, 0] - top[0, 1]) for top in (logits.topk(2).values for logits in output.logits)]
    sure = next((i for i, margin in enumerate(margins) if margin < 0.5), 80)
    got = list(runtime.generate_ids(ids, 80))
    assert got[:sure] == want[:sure]
    assert (
        "".join(runtime.generate("Once upon a time, there was", 80))
        == (runtime.tokenizer.decode(ids + got)[len(runtime.tokenizer.decode(ids)) :])
    )


def test_real_file_is_read_by_memory_map(tmp_path):
    model = student("qwen3")
    runtime = packed_runtime(tmp_path, model, packing="2bit")
    packed = runtime._linears["model.layers.0.mlp.up_proj"].packed
    base = packed
    while isinstance(base, np.ndarray) and base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not packed.flags.writeable
    assert read_packed(tmp_path / "s").config == runtime.model.config
