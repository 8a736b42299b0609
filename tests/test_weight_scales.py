"""Scales of rows and of groups of columns: by hand, the product and its gradient, saved students, packed files, runtimes."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import tiny_students
from bitdistill.command_line import parse_config
from bitdistill.config import RefineConfig
from bitdistill.errors import UserError
from bitdistill.export.parity import prove_parity
from bitdistill.export.write import write_packed
from bitdistill.kernels import packing
from bitdistill.kernels.cpu.grouped import grouped_product
from bitdistill.kernels.numerics import ACT_BLOCK, EPSILON, MAX_SCALE
from bitdistill.kernels.reference import (
    bit_linear,
    group_scales,
    quantize_activation,
    quantize_activation_blocks,
    quantize_weight,
    quantize_weight_groups,
    snapped_scale,
    spread_scales,
)
from bitdistill.runtime.compiled import compiled_product
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.packed_file import config_checksum, read_packed
from bitdistill.runtime.plain import plain_logits, plain_product
from bitdistill.student.calibration import InputStatistics
from bitdistill.student.gptq import gptq_group_codes
from bitdistill.student.layers import BitLinear, bit_linears
from bitdistill.student.quantizers import quantizer_named
from bitdistill.student.refine import load_student, refine, save_student

GRANULAR = ("absmean", "gptq", "tequila")


def test_snapped_scales_are_held_by_fp16_and_by_bf16():
    every = torch.logspace(-9, 6, 20_001)
    snapped = snapped_scale(every)
    assert torch.equal(snapped.half().float(), snapped)
    assert torch.equal(snapped.bfloat16().float(), snapped)
    assert snapped.min() >= EPSILON
    assert snapped.max() == MAX_SCALE == torch.tensor(MAX_SCALE).half() == torch.tensor(MAX_SCALE).bfloat16()
    inside = (every > EPSILON) & (every < MAX_SCALE)
    assert ((snapped - every).abs() <= every / 256)[inside].all()
    assert torch.equal(snapped_scale(snapped), snapped)


def test_codes_by_hand():
    """Two groups of two columns and one narrower: means 2, 5 and 5; and EPSILON, 1 and 7. 257 / 256 is no bf16."""
    weight = torch.tensor([[1.0, 3.0, -10.0, 0.0, 5.0], [0.0, 0.0, 1.0, -1.0, -7.0]])
    codes, scale = quantize_weight_groups(weight, 2)
    assert scale.tolist() == [[2, 5, 5], [snapped_scale(torch.tensor(EPSILON)).item(), 1, 7]]
    assert codes.tolist() == [[0, 1, -1, 0, 1], [0, 0, 1, -1, -1]]  # 1 / 2 is a tie: to even
    assert spread_scales(scale, 5, 2).tolist()[0] == [2, 2, 5, 5, 5]
    assert group_scales(weight, 5).tolist() == [[3.796875], [1.796875]]  # 3.8 and 1.8 in eight significant bits
    assert group_scales(torch.full((1, 4), 257 / 256), 4).item() == 1.0


def test_product_by_hand():
    """x = (127, -2, 1) has codes 127 -2 1, scale 1; groups of two: (127 * 1 + 0) * 2 + (-1) * 0.5 = 253.5, + bias."""
    weight = torch.tensor([[3.0, 1.0, -0.5]])
    codes, scale = quantize_weight_groups(weight, 2)
    assert codes.tolist() == [[1, 0, -1]]
    assert scale.tolist() == [[2.0, 0.5]]
    y = bit_linear(torch.tensor([[127.0, -2.0, 1.0]]), weight, torch.tensor([1.0]), (codes, scale), 2)
    assert y.tolist() == [[254.5]]


@pytest.mark.parametrize("columns", [None, 64, 128, 256, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act_scale", ["token", "block"])
def test_product_and_straight_through_gradient(columns, dtype, act_scale):
    """y = x~ W~^T + b, dX = dY W~, dW = dY^T x~; in float64, against which only the sums of fp32 round."""
    torch.manual_seed(0)
    weight = (torch.randn(24, 600) * torch.logspace(-1, 1, 600)).requires_grad_()
    bias = torch.randn(24, requires_grad=True)
    x = torch.randn(5, 7, 600, dtype=dtype, requires_grad=True)
    ternary = quantize_weight(weight) if columns is None else quantize_weight_groups(weight, columns)
    quantized = (ternary[0] * spread_scales(ternary[1], 600, columns)).double()
    act_codes, scale = quantize_activation(x) if act_scale == "token" else quantize_activation_blocks(x)
    rounded = act_codes.double() * (scale if act_scale == "token" else spread_scales(scale, 600, ACT_BLOCK)).double()
    y = bit_linear(x, weight, bias, ternary, columns, act_scale)
    tolerance = {"rtol": 1e-2, "atol": 0.5} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-3}
    torch.testing.assert_close(y.double(), F.linear(rounded, quantized, bias.double()), **tolerance)
    dy = torch.randn(5, 7, 24, dtype=dtype)
    y.backward(dy)
    torch.testing.assert_close(x.grad.double(), dy.double() @ quantized, **tolerance)
    torch.testing.assert_close(weight.grad.double(), torch.einsum("bto,bti->oi", dy.double(), rounded), **tolerance)
    torch.testing.assert_close(bias.grad.double(), dy.double().sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_one_group_per_row_is_the_product_with_the_scale_of_the_row():
    torch.manual_seed(0)
    weight, x = torch.randn(24, 100), torch.randn(3, 100)
    codes, scale = quantize_weight_groups(weight, 100)
    for row in range(24):
        alone = bit_linear(x, weight[row : row + 1], None, (codes[row : row + 1], scale[row, 0]))
        assert torch.equal(alone[:, 0], bit_linear(x, weight, None, (codes, scale), 100)[:, row])


def layer_with(quantizer, weight_scale, group_size=64):
    torch.manual_seed(0)
    layer = BitLinear(nn.Linear(200, 12), None, quantizer_named(quantizer, weight_scale, group_size))
    layer.quantizer.calibrate(layer, InputStatistics.of(torch.randn(300, 200)))
    return layer


@pytest.mark.parametrize("quantizer", GRANULAR)
@pytest.mark.parametrize(("weight_scale", "groups"), [("row", 1), ("group", 4)])
def test_every_granular_quantizer(quantizer, weight_scale, groups):
    layer, x = layer_with(quantizer, weight_scale), torch.randn(5, 200)
    codes, scale = layer.ternary()
    assert codes.dtype == torch.int8
    assert scale.shape == (12, groups)
    assert torch.equal(scale, snapped_scale(scale))
    quantized = layer.quantized_weight()
    assert torch.equal(quantized, codes * spread_scales(scale, 200, layer.quantizer.columns(layer)))
    act_codes, act_scale = quantize_activation(x)
    expected = F.linear(act_codes * act_scale, quantized, layer.ternary_bias())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    layer.annealing = 1 - 1e-6
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.watched()[1], scale.mean())


def test_formats_of_equal_groups_refuse_a_narrower_one():
    with pytest.raises(UserError, match=r"refine.group_size: expected a divisor of 200"):
        layer_with("absmean", "group").whole_groups()
    for weight_scale, group_size in (("row", 64), ("tensor", 64), ("group", 256)):  # the last one has one group per row
        assert layer_with("absmean", weight_scale, group_size).whole_groups()[0].shape == (12, 200)


def test_gptq_groups_without_correlation_round_to_nearest():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    for ours, nearest in zip(
        gptq_group_codes(weight, torch.eye(40), 16), quantize_weight_groups(weight, 16), strict=True
    ):
        assert torch.equal(ours, nearest)


@pytest.mark.parametrize(("weight_scale", "more"), [("row", {}), ("group", {"group_size": 64})])
def test_a_saved_student_remembers_its_scales(tmp_path, weight_scale, more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_students.CONFIGS["llama"], dtype=torch.float32)
    refine(model, weight_scale=weight_scale, group_size=64)
    tiny_students.randomize(model).eval()
    save_student(tmp_path, model)
    record = json.loads((tmp_path / "config.json").read_text())["bitdistill"]
    assert {key: record[key] for key in ("format_version", "weight_scale", *more)} == {
        "format_version": 2, "weight_scale": weight_scale, **more,
    }  # fmt: skip
    again, tokens = load_student(tmp_path).eval(), torch.tensor([tiny_students.prompt(12)])
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert {str(layer.quantizer) for layer in bit_linears(again).values()} == {
        str(quantizer_named("absmean", weight_scale, 64))
    }


def test_one_scale_per_tensor_is_recorded_as_it_was():
    model = AutoModelForCausalLM.from_config(tiny_students.CONFIGS["llama"])
    refine(model)
    assert model.config.bitdistill["format_version"] == 1
    assert not {"weight_scale", "group_size"} & set(model.config.bitdistill)
    assert not {"weight_scale", "group_size"} & set(RefineConfig().in_effect())
    assert "group_size" not in RefineConfig(weight_scale="row").in_effect()
    assert RefineConfig(weight_scale="group", group_size=64).in_effect()["group_size"] == 64


# ---------------------------------------------------------------------------------------------------- on a CPU


@settings(max_examples=40, deadline=None)
@given(
    packing_=st.sampled_from(packing.PACKINGS),
    rows=st.integers(1, 90),
    in_features=st.integers(65, 700),
    columns=st.sampled_from([64, 128, 256]),
    tokens=st.integers(1, 36),
    seed=st.integers(0, 99),
)
def test_compiled_products_are_the_reference_bit_for_bit(packing_, rows, in_features, columns, tokens, seed):
    """Every alignment of a group within a vector of packed bytes; also the largest codes, whose int16 sums must fit."""
    generator = np.random.default_rng(seed)
    weight = torch.from_numpy(generator.standard_normal((rows, in_features), np.float32))
    act_codes = generator.integers(-127, 128, (tokens, in_features)).astype(np.int8)
    if seed % 4 == 0:
        weight, act_codes = weight.abs() + 1, np.full_like(act_codes, 127 if seed % 8 else -127)
    codes, scale = quantize_weight_groups(weight, columns)
    packed, stored = packing.pack(codes.numpy(), packing_), packing.pack_scales(scale.half().numpy())
    got = grouped_product(act_codes, packed, packing_, rows, stored, columns)
    expected = torch.zeros(tokens, rows)
    for group, start in enumerate(range(0, in_features, columns)):
        part = slice(start, start + columns)
        integers = torch.from_numpy(act_codes[:, part]).int() @ codes[:, part].int().T
        expected += integers.float() * scale[:, group]
    assert np.array_equal(got, expected.numpy())


def test_compiled_products_refuse_what_does_not_fit():
    codes, scale = quantize_weight_groups(torch.randn(20, 300), 128)
    good = dict(
        act_codes=np.zeros((2, 300), np.int8), weight=packing.pack(codes.numpy(), "base3"), packing="base3", out_features=20,
        scales=packing.pack_scales(scale.half().numpy()), columns=128,
    )  # fmt: skip
    grouped_product(**good)
    for name, wrong in (
        ("act_codes", np.zeros((2, 300), np.int32)),
        ("packing", "int8"),
        ("columns", 100),
        ("scales", good["scales"].astype(np.float32)),
        ("weight", good["weight"][:-1]),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            grouped_product(**(good | {name: wrong}))


def wide_student(weight_scale, group_size=64, weight_quantizer="absmean", family="llama_biases"):
    """Widths of several groups, the last one narrower, and of one that is not a whole group."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_students.CONFIGS[family])
    config.hidden_size, config.intermediate_size, config.head_dim = 160, 330, 80
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    refine(model, weight_scale=weight_scale, group_size=group_size, weight_quantizer=weight_quantizer)
    return tiny_students.randomize(model).eval()


