"""Attention of a decoding step, and of a piece of a prompt, over a cache of keys and values on a GPU.

    rope_and_cache      q, k, v out of their product; q and k normed and turned; k and v into the cache
    attend              softmax(q k / sqrt(D)) v, split over the positions       (flash decoding)
    merge_quantize      the splits put together, SubLN, int8 codes for o

What changes from step to step, positions and slots, is read from device tensors, so that one CUDA graph serves all steps.
The grid does not depend on the length of the text: each split takes its share of the positions that there are, in whole
blocks, and splits without a share end at once.

The heads that share a key/value head are the rows of one tile; with a prompt, a tile contains several tokens. The cache is
bfloat16, rounded half to even, with products in tf32, which is finer than the cache; or it is float32 with fp32 products,
for comparisons with other implementations. Sums are fp32.

Shape suffixes: N tokens, H heads, K key/value heads, G heads per key/value head, D head width, C capacity of a slot,
S splits, P padded width.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.gpu.decode import PROGRAMS
from bitdistill.kernels.gpu.decode_rows import (
    Product,
    empty_codes,
    pointers,
    product_columns,
    quantize_row,
    rms_norm_row,
    row_warps,
)
from bitdistill.kernels.gpu.rounding import round_to_bf16

BLOCK_S = 32  # positions of a block, half as many of wide heads (registers); a split takes whole blocks
MAX_SPLITS = 32
PROMPT_ROWS = 32  # rows of a tile, tokens times heads, where a prompt has several tokens; half as many of wide heads


@dataclass(frozen=True)
class KVCache:
    """Keys (after norm and RoPE) and values of one layer: (slots, K, C, D) each, bfloat16 or float32."""

    keys: Tensor
    values: Tensor


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _rope_and_cache_kernel(
    acc_ptr,  # int32 (S, N, (H + 2 K) * D): q, k, v
    act_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    q_gain_ptr,
    k_gain_ptr,
    cos_ptr,  # float32 (positions, D / 2)
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_ptr,  # float32 (N, H, D)
    keys_ptr,
    values_ptr,
    N,
    C,
    eps,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    OWN_PLANES: tl.constexpr,  # q, k and v have an act_scale each
    NORM: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # half a head, padded
):
    n, head = tl.program_id(0), tl.program_id(1)
    is_q, is_v = head < H, head >= H + K
    plane = 0
    if OWN_PLANES:
        plane = tl.where(is_q, 0, tl.where(is_v, 2, 1))
    d = tl.arange(0, BLOCK)
    inside = d < D // 2
    columns = (H + 2 * K) * D
    low = product_columns(
        acc_ptr, act_scale_ptr, weight_scale_ptr, bias_ptr, n, plane, head * D + d, inside, N, columns, SPLITS, BIAS
    )  # fmt: skip
    high = product_columns(
        acc_ptr, act_scale_ptr, weight_scale_ptr, bias_ptr, n, plane, head * D + D // 2 + d, inside, N, columns, SPLITS,
        BIAS,
    )  # fmt: skip
    position = tl.load(positions_ptr + n).to(tl.int64)
    if not is_v:
        if NORM:
            mean = (tl.sum(low * low, 0) + tl.sum(high * high, 0)) / D
            factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
            gain_ptr = k_gain_ptr
            if is_q:
                gain_ptr = q_gain_ptr
            low = low * factor * tl.load(gain_ptr + d, mask=inside, other=0.0)
            high = high * factor * tl.load(gain_ptr + D // 2 + d, mask=inside, other=0.0)
        cos = tl.load(cos_ptr + position * (D // 2) + d, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + position * (D // 2) + d, mask=inside, other=0.0)
        turned = low * cos - high * sin
        high = high * cos + low * sin
        low = turned
    if is_q:
        q_row = q_ptr + (n.to(tl.int64) * H + head) * D
        tl.store(q_row + d, low, mask=inside)
        tl.store(q_row + D // 2 + d, high, mask=inside)
    else:
        kv = tl.where(is_v, head - H - K, head - H)
        row = ((tl.load(slots_ptr + n).to(tl.int64) * K + kv) * C + position) * D
        kind: tl.constexpr = keys_ptr.dtype.element_ty
        if kind == tl.bfloat16:
            low, high = round_to_bf16(low), round_to_bf16(high)
        cached = keys_ptr + row
        if is_v:
            cached = values_ptr + row
        tl.store(cached + d, low.to(kind), mask=inside)
        tl.store(cached + D // 2 + d, high.to(kind), mask=inside)


@triton.jit
def _attend_kernel(
    q_ptr,  # float32 (N, H, D)
    keys_ptr,  # (slots, K, C, D)
    values_ptr,
    positions_ptr,  # int32 (N,)
    slots_ptr,
    mixed_ptr,  # float32 (S, N, H, D): not divided by the sum
    peak_ptr,  # float32 (S, N, H); -inf: this split saw nothing
    sum_ptr,
    N,
    C,
    scale,
    WINDOW: tl.constexpr,  # last positions that a token sees, itself included; 0: all
    TOKENS: tl.constexpr,  # of a tile, neighbors in one slot
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of a tile: TOKENS * H / K, padded
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first_token, kv, split = tl.program_id(0) * TOKENS, tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // K
    r, s, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    n = first_token + r // G
    head = kv * G + r % G
    is_row = (r < TOKENS * G) & (n < N)
    position = tl.load(positions_ptr + n, mask=is_row, other=-1)
    oldest = tl.maximum(position - (WINDOW if WINDOW > 0 else C) + 1, 0)
    begin = tl.min(tl.where(is_row, oldest, 2147483647), 0) // BLOCK_S * BLOCK_S
    end = tl.max(position, 0) + 1
    share = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), BLOCK_S) * BLOCK_S
    begin += split * share
    end = tl.minimum(begin + share, end)

    row = n.to(tl.int64) * H + head
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0) * scale
    cached = (tl.load(slots_ptr + first_token).to(tl.int64) * K + kv) * C
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    mixed = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_S):
        t = start + s
        tile = (cached + t)[:, None] * D + d[None, :]
        there = (t < end)[:, None] & (d < D)[None, :]
        keys = tl.load(keys_ptr + tile, mask=there, other=0.0).to(tl.float32)
        scores = tl.dot(q, keys.T, input_precision=PRECISION)
        visible = (t[None, :] <= position[:, None]) & (t[None, :] >= oldest[:, None]) & (t < end)[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp(scores - base[:, None])
        decay = tl.exp(peak - base)
        values = tl.load(values_ptr + tile, mask=there, other=0.0).to(tl.float32)
        mixed = mixed * decay[:, None] + tl.dot(weights, values, input_precision=PRECISION)
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak
    slab = split.to(tl.int64) * N * H + row
    tl.store(peak_ptr + slab, peak, mask=is_row)
    tl.store(sum_ptr + slab, total, mask=is_row)
    if end > begin:
        tl.store(mixed_ptr + slab[:, None] * D + d[None, :], mixed, mask=is_row[:, None] & (d < D)[None, :])


@triton.jit
def _merge_kernel(
    mixed_ptr,
    peak_ptr,
    sum_ptr,
    subln_ptr,
    input_scale_ptr,
    codes_ptr,  # int8 (1, N, P)
    act_scale_ptr,
    N,
    P,
    subln_eps,
    SPLITS: tl.constexpr,
    SUBLN: tl.constexpr,
    DIVIDED: tl.constexpr,
    ACT_BLOCKS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < H * D
    row = n.to(tl.int64) * H
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    for split in range(SPLITS):
        slab = split * N.to(tl.int64) * H + row
        peak = tl.maximum(peak, tl.load(peak_ptr + slab + i // D, mask=inside, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        slab = split * N.to(tl.int64) * H + row
        own = tl.load(peak_ptr + slab + i // D, mask=inside, other=float("-inf"))
        seen = inside & (own != float("-inf"))
        weight = tl.where(seen, tl.exp(own - peak), 0.0)
        total += weight * tl.load(sum_ptr + slab + i // D, mask=seen, other=0.0)
        mixed += weight * tl.load(mixed_ptr + slab * D + i, mask=seen, other=0.0)
    y = tl.where(inside, tl.div_rn(mixed, tl.where(inside, total, 1.0)), 0.0)
    if SUBLN:
        y = rms_norm_row(y, subln_ptr, i, inside, H * D, subln_eps)
    quantize_row(
        y, input_scale_ptr, codes_ptr, act_scale_ptr, n.to(tl.int64), i, inside, P, DIVIDED, ACT_BLOCKS, BLOCK
    )  # fmt: skip


# --- launch -----------------------------------------------------------------------------------------------------------


def rope_and_cache(
    product: Product,
    cache: KVCache,
    positions: Tensor,
    slots: Tensor,
    rope: tuple[Tensor, Tensor],
    heads: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """q, turned; k, turned, and v written to the cache, of N tokens.

    Args:
        product: (N, (H + 2 K) * D), the columns of q, k, v; three planes of act_scale when each has its own.
        cache: written at (slot, :, position).
        positions: int32 (N,), each below C. slots: int32 (N,).
        rope: cos and sin float32 (positions, D / 2).
        heads: H.
        norms: gains float32 (D,) of the norms of q and k, or None. eps: theirs.

    Returns: q float32 (N, H, D).
    """
    kv_heads, capacity, width = cache.keys.shape[1:]
    rows = product.acc.shape[1]
    q = torch.empty(rows, heads, width, dtype=torch.float32, device=product.acc.device)
    block = triton.next_power_of_2(width // 2)
    _rope_and_cache_kernel[(rows, heads + 2 * kv_heads)](
        *pointers(product, q), *((q, q) if norms is None else norms), *rope, positions, slots, q, cache.keys, cache.values,
        rows, capacity, eps,
        SPLITS=len(product.acc), BIAS=product.bias is not None, OWN_PLANES=product.planes == 3,
        NORM=norms is not None, H=heads, K=kv_heads, D=width, BLOCK=block, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return q


def attention_splits(tiles: int, kv_heads: int) -> int:
    """Parts that the positions are cut into: enough programs for the device, whatever the length; a power of two."""
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * tiles * kv_heads <= 2 * PROGRAMS:
        splits *= 2
    return splits


def attend(
    q: Tensor,
    cache: KVCache,
    positions: Tensor,
    slots: Tensor,
    scale: float,
    window: int | None,
    one_slot: bool,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``softmax(scale * q k) v`` over the cached positions up to each token's own, not yet divided, in splits.

    Args:
        q: float32 (N, H, D). cache: holds the tokens' own keys and values.
        positions, slots: int32 (N,).
        scale: of q.k.
        window: last positions that a token sees, itself included; None is all.
        one_slot: all tokens are of one slot (a prompt), so that several share a tile.
        splits: S; by default what occupies the device.

    Returns: (mixed float32 (S, N, H, D), peak (S, N, H), sum (S, N, H)) for `merge_quantize`.

    Numerics: masks exact; fp32 sums, products in tf32 over a bfloat16 cache and in fp32 over a float32 one.
    """
    rows, heads, width = q.shape
    kv_heads, capacity = cache.keys.shape[1:3]
    group = heads // kv_heads
    block_d = max(16, triton.next_power_of_2(width))
    tokens = max(1, _prompt_rows(block_d) // group) if one_slot and rows > 1 else 1
    tiles = triton.cdiv(rows, tokens)
    splits = splits or attention_splits(tiles, kv_heads)
    mixed = torch.empty(splits, rows, heads, width, dtype=torch.float32, device=q.device)
    peak, total = torch.empty(2, splits, rows, heads, dtype=torch.float32, device=q.device)
    block_r = max(16, triton.next_power_of_2(tokens * group))
    _attend_kernel[(tiles, kv_heads, splits)](
        q, cache.keys, cache.values, positions, slots, mixed, peak, total, rows, capacity, scale,
        WINDOW=window or 0, TOKENS=tokens, H=heads, K=kv_heads, D=width,
        PRECISION="tf32" if cache.keys.dtype == torch.bfloat16 else "ieee",
        BLOCK_R=block_r, BLOCK_S=_block_s(block_d), BLOCK_D=block_d,
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return mixed, peak, total


def _prompt_rows(block_d: int) -> int:
    return PROMPT_ROWS if block_d <= 128 else PROMPT_ROWS // 2


def _block_s(block_d: int) -> int:
    return BLOCK_S if block_d <= 128 else BLOCK_S // 2


def merge_quantize(
    parts: tuple[Tensor, Tensor, Tensor],
    act_columns: int,
    subln: Tensor | None = None,
    subln_eps: float = 0.0,
    input_scale: Tensor | None = None,
    blocks: bool = False,
) -> tuple[Tensor, Tensor]:
    """The splits of `attend` put together, and int8 codes of ``[SubLN](heads side by side) [/ input_scale]``.

    Args:
        parts: from `attend`. act_columns: P of the o projection. subln: float32 (1, H * D) or None.
        subln_eps: eps of that norm.
        input_scale: float32 (1, H * D), by which they are divided before they are rounded, or None.
        blocks: whether each ACT_BLOCK columns of a token have a scale.

    Returns: (act_codes int8 (1, N, P), act_scale float32 (1, N), or (1, N, P / 32)).
    """
    mixed, peak, total = parts
    splits, rows, heads, width = mixed.shape
    codes, scale = empty_codes(1, rows, act_columns, mixed.device, blocks)
    block = triton.next_power_of_2(act_columns)
    _merge_kernel[(rows,)](
        mixed, peak, total, scale if subln is None else subln, scale if input_scale is None else input_scale,
        codes, scale, rows, act_columns, subln_eps,
        SPLITS=splits, SUBLN=subln is not None, DIVIDED=input_scale is not None, ACT_BLOCKS=blocks,
        H=heads, D=width, BLOCK=block, num_warps=row_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale
