"""The operations between the products, row by row in fp32: norms, activations, RoPE, scaling of accumulators.

Buffers of this package hold rows whose widths are padded to a multiple of 16 floats with zeros, and every function here
keeps that padding zero, so no loop has a remainder. Gains and biases are padded likewise (`padded`). Sums over a row have
one order: sixteen partial sums, lane by lane, and then a fixed tree.
"""

import math

import numpy as np

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import (
    LANES,
    add,
    divide,
    exp,
    load,
    load_int32,
    multiply,
    multiply_add,
    splat,
    store,
    subtract,
    total,
)
from bitdistill.kernels.cpu.native import float32s
from bitdistill.kernels.cpu.records import SILU

ROW = 4 * LANES  # bytes of a vector of floats
_GELU_LINEAR = np.float32(2 * math.sqrt(2 / math.pi))
_GELU_CUBIC = np.float32(0.044715)


@jit
def padded(width):
    """`width` rounded up to a multiple of 16: the floats of a row in a buffer."""
    return (width + LANES - 1) // LANES * LANES


@jit
def rms_norm(x, gain, eps, width, out):
    """``out = x / sqrt(mean(x^2) + eps) * gain``.

    Args:
        x, gain, out: addresses of float32 rows of `width`, padded; out may be x.
        eps: float32.
        width: numbers in a row.

    Numerics: fp32; the sum of squares in 16 lanes, so its error is below width / 16 + 4 roundings.
    """
    squares = splat(np.float32(0))
    size = 4 * padded(width)
    for at in range(0, size, ROW):
        values = load(x + at)
        squares = multiply_add(values, values, squares)
    mean = total(squares) / np.float32(width)
    factor = splat(np.float32(1) / np.sqrt(mean + eps))
    for at in range(0, size, ROW):
        store(out + at, multiply(multiply(load(x + at), factor), load(gain + at)))


@jit
def add_rows(x, y, width):
    """``x += y``: the residual. Addresses of float32 rows, padded."""
    for at in range(0, 4 * padded(width), ROW):
        store(x + at, add(load(x + at), load(y + at)))


@jit
def divide_rows(x, y, width, out):
    """``out = x / y``. Addresses of float32 rows, padded; y with ones."""
    for at in range(0, 4 * padded(width), ROW):
        store(out + at, divide(load(x + at), load(y + at)))


@jit
def scale_row(x, factor, width):
    """``x *= factor``. Address of a float32 row, padded; a float32."""
    by = splat(factor)
    for at in range(0, 4 * padded(width), ROW):
        store(x + at, multiply(load(x + at), by))


@jit
def gated_activation(gate, up, activation, width):
    """``gate = act(gate) * up``, ``silu(x) = x / (1 + e^-x)``, ``gelu_tanh(x) = x / (1 + e^(-2u))``.

    With ``u = sqrt(2/pi) (x + 0.044715 x^3)``; the latter is ``x (1 + tanh u) / 2`` without its cancellation.

    Args:
        gate, up: addresses of float32 (width,), width a multiple of 16.
        activation: SILU or GELU_TANH.
        width: numbers in a row.

    Numerics: within 6 units in the last place for SiLU. Infinity and NaN as the formulas have them.
    """
    one, zero = splat(np.float32(1)), splat(np.float32(0))
    linear, cubic = splat(_GELU_LINEAR), splat(_GELU_CUBIC)
    for at in range(0, 4 * width, ROW):
        x = load(gate + at)
        inner = x if activation == SILU else multiply(linear, multiply_add(multiply(multiply(cubic, x), x), x, x))
        sigmoid = divide(x, add(one, exp(subtract(zero, inner))))
        store(gate + at, multiply(sigmoid, load(up + at)))


@jit
def scale_accumulators(acc, scale, bias, width, out):
    """``out = acc * scale + bias``, product and sum rounded one by one as in reference.py.

    Args:
        acc: address of int32 (width,), width a multiple of 16. scale: float32, act_scale * weight_scale.
        bias: address of float32 (width,), or 0 for none.
        out: address of float32 (width,).
        width: numbers in a row.
    """
    by = splat(scale)
    if bias == 0:
        for at in range(0, 4 * width, ROW):
            store(out + at, multiply(load_int32(acc + at), by))
    else:
        for at in range(0, 4 * width, ROW):
            store(out + at, add(multiply(load_int32(acc + at), by), load(bias + at)))


@jit
def rope_angles(position, inv_freq, scaling, half, cos, sin):
    """``cos(position * inv_freq) * scaling`` and the sine, for one position.

    The angle is rounded to fp32, as in transformers; its cosine is taken in fp64 and rounded once.

    Args:
        position: of the token in its sequence. half: head_dim / 2.
        inv_freq: address of float32 (half,). scaling: float32. cos, sin: addresses of float32 (half,) to write.
    """
    frequencies, cosines, sines = float32s(inv_freq, half), float32s(cos, half), float32s(sin, half)
    for d in range(half):
        angle = np.float64(np.float32(position) * frequencies[d])
        cosines[d] = np.float32(math.cos(angle)) * scaling
        sines[d] = np.float32(math.sin(angle)) * scaling


@jit
def rotate(x, cos, sin, half):
    """RoPE in place: dimension d turns with d + half. Addresses of float32 (2 half,), (half,), (half,)."""
    low, high = float32s(x, half), float32s(x + 4 * half, half)
    cosines, sines = float32s(cos, half), float32s(sin, half)
    for d in range(half):
        a, b = low[d], high[d]
        low[d] = a * cosines[d] - b * sines[d]
        high[d] = b * cosines[d] + a * sines[d]


@jit
def copy_floats(source, target, count):
    """Copies float32 (count,) from one address to another."""
    values, copies = float32s(source, count), float32s(target, count)
    for i in range(count):
        copies[i] = values[i]
