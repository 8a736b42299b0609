"""The plain forward of a packed file against transformers: products bit for bit, the function around them to float noise."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import AutoModelForCausalLM

from bitdistill.export.parity import _unrounded
from bitdistill.export.write import write_packed
from bitdistill.kernels import reference
from bitdistill.runtime import plain
from bitdistill.runtime.packed_file import read_packed
from bitdistill.student.layers import bit_linears
from bitdistill.student.refine import refine
from tiny_students import CONFIGS, prompt, student

DATA = Path(os.environ.get("BITDISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def opened(folder, model, **options):
    """The packed file of a student, which gets the embedding that the file holds, so that only float noise remains."""
    write_packed(folder / "s", model, **options)
    packed = read_packed(folder / "s")
    with torch.no_grad():
        for name in packed.config.tables():
            model.get_submodule(name).weight.copy_(torch.from_numpy(packed.table(name)))
    return packed


def hf_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def near(got, want):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5 * want.std())


# --- integers, bit for bit --------------------------------------------------------------------------------------------

ACTIVATIONS = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=ACTIVATIONS))
def test_quantize_activation_is_the_reference(x):
    codes, scale = plain.quantize_activation(x)
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
        codes, scale = plain.quantize_activation(x)
        want_codes, want_scale = reference.quantize_activation(torch.from_numpy(x))
        np.testing.assert_array_equal(codes, want_codes.numpy())
        np.testing.assert_array_equal(scale, want_scale.numpy())


@pytest.mark.parametrize("packing", ["2bit", "base3"])
@pytest.mark.parametrize("name", ["qwen2", "llama_biases"])
def test_products_are_bit_for_bit(tmp_path, name, packing):
    model = student(name)
    packed = opened(tmp_path, model, packing=packing)
    for key, layer in bit_linears(model).items():
        x = torch.randn(5, layer.in_features)
        with torch.no_grad():
            want = reference.bit_linear(x, layer.weight, layer.bias).numpy()
        np.testing.assert_array_equal(plain.plain_product(packed, key, x.numpy()), want)
        np.testing.assert_array_equal(plain.plain_product(packed, key, x[:1].numpy()), want[:1])


# --- the whole function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["two", "all", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_unrounded_logits_equal_transformers(tmp_path, name, norms):
    """Texts of several lengths at once, past every sliding window."""
    model = student(name, norms)
    packed = opened(tmp_path, model)
    prompts = [prompt(length, seed=length) for length in (1, 2, 9, 64)]
    with _unrounded(model):
        for got, ids in zip(plain.plain_logits(packed, prompts, unrounded=True), prompts, strict=True):
            near(got, hf_logits(model, ids))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_where_nothing_was_rounded_apart(tmp_path, name):
    """With int8 activations an ulp now and then flips a code; a single token mostly has none."""
    model = student(name)
    texts = [[token] for token in range(3, 33)]
    packed = opened(tmp_path, model)
    wants = [hf_logits(model, ids) for ids in texts]
    gots = plain.plain_logits(packed, texts)
    differences = [np.abs(got - want).max() / want.std() for got, want in zip(gots, wants, strict=True)]
    assert max(differences) < 0.2
    assert sum(difference < 5e-5 for difference in differences) >= 20


@pytest.mark.parametrize("embedding", ["fp16", "int8", "int4", "ternary"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_embedding_formats(tmp_path, monkeypatch, name, embedding):
    model = student(name)
    monkeypatch.setattr(plain, "TABLE_ROWS", 40)  # of 97, so that there is a last, smaller part
    packed = opened(tmp_path, model, embedding=embedding)
    with _unrounded(model):
        near(plain.plain_logits(packed, [prompt(12)], unrounded=True)[0], hf_logits(model, prompt(12)))


def test_a_real_model_greedily(tmp_path):
    """Unrounded, so that no near-tie depends on the machine: the words of transformers' generate."""
    folder = DATA / "models" / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set BITDISTILL_DATA to the folder with the real models")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    refine(model)
    packed = opened(tmp_path, model)
    ids = [1, 403, 407, 261, 378]
    with _unrounded(model), torch.no_grad():
        output = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)
    want = output[0].tolist()
    logits = plain.plain_logits(packed, [want], unrounded=True)[0]
    assert logits.argmax(axis=1)[len(ids) - 1 : -1].tolist() == want[len(ids) :]
