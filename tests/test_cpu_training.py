"""The CPU's training kernels against the reference: codes, scales and integers bit for bit, gradients as good as PyTorch's."""

import json
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bitdistill.kernels import reference
from bitdistill.kernels.cpu import (
    bf16,
    bit_linear,
    choices,
    rows,
    training_digits,
    training_gradients,
    training_products,
    training_quantize,
)
from bitdistill.kernels.cpu.instructions import FEATURES

KNOWN = ("amx", "avx2")  # instruction sets that need no measurement
SHAPES = [(6, 48), (2, 3, 48), (1, 16), (0, 48), (7, 575), (3, 1), (130, 80), (5, 17)]


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """One thread, and three that share even small work."""
    monkeypatch.setattr(rows, "LEAST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def odd_rows(shape, dtype=torch.float32, seed=0):
    """Random rows, among them zeros, ties of the rounding, very large and very small ones."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    flat = x.view(-1, shape[-1])
    for place, row in enumerate(flat[:5]):
        if place == 0:
            row.zero_()
        elif place == 1:
            row.copy_((torch.arange(len(row)) % 255 - 127) / 2)
            row[0] = 127  # so that every second value lies halfway between two codes
        elif place in (2, 3):
            row.mul_(1e10 if place == 2 else 1e-10)
    return x.to(dtype)


def work_for(seconds):
    """Takes so much of the processor's time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


# --- quantizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_bit_for_bit(shape, dtype, threads):
    x = odd_rows(shape, dtype)
    codes, scale = bit_linear.quantize_input(x)
    expected_codes, expected_scale = reference.quantize_activation(x)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)


def test_activations_of_any_layout():
    x = odd_rows((40, 60))
    for view in (x.t(), x[:, 3:50], x[::2], x[:, ::2], x[0].expand(4, 60), x.view(4, 10, 60).transpose(0, 1)):
        codes, scale = bit_linear.quantize_input(view)
        expected = reference.quantize_activation(view)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])
    read_only = np.ones((3, 5), np.float32)
    read_only.flags.writeable = False
    with pytest.warns(UserWarning, match="not writable"):
        frozen = torch.from_numpy(read_only)
    assert (bit_linear.quantize_input(frozen).act_codes == 127).all()


