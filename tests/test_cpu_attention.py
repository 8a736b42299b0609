"""Attention over each kind of cache, and the elementwise functions: against float64, and bit for bit where they promise it."""

import numpy as np
import pytest
import torch

from bitdistill.kernels.cpu import attention, elementwise, floats, records
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.decoder import CACHE_DTYPES
from bitdistill.kernels.cpu.native import float32s
from bitdistill.kernels.cpu.step import CALL
from bitdistill.kernels.cpu.tiles import TILES
from bitdistill.kernels.reference import quantize_activation

KINDS = list(CACHE_DTYPES)


@jit
def write(call, head, position, key, value, head_dim, scratch):
    attention.write_position(call[0], head, position, key, value, head_dim, scratch)


@jit
def attend(call, head, position, rows, group, window, head_dim, scratch):
    attention.attend(call.ctypes.data, head, position, rows, group, window, head_dim, scratch)


def padded(array):
    out = np.zeros((*array.shape[:-1], elementwise.padded(array.shape[-1])), np.float32)
    out[..., : array.shape[-1]] = array
    return out


class Cache:
    """Some heads of a cache, filled with what no row may see: NaN, and large codes."""

    def __init__(self, kind, heads, capacity, head_dim):
        self.head_dim, self.capacity = head_dim, -(-capacity // 32) * 32
        code, dtype = CACHE_DTYPES[kind]
        fill = {"fp32": np.nan, "bf16": 0x7FC0, "int8": 100}[kind]
        self.keys = np.full((heads, self.capacity // 16, attention.key_rows(code, head_dim), 16), fill, dtype)
        self.values = np.full((heads, self.capacity, elementwise.padded(head_dim)), fill, dtype)
        self.key_scales, self.value_scales = (np.full((heads, self.capacity), np.nan, np.float32) for _ in range(2))
        self.call = np.zeros(1, CALL)
        self.call["dtype"], self.call["capacity"] = code, self.capacity
        for name in ("keys", "values", "key_scales", "value_scales"):
            self.call[name] = getattr(self, name).ctypes.data

    def write(self, head, position, key, value):
        key, value, scratch = padded(key), padded(value), np.empty(elementwise.padded(self.head_dim), np.float32)
        write(self.call, head, position, key.ctypes.data, value.ctypes.data, self.head_dim, scratch.ctypes.data)

    def attend(self, head, position, q_RGD, window):
        rows, group, width = q_RGD.shape
        scratch = np.full(attention.attention_scratch_floats(group, width), np.nan, np.float32)
        queries = padded(q_RGD)
        scratch[: queries.size] = queries.reshape(-1)
        attend(self.call, head, position, rows, group, window or 0, width, scratch.ctypes.data)
        return scratch[: queries.size].reshape(queries.shape)[..., :width].copy()


def as_cached(kind, x):
    """What a cache of this kind gives back for (..., D), by PyTorch."""
    x = torch.from_numpy(x)
    if kind == "bf16":
        return x.bfloat16().double().numpy()
    if kind == "int8":
        codes, scale = quantize_activation(x)
        return (codes.double() * scale.double()).numpy()
    return x.double().numpy()


def expected(kind, q_TGD, k_TD, v_TD, window):
    k, v = as_cached(kind, k_TD), as_cached(kind, v_TD)
    scores = np.einsum("tgd,sd->tgs", q_TGD.astype(np.float64), k)
    age = np.arange(len(k))[:, None] - np.arange(len(k))
    scores.transpose(0, 2, 1)[(age < 0) | (age >= (window or len(k)))] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("tgs,sd->tgd", weights / weights.sum(axis=-1, keepdims=True), v)


def random_case(length, group, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(length, group, head_dim)).astype(np.float32)
    k, v = (rng.normal(size=(length, head_dim)).astype(np.float32) for _ in range(2))
    return q / np.float32(head_dim**0.5), k, v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 2, 3, 8, 20])
@pytest.mark.parametrize(
    ("head_dim", "length", "window"), [(24, 70, None), (64, 40, 7), (80, 33, 32), (16, 100, 50), (25, 45, 8)]
)
def test_attend_is_softmax_attention(kind, group, head_dim, length, window):
    q, k, v = random_case(length, group, head_dim)
    cache = Cache(kind, 2, length, head_dim)
    for position in range(length):
        cache.write(1, position, k[position], v[position])
    at_once = attention.tile_rows(group)
    got = [cache.attend(1, p, q[p : p + at_once], window) for p in range(0, length, at_once)]
    want = expected(kind, q, k, v, window)
    np.testing.assert_allclose(np.concatenate(got), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("window", [None, 40, 600, attention.SPAN])
def test_rows_of_several_spans(kind, group, window):
    """Right around every border of a span and of a window, and bit for bit the same alone and in any tile."""
    length, head_dim = 2 * attention.SPAN + 70, 24
    q, k, v = random_case(length, group, head_dim, seed=group)
    cache, at_once = Cache(kind, 1, length, head_dim), min(3, attention.tile_rows(group))
    for position in range(length):
        cache.write(0, position, k[position], v[position])
    want = expected(kind, q, k, v, window)
    borders = [0, 38, attention.SPAN - 2, attention.SPAN, attention.SPAN + 40, 2 * attention.SPAN - 1, length - 3]
    for start in borders:
        tile = cache.attend(0, start, q[start : start + at_once], window)
        np.testing.assert_allclose(tile, want[start : start + at_once], rtol=0, atol=3e-6)
        alone = [cache.attend(0, p, q[p : p + 1], window) for p in range(start, start + at_once)]
        np.testing.assert_array_equal(tile, np.concatenate(alone))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [96, 128, 256])
def test_wide_heads(kind, head_dim):
    q, k, v = random_case(35, 2, head_dim)
    cache = Cache(kind, 1, 35, head_dim)
    for position in range(35):
        cache.write(0, position, k[position], v[position])
    np.testing.assert_allclose(cache.attend(0, 30, q[30:35], None), expected(kind, q, k, v, None)[30:], atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 9, 33])
