"""Quantizers on the GPU (interpreted where there is none) against the reference: codes and scales bit for bit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton exists for Linux only")

from bitdistill.kernels import reference
from bitdistill.kernels.gpu import norm_quantize, quantize, swiglu_quantize
from bitdistill.kernels.numerics import EPSILON

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def check_activation(x):
    ours = quantize.quantize_activation(x)
    codes, scale = reference.quantize_activation(x)
    assert ours.act_codes.dtype == torch.int8
    assert torch.equal(ours.act_codes, codes)
    assert torch.equal(ours.act_scale, scale)
    return ours


def assert_as_accurate(ours, plain, exact):
    """Within twice plain PyTorch's own error in the same dtype, both against float64: in the mean and at the worst."""
    assert ours.dtype == plain.dtype
    mistake, allowed = (ours.double() - exact).abs(), (plain.double() - exact).abs()
    floor = torch.finfo(torch.float32).eps * exact.abs().max()
    assert mistake.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + floor / 8
    assert mistake.max() <= 2 * allowed.max() + floor


# ---------------------------------------------------------------------------------------------------- activations


def test_activation_by_hand(device):
    ours = quantize.quantize_activation(torch.tensor([[127.0, -63.5, 0.5, 1.5, -2.5, 0.0]], device=device))
    assert ours.act_codes.tolist() == [[127, -64, 0, 2, -2, 0]]  # ties go to the even neighbor
    assert ours.act_scale.tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 7), (2, 5, 130), (9, 1024), (3, 2560), (2, 16_384), (1, 20_000), (0, 8), (7,)]
)
def test_activation(shape, dtype, device):
    check_activation(normal(*shape, dtype=dtype, device=device) * 3)


def test_activation_of_any_bits(device):
    """Rows of random bit patterns: every magnitude that a float can have, subnormal to huge."""
    bits = torch.randint(-(2**31), 2**31, (64, 257), generator=torch.Generator().manual_seed(1))
    x = bits.to(torch.int32).view(torch.float32).to(device)
    check_activation(torch.where(x.isfinite(), x, 1.0))
    exponents = torch.randint(90, 160, (64, 1), generator=torch.Generator().manual_seed(2))
    check_activation(torch.ldexp(normal(64, 257), exponents - 127).to(device))


def test_activation_ties_zeros_and_extremes(device):
    steps = torch.arange(-254, 255, dtype=torch.float32, device=device) / 2
    check_activation(torch.stack([steps, steps * 3, steps / 7, steps * 0, steps * 1e30, steps * 1e-30, -steps]))
    check_activation(torch.full((2, 33), EPSILON, device=device))
    check_activation(torch.full((2, 33), torch.finfo(torch.float32).max, device=device))


def test_activation_shows_what_is_not_finite(device):
    x = normal(4, 50, device=device)
    x[1, 17], x[2, 49] = float("nan"), float("-inf")
    scale = quantize.quantize_activation(x).act_scale[:, 0]
    assert scale.isnan().tolist() == [False, True, False, False]
    assert scale.isinf().tolist() == [False, False, True, False]


def test_activation_strides(device):
    wide = normal(6, 40, device=device)
    for x in (
        wide[:, 3:20],
        wide[::2],
        wide.T,
        normal(4, 3, 10, device=device).transpose(0, 1),
        wide[:1].expand(5, 40),
    ):
        check_activation(x)
    frozen = wide.clone()
    quantize.quantize_activation(wide)
    assert torch.equal(wide, frozen)


def test_activation_refuses(device):
    with pytest.raises(ValueError, match="last dimension of 1 to 32768; got 0"):
        quantize.quantize_activation(torch.ones(3, 0, device=device))
    with pytest.raises(ValueError, match="got 32769"):
        quantize.quantize_activation(torch.ones(1, 32_769, device=device))
    with pytest.raises(ValueError, match=r"torch\.float64"):
        quantize.quantize_activation(torch.ones(1, 4, dtype=torch.float64, device=device))