@pytest.mark.parametrize("packing_", packing.PACKINGS)
@pytest.mark.parametrize(("weight_scale", "group_size"), [("row", 128), ("group", 64), ("group", 128), ("group", 256)])
def test_a_packed_file_is_the_student(tmp_path, weight_scale, group_size, packing_):
    model, path = wide_student(weight_scale, group_size), tmp_path / "s.safetensors"
    sizes = write_packed(path, model, packing=packing_)
    packed = read_packed(path)
    assert packed.config.weight_scale == weight_scale
    weights, stored = 0, 0
    for name, layer in bit_linears(model).items():
        codes, scale = layer.ternary()
        assert np.array_equal(packed.weight_codes(name), codes.numpy())
        assert np.array_equal(packed.weight_scales(name), scale.numpy())
        weights += codes.numel()
        stored += packing.packed_bytes(*codes.shape, packing_) + 2 * 16 * -(-len(codes) // 16) * scale.shape[1]
        x = torch.randn(5, layer.in_features)
        inside = x if layer.subln is None else layer.subln(x)
        with torch.no_grad():
            want = layer._on_reference(x).numpy()
        for product in (plain_product, compiled_product):
            assert np.array_equal(product(packed, name, inside.detach().numpy()), want)
    assert sizes["bits_per_weight"] == 8 * stored / weights
    proof = prove_parity(path, model, [tiny_students.prompt(20)])
    assert proof["linears"] == 21


@pytest.mark.parametrize("weight_scale", ["row", "group"])
def test_the_runtime_multiplies_by_them(tmp_path, weight_scale):
    """A text whole, and token by token: equal to the last bit; and near the plain forward."""
    model, path = wide_student(weight_scale), tmp_path / "s.safetensors"
    write_packed(path, model)
    ids = tiny_students.prompt(20)
    plain = plain_logits(read_packed(path), [ids])[0]
    for threads in (1, 2):
        runtime = Runtime(path, threads=threads)
        whole = runtime.logits(ids)
        cache = runtime.new_cache(20)
        alone = np.concatenate([runtime.logits([token], cache=cache) for token in ids])
        assert np.array_equal(whole, alone)
        assert np.abs(whole - plain).mean() < 0.1 * plain.std()  # now and then an activation is rounded the other way
        runtime.close()


@pytest.mark.parametrize("quantizer", ["gptq", "tequila"])
def test_other_quantizers_go_into_a_file(tmp_path, quantizer):
    model = wide_student("group", 128, quantizer)
    write_packed(tmp_path / "s.safetensors", model)
    assert prove_parity(tmp_path / "s.safetensors", model, [tiny_students.prompt(20)])["product_max_diff"] < 1e-6


def test_sixteen_bits_for_a_group():
    """Where 16 divides O, and a group and five blocks of four columns divide I: 1.6 + 16 / group bits for a weight."""
    layer = BitLinear(nn.Linear(1280, 64), None, quantizer_named("absmean", "group", 128))
    codes, scale = layer.ternary()
    stored = packing.packed_bytes(64, 1280, "base3") + packing.pack_scales(scale.half().numpy()).nbytes
    assert 8 * stored / codes.numel() == pytest.approx(1.6 + 16 / 128, rel=1e-12)


def test_version_2_is_read(tmp_path):
    """What files of one scale per linear were before version 3: the same tensors, and a config without the two fields."""
    model, path = tiny_students.student("qwen3"), tmp_path / "s.safetensors"
    write_packed(path, model)
    with safe_open(path, "np") as file:
        header = file.metadata()
    config = json.loads(header["config"])
    assert (config.pop("weight_scale"), config.pop("group_size")) == ("tensor", None)
    header |= {"version": "2", "config": json.dumps(config)}
    header["config_sha256"] = config_checksum(header)
    save_file(load_file(path), tmp_path / "old.safetensors", metadata=header)
    old, new = read_packed(tmp_path / "old.safetensors"), read_packed(path)
    assert old.config == new.config
    assert np.array_equal(plain_logits(old, [[5, 6, 7]])[0], plain_logits(new, [[5, 6, 7]])[0])


# ---------------------------------------------------------------------------------------------------- refusals


def test_refusals():
    with pytest.raises(UserError, match="group_size"):
        quantizer_named("absmean", "group", 48)
    with pytest.raises(UserError, match="weight_scale"):
        quantizer_named("absmean", "column")
    for quantizer in ("block", "awq", "seq"):
        with pytest.raises(UserError, match=r"refine.weight_scale: expected tensor .*absmean, gptq or tequila"):
            parse_config(["--refine.weight_quantizer", quantizer, "--refine.weight_scale", "row"])
    with pytest.raises(UserError, match="softmax"):
        parse_config(["--refine.weight_scale", "group", "--pretrain.annealing", "softmax"])
    config = parse_config(["--refine.weight_scale", "group", "--refine.group_size", "64"])[0]
    assert (config.refine.weight_scale, config.refine.group_size) == ("group", 64)
