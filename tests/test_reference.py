"""kernels/reference.py against hand examples, an independent float64 version, torch autograd and transformers' BitNet."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bitdistill.kernels import reference as ref
from bitdistill.kernels.numerics import EPSILON, MAX_EXACT_IN_FEATURES

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 33), st.integers(1, 17))


def test_weight_hand_example():
    weight = torch.tensor([[0.5, -1.5, 0.0], [0.24, -0.26, 0.5]])  # mean |W| = 3.0 / 6 = 0.5
    codes, scale = ref.quantize_weight(weight)
    assert scale == 0.5
    assert scale.dtype == torch.float32
    # 0.24 / 0.5 = 0.48 -> 0;  -0.26 / 0.5 = -0.52 -> -1;  -1.5 / 0.5 = -3 -> clipped
    assert codes.tolist() == [[1, -1, 0], [0, -1, 1]]
    assert codes.dtype == torch.int8


def test_weight_ties_round_to_even():
    # mean |W| = 1 exactly; 0.5 and -0.5 are ties and go to 0, 1.5 is a tie that goes to 2 and is clipped to 1
    codes, scale = ref.quantize_weight(torch.tensor([[0.5, -0.5, 1.5, 1.5]]))
    assert scale == 1.0
    assert codes.tolist() == [[0, 0, 1, 1]]


def test_activation_hand_example():
    codes, scale = ref.quantize_activation(torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0]]))
    # row 0: 127, -63.5 -> -64 (even), 31.75 -> 32
    assert codes.tolist() == [[127, -64, 32], [0, 0, 0]]
    assert scale[0].item() == np.float32(1) / np.float32(127)
    assert scale[1].item() == np.float32(EPSILON) / np.float32(127)


@given(SHAPES, st.integers(0, 2**31 - 1), st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]))
@settings(max_examples=60, deadline=None)
def test_quantizers_equal_numpy_bit_for_bit(shape, seed, magnitude):
    tokens, width, out = shape
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, width)) * magnitude).astype(np.float32)
    w = (rng.standard_normal((out, width)) * magnitude).astype(np.float32)
    peak = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(EPSILON))
    act = np.clip(np.rint(x * (np.float32(127) / peak)), -128, 127).astype(np.int8)
    scale = max(np.float32(np.abs(w).sum(dtype=np.float64) / w.size), np.float32(EPSILON))
    weight = np.clip(np.rint(w / scale), -1, 1).astype(np.int8)
    codes, act_scale = ref.quantize_activation(torch.from_numpy(x))
    assert np.array_equal(codes.numpy(), act)
    assert np.array_equal(act_scale.numpy(), peak / np.float32(127))
    codes, weight_scale = ref.quantize_weight(torch.from_numpy(w))
    assert weight_scale.item() == scale
    assert np.array_equal(codes.numpy(), weight)


def test_weight_scale_does_not_depend_on_order_or_threads():
    weight = torch.randn(513, 1031)
    shuffled = weight.flatten()[torch.randperm(weight.numel())]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = ref.weight_scale(weight)
    torch.set_num_threads(threads)
    assert ref.weight_scale(weight) == alone == ref.weight_scale(shuffled) == ref.weight_scale(weight.T)


def test_codes_equal_transformers_bitnet():
    """A third party: transformers' AutoBitLinear quantizers, on values that are not at a rounding boundary."""
    from transformers.integrations.bitnet import ActQuant, WeightQuant

    torch.manual_seed(0)
    weight, x = torch.randn(64, 48), torch.randn(10, 48)
    codes, scale = ref.quantize_weight(weight)
    theirs = WeightQuant.forward.__wrapped__(None, weight) if hasattr(WeightQuant.forward, "__wrapped__") else None
    theirs = WeightQuant.apply(weight) if theirs is None else theirs
    assert torch.allclose(codes * scale, theirs, atol=1e-6)
    codes, scale = ref.quantize_activation(x)
    assert torch.allclose(codes * scale, ActQuant.apply(x), atol=1e-6)


def test_accumulators_are_exact_integers():
    x = torch.randint(-128, 128, (7, 1000), dtype=torch.int8)
    w = torch.randint(-1, 2, (13, 1000), dtype=torch.int8)
    assert torch.equal(ref.ternary_accumulate(x, w), (x.long() @ w.long().T).int())
    worst = torch.full((1, MAX_EXACT_IN_FEATURES), -128, dtype=torch.int8)
    ones = torch.ones(1, MAX_EXACT_IN_FEATURES, dtype=torch.int8)
    assert ref.ternary_accumulate(worst, ones).item() == -128 * MAX_EXACT_IN_FEATURES
    wider = torch.full((1, MAX_EXACT_IN_FEATURES + 7), -127, dtype=torch.int8)
    ones = torch.ones_like(wider).clamp(max=1)
    assert ref.ternary_accumulate(wider, ones).item() == -127 * (MAX_EXACT_IN_FEATURES + 7)


def fake_quant_linear(x, weight, bias):
    """An independent straight-through version: quantize, dequantize, F.linear, let autograd do the rest."""
    act_codes, act_scale = ref.quantize_activation(x)
    weight_codes, weight_scale = ref.quantize_weight(weight)
    x = x + (act_codes * act_scale - x).detach()
    weight = weight + (weight_codes * weight_scale - weight).detach()
    return F.linear(x, weight, bias)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 1, 24), (0, 24)])
def test_forward_and_gradients_equal_fake_quantization(shape, has_bias):
    torch.manual_seed(1)
    leaves = [torch.randn(shape), torch.randn(11, 24), torch.randn(11) if has_bias else None]
    ours = [t.clone().requires_grad_() if t is not None else None for t in leaves]
    theirs = [t.clone().double().requires_grad_() if t is not None else None for t in leaves]
    y = ref.bit_linear(*ours)
    expected = fake_quant_linear(*theirs)
    assert y.shape == (*shape[:-1], 11)
    assert torch.allclose(y.double(), expected, atol=1e-5)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            assert torch.allclose(a.grad.double(), b.grad, atol=1e-4), (a.grad - b.grad).abs().max()
            assert a.grad.dtype == torch.float32


def test_zero_weight_and_zero_input():
    y = ref.bit_linear(torch.zeros(2, 4), torch.zeros(3, 4), torch.arange(3.0))
    assert torch.equal(y, torch.arange(3.0).expand(2, 3))


def test_dtypes():
    weight = torch.randn(6, 8, requires_grad=True)
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    y = ref.bit_linear(x, weight)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x32 = torch.randn(4, 8, requires_grad=True)
        y = ref.bit_linear(x32, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ref.bit_linear(x32, weight).bfloat16())  # integers stay exact: only the result is rounded
    y.sum().backward()
    assert x32.grad.dtype == torch.float32


def test_refusals():
    with pytest.raises(ValueError, match="ZeRO-3"):
        ref.weight_scale(torch.empty(0))
    with pytest.raises(ValueError, match="in_features"):
        ref.bit_linear(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(ValueError, match="last dimension"):
        ref.quantize_activation(torch.ones(2, 0))


def test_inputs_are_not_changed():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    before = x.clone(), weight.clone()
    ref.bit_linear(x.T.contiguous().T, weight)
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


def test_rms_norm_equals_torch():
    x, gain = torch.randn(4, 9, dtype=torch.float64).float() * 30, torch.rand(9)
    assert torch.allclose(ref.rms_norm(x, gain, 1e-6), F.rms_norm(x, (9,), gain, 1e-6), atol=1e-5)
    assert ref.rms_norm(x.bfloat16(), gain, 1e-6).dtype == torch.bfloat16
