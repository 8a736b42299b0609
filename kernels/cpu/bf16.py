"""Whether bfloat16 products are worth it on this processor: found out by timing one.

Without instructions for them they run at a tenth of float32's speed. With AVX512-BF16 they are twice as fast as float32 on one
processor (AMD's Zen 4) and half as fast on another (Intel's Sapphire Rapids, whose AMX was masked); with AMX seven times as
fast.
"""

import functools
import os

import torch

from bitdistill.kernels.cpu.choices import ISA, fastest

WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
SHAPE = (512, 576, 1024)  # of the product that is timed


@functools.cache
def has_bf16_products() -> bool:
    """Whether a bf16 product is faster than a float32 one, on a processor with AVX512-BF16 or AMX that torch may use."""
    if os.environ.get(ISA, "").upper() in WITHOUT_BF16:
        return False
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    N, K, O = SHAPE
    a, b = torch.ones(N, K), torch.ones(K, O)
    ways = {
        str(dtype): functools.partial(torch.mm, a.to(dtype), b.to(dtype)) for dtype in (torch.float32, torch.bfloat16)
    }
    return fastest(f"product {N}x{K}x{O}", ways) == str(torch.bfloat16)
