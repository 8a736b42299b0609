"""The GPU's matrix products: integers bit for bit, gradients against float64, at shapes that no tile divides."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from bitdistill.kernels import reference
from bitdistill.kernels.gpu import bit_linear, gradient_codes, matmul
from gpu_launches.gradient_codes import production_launches as launches_of_gradients
from gpu_launches.launch import Launch
from gpu_launches.matmul import production_launches as launches_of_matmul

pytestmark = pytest.mark.usefixtures("poisoned")
SMALL = matmul.Tile(32, 16, 32, 4, 2)  # so that small shapes have several tiles, groups of tiles and inner steps


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(matmul, "choose_tile", lambda *_: SMALL)


def random_codes(rows, columns, device, most=127, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, (rows, columns), generator=generator, dtype=torch.int8).to(device)


def randn(*shape, device, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def exact_product(a, b):
    return a.double() @ b.double().T


SHAPES = [(1, 16, 8), (1, 1, 1), (5, 37, 3), (33, 64, 48), (70, 130, 45), (16, 300, 100)]  # N, I, O


@pytest.mark.parametrize(("N", "I", "O"), SHAPES)
def test_accumulators_are_exact(N, I, O, device, small_tiles):
    act, weight = random_codes(N, I, device), random_codes(O, I, device, most=1, seed=1)
    one = torch.ones(N, device=device)
    y = matmul.int8_linear(act, one, weight, torch.ones(1, device=device), [O], dtype=torch.float32)
    assert torch.equal(y.to(torch.int32), reference.ternary_accumulate(act, weight))


def test_accumulators_at_the_largest_magnitude(device):
    """127 * 9728 in every sum, and both operands of full int8 range: beyond what fp32 or an int8 overflow would give."""
    act = torch.full((3, 9728), 127, dtype=torch.int8, device=device)
    act[1] = -127
    ones = torch.ones(3, device=device)
    weight = torch.ones((2, 9728), dtype=torch.int8, device=device)
    y = matmul.int8_linear(act, ones, weight, None, dtype=torch.float32)
    assert y.tolist() == [[127 * 9728] * 2, [-127 * 9728] * 2, [127 * 9728] * 2]
    y = matmul.int8_linear(act, ones, 127 * weight, None, dtype=torch.float32)
    assert y[0, 0] == torch.tensor(127 * 127 * 9728).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(48,), (32, 17), (16, 5, 9)])
def test_segments_scales_and_biases(sizes, dtype, device, small_tiles):
    N, I, O = 37, 70, sum(sizes)
    act, weight = random_codes(N, I, device), random_codes(O, I, device, most=1, seed=1)
    act_scale, scale = randn(N, 1, device=device).abs(), randn(len(sizes), device=device, seed=2).abs()
    bias = randn(O, device=device, seed=3)
    column_scale = scale.repeat_interleave(torch.tensor(sizes, device=device))
    exact = exact_product(act, weight).float() * (act_scale * column_scale)
    y = matmul.int8_linear(act, act_scale, weight, scale, sizes, dtype=dtype)
    assert torch.equal(y, exact.to(dtype))  # bit for bit, rounding to the output's dtype included
    y = matmul.int8_linear(act, act_scale, weight, scale, sizes, bias, dtype=dtype)
    expected = (exact + bias).to(dtype)  # on a device the multiplication and addition are fused
    assert torch.equal(y, expected) or (y - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def errors_of(ours, plain, exact):
    """Our largest error and plain PyTorch's, in units of the largest value."""
    peak = exact.abs().max().clamp_min(1e-300)
    return ((ours.double() - exact).abs().max() / peak).item(), ((plain.double() - exact).abs().max() / peak).item()


def check_gradient(ours, plain, exact, dtype):
    assert not ours.isnan().any()
    error, allowed = errors_of(ours, plain, exact)
    assert error <= max(2 * allowed, 2 * torch.finfo(dtype).eps), (error, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(48,), (1,), (32, 17), (64, 33, 9)])
