"""Activations to int8 and weights to {-1, 0, 1} on the GPU: `reference.py`'s codes and scales, bit for bit.

**Activations.** A program keeps a few whole rows in registers, so x is read once: in bf16, 2 bytes in and 1 byte out per
element. The peak is an integer maximum over the bits of |x|. These have the same order as the floats, with NaN above
infinity, so that a NaN in a row reaches its scale. Rounding half to even is one addition: in ``v + 1.5 * 2**23``, the
integer is in the low bits. The clip stands between the product and that addition and thereby also prevents a fused
multiply-add, which would round once where the reference rounds twice.

**Weights.** ``clip(round(W / s), -1, 1)`` needs no division: rounding sends exactly 0.5 to 0, and no float W above s / 2
has a quotient that rounds to 0.5 (W would have to lie strictly between s / 2 and the float after it). So the code is
``(W > s / 2) - (W < -s / 2)``, exactly.

The scale of a tensor is known only after all of it has been read, and reading it twice from memory costs 9 bytes per weight
instead of 5. One launch therefore walks through a list of tiles of all tensors, in which the second visit to a tensor
(write the codes) follows shortly after the first (sum |W|), while the tensor is still in the L2 cache. Tensors that are
larger than the L2 cache are visited the second time in reverse order, starting from what was read last. Programs take their
places in the list from a counter, so a program that waits for a scale waits for programs that are already running and do
not wait themselves: there is no deadlock, whatever the scheduler does. Sums are fp64, one per tile, and are added in the
order of the tiles by whichever program finishes a tensor last: no float atomics, the same bits in every run.

Shape suffixes: N tokens, I in_features, O out_features.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.numerics import ACT_BLOCK, ACT_MAX, EPSILON

MAX_WIDTH = 32_768  # a row in the registers of 16 warps; 28,672 is the widest linear of Llama 70B
PEAK = tl.constexpr(float(ACT_MAX))
_EPSILON = tl.constexpr(EPSILON)
_ACT_BLOCK = tl.constexpr(ACT_BLOCK)

# 64 rows of 128 columns: whole 128-byte lines of codes, 32 values per thread.
TILE_O, TILE_I, TILE_WARPS = 64, 128, 8
# Tiles between a tensor's last first visit and its first second visit: about as many as an H200 has under way at once
# (132 processors, 4 tiles each), so that nobody waits; 16 MB of fp32, a third of the L2 cache.
LAG_TILES = 512
LARGE_BYTES = 32 * 2**20  # a weight that, with what is read meanwhile, outgrows an L2 cache of 50 MB


class Quantized(NamedTuple):
    """Activations as the integer product takes them: ``x ~ act_scale * act_codes``."""

    act_codes: Tensor  # int8 (..., I)
    act_scale: Tensor  # fp32 (..., 1); or (..., B) of blocks of ACT_BLOCK columns


class TernaryWeight(NamedTuple):
    """``W ~ weight_scale * weight_codes``."""

    weight_codes: Tensor  # int8 (O, I)
    weight_scale: Tensor  # fp32 (); or (O, G) of rows and groups of columns
    columns: int = 0  # of such a group


# ---------------------------------------------------------------------------------------------------- activations


@triton.jit
def peak_of(x, AXIS: tl.constexpr):
    """``max(max|x|, EPSILON)`` along an axis of fp32; by the bits of |x|, so that a NaN is the largest."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peak = tl.max(magnitude, AXIS).to(tl.float32, bitcast=True)
    return tl.where(peak < _EPSILON, _EPSILON, peak)


