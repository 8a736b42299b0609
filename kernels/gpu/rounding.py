"""Rounds fp32 to a narrower float and to integers, half to even, in Triton. All kernels use this file.

The interpreter's own cast to bf16 truncates, so in the interpreter the rounding is done on the bits.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def round_to_bf16(x):
    """fp32 with the 16 low bits cleared, half to even, so that converting it to bf16 is exact. NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 to DTYPE, half to even."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        x = round_to_bf16(x)
    return x.to(DTYPE)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 values rounded to DTYPE, half to even, and back."""
    return narrow(x, DTYPE).to(tl.float32)


@triton.jit
def round_to_integer(x):
    """To the nearest integer, half to even, for |x| < 2**22; fp32."""
    return (x + 12582912.0) - 12582912.0
