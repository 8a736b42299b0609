"""The operation before a quantizer in training on a CPU, fused with it: SubLN, and the gate of an MLP with or without
SubLN.

    y = x * rstd * gain                     rstd = 1 / sqrt(mean(x^2) + eps)
    y = h * rstd * gain, or h               h = act(gate) * up

y never leaves the first-level cache. Like in the reference, it is rounded to bf16 where x is bf16. Backward, straight
through the quantizer, with ``x^ = x * rstd``:

    dx = rstd * (dy * gain - x^ * mean(dy * gain * x^)),    dgain = sum over tokens of dy * x^
    dup = dh * act,    dgate = dh * up * act'

dgain is summed over one BLOCK of rows at a time; the caller adds up the blocks. Both activations are ``act(g) = g *
sigmoid(v)``: v = g for SiLU, ``v = sqrt(8 / pi) * (g + 0.044715 g^3)`` for the tanh form of GELU, and ``act' = s + act * (1
- s) * v'``.

Addresses are int64, strides in bytes; `half` says that floats are bf16.
"""

import math

import numpy as np

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import (
    LANES,
    add,
    divide,
    exp,
    largest_magnitude,
    maximum,
    maximum_magnitude,
    multiply,
    multiply_add,
    round_bf16,
    splat,
    subtract,
    total,
    where_positive,
)
from bitdistill.kernels.cpu.native import float32s, keep
from bitdistill.kernels.cpu.rows import BLOCK, get, put
from bitdistill.kernels.cpu.training_quantize import put_codes
from bitdistill.kernels.numerics import ACT_MAX, EPSILON

_EPSILON, _ACT_MAX, _ZERO, _ONE = (np.float32(value) for value in (EPSILON, ACT_MAX, 0, 1))
_LINEAR = np.float32(math.sqrt(8 / math.pi))
_CUBIC, _SLOPE, _FAR = np.float32(0.044715), np.float32(3 * 0.044715), np.float32(64)


@jit
def _rstd(x, size, half, width, eps):
    """``1 / sqrt(mean(x^2) + eps)`` of a row."""
    squares = splat(_ZERO)
    for i in range(0, width, LANES):
        value = get(x + size * i, width - i, half)
        squares = multiply_add(value, value, squares)
    return _ONE / np.sqrt(total(squares) / np.float32(width) + eps)


@jit
def _normed(value, rstd, gain, i, width, half):
    """16 values of y; without a gain (0) just the values."""
    if gain != 0:
        value = multiply(multiply(value, rstd), get(gain + 4 * i, width - i, False))
    return round_bf16(value) if half else value


@jit
def _quantize_normed(x, size, x_half, half, width, part, rstd, gain, codes, scale):
    """The int8 codes of y and the scale of each `part` of its columns, computed twice rather than kept."""
    by = splat(rstd)
    for start in range(0, width, part):
        peaks, end = splat(_EPSILON), min(width, start + part)
        for i in range(start, end, LANES):
            peaks = maximum_magnitude(peaks, _normed(get(x + size * i, end - i, x_half), by, gain, i, end, half))
        peak = largest_magnitude(peaks)
        factor = splat(_ACT_MAX / peak)
        for i in range(start, end, LANES):
            y = _normed(get(x + size * i, end - i, x_half), by, gain, i, end, half)
            put_codes(codes + i, multiply(y, factor), end - i)
        float32s(scale + 4 * (start // part), 1)[0] = peak / _ACT_MAX


@jit
def norm_quantize_rows(first, last, x, stride, half, width, part, gain, eps, codes, scale, rstd):
    """int8 codes of ``x * rstd * gain``, rows first .. last - 1.

    Args:
        first, last: rows.
        x: address of rows of `width` floats, bf16 where `half`.
        stride, half, width: of these rows.
        part: columns that share a scale: `width`, or ACT_BLOCK.
        gain: address of float32 (width,). eps: float32.
        codes: address of int8 (N, width). scale: of float32 (N, ceil(width / part)).
        rstd: address of float32 (N,).
    """
    size, parts = 2 if half else 4, (width + part - 1) // part
    for n in range(first, last):
        row = x + n * stride
        factor = _rstd(row, size, half, width, eps)
        float32s(rstd + 4 * n, 1)[0] = factor
        _quantize_normed(row, size, half, half, width, part, factor, gain, codes + n * width, scale + 4 * parts * n)


@jit
def _activated(gate, gelu):
    """act(gate) and act'(gate)."""
    one, zero = splat(_ONE), splat(_ZERO)
    v, slope = gate, one
    if gelu:
        far = splat(_FAR)  # beyond, the sigmoid is 0 or 1 and the cube could overflow
        held = maximum(gate, subtract(zero, far))
        held = subtract(zero, maximum(subtract(zero, held), subtract(zero, far)))
        square, linear = multiply(held, held), splat(_LINEAR)
        v = multiply(linear, multiply_add(multiply(splat(_CUBIC), square), held, held))
        slope = multiply(linear, multiply_add(splat(_SLOPE), square, one))
    e = exp(subtract(zero, maximum_magnitude(zero, v)))  # never overflows
    large = divide(one, add(one, e))
    small = multiply(e, large)
    sigmoid = where_positive(v, large, small)
    act = multiply(gate, sigmoid)
    return act, multiply_add(multiply(act, where_positive(v, small, large)), slope, sigmoid)


@jit
def gated_quantize_rows(
    first, last, gate, gate_stride, up, up_stride, half, width, part, gelu, gain, eps, codes, scale, rstd
):
    """int8 codes of ``h * rstd * gain``, or of h where gain is 0.

    Args:
        first, last: rows.
        gate, up: addresses of rows of `width` floats.
        gate_stride, up_stride, half, width: of these rows.
        gelu: which activation.
        part, gain, eps, codes, scale, rstd: as in `norm_quantize_rows`.
    """
    size, parts = 2 if half else 4, (width + part - 1) // part
    kept = np.empty(width + LANES, np.float32)
    h = kept.ctypes.data
    for n in range(first, last):
        gates, ups = gate + n * gate_stride, up + n * up_stride
        for i in range(0, width, LANES):
            act, _ = _activated(get(gates + size * i, width - i, half), gelu)
            put(h + 4 * i, multiply(act, get(ups + size * i, width - i, half)), width - i, False)
        factor = _ONE
        if gain != 0:
            factor = _rstd(h, 4, False, width, eps)
            float32s(rstd + 4 * n, 1)[0] = factor
        _quantize_normed(h, 4, False, half, width, part, factor, gain, codes + n * width, scale + 4 * parts * n)
    keep(kept)


@jit
def norm_backward_rows(first, last, dy, dy_stride, dy_half, x, stride, half, width, gain, rstd, dx, dgain):
    """dx in x's dtype, and dgain float32 (blocks, width), of ``x * rstd * gain``.

    Args:
        first, last: rows.
        dy, x: addresses of rows of `width` floats.
        dy_stride, dy_half, stride, half, width: of these rows.
        gain: address of float32 (width,). rstd: of float32 (N,).
        dx: address of (N, width) floats. dgain: of float32 (blocks, width).
    """
    size, dy_size = 2 if half else 4, 2 if dy_half else 4
    for n in range(first, last):
        row, grad, part = x + n * stride, dy + n * dy_stride, dgain + 4 * width * (n // BLOCK)
        by, products = splat(float32s(rstd + 4 * n, 1)[0]), splat(_ZERO)
        for i in range(0, width, LANES):
            left = width - i
            g, x_hat = get(grad + dy_size * i, left, dy_half), multiply(get(row + size * i, left, half), by)
            products = multiply_add(multiply(g, get(gain + 4 * i, left, False)), x_hat, products)
            before = splat(_ZERO) if n % BLOCK == 0 else get(part + 4 * i, left, False)
            put(part + 4 * i, multiply_add(g, x_hat, before), left, False)
        mean = splat(total(products) / np.float32(width))
        for i in range(0, width, LANES):
            left = width - i
            g, x_hat = get(grad + dy_size * i, left, dy_half), multiply(get(row + size * i, left, half), by)
            dh = subtract(multiply(g, get(gain + 4 * i, left, False)), multiply(x_hat, mean))
            put(dx + size * (n * width + i), multiply(by, dh), left, half)


@jit
def gated_backward_rows(
    first, last, dy, dy_stride, dy_half, gate, gate_stride, up, up_stride, half, width, gelu, gain, rstd, dgate, dup, out_stride,
    dgain,
):  # fmt: skip
    """dgate and dup in gate's dtype, and dgain float32 (blocks, width); of no norm where gain is 0.

    Args:
        first, last, dy, dy_stride, dy_half, half, width, gain, rstd, dgain: as in `norm_backward_rows`.
        gate, gate_stride, up, up_stride, gelu: as in `gated_quantize_rows`.
        dgate, dup: addresses of rows of `width` floats. out_stride: of these rows.
    """
    size, dy_size = 2 if half else 4, 2 if dy_half else 4
    kept = np.empty((2, width + LANES), np.float32)
    acts, slopes = kept.ctypes.data, kept.ctypes.data + 4 * (width + LANES)
    for n in range(first, last):
        gates, ups, grad = gate + n * gate_stride, up + n * up_stride, dy + n * dy_stride
        part = dgain + 4 * width * (n // BLOCK)
        by = splat(float32s(rstd + 4 * n, 1)[0] if gain != 0 else _ONE)
        products = splat(_ZERO)
        for i in range(0, width, LANES):
            left = width - i
            act, slope = _activated(get(gates + size * i, left, half), gelu)
            put(acts + 4 * i, act, left, False)
            put(slopes + 4 * i, slope, left, False)
            if gain != 0:
                g = get(grad + dy_size * i, left, dy_half)
                h_hat = multiply(multiply(act, get(ups + size * i, left, half)), by)
                products = multiply_add(multiply(g, get(gain + 4 * i, left, False)), h_hat, products)
                before = splat(_ZERO) if n % BLOCK == 0 else get(part + 4 * i, left, False)
                put(part + 4 * i, multiply_add(g, h_hat, before), left, False)
        mean = splat(total(products) / np.float32(width))
        for i in range(0, width, LANES):
            left, out = width - i, n * out_stride + size * i
            act, ups_i = get(acts + 4 * i, left, False), get(ups + size * i, left, half)
            dh = get(grad + dy_size * i, left, dy_half)
            if gain != 0:
                h_hat = multiply(multiply(act, ups_i), by)
                dh = subtract(multiply(dh, get(gain + 4 * i, left, False)), multiply(h_hat, mean))
                dh = multiply(by, dh)
            put(dup + out, multiply(dh, act), left, half)
            put(dgate + out, multiply(multiply(dh, ups_i), get(slopes + 4 * i, left, False)), left, half)
    keep(kept)