def test_a_nan_or_an_infinity_reaches_the_output():
    weight = torch.randn(4, 20)
    for bad in (float("nan"), float("inf")):
        x = torch.ones(3, 20)
        x[1, 7] = bad
        y = bit_linear.ternary_linear(
            x, bit_linear.quantize_input(x), [weight], [], bit_linear.ternarize([weight]), torch.float32, "exact"
        )
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()
    with pytest.raises(ValueError, match="at least 1"):
        bit_linear.quantize_input(torch.zeros(2, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_bit_for_bit(dtype, threads):
    weights = [
        odd_rows(shape, seed=seed).to(dtype) for seed, shape in enumerate([(32, 48), (5, 3), (1, 1), (300, 700)])
    ]
    weights += [
        torch.zeros(4, 6, dtype=dtype),
        torch.full((3, 5), -1e-6, dtype=dtype),
        torch.randn(20, 30, dtype=dtype).t(),
    ]
    weights += [torch.tensor([[0.5, 1.5, -0.5, -1.5]], dtype=dtype)]  # halves of the scale, which is 1
    for part, weight in zip(bit_linear.ternarize_each(weights), weights, strict=True):
        codes, scale = reference.quantize_weight(weight)
        assert torch.equal(part.weight_codes, codes)
        assert torch.equal(part.weight_scale, scale.view(1))
    with pytest.raises(ValueError, match="ZeRO-3"):
        bit_linear.ternarize([torch.zeros(0)])


def test_stacked_weights_are_views_where_they_lie_side_by_side():
    weights = [torch.randn(O, 24) for O in (8, 5, 16)]
    parts = bit_linear.ternarize_each(weights)
    together = bit_linear.stacked(parts)
    assert together.weight_codes.data_ptr() == parts[0].weight_codes.data_ptr()
    assert bit_linear.stacked(parts) is together
    apart = bit_linear.stacked([parts[2], parts[0]])
    assert torch.equal(apart.weight_codes, torch.cat([parts[2].weight_codes, parts[0].weight_codes]))
    assert apart.of_columns().tolist() == [parts[2].weight_scale.item()] * 16 + [parts[0].weight_scale.item()] * 8


# --- products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("method", training_products.METHODS)
def test_products_bit_for_bit(method, kind, threads):
    for N, I, O in [
        (1, 16, 16),
        (2, 48, 32),
        (9, 64, 16),
        (37, 576, 192),
        (65, 64, 64),
        (5, 1028, 48),
        (300, 32, 80),
        (1100, 64, 272),  # so large that tiles write it past the caches
        (4, 575, 33),
        (3, 1, 5),
        (3, 4, 1),
    ]:
        generator = torch.Generator().manual_seed(N)
        for extreme in (False, True):
            ternary = bit_linear.ternarize([torch.randn(O, I, generator=generator) + extreme * 9])
            codes = torch.randint(-127, 128, (N, I if kind == "forward" else O), generator=generator, dtype=torch.int8)
            codes = codes.fill_(-127) if extreme else codes
            expected = codes.long() @ (ternary.weight_codes.t() if kind == "forward" else ternary.weight_codes).long()
            got = training_products.ternary_product(kind, codes, ternary, method)
            assert got.dtype == torch.int32
            assert torch.equal(got.long(), expected), (N, I, O)
            row, column, bias = (torch.randn(n, generator=generator) for n in (N, got.shape[1], got.shape[1]))
            for dtype, *rest in (
                (torch.float32, column, bias),
                (torch.float32, None, None),
                (torch.bfloat16, None, None),
            ):
                floats = training_products.scaled_product(kind, codes, ternary, row, *rest, dtype, method)
                by = row[:, None] if rest[0] is None else row[:, None] * column
                wanted = got.float() * by + (0 if rest[1] is None else bias)
                assert torch.equal(floats, wanted.to(dtype)), (N, I, O)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 15, 16, 17, 33])
def test_scaling_writes_nothing_beyond_its_rows(width, half):
    """With one column left over, LLVM 22 wrote two bf16 numbers where one was asked for."""
    rows, size, margin = 3, 2 if half else 4, 64
    acc, ones = np.arange(rows * width, dtype=np.int32), np.ones(max(rows, width), np.float32)
    out = np.full(rows * width * size + 2 * margin, 171, np.uint8)
    pointers = (ones.ctypes.data, ones.ctypes.data, 0, out.ctypes.data + margin)
    training_quantize.scale_rows(0, rows, acc.ctypes.data, True, width, *pointers, half)
    assert (out[:margin] == 171).all()
    assert (out[-margin:] == 171).all()
    bits = out[margin:-margin].view(np.uint16 if half else np.uint32)
    values = (bits.astype(np.uint32) << 16).view(np.float32) if half else bits.view(np.float32)
    assert values.tolist() == acc.tolist()


def test_dense_products_bit_for_bit(threads):
    if not training_products.dense_products_are_exact():
        pytest.skip("int8 times int8 saturates here")
    for N, P, I in [(1, 16, 16), (64, 32, 48), (65, 48, 64), (200, 96, 576), (65, 1040, 272), (0, 16, 32), (7, 33, 5)]:
        generator = torch.Generator().manual_seed(N)
        columns, codes = (
            torch.randint(-127, 128, (N, width), generator=generator, dtype=torch.int8) for width in (P, I)
        )
        for a, b in ((columns, codes), (columns.clone().fill_(127), codes.clone().fill_(-127))):
            got = training_products.dense_product(a, b)
            assert got.dtype == torch.int32
            assert torch.equal(got.long(), a.long().t() @ b.long()), (N, P, I)


