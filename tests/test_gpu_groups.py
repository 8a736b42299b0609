"""Scales of rows, of groups of columns and of blocks of activations on the GPU's training kernels (interpreted where there is no
GPU), against the reference."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton exists for Linux only")

from test_weight_scales import wide_student

from bitdistill.kernels import reference
from bitdistill.kernels.gpu import bit_linear, groups, matmul, swiglu_quantize
from bitdistill.kernels.numerics import ACT_BLOCK
from bitdistill.student import layers, sharing
from bitdistill.student.layers import bit_linears
from bitdistill.student.sharing import WeightCodes

SCALES = [
    ("token", 64),
    ("token", 256),
    ("token", 10_000),
    ("block", None),
    ("block", 64),
    ("block", 128),
    ("block", 10_000),
]
pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def odd_rows(*shape, device):
    """Random rows; the first ones zero, tiny, large, and with halves at a scale of 1."""
    x = normal(*shape, device=device)
    rows = x.view(-1, shape[-1])
    if len(rows) >= 4:
        rows[0], rows[1], rows[2] = 0, rows[1] * 1e-9, rows[2] * 1e6
        rows[3] = torch.tensor([127.0, -2.5, 0.5, 1.5, -0.5], device=device).repeat(shape[-1])[: shape[-1]]
    return x


def relative(ours, expected):
    """Norm of the difference, relative; 0 for two that are empty or equal."""
    difference = (ours.double() - expected.double()).norm()
    return 0.0 if difference == 0 else (difference / expected.double().norm()).item()


# ---------------------------------------------------------------------------------------------------- quantizers


@pytest.mark.parametrize("columns", [64, 128, 10_000])
def test_weights_bit_for_bit(columns, device):
    weights = [odd_rows(*shape, device=device) for shape in [(32, 576), (5, 3), (1, 1), (40, 300)]]
    weights += [torch.zeros(4, 70), torch.full((3, 65), -1e-6), torch.full((2, 64), 1e30), normal(20, 30).bfloat16()]
    weights += [torch.tensor([[0.5, 1.5, -0.5, -1.5]])]  # halves of the scale, which is 1
    for weight in weights:
        (part,) = groups.quantize_weight_groups([weight.to(device)], columns)
        codes, scale = reference.quantize_weight_groups(weight.to(device), columns)
        assert torch.equal(part.weight_codes, codes)
        assert torch.equal(part.weight_scale, scale)
    broken = torch.ones(2, 70, device=device)
    broken[1, 66] = float("nan")
    assert groups.quantize_weight_groups([broken], 64)[0].weight_scale.isnan().tolist() == [[False] * 2, [False, True]]
    with pytest.raises(ValueError, match="ZeRO-3"):
        bit_linear.ternarize_each([torch.zeros(0, 4, device=device)], columns)
    assert groups.quantize_weight_groups([], columns) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 48), (2, 3, 100), (0, 48), (7, 575), (3, 1), (2, 5000)])
def test_blocks_bit_for_bit(shape, dtype, device):
    x = odd_rows(*shape, device=device).clamp(-6e4, 6e4).to(dtype)
    ours, expected = bit_linear.quantize_input(x, "block"), reference.quantize_activation_blocks(x)
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


def test_blocks_after_a_norm_and_after_a_gate(device):
    """Bit for bit where anyone can repeat the float arithmetic, else one code apart; the norm's and the gate's gradients."""
    gate, up = (normal(9, 200, device=device, seed=seed).requires_grad_() for seed in (0, 1))
    gain = (1 + 0.3 * normal(200, device=device, seed=2)).requires_grad_()
    open_gate = torch.full((9, 200), 50.0, device=device)
    quantized, _ = swiglu_quantize.swiglu_norm_quantize(open_gate, up, None, 0.0, "silu", True)
    expected = reference.quantize_activation_blocks(open_gate * up)
    assert all(torch.equal(*pair) for pair in zip(quantized, expected, strict=True))
    h = F.silu(gate) * up
    cases = [
        (bit_linear.norm_quantize_input(gate, gain, 1e-6, "block"), reference.rms_norm(gate, gain, 1e-6), [gate, gain]),
        (bit_linear.gated_quantize_input(gate, up, None, 0.0, "silu", "block"), h, [gate, up]),
        (
            bit_linear.gated_quantize_input(gate, up, gain, 1e-6, "silu", "block"),
            reference.rms_norm(h, gain, 1e-6),
            [gate, up, gain],
        ),
    ]
    for (activation, anchor), y, inputs in cases:
        assert activation.act_scale.shape == (9, 7)
        got = activation.act_codes * reference.spread_scales(activation.act_scale, 200, ACT_BLOCK)
        assert relative(got, reference.rounded_activation(y, "block")) < 1e-3
        dy = normal(*y.shape, device=device, seed=3)
        for a, b in zip(*(torch.autograd.grad(out, inputs, dy, retain_graph=True) for out in (anchor, y)), strict=True):
            assert relative(a, b) < 1e-5


# ---------------------------------------------------------------------------------------------------- the linear


def linear(x, weight, bias, act_scale, columns, dtype=torch.float32, backward="exact"):
    activation, ternary = bit_linear.quantize_input(x, act_scale), bit_linear.ternarize([weight], columns)
    return bit_linear.ternary_linear(x, activation, [weight], [bias], ternary, dtype, backward)


def in_pytorch(x, weight, bias, act_scale, columns):
    ternary = None if columns is None else reference.quantize_weight_groups(weight, columns)
    return reference.bit_linear(x, weight, bias, ternary, columns, act_scale)


@pytest.mark.parametrize(("act_scale", "columns"), SCALES)
@pytest.mark.parametrize("shape", [(5, 64, 32), (2, 9, 320, 48), (7, 575, 33), (0, 128, 16), (1, 330, 70)])
def test_forward(shape, act_scale, columns, device):
    """Bit for bit the reference (but for a fused multiply-add of the bias with scales of rows); rounded to bf16 the same."""
    *tokens, I, O = shape
    x, weight, bias = odd_rows(*tokens, I, device=device), normal(O, I, device=device), normal(O, device=device)
    expected = in_pytorch(x, weight, bias, act_scale, columns)
    for dtype in (torch.float32, torch.bfloat16):
        y, rounded = linear(x, weight, bias, act_scale, columns, dtype), expected.to(dtype)
        assert y.dtype == dtype
        rows = act_scale == "token" and columns >= I
        assert torch.equal(y, rounded) or (rows and relative(y, rounded) < torch.finfo(dtype).eps)


@pytest.mark.parametrize("small", [False, True])
def test_integers_are_exact_at_the_largest_magnitude(small, device, monkeypatch):
    """127 * 256 in every group, in one tile and in many."""
    if small:
        monkeypatch.setattr(groups, "choose_tile", lambda *_: matmul.Tile(16, 16, 32, 4, 2))
    act = torch.full((20, 600), 127, dtype=torch.int8, device=device)
    act[3] = -128
    weight = torch.ones((35, 600), dtype=torch.int8, device=device)
    ones, sizes = torch.ones(20, 1, device=device), [35]
    y = groups.grouped_linear(act, ones, weight, ones.new_ones(35, 3), 256, sizes, dtype=torch.float32)
    assert torch.equal(y, (act.double() @ weight.double().t()).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("act_scale", "columns"), SCALES)
@pytest.mark.parametrize("backward", ["exact", "fast"])
def test_gradients(act_scale, columns, dtype, backward, device, monkeypatch):
    """Exact: at most twice the reference's error against float64. Fast: as near as int8 noise allows, or exact."""
    if device == "cpu":  # the interpreter takes its time by the instruction: few large tiles
        monkeypatch.setattr(matmul, "FP32_TILES", (matmul.Tile(128, 128, 128, 4, 1),))
    torch.manual_seed(0)
    x = normal(2, 35, 160, dtype=dtype, device=device).requires_grad_()
    weight, bias = (normal(*size, device=device, seed=1).requires_grad_() for size in ((48, 160), (48,)))
    inputs = [x, weight, bias]
    dy = (normal(2, 35, 48, device=device, seed=2) * normal(2, 35, 1, device=device, seed=3) ** 2).to(dtype)
    ours = torch.autograd.grad(linear(x, weight, bias, act_scale, columns, dtype, backward), inputs, dy)
    theirs = torch.autograd.grad(in_pytorch(x, weight, bias, act_scale, columns), inputs, dy)
    codes, scale = (
        reference.quantize_weight(weight) if columns is None else reference.quantize_weight_groups(weight, columns)
    )
    weight64 = codes * reference.spread_scales(scale.double(), 160, columns)
    x64 = reference.rounded_activation(x, act_scale).double()
    rows = dy.double().flatten(0, -2)
    truth = [(rows @ weight64).view(x.shape), rows.t() @ x64.flatten(0, -2), rows.sum(0)]
    for name, a, b, t in zip(("dX", "dW", "db"), ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        bound = max(2 * relative(b, t), 2**-22 if dtype == torch.float32 else 2**-8)
        assert relative(a, t) <= (bound if backward == "exact" else max(bound, 0.03)), name


@pytest.mark.parametrize("backward", ["exact", "fast"])
def test_gradients_of_no_tokens(backward, device):
    for act_scale, columns in SCALES:
        x = torch.zeros(2, 0, 96, device=device, requires_grad=True)
        weight, bias = (torch.ones(size, device=device, requires_grad=True) for size in ((16, 96), (16,)))
        y = linear(x, weight, bias, act_scale, columns, backward=backward)
        dx, dw, db = torch.autograd.grad(y, [x, weight, bias], torch.zeros(2, 0, 16, device=device))
        assert dx.shape == x.shape
        assert not dw.any()
        assert not db.any()


@pytest.mark.parametrize(("act_scale", "columns"), [("token", 64), ("block", None), ("token", 10_000)])
def test_linears_side_by_side(act_scale, columns, device):
    """q, k and v from one product, by codes that lie side by side in memory or do not."""
    x = normal(9, 128, device=device)
    for sizes in ((32, 16, 16), (5, 6, 7)):
        weights = [normal(O, 128, device=device, seed=O) for O in sizes]
        parts = bit_linear.ternarize_each(weights, columns)
        together = bit_linear.stacked(parts)
        if columns == 64 and sizes[0] == 32:
            assert together.weight_scale.data_ptr() == parts[0].weight_scale.data_ptr()
        activation = bit_linear.quantize_input(x, act_scale)
        y = bit_linear.ternary_linear(x, activation, weights, [], together, torch.float32, "exact")
        assert torch.equal(y, torch.cat([in_pytorch(x, weight, None, act_scale, columns) for weight in weights], 1))


def test_a_student_against_the_reference(device, monkeypatch):
    """The loss and every gradient of a student with widths that are no whole groups, on held codes; no layer in PyTorch."""
    student = wide_student("group").train().to(device)
    tokens = torch.randint(3, 97, (1, 6), generator=torch.Generator().manual_seed(0)).to(device)
    for layer in bit_linears(student).values():
        layer.act_scale = "block"
    results = []
    for kernels in (bit_linear, None):
        with monkeypatch.context() as patch:
            for module in (layers, sharing):
                patch.setattr(module, "kernels_for", lambda device, kernels=kernels: kernels)
            if kernels is not None:
                patch.setattr(layers.BitLinear, "_on_reference", None)
            with WeightCodes(student).hold(step=0):
                loss = student(input_ids=tokens, labels=tokens).loss
                results.append((loss, *torch.autograd.grad(loss, list(student.parameters()))))
    (loss, *ours), (expected, *theirs) = results
    assert abs(loss / expected - 1) < 0.005  # now and then an activation after a fused norm is rounded the other way
    for (name, _), a, b in zip(student.named_parameters(), ours, theirs, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.99, name


def test_compiled_without_a_break(device):
    """The operators tell torch.compile the shapes of what they return."""
    weight, x = normal(32, 128, device=device), normal(5, 128, device=device)
    for act_scale, columns in SCALES:

        @torch.compile(backend="eager", fullgraph=True)
        def whole(x, weight, act_scale=act_scale, columns=columns):
            return linear(x, weight, weight[:, 0], act_scale, columns)

        assert torch.equal(whole(x, weight), linear(x, weight, weight[:, 0], act_scale, columns))
