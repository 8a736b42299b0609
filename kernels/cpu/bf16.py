"""Whether this processor multiplies bfloat16 in hardware: without such instructions a bf16 product is far slower than fp32."""

import functools
import os

import torch

ISA = "ONEDNN_MAX_CPU_ISA"  # oneDNN, torch's library of products, obeys it; read once, when it is loaded
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


@functools.cache
def has_bf16_products() -> bool:
    """AVX512-BF16 or AMX, unless ONEDNN_MAX_CPU_ISA keeps torch from using them."""
    if os.environ.get(ISA, "").upper() in WITHOUT_BF16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