def test_the_choice_is_kept_for_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(choices, "cache_folder", lambda: tmp_path)
    choices._known.cache_clear()
    timed = []
    ways = {name: lambda name=name: timed.append(name) for name in ("one", "other")}
    try:
        first = choices.fastest("this", ways)
        assert all(timed.count(name) > choices.TRIALS for name in ways)
        for again in range(2):  # known to the process, then read from the file
            timed.clear()
            assert choices.fastest("this", ways) == first
            assert not timed
            if again == 0:
                choices._known.cache_clear()
        (tmp_path / "choices.json").write_text("broken")
        choices._known.cache_clear()
        assert choices.fastest("this", ways) in ways
        assert timed
    finally:
        choices._known.cache_clear()


def test_tiles_are_taken_without_timing(monkeypatch):
    codes, ternary = torch.ones(9, 64, dtype=torch.int8), bit_linear.ternarize([torch.randn(32, 64)])
    if FEATURES not in KNOWN:
        pytest.skip("by measurement here")
    monkeypatch.setattr(training_products, "fastest", lambda *_: pytest.fail("timed"))
    monkeypatch.setitem(training_products.METHODS, "onednn", lambda *_: pytest.fail("not tiles"))
    training_products.ternary_product("forward", codes, ternary)


def test_side_by_side_the_first_choice_holds_and_none_is_lost(monkeypatch, tmp_path):
    monkeypatch.setattr(choices, "cache_folder", lambda: tmp_path)
    choices._known.cache_clear()
    file, ways = tmp_path / "choices.json", {"slow": lambda: work_for(0.01), "fast": lambda: None}
    try:
        assert choices.fastest("one", ways) == "fast"
        (key,) = kept = json.loads(file.read_text())
        file.write_text(
            json.dumps(kept | {key.replace("one", "two"): "slow"})
        )  # by another process, after ours had read it
        assert choices.fastest("two", ways) == "slow"
        assert choices.fastest("three", ways) == "fast"
        assert list(json.loads(file.read_text()).values()) == ["fast", "slow", "fast"]
    finally:
        choices._known.cache_clear()


