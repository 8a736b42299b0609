"""Scales of rows, of groups of columns and of blocks of activations on the CPU's training kernels, against the reference."""

import pytest
import torch
from test_cpu_training import odd_rows, relative, threads  # noqa: F401
from test_weight_scales import wide_student
from torch.nn import functional as F

import tiny_students
from bitdistill.kernels import reference
from bitdistill.kernels.cpu import bit_linear, training_groups, training_products
from bitdistill.kernels.cpu.bf16 import has_bf16_products
from bitdistill.kernels.numerics import ACT_BLOCK
from bitdistill.student import backend, layers
from bitdistill.student.layers import bit_linears
from bitdistill.student.sharing import WeightCodes

SHAPES = [(5, 64, 32), (2, 9, 320, 48), (300, 576, 192), (7, 575, 33), (0, 128, 16), (1, 330, 16)]  # (..., I, O)
SCALES = [
    ("token", 64),
    ("block", 64),
    ("block", 128),
    ("block", None),
    ("block", 10_000),
    ("token", 10_000),
]


@pytest.mark.parametrize("columns", [64, 128, 256, 10_000])
def test_weights_bit_for_bit(columns, threads):  # noqa: F811
    weights = [odd_rows(shape, seed=seed) for seed, shape in enumerate([(32, 576), (5, 3), (1, 1), (40, 700)])]
    weights += [
        torch.zeros(4, 70),
        torch.full((3, 65), -1e-6),
        torch.full((2, 64), 1e30),
        torch.randn(20, 30).bfloat16(),
    ]
    weights += [torch.tensor([[0.5, 1.5, -0.5, -1.5]])]  # halves of the scale, which is 1
    for part, weight in zip(bit_linear.ternarize_each(weights, columns), weights, strict=True):
        codes, scale = reference.quantize_weight_groups(weight, columns)
        assert torch.equal(part.weight_codes, codes)
        assert torch.equal(part.weight_scale, scale)
        for dtype in (torch.float32, torch.bfloat16):
            expected = codes * reference.spread_scales(scale, weight.shape[1], columns)
            assert torch.equal(part.dequantized(dtype).float(), expected)
    with pytest.raises(ValueError, match="ZeRO-3"):
        bit_linear.ternarize([torch.zeros(0, 4)], columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 48), (2, 3, 100), (0, 48), (7, 575), (3, 1)])
def test_blocks_of_activations_bit_for_bit(shape, dtype, threads):  # noqa: F811
    x = odd_rows(shape, dtype)
    for ours, expected in zip(
        bit_linear.quantize_input(x, "block"), reference.quantize_activation_blocks(x), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_after_a_norm_and_after_a_gate(dtype):
    """Codes of what the fused norm computes, one at most apart, and the gradients of the norm and the gate."""
    torch.manual_seed(0)
    gate, up = (torch.randn(70, 200).to(dtype).requires_grad_() for _ in range(2))
    gain = (1 + torch.rand(200)).requires_grad_()
    normed, h = reference.rms_norm(gate, gain, 1e-6), F.silu(gate) * up
    cases = [
        (bit_linear.norm_quantize_input(gate, gain, 1e-6, "block"), normed, [gate, gain]),
        (bit_linear.gated_quantize_input(gate, up, None, 0.0, "silu", "block"), h, [gate, up]),
        (
            bit_linear.gated_quantize_input(gate, up, gain, 1e-6, "silu", "block"),
            reference.rms_norm(h, gain, 1e-6),
            [gate, up, gain],
        ),
    ]
    for (activation, anchor), y, inputs in cases:
        got = training_groups.rounded(*activation)
        assert activation.act_scale.shape == (70, 7)
        assert relative(got, reference.rounded_activation(y, "block")) < (1e-3 if dtype == torch.float32 else 0.02)
        dy = torch.randn(y.shape).to(dtype)
        for a, b in zip(*(torch.autograd.grad(out, inputs, dy, retain_graph=True) for out in (anchor, y)), strict=True):
            assert relative(a, b) < (1e-5 if dtype == torch.float32 else 0.02)


def linear(x, weight, bias, act_scale, columns, dtype=torch.float32, backward="exact"):
    activation, ternary = bit_linear.quantize_input(x, act_scale), bit_linear.ternarize([weight], columns)
    return bit_linear.ternary_linear(x, activation, [weight], [bias], ternary, dtype, backward)


def in_pytorch(x, weight, bias, act_scale, columns):
    ternary = None if columns is None else reference.quantize_weight_groups(weight, columns)
    return reference.bit_linear(x, weight, bias, ternary, columns, act_scale)


def factors(x, weight, act_scale, columns):
    """x~ and W~ in float64."""
    if columns is None:
        codes, scale = reference.quantize_weight(weight)
        quantized = codes * scale.double()
    else:
        codes, scale = reference.quantize_weight_groups(weight, columns)
        quantized = codes * reference.spread_scales(scale.double(), weight.shape[1], columns)
    if act_scale == "token":
        codes, scale = reference.quantize_activation(x)
        return codes * scale.double(), quantized
    codes, scale = reference.quantize_activation_blocks(x)
    return codes * reference.spread_scales(scale.double(), x.shape[-1], ACT_BLOCK), quantized


@pytest.mark.parametrize(("act_scale", "columns"), SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [3], indirect=True)
def test_forward(shape, act_scale, columns, threads, monkeypatch):  # noqa: F811
    """By integers bit for bit the reference; every other way as near as fp32 is; rounded to bf16 the same."""
    torch.manual_seed(0)
    *tokens, I, O = shape
    x, weight, bias = odd_rows((*tokens, I)), torch.randn(O, I), torch.randn(O)
    expected = in_pytorch(x, weight, bias, act_scale, columns)
    x64, weight64 = factors(x, weight, act_scale, columns)
    truth = x64 @ weight64.t() + bias
    for way in training_groups.WAYS:
        for dtype in (torch.float32, torch.bfloat16):
            monkeypatch.setattr(
                training_groups, "fastest", lambda what, ways, way=way: way if way in ways else "floats"
            )
            y = linear(x, weight, bias, act_scale, columns, dtype)
            assert y.dtype == dtype
            if dtype == torch.bfloat16:
                assert relative(y, truth) <= 1.01 * relative(expected.bfloat16(), truth)
            elif (way == "integers" and O % 16 == 0 and I % 4 == 0) or (act_scale == "token" and columns == 10_000):
                assert torch.equal(y, expected)
            else:
                assert relative(y, truth) <= max(2 * relative(expected, truth), 2**-22)


def test_the_ways_that_fit():
    weight, x = torch.randn(32, 64), torch.randn(5, 64)
    ways = {}
    for name in ("token", "block"):
        codes, scale = bit_linear.quantize_input(x, name)
        ternary = bit_linear.ternarize([weight], 64 if name == "block" else 32)
        ways[name] = training_groups.possible_ways(codes, scale, ternary, torch.bfloat16)
    assert ways["token"] == ["floats", "integers"]
    assert ways["block"] == ["floats", "integers"] + ["pieces"] * has_bf16_products()
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), training_groups._as_bf16(True):
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_way_that_is_wrong_here_is_left_out(monkeypatch):
    monkeypatch.setattr(training_products, "_left_out", {"integers"})
    codes, scale = bit_linear.quantize_input(torch.randn(5, 64))
    ternary = bit_linear.ternarize([torch.randn(32, 64)], 32)
    assert training_groups.possible_ways(codes, scale, ternary, torch.float32) == ["floats"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("act_scale", "columns"), SCALES)
@pytest.mark.parametrize("backward", ["exact", "fast"])
@pytest.mark.parametrize("threads", [3], indirect=True)
def test_gradients(act_scale, columns, dtype, backward, threads):  # noqa: F811
    """Exact: at most twice the reference's error against float64. Fast: as near as int8 noise allows, or exact."""
    torch.manual_seed(0)
    x = torch.randn(2, 65, 320).to(dtype).requires_grad_()
    weight, bias = torch.randn(48, 320, requires_grad=True), torch.randn(48, requires_grad=True)
    inputs = [x, weight, bias]
    dy = (torch.randn(2, 65, 48) * torch.rand(2, 65, 1) ** 4).to(dtype)
    ours = torch.autograd.grad(linear(x, weight, bias, act_scale, columns, dtype, backward), inputs, dy)
    theirs = torch.autograd.grad(in_pytorch(x, weight, bias, act_scale, columns), inputs, dy)
    x64, weight64 = factors(x, weight, act_scale, columns)
    rows = dy.double().flatten(0, -2)
    truth = [(rows @ weight64).view(x.shape), rows.t() @ x64.flatten(0, -2), rows.sum(0)]
    for name, a, b, t in zip(("dX", "dW", "db"), ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        bound = max(2 * relative(b, t), 2**-22 if dtype == torch.float32 else 2**-8)
        assert relative(a, t) <= (bound if backward == "exact" else max(bound, 0.015)), name


def test_linears_side_by_side():
    """q, k and v with groups from one product, by their held codes."""
    torch.manual_seed(0)
    weights, x = [torch.randn(O, 128) for O in (32, 16, 16)], torch.randn(9, 128)
    parts = bit_linear.ternarize_each(weights, 64)
    together = bit_linear.stacked(parts)
    assert together.weight_scale.data_ptr() == parts[0].weight_scale.data_ptr()
    y = bit_linear.ternary_linear(x, bit_linear.quantize_input(x), weights, [], together, torch.float32, "exact")
    expected = [in_pytorch(x, weight, None, "token", 64) for weight in weights]
    assert relative(y, torch.cat(expected, 1)) < 1e-6


@pytest.mark.parametrize("act_scale", ["token", "block"])
@pytest.mark.parametrize("weight_scale", ["tensor", "row", "group"])
def test_a_student_against_the_reference(weight_scale, act_scale, monkeypatch):
    """Every layer, and the loss and every gradient of a student with widths that are no whole groups, on held codes."""
    student = wide_student(weight_scale).train()
    student_layers = bit_linears(student).values()
    for layer in student_layers:
        layer.act_scale = act_scale
        x = torch.randn(2, 9, layer.in_features)
        assert relative(layer(x), layer._on_reference(x)) < 1e-6
        monkeypatch.setattr(layer, "_on_reference", None)  # the kernels do all the work
    tokens = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with WeightCodes(student).hold(step=0):
        loss = student(input_ids=tokens, labels=tokens).loss
        ours = torch.autograd.grad(loss, list(student.parameters()))
    monkeypatch.undo()
    monkeypatch.setattr(layers, "kernels_for", lambda device: None)
    expected = student(input_ids=tokens, labels=tokens).loss
    theirs = torch.autograd.grad(expected, list(student.parameters()))
    assert abs(loss / expected - 1) < 0.005  # now and then an activation after a fused norm is rounded the other way
    for (name, _), a, b in zip(student.named_parameters(), ours, theirs, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.99, name


def test_the_quantizers_that_the_kernels_know():
    assert backend.kernels_for(torch.device("cpu")) is bit_linear
    for quantizer, known in (("absmean", True), ("block", True), ("gptq", False), ("tequila", False)):
        student = tiny_students.student("qwen3") if quantizer == "absmean" else wide_student("tensor", 128, quantizer)
        assert all(layer.on_reference() != known for layer in bit_linears(student).values())