@triton.jit
def codes_of(x, factor):
    """``clip(round(x * factor), -128, 127)``, int32. The clip between keeps product and sum from being fused."""
    scaled = tl.minimum(tl.maximum(x * factor, -128.0), 127.0)
    return (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def quantize_tile(x):
    """``(codes int32, act_scale)`` of rows (ROWS, BLOCK) in fp32, zero beyond their width."""
    peak = peak_of(x, 1)
    most = tl.full(peak.shape, PEAK, tl.float32)
    return codes_of(x, tl.div_rn(most, peak)[:, None]), tl.div_rn(peak, most)


@triton.jit
def store_quantized(
    y, codes_ptr, scale_ptr, rows, columns, inside, N,
    I: tl.constexpr, ACT_BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantizes rows (ROWS, BLOCK) in fp32, zero beyond their width I, and stores codes and scales: of a token, or of each
    ACT_BLOCK columns of it."""
    if ACT_BLOCKS:
        count: tl.constexpr = (I + _ACT_BLOCK - 1) // _ACT_BLOCK
        parts, scales = quantize_tile(tl.reshape(y, (ROWS * (BLOCK // _ACT_BLOCK), _ACT_BLOCK)))
        codes = tl.reshape(parts, (ROWS, BLOCK))
        scales = tl.reshape(scales, (ROWS, BLOCK // _ACT_BLOCK))
        block = tl.arange(0, BLOCK // _ACT_BLOCK)
        tl.store(scale_ptr + rows[:, None] * count + block, scales, mask=(rows < N)[:, None] & (block < count))
    else:
        codes, scale = quantize_tile(y)
        tl.store(scale_ptr + rows, scale, mask=rows < N)
    tl.store(codes_ptr + rows[:, None] * I + columns, codes.to(tl.int8), mask=inside)


@triton.jit
def _quantize_activation(
    x_ptr, codes_ptr, scale_ptr, N, x_stride,
    I: tl.constexpr, ACT_BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < N) & (columns < I)
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    store_quantized(x, codes_ptr, scale_ptr, rows, columns, inside, N, I, ACT_BLOCKS, ROWS, BLOCK)


def row_tile(width: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK, num_warps) for rows of ``width``: 4,096 values or one row per program, 32 values per thread up to 16
    warps, i.e. four 16-byte loads of bf16 under way in each thread."""
    block = max(ACT_BLOCK, triton.next_power_of_2(width))
    rows = max(1, 4096 // block)
    return rows, block, max(4, min(16, rows * block // 1024))


def rows_of(name: str, x: Tensor) -> Tensor:
    """``x`` (..., I) as (N, I) with neighboring columns; a copy only where its strides leave no other way.

    Raises:
        ValueError: not a float, no columns, or more than MAX_WIDTH.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: expected float32, bfloat16 or float16; got {x.dtype}. Cast it first.")
    width = x.shape[-1]
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(
            f"{name}: expected a last dimension of 1 to {MAX_WIDTH}; got {width}. Use the reference for wider rows."
        )
    x = x.detach()
    rows = x.reshape(math.prod(x.shape[:-1]), width)
    return rows if rows.stride(1) == 1 or width == 1 else rows.contiguous()


def scales_of(width: int, blocks: bool) -> int:
    """Activation scales of a token of `width` columns: one, or one for each ACT_BLOCK columns."""
    return triton.cdiv(width, ACT_BLOCK) if blocks else 1


def empty_quantized(shape: Sequence[int], device: torch.device, blocks: bool = False) -> Quantized:
    """Room for the codes and scales, of tokens or of blocks, of activations of this shape (..., I)."""
    vector = (*shape[:-1], scales_of(shape[-1], blocks))
    return Quantized(
        torch.empty(tuple(shape), dtype=torch.int8, device=device),
        torch.empty(vector, dtype=torch.float32, device=device),
    )


def quantize_activation(x: Tensor, blocks: bool = False) -> Quantized:
    """Absmax int8 per token or block: ``clip(round(x * (127 / m)), -128, 127)``, ``m = max(max|x|, EPSILON)``.

    Args:
        x: (..., I) fp32, bf16 or fp16 on the GPU, I <= MAX_WIDTH; any strides (copied where rows are not contiguous).
        blocks: whether each ACT_BLOCK columns of a token have an m of their own.

    Returns: Quantized(act_codes int8 (..., I), act_scale fp32 (..., 1), or (..., B) of blocks, = m / 127).

    Raises:
        ValueError: another dtype, no columns, or rows too wide.

    Numerics: bit for bit ``reference.quantize_activation``, or `quantize_activation_blocks`. A row or block with a NaN or an
    infinity has it as its scale; its codes mean nothing.
    """
    rows = rows_of("x", x)
    out = empty_quantized(x.shape, x.device, blocks)
    N, I = rows.shape
    if N:
        ROWS, BLOCK, num_warps = row_tile(I)
        _quantize_activation[(triton.cdiv(N, ROWS),)](
            rows, *out, N, rows.stride(0), I, blocks, ROWS, BLOCK, num_warps=num_warps, enable_fp_fusion=True
        )
    return out


# ---------------------------------------------------------------------------------------------------- weights


@triton.jit
def _quantize_weights(
    address_ptr,  # int64 (W,): where each weight lies
    shape_ptr,  # int64 (W, 4): O, I, elements before this tensor, tiles before this tensor
    item_ptr,  # int32 (items, 2): tensor, and tile to sum, or -1 - tile to write
    counter_ptr,  # int32 (1 + W,), zeros: places drawn; tiles summed of each tensor
    partial_ptr,  # fp64 (tiles,)
    codes_ptr,
    scale_ptr,  # fp32 (W,), zeros: 0 is "not known yet", a scale is at least EPSILON
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
):
    item = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    tensor = tl.load(item_ptr + 2 * item)
    place = tl.load(item_ptr + 2 * item + 1)
    weight_ptr = tl.load(address_ptr + tensor).to(tl.pointer_type(DTYPE))
    O = tl.load(shape_ptr + 4 * tensor)
    I = tl.load(shape_ptr + 4 * tensor + 1)
    first_element = tl.load(shape_ptr + 4 * tensor + 2)
    first_tile = tl.load(shape_ptr + 4 * tensor + 3)
    if ALIGNED:  # the loads below are only wide where the compiler knows this
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        O, I = tl.multiple_of(O, 16), tl.multiple_of(I, 16)
        first_element = tl.multiple_of(first_element, 16)

    tile = tl.where(place < 0, -1 - place, place)
    tiles_I = tl.cdiv(I, TILE_I)
    start_O, start_I = tile // tiles_I * TILE_O, tile % tiles_I * TILE_I
    rows, columns = tl.arange(0, TILE_O), tl.arange(0, TILE_I)
    inside = (start_O + rows[:, None] < O) & (start_I + columns < I)
    corner = start_O.to(tl.int64) * I + start_I
    offsets = rows[:, None] * I.to(tl.int32) + columns

    if place >= 0:
        weight = tl.load(weight_ptr + corner + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(partial_ptr + first_tile + tile, tl.sum(tl.sum(tl.abs(weight).to(tl.float64), 1), 0))
        tl.debug_barrier()
        tiles = (tl.cdiv(O, TILE_O) * tiles_I).to(tl.int32)
        if tl.atomic_add(counter_ptr + 1 + tensor, 1, sem="acq_rel") == tiles - 1:  # the last one of this tensor
            lanes = tl.arange(0, 1024)
            sums = tl.zeros((1024,), tl.float64)
            for start in range(0, tiles, 1024):
                ptr = partial_ptr + first_tile + start + lanes
                sums += tl.load(ptr, mask=start + lanes < tiles, other=0.0, cache_modifier=".cg")
            mean = (tl.sum(sums, 0) / (O * I).to(tl.float64)).to(tl.float32)
            tl.store(scale_ptr + tensor, tl.where(mean < _EPSILON, _EPSILON, mean))
    else:
        weight = tl.load(weight_ptr + corner + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
        weight = weight.to(tl.float32)  # on its way while this program waits
        scale = tl.load(scale_ptr + tensor, volatile=True)
        while scale == 0.0:
            scale = tl.load(scale_ptr + tensor, volatile=True)
        half = scale * 0.5
        codes = (weight > half).to(tl.int8) - (weight < -half).to(tl.int8)
        tl.store(codes_ptr + first_element + corner + offsets, codes, mask=inside, eviction_policy="evict_first")


def visits(tiles: Sequence[int], large: Sequence[bool], lag: int) -> list[tuple[int, int, int, int]]:
    """The order of the work: runs (tensor, first place, last place, step), as places of ``_quantize_weights``.

    Every tile of a tensor is summed before ``lag`` further tiles (of later tensors) are, and then all are written.

    Args:
        tiles: tiles of each tensor. large: whether it outgrows the L2 cache and is revisited backwards.
        lag: tiles that are summed between the two visits of one.
    """
    runs, waiting, summed = [], [], 0
    for tensor, count in enumerate(tiles):
        start = 0
        while start < count:  # cut where a waiting tensor's turn comes
            stop = count if not waiting else min(count, start + max(0, waiting[0][1] - summed))
            if stop > start:
                runs.append((tensor, start, stop, 1))
                summed += stop - start
                start = stop
            while waiting and waiting[0][1] <= summed:
                runs.append(_written(waiting.pop(0)[0], tiles, large))
        waiting.append((tensor, summed + lag))
    return runs + [_written(tensor, tiles, large) for tensor, _ in waiting]


def _written(tensor: int, tiles: Sequence[int], large: Sequence[bool]) -> tuple[int, int, int, int]:
    count = tiles[tensor]
    return (tensor, -count, 0, 1) if large[tensor] else (tensor, -1, -1 - count, -1)


@lru_cache(maxsize=8)
def _plan(shapes: tuple[tuple[int, int], ...], element_size: int, device: torch.device):
    """(shape table, items, number of tiles) on the device; it depends on the shapes alone."""
    tiles = [triton.cdiv(O, TILE_O) * triton.cdiv(I, TILE_I) for O, I in shapes]
    large = [O * I * element_size > LARGE_BYTES for O, I in shapes]
    elements = tile = 0
    table = []
    for (O, I), count in zip(shapes, tiles, strict=True):
        table.append((O, I, elements, tile))
        elements += triton.cdiv(O * I, 16) * 16  # every tensor's codes start at a multiple of 16 bytes
        tile += count
    runs = visits(tiles, large, LAG_TILES)
    items = torch.empty((sum(abs(last - first) for _, first, last, _ in runs), 2), dtype=torch.int32)
    at = 0
    for tensor, first, last, step in runs:
        places = torch.arange(first, last, step, dtype=torch.int32)
        items[at : at + len(places), 0] = tensor
        items[at : at + len(places), 1] = places
        at += len(places)
    return torch.tensor(table).to(device), items.to(device), tile, elements


def quantize_weights(weights: Sequence[Tensor]) -> list[TernaryWeight]:
    """Ternary codes and scales of all linears of a model in one launch: ``clip(round(W / s), -1, 1)``, ``s = mean|W|``.

    Args:
        weights: (O, I) each, contiguous, all fp32, bf16 or fp16, on one GPU.

    Returns: a TernaryWeight for each: weight_codes int8 (O, I), weight_scale fp32 ().
    All codes are views of one buffer, all scales of another: they live and die together.

    Raises:
        ValueError: an empty (ZeRO-3 partitioned), non-contiguous or not two-dimensional tensor, or mixed dtypes.

    Numerics: bit for bit ``reference.quantize_weight``. The fp64 sum over tiles may differ from the reference's in its last
    bits, which the rounding to fp32 hides but for one tensor in about 10^7. The same bits in every run.
    """
    if not weights:
        return []
    for weight in weights:
        if weight.numel() == 0:
            raise ValueError(
                "weight: expected at least one element; got none. Under ZeRO-3 gather the parameter first."
            )
        if weight.dim() != 2 or not weight.is_contiguous():
            raise ValueError(
                f"weight: expected a contiguous matrix (O, I); got shape {tuple(weight.shape)}, strides "
                f"{weight.stride()}. Call .contiguous() on it."
            )
    dtype, device = weights[0].dtype, weights[0].device
    kinds = {(weight.dtype, weight.device) for weight in weights}
    if len(kinds) > 1 or dtype not in TRITON_DTYPES:
        raise ValueError(
            f"weights: expected one dtype of float32, bfloat16 or float16, on one device; got {sorted(map(str, kinds))}."
            " Quantize each kind by a call of its own."
        )
    shape_table, items, tiles, elements = _plan(
        tuple((weight.shape[0], weight.shape[1]) for weight in weights), dtype.itemsize, device
    )
    addresses = torch.tensor([weight.data_ptr() for weight in weights], pin_memory=device.type == "cuda")
    addresses = addresses.to(device, non_blocking=True)
    # Zeros, then the launch: both in stream order.
    counters = torch.zeros(1 + len(weights), dtype=torch.int32, device=device)
    scales = torch.zeros(len(weights), dtype=torch.float32, device=device)
    partial = torch.empty(tiles, dtype=torch.float64, device=device)
    codes = torch.empty(elements, dtype=torch.int8, device=device)
    aligned = all(w.shape[0] % 16 == 0 and w.shape[1] % 16 == 0 and w.data_ptr() % 16 == 0 for w in weights)
    _quantize_weights[(len(items),)](
        addresses, shape_table, items, counters, partial, codes, scales,
        TRITON_DTYPES[dtype], aligned, TILE_O, TILE_I, num_warps=TILE_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    result, start = [], 0
    for index, (O, I) in enumerate(weight.shape for weight in weights):
        part = slice(start, start + O * I)
        result.append(TernaryWeight(codes[part].view(O, I), scales[index]))
        start += triton.cdiv(O * I, 16) * 16
    return result


TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
