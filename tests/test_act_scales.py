"""Activations rounded in blocks of 32 columns: rounding and product by hand, the compiled ones bit for bit, files, refusals."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weight_scales import wide_student
from torch import nn
from torch.nn import functional as F

import tiny_students
from bitdistill.command_line import parse_config
from bitdistill.config import RefineConfig
from bitdistill.errors import UserError
from bitdistill.export.parity import prove_parity
from bitdistill.export.write import write_packed
from bitdistill.kernels import packing
from bitdistill.kernels.cpu.activations import quantize_activations
from bitdistill.kernels.cpu.grouped import blocked_product
from bitdistill.kernels.numerics import ACT_BLOCK, EPSILON
from bitdistill.kernels.reference import (
    bit_linear,
    quantize_activation,
    quantize_activation_blocks,
    quantize_weight,
    quantize_weight_groups,
    rounded_activation,
    spread_scales,
)
from bitdistill.runtime.compiled import compiled_product
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.packed_file import read_packed
from bitdistill.runtime.plain import plain_logits, plain_product
from bitdistill.student.layers import BitLinear, bit_linears
from bitdistill.student.quantizers import QUANTIZERS, quantizer_named
from bitdistill.student.refine import load_student, refine, require_quantizers, save_student


def test_rounding_by_hand():
    """Blocks of peaks 127, 254, 0 and, narrower, 1: scales 1, 2, EPSILON / 127 and 1 / 127."""
    x = torch.zeros(1, 100)
    x[0, :3] = torch.tensor([127.0, -1.5, 0.4])  # a tie: to even
    x[0, 32:34] = torch.tensor([-254.0, 3.0])
    x[0, 97] = 1.0
    codes, scale = quantize_activation_blocks(x)
    assert scale.tolist()[0] == pytest.approx([1, 2, EPSILON / 127, 1 / 127], rel=1e-7)
    assert codes[0, :3].tolist() == [127, -2, 0]
    assert codes[0, 32:34].tolist() == [-127, 2]
    assert codes[0, 97] == 127
    assert codes.count_nonzero() == 5


def test_every_block_is_rounded_as_a_token_of_its_own():
    x = torch.randn(3, 5, 200)
    codes, scale = quantize_activation_blocks(x)
    for block, part in enumerate(x.split(ACT_BLOCK, dim=-1)):
        own_codes, own_scale = quantize_activation(part)
        assert torch.equal(codes[..., ACT_BLOCK * block :][..., : part.shape[-1]], own_codes)
        assert torch.equal(scale[..., block : block + 1], own_scale)
    rounded = rounded_activation(x, "block")
    assert torch.equal(rounded, codes * spread_scales(scale, 200, ACT_BLOCK))
    assert (rounded - x).abs().mean() < 0.8 * (rounded_activation(x) - x).abs().mean()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_takes_blocks(quantizer):
    torch.manual_seed(0)
    layer = BitLinear(nn.Linear(200, 12), None, quantizer_named(quantizer), act_scale="block")
    x = torch.randn(5, 200, requires_grad=True)
    expected = F.linear(rounded_activation(x, "block"), layer.quantized_weight(), layer.ternary_bias())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0
    layer.annealing = 1 - 1e-6
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- on a CPU


@settings(max_examples=30, deadline=None)
@given(
    packing_=st.sampled_from(packing.PACKINGS),
    rows=st.integers(1, 90),
    in_features=st.integers(1, 700),
    columns=st.sampled_from([None, 64, 128, 256]),
    tokens=st.integers(1, 36),
    seed=st.integers(0, 99),
)
def test_compiled_rounding_and_products_are_the_reference_bit_for_bit(
    packing_, rows, in_features, columns, tokens, seed
):
    generator = np.random.default_rng(seed)
    weight = torch.from_numpy(generator.standard_normal((rows, in_features), np.float32))
    x = generator.standard_normal((tokens, in_features), np.float32) * np.float32(10.0 ** generator.integers(-3, 4))
    act_codes, act_scale = quantize_activation_blocks(torch.from_numpy(x))
    for ours, expected in zip(quantize_activations(x, blocks=True), (act_codes, act_scale), strict=True):
        assert np.array_equal(ours, expected.numpy())
    if columns is not None and columns >= in_features:
        columns = None
    codes, scale = quantize_weight(weight) if columns is None else quantize_weight_groups(weight, columns)
    stored = None if columns is None else packing.pack_scales(scale.half().numpy())
    got = blocked_product(x, packing.pack(codes.numpy(), packing_), packing_, rows, stored, columns or 0)
    if columns is None:
        got = got * scale.numpy()
    expected = bit_linear(torch.from_numpy(x), weight, None, (codes, scale), columns, "block")
    assert np.array_equal(got, expected.numpy())


def blocked(model):
    """A student as it would be after training with blocks."""
    for layer in bit_linears(model).values():
        layer.act_scale = "block"
    return model


@pytest.mark.parametrize("weight_scale", ["tensor", "row", "group"])
def test_a_packed_file_is_the_student(tmp_path, weight_scale):
    """Its products and the proof; a text whole, and token by token on one thread or two, equal to the last bit."""
    model, path = blocked(wide_student(weight_scale)), tmp_path / "s.safetensors"
    write_packed(path, model)
    packed = read_packed(path)
    assert packed.config.act_scale == "block"
    for name, layer in bit_linears(model).items():
        x = torch.randn(5, layer.in_features)
        inside = x if layer.subln is None else layer.subln(x)
        with torch.no_grad():
            want = layer._on_reference(x).numpy()
        for product in (plain_product, compiled_product):
            assert np.array_equal(product(packed, name, inside.detach().numpy()), want)
    ids = tiny_students.prompt(20)
    assert prove_parity(path, model, [ids])["product_max_diff"] < 1e-6
    plain = plain_logits(packed, [ids])[0]
    for threads in (1, 2):
        runtime = Runtime(path, threads=threads)
        whole = runtime.logits(ids)
        cache = runtime.new_cache(20)
        assert np.array_equal(whole, np.concatenate([runtime.logits([token], cache=cache) for token in ids]))
        assert np.abs(whole - plain).mean() < 0.1 * plain.std()  # now and then an activation is rounded the other way
        runtime.close()


def test_a_saved_student_remembers_its_blocks(tmp_path):
    model = tiny_students.model("qwen3")
    refine(model, norms="none", act_scale="block")
    tiny_students.randomize(model).eval()
    save_student(tmp_path, model)
    record = json.loads((tmp_path / "config.json").read_text())["bitdistill"]
    assert (record["format_version"], record["act_scale"]) == (3, "block")
    again, tokens = load_student(tmp_path).eval(), torch.tensor([tiny_students.prompt(12)])
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    require_quantizers(tmp_path, "absmean", "fp16", act_scale="block")
    with pytest.raises(UserError, match=r"refine\.act_scale: expected block, with which"):
        require_quantizers(tmp_path, "absmean", "fp16")


def test_one_scale_per_token_is_recorded_as_it_was():
    model = tiny_students.model("llama")
    refine(model)
    assert "act_scale" not in model.config.bitdistill
    assert "act_scale" not in RefineConfig().in_effect()
    assert RefineConfig(act_scale="block").in_effect()["act_scale"] == "block"


def test_refusals():
    with pytest.raises(UserError, match=r"refine\.act_scale: expected one of token, block"):
        refine(tiny_students.model("llama"), act_scale="row")
    assert parse_config(["--refine.act_scale", "block"])[0].refine.act_scale == "block"