def test_a_row_depends_on_nothing_but_its_own_past(kind, window):
    """Bit for bit the same alone, in any tile, and whatever comes after its position."""
    q, k, v = random_case(80, 3, 24)
    together, growing = Cache(kind, 1, 80, 24), Cache(kind, 1, 80, 24)
    for position in range(80):
        together.write(0, position, k[position], v[position])
    tiles = [together.attend(0, p, q[p : p + 5], window) for p in range(0, 80, 5)]
    shifted = [together.attend(0, p, q[p : p + 4], window) for p in range(0, 80, 4)]
    alone = []
    for position in range(80):
        growing.write(0, position, k[position], v[position])
        alone.append(growing.attend(0, position, q[position : position + 1], window))
    for other in (tiles, shifted):
        np.testing.assert_array_equal(np.concatenate(other), np.concatenate(alone))


@pytest.mark.skipif(not TILES, reason="a processor with AMX: elsewhere neighboring rows share what is not finite")
@pytest.mark.parametrize("window", [None, 9, 40])
def test_what_is_not_finite_reaches_only_those_who_see_it(window):
    """Bit for bit the same alone and in any tile, and for all others as if it were not there."""
    q, k, v = random_case(80, 3, 24)
    good, bad = Cache("bf16", 1, 80, 24), Cache("bf16", 1, 80, 24)
    poisoned = v.copy()
    poisoned[20, 3], poisoned[45, 20], poisoned[46, 3] = np.inf, np.nan, -np.inf
    for position in range(80):
        good.write(0, position, k[position], v[position])
        bad.write(0, position, k[position], poisoned[position])
    want = np.concatenate([good.attend(0, p, q[p : p + 5], window) for p in range(0, 80, 5)])
    together = np.concatenate([bad.attend(0, p, q[p : p + 5], window) for p in range(0, 80, 5)])
    alone = np.concatenate([bad.attend(0, p, q[p : p + 1], window) for p in range(80)])
    np.testing.assert_array_equal(together, alone)
    age = np.arange(80)[:, None] - np.arange(80)
    seen = (age >= 0) & (age < (window or 80))
    touched = (seen[:, :, None] & ~np.isfinite(poisoned)).any(axis=1)[:, None, :].repeat(3, axis=1)
    np.testing.assert_array_equal(np.isfinite(together), ~touched)
    np.testing.assert_array_equal(together[~touched], want[~touched])