@pytest.mark.parametrize(("N", "I"), [(1, 16), (37, 70), (64, 96)])
def test_gradients_against_float64(N, I, sizes, dtype, device, small_tiles):
    O = sum(sizes)
    dy = randn(N, O, device=device, dtype=dtype)
    act, weight = random_codes(N, I, device), random_codes(O, I, device, most=1, seed=1)
    act_scale = randn(N, 1, device=device, seed=2).abs() + 0.01
    scale = randn(len(sizes), device=device, seed=3).abs() + 0.01
    rows = scale.repeat_interleave(torch.tensor(sizes, device=device))[:, None]

    ours = matmul.grad_input(dy, weight, scale, sizes, dtype)
    plain = dy @ (weight * rows).to(dtype)
    check_gradient(ours, plain, dy.double() @ (weight.double() * rows.double()), dtype)

    ours = matmul.grad_weight(dy, act, act_scale, torch.float32)
    assert ours.dtype == torch.float32
    plain = dy.T @ (act * act_scale).to(dtype)
    check_gradient(ours, plain, dy.double().T @ (act.double() * act_scale.double()), dtype)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12, 1e30])
def test_gradients_of_any_magnitude(magnitude, device):
    """No EPSILON, no integer range: bf16 gradients may be far from 1."""
    dy = randn(9, 48, device=device, dtype=torch.bfloat16) * magnitude
    act, weight = random_codes(9, 40, device), random_codes(48, 40, device, most=1)
    scale, sizes, act_scale = torch.tensor([0.01, 3.0], device=device), (16, 32), torch.ones(9, device=device)
    rows = scale.repeat_interleave(torch.tensor(sizes, device=device))[:, None].double()
    check_gradient(
        matmul.grad_input(dy, weight, scale, sizes, torch.float32),
        dy.float() @ (weight * rows.float()),
        dy.double() @ (weight * rows),
        torch.bfloat16,
    )
    check_gradient(
        matmul.grad_weight(dy, act, act_scale, torch.float32),
        dy.float().T @ act.float(),
        dy.double().T @ act.double(),
        torch.bfloat16,
    )


def test_zero_rows(device):
    """No token: empty outputs, and a weight gradient of zeros."""
    act, weight = random_codes(0, 32, device), random_codes(16, 32, device, most=1)
    none, scale = torch.ones((0, 1), device=device), torch.ones(1, device=device)
    assert matmul.int8_linear(act, none, weight, scale, [16], dtype=torch.bfloat16).shape == (0, 16)
    dy = torch.zeros((0, 16), device=device)
    assert matmul.grad_input(dy, weight, scale, [16], torch.float32).shape == (0, 32)
    assert torch.equal(matmul.grad_weight(dy, act, none, torch.float32), torch.zeros((16, 32), device=device))


def test_strides(device):
    """Gradients that autograd hands over expanded, transposed or as a slice of a wider tensor."""
    act, weight = random_codes(12, 40, device), random_codes(24, 40, device, most=1)
    act_scale, scale = torch.ones(12, device=device), torch.ones(1, device=device)
    wide = randn(12, 64, device=device)
    for dy in (wide[:, 8:32], wide.T.contiguous().T[:, :24], wide[:, :1].expand(12, 24), wide[:1, :24].expand(12, 24)):
        dx = matmul.grad_input(dy, weight, scale, [24], torch.float32)
        assert torch.equal(dx, matmul.grad_input(dy.contiguous(), weight, scale, [24], torch.float32))
        dw = matmul.grad_weight(dy, act, act_scale, torch.float32)
        assert torch.equal(dw, matmul.grad_weight(dy.contiguous(), act, act_scale, torch.float32))
    read_only = random_codes(24, 80, device, most=1)[:, ::2]
    y = matmul.int8_linear(act, act_scale, read_only, scale, [24], dtype=torch.float32)
    assert torch.equal(y, exact_product(act, read_only).float())


def test_nan_and_infinity_reach_the_gradients(device):
    """A loss scaler looks for them there."""
    dy = randn(40, 24, device=device)
    dy[7, 3] = float("inf")
    act, weight = random_codes(40, 32, device), torch.ones((24, 32), dtype=torch.int8, device=device)
    assert not matmul.grad_input(dy, weight, torch.ones(1, device=device), [24], torch.float32)[7].isfinite().any()
    assert not matmul.grad_weight(dy, act, torch.ones(40, device=device), torch.float32)[3].isfinite().all()
    for value in (float("inf"), float("nan")):
        dy[7, 3] = value
        codes = gradient_codes.quantize_gradient(
            dy, torch.ones(40, device=device), torch.ones(1, device=device), [24], 0
        )
        assert not codes.row_scale[7].isfinite()
        assert not codes.column_scale[3].isfinite()
        assert codes.row_scale[8].isfinite()