def test_activation_moves_three_bytes_an_element(moved_bytes, device):
    x = normal(12, 1024, dtype=torch.bfloat16, device=device)
    with moved_bytes() as moved:
        quantize.quantize_activation(x)
    assert moved.loaded == 2 * x.numel()
    assert moved.stored == x.numel() + 4 * 12


# ---------------------------------------------------------------------------------------------------- weights


def check_weights(weights):
    for weight, ours in zip(weights, quantize.quantize_weights(weights), strict=True):
        codes, scale = reference.quantize_weight(weight)
        assert ours.weight_codes.dtype == torch.int8
        assert torch.equal(ours.weight_scale, scale)
        assert torch.equal(ours.weight_codes, codes)


SHAPES = ((64, 128), (100, 150), (3, 5), (1, 1), (70, 140), (1, 9), (300, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights(dtype, device):
    check_weights([normal(*shape, dtype=dtype, device=device, seed=i) * 0.02 for i, shape in enumerate(SHAPES)])
    assert quantize.quantize_weights([]) == []


@pytest.mark.parametrize("shape", [(96, 160), (64, 128)])
def test_weights_whose_rows_are_aligned(shape, device):
    check_weights([normal(*shape, device=device, seed=i) for i in range(2)])


def test_weights_visited_backwards_and_soon(device, monkeypatch):
    """The other orders of the list of tiles give the same bits."""
    weights = [normal(*shape, device=device, seed=i) for i, shape in enumerate(SHAPES)]
    expected = quantize.quantize_weights(weights)
    for lag, large in ((0, 0), (3, 0), (3, 2**40), (10**6, 1000)):
        monkeypatch.setattr(quantize, "LAG_TILES", lag)
        monkeypatch.setattr(quantize, "LARGE_BYTES", large)
        quantize._plan.cache_clear()
        for ours, theirs in zip(quantize.quantize_weights(weights), expected, strict=True):
            assert torch.equal(ours.weight_codes, theirs.weight_codes)
            assert torch.equal(ours.weight_scale, theirs.weight_scale)
    quantize._plan.cache_clear()


@pytest.mark.parametrize("lag", [0, 1, 4, 100])
def test_visits(lag):
    """Each tile is summed once and written once, in that order; a tensor is not written before `lag` others are summed."""
    tiles, large = [3, 1, 7, 2, 2], [False, True, False, True, False]
    items = [
        (tensor, place)
        for tensor, first, last, step in quantize.visits(tiles, large, lag)
        for place in range(first, last, step)
    ]
    assert len(items) == 2 * sum(tiles)
    summed = written = 0
    for tensor, place in items:
        if place >= 0:
            summed += 1
        else:
            written += 1
            own = sum(tiles[: tensor + 1])
            assert summed >= min(own + lag, sum(tiles))
    assert (summed, written) == (sum(tiles), sum(tiles))
    for tensor, count in enumerate(tiles):
        assert [place for t, place in items if t == tensor and place >= 0] == list(range(count))
        backwards = [-1 - place for t, place in items if t == tensor and place < 0]
        assert backwards == sorted(range(count), reverse=large[tensor])


def test_no_division_is_needed():
    """``round(W / s)`` is nonzero exactly where |W| > s / 2: at s / 2 and its neighbors, for a million scales."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(10**6, generator=generator).mul(40).sub(16).exp2()
    half = scale / 2
    for weight in (half, torch.nextafter(half, scale), torch.nextafter(half, 0 * half), half * (1 + 2**-22)):
        assert torch.equal(torch.round(weight / scale) != 0, weight > half)
        assert torch.equal(torch.round(-weight / scale) != 0, -weight < -half)


def test_weights_at_the_boundary(device):
    """A scale of exactly 1: 0.5 is code 0, its upper neighbor 1."""
    up = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    row = torch.tensor([0.5, 1.5, -0.5, -1.5, up, 2 - up, -up, up - 2], device=device)
    (ours,) = quantize.quantize_weights([row[None]])
    assert ours.weight_scale == 1.0
    assert ours.weight_codes.tolist() == [[0, 1, 0, -1, 1, 1, -1, -1]]
    check_weights([row[None].expand(64, 8).contiguous()])


def test_weights_of_every_magnitude(device):
    weight = normal(40, 60, device=device)
    check_weights([weight * 0, weight * 1e30, weight * 1e-30, weight * 1e-5, weight.abs(), torch.ones_like(weight)])
    weight[3, 4] = float("nan")
    (ours,) = quantize.quantize_weights([weight])
    assert ours.weight_scale.isnan()


def test_weights_refuse(device):
    whole = normal(8, 8, device=device)
    with pytest.raises(ValueError, match="ZeRO-3"):
        quantize.quantize_weights([whole, torch.ones(0, device=device)])
    with pytest.raises(ValueError, match="contiguous"):
        quantize.quantize_weights([whole.T[:4]])
    with pytest.raises(ValueError, match="one dtype"):
        quantize.quantize_weights([whole, whole.half()])
    with pytest.raises(ValueError, match="float64"):
        quantize.quantize_weights([whole.double()])


def test_weights_move_five_bytes_and_four_from_the_cache(moved_bytes, device):
    weights = [normal(256, 384, device=device), normal(128, 128, device=device)]
    count = sum(weight.numel() for weight in weights)
    tiles = count // (quantize.TILE_O * quantize.TILE_I)
    with moved_bytes() as moved:
        quantize.quantize_weights(weights)
    # 4 bytes twice: from memory, and soon after from the L2 cache. A tile reads its line of the list (8), the tables (40)
    # and, as it writes, the scale (4); the partial sums (8) are read once.
    assert moved.loaded == 8 * count + tiles * (2 * 48 + 4 + 8)
    assert moved.stored == count + tiles * 8 + 4 * len(weights)


# ---------------------------------------------------------------------------------------------------- RMSNorm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 130), (9, 1024), (1, 16_384), (0, 16), (3, 1)])
def test_rms_norm(shape, dtype, device):
    x = normal(*shape, dtype=dtype, device=device) * 2
    gain = 1 + 0.3 * normal(shape[-1], device=device, seed=1)
    ours, rstd = norm_quantize.rms_norm_quantize(x, gain, EPS)
    assert rstd.shape == (*shape[:-1], 1)
    exact = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    y = (x.float() * rstd * gain).to(dtype)  # what the kernel quantized: the same products, rounded in the same places
    codes, scale = reference.quantize_activation(y)
    assert torch.equal(ours.act_codes, codes)
    assert torch.equal(ours.act_scale, scale)
    if x.numel():
        assert_as_accurate(y, reference.rms_norm(x, gain, EPS), x.double() * exact * gain.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_backward(dtype, device):
    for shape in ((5, 64), (2, 3, 130), (300, 24), (3, 5000), (2, 4097)):
        x = (normal(*shape, dtype=dtype, device=device) * 2).requires_grad_()
        gain = (1 + 0.3 * normal(shape[-1], device=device, seed=1)).requires_grad_()
        grad = normal(*shape, dtype=dtype, device=device, seed=7)
        rstd = norm_quantize.rms_norm_quantize(x, gain, EPS)[1]
        computed = norm_quantize.rms_norm_quantize_backward(grad, x, gain, rstd)
        again = norm_quantize.rms_norm_quantize_backward(grad, x, gain, rstd)
        assert all(torch.equal(*pair) for pair in zip(computed, again, strict=True))

        plain = torch.autograd.grad(reference.rms_norm(x, gain, EPS), [x, gain], grad)
        x64, gain64 = (t.detach().double().requires_grad_() for t in (x, gain))
        rms = torch.rsqrt(x64.square().mean(-1, keepdim=True) + EPS)
        exact = torch.autograd.grad(x64 * rms * gain64, [x64, gain64], grad.double())
        for ours, theirs, truth in zip(computed, plain, exact, strict=True):
            assert_as_accurate(ours, theirs, truth)


def test_rms_norm_edges(device):
    x = normal(6, 48, device=device)
    x[0], x[1], x[2] = 0, x[1] * 1e15, x[2] * 1e-15
    gain = torch.ones(48, device=device)
    ours, rstd = norm_quantize.rms_norm_quantize(x, gain, EPS)
    assert torch.equal(ours.act_codes, reference.quantize_activation(x * rstd)[0])
    assert not ours.act_codes[0].any()
    assert ours.act_scale[0] == reference.quantize_activation(x[:1] * 0)[1]
    x[3, 5] = float("nan")
    ours, rstd = norm_quantize.rms_norm_quantize(x.bfloat16(), gain, EPS)
    assert ours.act_scale[:, 0].isnan().tolist() == [False, False, False, True, False, False]
    dx, dgain = norm_quantize.rms_norm_quantize_backward(x[:0], x[:0], gain, rstd[:0])
    assert dx.shape == (0, 48)
    assert dgain.tolist() == [0.0] * 48
    strided = normal(5, 3, 48, device=device)[:, 1]
    ours, rstd = norm_quantize.rms_norm_quantize(strided, gain.bfloat16(), EPS)
    assert torch.equal(ours.act_codes, reference.quantize_activation(strided * rstd)[0])
    dx = norm_quantize.rms_norm_quantize_backward(strided, strided, gain, rstd)[0]
    assert torch.equal(dx, norm_quantize.rms_norm_quantize_backward(strided.clone(), strided.clone(), gain, rstd)[0])


def test_rms_norm_refuses(device):
    x, gain = normal(2, 8, device=device), torch.ones(8, device=device)
    for wrong in (gain[:4], gain[None]):
        with pytest.raises(ValueError, match=r"gain: expected shape \(8,\)"):
            norm_quantize.rms_norm_quantize(x, wrong, EPS)


def test_rms_norm_reads_x_once(moved_bytes, device):
    """3 bytes per element, the gain for every program (4 rows), and per row rstd and scale."""
    x = normal(12, 1024, dtype=torch.bfloat16, device=device)
    gain = torch.ones(1024, device=device)
    with moved_bytes() as moved:
        _, rstd = norm_quantize.rms_norm_quantize(x, gain, EPS)
    assert moved.loaded == 2 * x.numel() + 3 * 4 * 1024
    assert moved.stored == x.numel() + 12 * (4 + 4)
    with moved_bytes() as moved:  # x, one dy, rstd in; dx and the parts of dgain out; 6 programs of 2 rows
        norm_quantize.rms_norm_quantize_backward(x, x, gain, rstd)
    assert moved.loaded == 4 * x.numel() + 12 * 4 + 6 * 4 * 1024
    assert moved.stored == 2 * x.numel() + 6 * 4 * 1024


# ---------------------------------------------------------------------------------------------------- SwiGLU


def plain_swiglu(gate, up, gain, activation):
    h = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    return h if gain is None else reference.rms_norm(h, gain, EPS)


def exact_swiglu(gate, up, gain, activation):
    h = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    return h if gain is None else h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * gain


@pytest.mark.parametrize("activation", swiglu_quantize.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_bit_for_bit_where_the_gate_is_open_or_shut(dtype, activation, device):
    """sigmoid is exactly 1 at 40 and more, and 0 at -120: h is then a product that anyone can repeat."""
    gate = torch.randint(40, 60, (7, 300), generator=torch.Generator().manual_seed(3)).to(dtype).to(device)
    gate[:, ::5] = -120
    up = normal(7, 300, dtype=dtype, device=device)
    gain = 1 + 0.3 * normal(300, device=device, seed=1)
    h = torch.where(gate > 0, gate.float() * up.float(), 0.0)
    for norm in (gain, None):
        ours, rstd = swiglu_quantize.swiglu_norm_quantize(gate, up, norm, EPS, activation)
        y = (h if norm is None else h * rstd * gain).to(dtype)
        codes, scale = reference.quantize_activation(y)
        assert torch.equal(ours.act_codes, codes)
        assert torch.equal(ours.act_scale, scale)
        assert (rstd is None) == (norm is None)


@pytest.mark.parametrize("activation", swiglu_quantize.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
def test_swiglu(normed, dtype, activation, device):
    """Codes are the quantized y of float64, but for the error of y, which is at most twice PyTorch's."""
    for shape in ((5, 64), (2, 3, 130), (1, 3072), (0, 8), (3, 1)):
        gate, up = (normal(*shape, dtype=dtype, device=device, seed=seed) * 3 for seed in (0, 1))
        gain = 1 + 0.3 * normal(shape[-1], device=device, seed=2) if normed else None
        ours, _ = swiglu_quantize.swiglu_norm_quantize(gate, up, gain, EPS, activation)
        if not gate.numel():
            continue
        exact = exact_swiglu(gate.double(), up.double(), None if gain is None else gain.double(), activation)
        mistake = 2 * (plain_swiglu(gate, up, gain, activation).double() - exact).abs().amax(-1, keepdim=True)
        mistake = mistake + torch.finfo(torch.float32).eps * exact.abs().amax(-1, keepdim=True)
        scale = ours.act_scale.double()
        assert ((127 * scale - exact.abs().amax(-1, keepdim=True).clamp_min(EPSILON)).abs() <= mistake).all()
        assert ((ours.act_codes * scale - exact).abs() <= scale / 2 + 2 * mistake).all()


@pytest.mark.parametrize("activation", swiglu_quantize.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
def test_swiglu_backward(normed, dtype, activation, device):
    for shape in ((5, 64), (2, 3, 130), (300, 24), (2, 5000), (1, 9000), (1, 13_000), (1, 17_000)):
        gate, up = ((normal(*shape, dtype=dtype, device=device, seed=s) * 3).requires_grad_() for s in (0, 1))
        gain = (1 + 0.3 * normal(shape[-1], device=device, seed=2)).requires_grad_() if normed else None
        grad = normal(*shape, dtype=dtype, device=device, seed=3)
        inputs = [gate, up, *([gain] if normed else [])]
        rstd = swiglu_quantize.swiglu_norm_quantize(gate, up, gain, EPS, activation)[1]
        ours = swiglu_quantize.swiglu_norm_quantize_backward(grad, gate, up, gain, rstd, activation)
        again = swiglu_quantize.swiglu_norm_quantize_backward(grad, gate, up, gain, rstd, activation)
        assert all(torch.equal(*pair) for pair in zip(ours[: len(inputs)], again[: len(inputs)], strict=True))
        assert (ours[2] is None) == (not normed)
        plain = torch.autograd.grad(plain_swiglu(gate, up, gain, activation), inputs, grad)
        inputs64 = [t.detach().double().requires_grad_() for t in inputs]
        exact = torch.autograd.grad(
            exact_swiglu(*inputs64[:2], inputs64[2] if normed else None, activation), inputs64, grad.double()
        )
        for mine, theirs, truth in zip(ours, plain, exact, strict=False):
            assert_as_accurate(mine, theirs, truth)


@pytest.mark.parametrize("activation", swiglu_quantize.ACTIVATIONS)
def test_swiglu_edges(activation, device):
    """Zeros, gates of every magnitude, halves of one tensor; gradients stay finite where the function is flat."""
    both = normal(6, 2 * 40, device=device)
    gate, up = both[:, :40], both[:, 40:]
    gain = torch.ones(40, device=device)
    whole = swiglu_quantize.swiglu_norm_quantize(gate.clone(), up.clone(), gain, EPS, activation)
    halves = swiglu_quantize.swiglu_norm_quantize(gate, up, gain, EPS, activation)
    assert all(torch.equal(*pair) for pair in zip(whole[0], halves[0], strict=True))
    gate = torch.tensor([[1e18, -1e18, 1e-30, -1e-30, 0.0, 88.0, -88.0, 500.0, -500.0, 3.0]], device=device)
    up = torch.ones_like(gate)
    up[0, 0] = 1e-18
    ours, _ = swiglu_quantize.swiglu_norm_quantize(gate, up, None, EPS, activation)
    assert ours.act_codes.tolist() == [[0, 0, 0, 0, 0, 22, 0, 127, 0, 1]]
    dgate, dup, _ = swiglu_quantize.swiglu_norm_quantize_backward(up, gate, up, None, None, activation)
    assert dgate.isfinite().all()
    assert dup.isfinite().all()
    ours, _ = swiglu_quantize.swiglu_norm_quantize(gate * 0, up, gain[:10], EPS, activation)
    assert not ours.act_codes.any()
    assert torch.equal(ours.act_scale, reference.quantize_activation(gate * 0)[1])


def test_swiglu_refuses(device):
    gate, gain = normal(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match="silu or gelu_pytorch_tanh; got relu"):
        swiglu_quantize.swiglu_norm_quantize(gate, gate, gain, EPS, "relu")
    with pytest.raises(ValueError, match="up: expected the shape and dtype of gate"):
        swiglu_quantize.swiglu_norm_quantize(gate, gate.half(), gain, EPS, "silu")
    with pytest.raises(ValueError, match="gain: expected shape"):
        swiglu_quantize.swiglu_norm_quantize(gate, gate, gain[:4], EPS, "silu")


def test_swiglu_moves_five_bytes_an_element(moved_bytes, device):
    gate = normal(8, 2048, dtype=torch.bfloat16, device=device)
    gain = torch.ones(2048, device=device)
    with moved_bytes() as moved:
        _, rstd = swiglu_quantize.swiglu_norm_quantize(gate, gate.clone(), gain, EPS, "silu")
    assert moved.loaded == 4 * gate.numel() + 4 * 4 * 2048  # 4 programs of 2 rows read the gain
    assert moved.stored == gate.numel() + 8 * 8
    with moved_bytes() as moved:
        swiglu_quantize.swiglu_norm_quantize_backward(gate, gate, gate, gain, rstd, "silu")
    # The interpreter loads once for the mean and once for the gradients: the compiler makes one load of it.
    assert moved.loaded == 2 * (6 * gate.numel() + 8 * 4 * 2048) + 8 * 4
    assert moved.stored == 4 * gate.numel() + 8 * 4 * 2048


# ---------------------------------------------------------------------------------------------------- ahead of time


def test_assembly():
    """Products and additions stay apart where the reference rounds between them, and memory is moved 16 bytes at a time.

    Compiled for sm_90 in a process that does not interpret; no GPU is needed.
    """
    script = (
        "import json, triton\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource\n"
        "from gpu_launches.quantize import production_launches\n"
        "for launch in (production_launches()[0], production_launches()[-1]):\n"
        "    names = launch.kernel.arg_names\n"
        "    types = {name: launch.signature.get(name, 'constexpr') for name in names}\n"
        "    attrs = {(names.index(name),): [['tt.divisibility', 16]] for name in launch.aligned}\n"
        "    source = ASTSource(launch.kernel, types, constexprs=dict(launch.constexprs), attrs=attrs)\n"
        "    options = {'num_warps': launch.num_warps, 'enable_fp_fusion': True}\n"
        "    print(json.dumps(triton.compile(source, target=GPUTarget('cuda', 90, 32), options=options).asm['ptx']))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1] / "bench")
    command = [sys.executable, "-P", "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    activation, weights = map(json.loads, result.stdout.splitlines())
    assert "fma" not in activation
    assert 1 <= activation.count("div.rn.f32") <= 8  # of scales, never of elements
    assert activation.count("ld.global.v4.b32") == 4  # 32 values per thread, in bf16
    assert activation.count("st.global.v4.b32") == 2
    assert not re.search(r"div\S*f32", weights)
    assert len(re.findall(r"ld\.global\.\S*v4\.b32", weights)) == 2 * 8  # a tile, in either of its two visits
    assert len(re.findall(r"st\.global\.\S*v4\.b32", weights)) == 2  # its codes