def test_large_scores_do_not_overflow_and_far_ones_vanish():
    q, k, v = random_case(40, 1, 16)
    q *= 3000
    cache = Cache("fp32", 1, 40, 16)
    for position in range(40):
        cache.write(0, position, k[position], v[position])
    want = expected("fp32", q, k, v, None)
    got = np.concatenate([cache.attend(0, p, q[p : p + 1], None) for p in range(40)])
    np.testing.assert_allclose(got, want, atol=2e-3)  # scores near 1e4 have a rounding of 1e-3
    assert np.isfinite(got).all()


def test_zero_keys_and_values():
    cache = Cache("int8", 1, 3, 16)
    for position in range(3):
        cache.write(0, position, np.zeros(16, np.float32), np.zeros(16, np.float32))
    assert (cache.attend(0, 2, np.ones((1, 1, 16), np.float32), None) == 0).all()


# --- elementwise ------------------------------------------------------------------------------------------------------


@jit
def apply_exp(x, out, count):
    for at in range(0, 4 * count, 64):
        floats.store(out + at, floats.exp(floats.load(x + at)))


def exp(values):
    x = np.zeros(-(-len(values) // 16) * 16, np.float32)
    x[: len(values)] = values
    out = np.empty_like(x)
    apply_exp(x.ctypes.data, out.ctypes.data, len(x))
    return out[: len(values)]


def test_exp():
    x = np.concatenate([np.linspace(-87.3, 88.7, 40001), np.linspace(-1, 1, 4001)]).astype(np.float32)
    want = np.exp(x.astype(np.float64))
    assert (np.abs(exp(x) - want) / want).max() < 2.4e-7  # two units in the last place
    special = np.array([-np.inf, -200, -87.4, 0, 88.73, 200, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(exp(special), np.array([0, 0, 0, 1, np.inf, np.inf, np.inf, np.nan], np.float32))


@pytest.mark.parametrize("width", [16, 90, 1000, 1024])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rms_norm(width, size):
    rng = np.random.default_rng(width)
    x, gain = (size * rng.normal(size=width)).astype(np.float32), rng.normal(size=width).astype(np.float32)
    want = x / np.sqrt(np.square(x, dtype=np.float64).mean() + np.float32(1e-6)) * gain.astype(np.float64)
    source, gains = padded(x), padded(gain)
    out = np.full_like(source, 7)
    elementwise.rms_norm(source.ctypes.data, gains.ctypes.data, np.float32(1e-6), width, out.ctypes.data)
    np.testing.assert_allclose(out[:width], want, rtol=6e-7)
    assert not out[width:].any()
    elementwise.rms_norm(source.ctypes.data, gains.ctypes.data, np.float32(1e-6), width, source.ctypes.data)
    np.testing.assert_array_equal(source, out)


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
def test_gated_activation(name):
    gate = np.concatenate([np.linspace(-60, 60, 3001), [0, -1e30, 1e30, np.nan, np.inf, -200, 200]]).astype(np.float32)
    up = np.random.default_rng(0).normal(size=len(gate)).astype(np.float32)
    x = torch.from_numpy(gate).double()
    if name == "silu":
        act = torch.nn.functional.silu(x)
    else:  # gelu_tanh(x) = x (1 + tanh u) / 2 = x sigmoid(2u); the first form has no digits left for x << 0
        act = x * torch.sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
        np.testing.assert_allclose(act, torch.nn.functional.gelu(x, approximate="tanh"), atol=1e-14)
    want = act.numpy() * up
    ours, ups = padded(gate), padded(up)
    activation = {"silu": records.SILU, "gelu_pytorch_tanh": records.GELU_TANH}[name]
    elementwise.gated_activation(ours.ctypes.data, ups.ctypes.data, activation, len(ours))
    # the relative error of e^-x is that of x's rounding, |x| 2^-24
    np.testing.assert_allclose(ours[: len(gate)], want, rtol=8e-6, atol=1e-30)
    assert not ours[len(gate) :].any()


@pytest.mark.parametrize("bias", [False, True])
def test_scaled_accumulators_have_the_bits_of_the_reference(bias):
    rng = np.random.default_rng(0)
    acc, added = rng.integers(-(2**24), 2**24, 64, dtype=np.int32), rng.normal(size=64).astype(np.float32)
    scale, out = np.float32(0.0123) * np.float32(0.456), np.empty(64, np.float32)
    address = added.ctypes.data if bias else 0
    elementwise.scale_accumulators(acc.ctypes.data, scale, address, 64, out.ctypes.data)
    want = torch.from_numpy(acc).float() * torch.tensor(scale)
    np.testing.assert_array_equal(out, (want + torch.from_numpy(added) if bias else want).numpy())


def test_rope_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import rotate_half

    half, position = 32, 30011
    inv_freq = (1 / 10000 ** (np.arange(half) / half)).astype(np.float32)
    cos, sin = (np.empty(half, np.float32) for _ in range(2))
    elementwise.rope_angles(position, inv_freq.ctypes.data, np.float32(1.25), half, cos.ctypes.data, sin.ctypes.data)
    angle = torch.tensor(position, dtype=torch.float32) * torch.from_numpy(inv_freq)
    np.testing.assert_allclose(cos, angle.cos() * 1.25, atol=2e-7)
    np.testing.assert_allclose(sin, angle.sin() * 1.25, atol=2e-7)
    x = np.random.default_rng(0).normal(size=2 * half).astype(np.float32)
    emb = torch.cat([angle, angle]).double()
    want = torch.from_numpy(x) * emb.cos() * 1.25 + rotate_half(torch.from_numpy(x)) * emb.sin() * 1.25
    elementwise.rotate(x.ctypes.data, cos.ctypes.data, sin.ctypes.data, half)
    np.testing.assert_allclose(x, want, atol=1e-6)


def test_absmax_keeps_nan():
    @jit
    def peak(x):
        return floats.largest_magnitude(floats.maximum_magnitude(floats.splat(np.float32(1e-5)), floats.load(x)))

    x = np.linspace(-3, 2, 16).astype(np.float32)
    assert peak(x.ctypes.data) == 3
    x[5] = np.nan
    assert np.isnan(peak(x.ctypes.data))
    x[5] = -np.inf
    assert peak(x.ctypes.data) == np.inf


def test_bf16_rounding_is_that_of_torch():
    @jit
    def convert(x, out, back):
        floats.store_bf16(out, floats.load(x))
        floats.store(back, floats.load_bf16(out))

    rng = np.random.default_rng(0)
    x = rng.normal(size=16).astype(np.float32) * np.float32(10) ** rng.integers(-40, 38, 16)
    x[:6] = [np.nan, np.inf, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38]  # two ties; the last one rounds to infinity
    out, back = np.empty(16, np.uint16), np.empty(16, np.float32)
    convert(x.astype(np.float32).ctypes.data, out.ctypes.data, back.ctypes.data)
    np.testing.assert_array_equal(back, torch.from_numpy(x.astype(np.float32)).bfloat16().float().numpy())


def test_views_share_memory():
    @jit
    def set_one(address):
        float32s(address, 4)[2] = 5

    x = np.zeros(4, np.float32)
    set_one(x.ctypes.data)
    assert x.tolist() == [0, 0, 5, 0]