@settings(max_examples=25, deadline=None)
@given(
    N=st.integers(1, 40),
    I=st.integers(1, 70),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
)
def test_any_shape(N, I, sizes, seed):
    """Forward and both gradients in fp32 against float64, tiles smaller than the shapes."""
    device, O = "cuda" if torch.cuda.is_available() else "cpu", sum(sizes)
    act, weight = random_codes(N, I, device, seed=seed), random_codes(O, I, device, most=1, seed=seed + 1)
    dy, act_scale = randn(N, O, device=device, seed=seed), randn(N, device=device, seed=seed + 1).abs() + 0.1
    scale = randn(len(sizes), device=device, seed=seed + 2).abs() + 0.1
    rows = scale.repeat_interleave(torch.tensor(sizes, device=device))[:, None]
    tile, matmul.choose_tile = matmul.choose_tile, lambda *_: SMALL
    try:
        y = matmul.int8_linear(act, act_scale, weight, scale, sizes, dtype=torch.float32)
        dx = matmul.grad_input(dy, weight, scale, sizes, torch.float32)
        dw = matmul.grad_weight(dy, act, act_scale, torch.float32)
    finally:
        matmul.choose_tile = tile
    assert torch.equal(y, exact_product(act, weight).float() * (act_scale[:, None] * rows.T))
    exact = dy.double() @ (weight * rows.double())
    assert (dx - exact).abs().max() <= 1e-5 * exact.abs().max().clamp_min(1e-3)
    exact = dy.double().T @ (act * act_scale[:, None].double())
    assert (dw - exact).abs().max() <= 1e-5 * exact.abs().max().clamp_min(1e-3)


# ---------------------------------------------------------------------------------------------------- int8 gradients


def test_gradient_codes_are_the_two_neighbors_and_exact_in_the_mean(device):
    sizes, N = (40, 30), 50
    dy = randn(N, 70, device=device) * torch.logspace(-8, 3, N, device=device)[:, None]
    dy[4], dy[:, 9], dy[5, 5:9] = 0, 0, 0
    act_scale, scale = randn(N, device=device, seed=1).abs() + 0.1, torch.tensor([0.02, 0.5], device=device)
    columns = scale.repeat_interleave(torch.tensor(sizes, device=device))
    rows_value, columns_value = dy * columns, (dy * act_scale[:, None]).T
    sums = [0, 0]
    for seed in range(30):
        codes = gradient_codes.quantize_gradient(dy, act_scale, scale, sizes, seed)
        assert codes.column_codes.shape == (70, 128)
        assert not codes.column_codes[:, N:].any()  # padding
        pairs = (
            (rows_value, codes.row_codes, codes.row_scale),
            (columns_value, codes.column_codes[:, :N], codes.column_scale),
        )
        for place, (value, code, step) in enumerate(pairs):
            assert not code[value == 0].any()
            units = value.double() / step[:, None].double()
            assert ((code - units).abs() < 1 + 1e-4).all()
            peak = value.abs().amax(1)
            assert torch.allclose(step[peak > 0], peak[peak > 0] / 127)
            assert (code.abs().amax(1)[peak > 0] == 127).all()
            sums[place] = sums[place] + (code - units)
    for total in sums:  # a draw's standard deviation is at most 1/2: a mean beyond 5 sigma is a bias
        assert (total / 30).abs().max() < 5 * 0.5 / 30**0.5
        assert (total / 30).mean().abs() < 5 * 0.5 / (30 * total.numel()) ** 0.5


def test_same_seed_same_bits_and_rows_draw_apart(device):
    dy = torch.full((256, 128), 0.3, device=device)
    dy[:, 0] = 127.0  # the step is 1: every other value is 0.3 of it
    ones = torch.ones(256, device=device)
    arguments = (dy, ones, ones[:1], [128])
    first = gradient_codes.quantize_gradient(*arguments, 7)
    again, other = gradient_codes.quantize_gradient(*arguments, 7), gradient_codes.quantize_gradient(*arguments, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for codes in (first, other):
        drawn = codes.row_codes[:, 1:].float()
        assert abs(drawn.mean() - 0.3) < 0.02
        assert not torch.equal(drawn[0], drawn[1])  # no two rows, tiles or columns share their draws
        assert not torch.equal(drawn[:128], drawn[128:])
        assert not torch.equal(drawn[:, 1:64], drawn[:, 64:127])
    assert (first.row_codes != other.row_codes).any()
    # the two codes of an element are drawn apart, too
    values = dy.clone()
    values[0] = 127.0
    codes = gradient_codes.quantize_gradient(values, ones, ones[:1], [128], 3)
    assert abs((codes.row_codes[1:, 1:] == codes.column_codes.T[1:256, 1:]).float().mean() - 0.58) < 0.02


def test_transpose(device):
    for R, C in ((1, 1), (130, 7), (256, 128)):
        codes = random_codes(R, C, device)
        result = gradient_codes.transpose_codes(codes)
        assert result.shape == (C, -(-R // 128) * 128)
        assert torch.equal(result[:, :R], codes.T)
        assert not result[:, R:].any()


def test_more_tokens_than_an_int32_sum_holds(device, monkeypatch):
    """The weight gradient is summed in parts."""
    monkeypatch.setattr(bit_linear, "TOKENS_OF_A_SUM", 16)
    torch.manual_seed(0)
    x, w = randn(40, 32, device=device), randn(24, 32, device=device, seed=1).requires_grad_()
    dy = randn(40, 24, device=device, seed=2)
    activation, ternary = bit_linear.quantize_input(x), bit_linear.ternarize([w])
    fast, exact = (
        torch.autograd.grad(bit_linear.ternary_linear(x, activation, [w], [], ternary, torch.float32, mode), w, dy)[0]
        for mode in ("fast", "exact")
    )
    assert torch.nn.functional.cosine_similarity(fast.flatten(), exact.flatten(), 0) > 0.999


# ---------------------------------------------------------------------------------------------------- cost


def test_bytes_touched(device, moved_bytes):
    """Each operand once a tile, each result once: at one tile the floor, but for scales."""
    N, I, O = 32, 64, 16
    act, weight = random_codes(N, I, device), random_codes(O, I, device, most=1)
    dy = randn(N, O, device=device)
    act_scale, scale = torch.ones(N, device=device), torch.ones(1, device=device)
    with moved_bytes() as moved:
        matmul.int8_linear(act, act_scale, weight, scale, [O], dtype=torch.bfloat16)
    assert moved.stored == 2 * N * O
    assert moved.loaded <= N * I + O * I + 4 * N + 4
    with moved_bytes() as moved:
        matmul.grad_input(dy.bfloat16(), weight, scale, [O], torch.bfloat16)
    assert moved.stored == 2 * N * I
    assert moved.loaded <= 2 * N * O + O * I + 4
    with moved_bytes() as moved:
        matmul.grad_weight(dy.bfloat16(), act, act_scale, torch.float32)
    assert moved.stored == 4 * O * I
    assert moved.loaded <= 2 * N * O + N * I + 4 * N


def test_bytes_of_gradient_codes(device, moved_bytes):
    """2 + 2 read and 1 + 1 written an element; scales and peaks are the rest."""
    N, O = 256, 128
    dy, ones = randn(N, O, device=device, dtype=torch.bfloat16), torch.ones(N, device=device)
    with moved_bytes() as moved:
        gradient_codes.quantize_gradient(dy, ones, ones[:1], [O], 0)
    peaks = 4 * (2 * N + 2 * O)
    assert moved.stored == 2 * N * O + peaks
    assert moved.loaded <= 4 * N * O + 8 * peaks


def test_tiles_fill_the_part():
    """132 processors: large products take the large tile, small ones more, smaller tiles; never beyond the problem."""
    tiles = matmul.INT8_TILES["sm_90"]
    assert matmul.choose_tile(tiles, 16384, 6144, 2048, 132) == tiles[0]
    few = matmul.choose_tile(tiles, 1024, 1024, 1024, 132)
    assert few.rows * few.columns < 128 * 256
    tiny = matmul.choose_tile(tiles, 1, 5, 20, 132)
    assert (tiny.rows, tiny.columns, tiny.inner) == (16, 16, 32)


def test_production_launches_name_every_argument():
    for launch in launches_of_matmul() + launches_of_gradients():
        assert isinstance(launch, Launch)
        assert dataclasses.is_dataclass(launch)
        names = set(launch.kernel.arg_names)
        assert set(launch.signature) | set(launch.constexprs) == names, launch.kernel
        assert set(launch.aligned) <= set(launch.signature)