def test_bf16_products_only_where_they_are_faster(monkeypatch, tmp_path):
    monkeypatch.setattr(choices, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.delenv(choices.ISA, raising=False)

    def slow(dtype):
        return lambda a, b: work_for(0.02) if a.dtype == dtype else None

    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(torch, "mm", slow(dtype))
        choices._known.cache_clear()
        bf16.has_bf16_products.cache_clear()
        (tmp_path / "choices.json").unlink(missing_ok=True)
        assert bf16.has_bf16_products() == (dtype == torch.float32)
    bf16.has_bf16_products.cache_clear()
    monkeypatch.setenv(choices.ISA, "avx2")
    assert not bf16.has_bf16_products()
    bf16.has_bf16_products.cache_clear()
    choices._known.cache_clear()


# --- the linear ----------------------------------------------------------------------------------------------------------


def linear(x, weights, biases, backward, dtype=torch.float32):
    activation, ternary = bit_linear.quantize_input(x), bit_linear.ternarize(weights)
    return bit_linear.ternary_linear(x, activation, weights, biases, ternary, dtype, backward)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_bit_for_bit(shape, bias, threads):
    """Also linears side by side, each with a scale of its own."""
    weights = [torch.randn(O, shape[-1]) * (1 + O) for O in (32, 5, 16)]
    biases = [torch.randn(len(weight)) for weight in weights] if bias else []
    x = odd_rows(shape)
    expected = [reference.bit_linear(x, w, b) for w, b in zip(weights, biases or [None] * 3, strict=True)]
    assert torch.equal(linear(x, weights, biases, "exact"), torch.cat(expected, -1))


def take(way, monkeypatch):
    """Lets the gradients be computed by a way, or skips the test."""
    if way == "rows" and not training_products.dense_products_are_exact():
        pytest.skip("oneDNN's int8 times int8 is not exact on this machine")
    monkeypatch.setattr(training_gradients, "_way", lambda *_: way)


@pytest.mark.parametrize(
    ("dtype", "way"), [(torch.float32, way) for way in training_gradients.WAYS] + [(torch.bfloat16, "floats")]
)
@pytest.mark.parametrize("shape", [(6, 48), (2, 65, 576), (0, 48), (1, 16), (2, 65, 575)])
@pytest.mark.parametrize("uneven", [False, True])
def test_exact_gradients_are_as_good_as_pytorchs(shape, dtype, way, uneven, threads, monkeypatch):
    """Of input, weights and biases, against float64: at most twice the reference's error, also where some gradients are far
    larger than others."""
    take(way, monkeypatch)
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    weights, biases = (
        [torch.randn(O, shape[-1], requires_grad=True) for O in (32, 16)],
        [torch.randn(32), torch.randn(16)],
    )
    biases = [bias.requires_grad_() for bias in biases]
    inputs = [x, *weights, *biases]
    y = linear(x, weights, biases, "exact", dtype)
    dy = torch.randn(y.shape)
    if uneven:
        dy *= torch.rand(y.shape[:-1])[..., None] ** 6 * torch.rand(y.shape[-1]) ** 6
    dy = dy.to(dtype)
    ours = torch.autograd.grad(y, inputs, dy)
    plain = torch.cat([reference.bit_linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)
    theirs = torch.autograd.grad(plain, inputs, dy)
    codes, scale = reference.quantize_activation(x)
    rows64, dy64 = (codes * scale.double()).flatten(0, -2), dy.double().flatten(0, -2)
    parts = [reference.quantize_weight(weight) for weight in weights]
    dx = sum((d @ (c * s.double())) for d, (c, s) in zip(dy64.split([32, 16], 1), parts, strict=True)).view(shape)
    truth = [dx, *(d.t() @ rows64 for d in dy64.split([32, 16], 1)), *dy64.sum(0).split([32, 16])]
    for name, a, b, t in zip(["x", "w0", "w1", "b0", "b1"], ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, t) <= max(2 * relative(b, t), 2**-22 if dtype == torch.float32 else 2**-8), name


@pytest.mark.parametrize("dense", [True, False])
def test_fast_gradients_are_close(dense, threads, monkeypatch):
    """int8 noise, but of the right size and direction; NaN gets through; zeros stay zero; unneeded gradients are not made."""
    if not (dense and training_products.dense_products_are_exact()):
        monkeypatch.setattr(training_gradients, "dense_products_are_exact", lambda: False)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(150, 70), torch.randn(40, 70), torch.randn(40)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    dy = torch.randn(150, 40) * torch.rand(150, 1) ** 4
    dy[3], dy[:, 5] = 0, 0
    fast = torch.autograd.grad(linear(x, [weight], [bias], "fast"), inputs, dy)
    exact = torch.autograd.grad(reference.bit_linear(x, weight, bias), inputs, dy)
    for a, b, bound in zip(fast, exact, (0.01, 0.015, 1e-6), strict=True):
        assert relative(a, b) <= bound
    assert (fast[0][3] == 0).all()
    assert (fast[1][5] == 0).all()
    dy[4, 6] = float("nan")
    dx, dw, _ = torch.autograd.grad(linear(x, [weight], [bias], "fast"), inputs, dy)
    assert dx[4].isnan().all()
    assert dw[6].isnan().all()
    assert dx[:4].isfinite().all()
    (only_x,) = torch.autograd.grad(linear(x, [weight.detach()], [], "fast"), [x], torch.ones(150, 40))
    (only_weight,) = torch.autograd.grad(linear(x.detach(), [weight], [], "fast"), [weight], torch.ones(150, 40))
    assert only_x.shape == x.shape
    assert only_weight.shape == weight.shape


@pytest.mark.parametrize("way", training_gradients.WAYS)
def test_exact_gradients_show_what_is_not_finite(way, monkeypatch):
    take(way, monkeypatch)
    x, weight = torch.randn(70, 33, requires_grad=True), torch.randn(48, 33, requires_grad=True)
    for bad in (float("nan"), float("inf")):
        dy = torch.randn(70, 48)
        dy[4, 6] = bad
        dx, dw = torch.autograd.grad(linear(x, [weight], [], "exact"), [x, weight], dy)
        assert not dx[4].isfinite().any()
        assert not dw[6].isfinite().any()
        assert dx[:4].isfinite().all()
        assert dw[:6].isfinite().all()


def quantized_gradient(dy, act_scale, weight_scale, planes):
    """The specification of training_digits.py in PyTorch: codes int8 and scales of dX's operand, and of dW's."""
    found = []
    for values, dim in ((dy.float() * weight_scale, 1), (dy.float() * act_scale, 0)):
        peak = values.abs().amax(dim, keepdim=True).clamp_min(float(training_digits.TINY))
        rest, codes = values * (torch.full_like(peak, 127) / peak), []
        for _ in range(planes):
            codes.append(rest.round())
            rest = (rest - codes[-1]) * training_digits.DIGIT
        found.append((torch.stack(codes).to(torch.int8), (peak / 127).flatten()))
    return found


# The last but three is written past the caches; the last three are padded to whole tiles.
GRADIENTS = [
    (6, 16, 48),
    (65, 48, 64),
    (1, 32, 16),
    (150, 80, 208),
    (1100, 64, 272),
    (70, 33, 40),
    (3, 5, 17),
    (66, 172, 160),
]


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", GRADIENTS)
def test_gradient_codes_bit_for_bit(shape, dtype, planes, threads):
    """As rows, and as tiles where whole ones fit; what is beyond the last row and column of tiles is zeros."""
    N, _, O = shape
    dy, act_scale, weight_scale = odd_rows((N, O), dtype), torch.rand(N, 1), torch.rand(O)
    ternary = training_products.Ternary(torch.zeros(O, 16, dtype=torch.int8), weight_scale, (1,) * O)
    (row_codes, row_scale), (column_codes, column_scale) = quantized_gradient(dy, act_scale, weight_scale, planes)
    rest = (dy, act_scale, ternary, planes)
    ours = torch.full((planes, N, O), 99, dtype=torch.int8), torch.full((N, planes, O), 99, dtype=torch.int8)
    scales = training_gradients._quantized(training_digits.gradient_rows, *rest, *ours)
    assert torch.equal(ours[0], row_codes)
    assert torch.equal(ours[1], column_codes.transpose(0, 1))
    if O % 16 == 0:
        tokens, groups, columns = -(-N // 64), -(-N // 16), -(-O // 64)
        rows = torch.full((planes, groups, columns, 16, 64), 99, dtype=torch.int8)
        of_columns = torch.full((planes, O // 16, tokens, 16, 64), 99, dtype=torch.int8)
        scales += training_gradients._quantized(training_digits.gradient_tiles, *rest, rows, of_columns)
        whole = rows.transpose(2, 3).reshape(planes, 16 * groups, 64 * columns)
        assert torch.equal(whole[:, :N], F.pad(row_codes, (0, 64 * columns - O)))
        whole = of_columns.transpose(2, 3).reshape(planes, O, 64 * tokens)
        assert torch.equal(whole, F.pad(column_codes.transpose(1, 2), (0, 64 * tokens - N)))
    for ours, expected in zip(scales, [row_scale, column_scale] * 2, strict=False):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("shape", GRADIENTS)
def test_gradients_by_tiles_bit_for_bit(shape, planes, threads):
    """dX and dW from tiles are the integers of the codes, scaled or joined; and the one alone is the same."""
    N, I, O = shape
    x, weight, dy = odd_rows((N, I)), torch.randn(O, I), odd_rows((N, O), seed=1)
    codes, act_scale = bit_linear.quantize_input(x)
    ternary = bit_linear.ternarize([weight])
    work = (dy, codes, act_scale, ternary)
    tiles = training_gradients._in_parts(*work, True, True, planes, True)
    (row_codes, row_scale), (column_codes, column_scale) = quantized_gradient(
        dy, act_scale, ternary.of_columns(), planes
    )
    sums = row_codes.long() @ ternary.weight_codes.long(), column_codes.transpose(1, 2).long() @ codes.long()
    for ours, acc, scale in zip(tiles, sums, (row_scale, column_scale), strict=True):
        acc = acc.int().flatten(0, 1)
        if planes == 1:
            assert torch.equal(ours, training_products.scaled(acc, scale, None, None, torch.float32))
        else:
            assert torch.equal(ours, training_gradients._joined(acc, scale, planes))
    assert torch.equal(training_gradients._in_parts(*work, True, False, planes, True)[0], tiles[0])
    assert torch.equal(training_gradients._in_parts(*work, False, True, planes, True)[1], tiles[1])


@pytest.mark.parametrize("backward", ["exact", "fast"])
def test_gradients_take_tiles_without_timing(backward, monkeypatch):
    if FEATURES not in KNOWN:
        pytest.skip("by measurement here")
    monkeypatch.setattr(training_gradients, "fastest", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(training_gradients, "_in_rows", lambda *_: pytest.fail("not tiles"))
    x, weight = torch.randn(70, 48, requires_grad=True), torch.randn(32, 48, requires_grad=True)
    linear(x, [weight], [], backward).sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("shape", [(70, 64, 32), (70, 33, 40), (0, 64, 32)])
def test_gradients_take_the_ways_that_were_fastest(shape, digits, tiles, monkeypatch):
    taken, (N, I, O) = [], shape
    monkeypatch.setattr(training_gradients, "digits_are_fastest", lambda: digits)
    monkeypatch.setattr(training_gradients, "tiles_are_fastest", lambda: tiles)
    ways = {
        name: lambda *work, name=name, way=way: taken.append(name) or way(*work)
        for name, way in training_gradients.WAYS.items()
    }
    monkeypatch.setattr(training_gradients, "WAYS", ways)
    x, weight = torch.randn(N, I, requires_grad=True), torch.randn(O, I, requires_grad=True)
    whole = {"tiles"} if tiles or not training_products.dense_products_are_exact() else {"rows"}
    for backward, expected in (("exact", whole if digits else {"floats"}), ("fast", whole)):
        taken.clear()
        grads = torch.autograd.grad(linear(x, [weight], [], backward), [x, weight], torch.randn(N, O))
        assert [grad.shape for grad in grads] == [x.shape, weight.shape]
        assert set(taken) == expected


@pytest.mark.parametrize("which", [training_products.tiles_are_fastest, training_gradients.digits_are_fastest])
def test_what_is_fastest_is_asked_once(which, monkeypatch):
    asked = []
    for module in (training_products, training_gradients):
        monkeypatch.setattr(module, "fastest", lambda what, ways: asked.append(ways) or min(ways))
    which.cache_clear()
    try:
        assert which() == which()
        assert len(asked) <= (FEATURES not in KNOWN) + (which is training_gradients.digits_are_fastest)
        for ways in asked:
            for way in ways.values():
                way()
    finally:
        which.cache_clear()


def test_more_tokens_than_an_int32_sum_holds(monkeypatch):
    monkeypatch.setattr(training_gradients, "TOKENS_OF_A_SUM", 64)
    torch.manual_seed(0)
    x, weight, dy = (
        torch.randn(150, 32, requires_grad=True),
        torch.randn(16, 32, requires_grad=True),
        torch.randn(150, 16),
    )
    fast = torch.autograd.grad(linear(x, [weight], [], "fast"), [x, weight], dy)
    exact = torch.autograd.grad(reference.bit_linear(x, weight), [x, weight], dy)
    assert all(relative(a, b) <= 0.015 for a, b in zip(fast, exact, strict=True))


def test_int8_is_saved_for_backward():
    """A quarter of the input's bytes, and the input itself is let go."""
    x, weight = torch.randn(64, 256, requires_grad=True) * 1, torch.randn(128, 256, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear(x, [weight], [], "exact")
    assert sum(tensor.nbytes for tensor in saved) <= x.nbytes / 4 + 64 * 4
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in saved)


# --- norms and gates -----------------------------------------------------------------------------------------------------


def errors(compute, plain, inputs, dtype):
    """(ours, PyTorch's) errors against float64 of the codes' values and of every gradient."""
    dy = torch.randn(inputs[0].shape).to(dtype)
    activation, anchor = compute(*inputs)
    value = plain(*inputs)
    inputs64 = [tensor.detach().double().requires_grad_() for tensor in inputs]
    value64 = plain(*inputs64)
    truth = torch.autograd.grad(value64, inputs64, dy.double())
    ours, theirs = (torch.autograd.grad(y, inputs, dy) for y in (anchor, value))
    codes, scale = reference.quantize_activation(value)
    pairs = [(relative(activation.act_codes * activation.act_scale, value64), relative(codes * scale, value64))]
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        pairs.append((relative(a, t), relative(b, t)))
    return pairs


def norm64(x, gain):
    if x.dtype != torch.float64:
        return reference.rms_norm(x, gain, 1e-6)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 48), (2, 70, 575), (3, 7)])
def test_norm_is_as_good_as_pytorchs(shape, dtype, threads):
    torch.manual_seed(0)
    x, gain = torch.randn(shape).to(dtype), torch.rand(shape[-1]) + 0.5
    inputs = [x.requires_grad_(), gain.requires_grad_()]
    compute = lambda x, gain: bit_linear.norm_quantize_input(x, gain, 1e-6)  # noqa: E731
    for ours, theirs in errors(compute, norm64, inputs, dtype):
        assert ours <= max(2 * theirs, 2**-22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("normed", [True, False])
def test_gate_is_as_good_as_pytorchs(normed, activation, dtype, threads):
    torch.manual_seed(0)
    act = F.silu if activation == "silu" else lambda x: F.gelu(x, approximate="tanh")
    for shape in ((5, 48), (2, 70, 90)):
        gate, up = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
        inputs = [gate.requires_grad_(), up.requires_grad_()]
        inputs += [(torch.rand(shape[-1]) + 0.5).requires_grad_()] if normed else []
        compute = lambda g, u, gain=None: bit_linear.gated_quantize_input(g, u, gain, 1e-6, activation)  # noqa: E731
        plain = lambda g, u, gain=None: act(g) * u if gain is None else norm64(act(g) * u, gain)  # noqa: E731
        for ours, theirs in errors(compute, plain, inputs, dtype):
            assert ours <= max(2 * theirs, 2**-21)


def test_gates_far_from_zero():
    gate = torch.tensor([[-1e30, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e18]], requires_grad=True)
    for activation, act in (("silu", F.silu), ("gelu_pytorch_tanh", lambda x: F.gelu(x, approximate="tanh"))):
        _, anchor = bit_linear.gated_quantize_input(gate, torch.ones_like(gate), None, 0.0, activation)
        (ours,) = torch.autograd.grad(anchor, [gate], torch.ones_like(gate))
        near = gate.detach()[:, 1:-1].double().requires_grad_()
        (theirs,) = torch.autograd.grad(act(near), [near], torch.ones_like(near))
        assert torch.allclose(ours[:, 1:-1].double(), theirs, atol=1e-6)
        assert ours.isfinite().all()


def test_unknown_gates_are_refused():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="expected silu or gelu_pytorch_tanh; got relu"):
        bit_linear.gated_quantize_input(x, x, None, 1e-6, "relu")
    with pytest.raises(ValueError, match="shape and dtype of gate"):
        bit_linear.gated_quantize_input(x, x[:1], None, 1e-6, "silu")


@pytest.mark.parametrize("part", ["norm", "gate"])
def test_sums_over_tokens_do_not_depend_on_the_threads(part, monkeypatch):
    monkeypatch.setattr(rows, "LEAST", 1)
    x, gain, dy = torch.randn(300, 40, requires_grad=True), torch.rand(40, requires_grad=True), torch.randn(300, 40)
    found = []
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        if part == "norm":
            _, anchor = bit_linear.norm_quantize_input(x, gain, 1e-6)
        else:
            _, anchor = bit_linear.gated_quantize_input(x, 2 * x, gain, 1e-6, "silu")
        found.append(torch.autograd.grad(anchor, [gain], dy)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
