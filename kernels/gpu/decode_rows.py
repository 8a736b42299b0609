"""The operations between two packed products of a decoder layer, on a GPU: one program per token, one launch between two
products.

    embed                   x = table[id] * embedding_scale
    residual_norm_quantize  x += [norm](product); y = norm(x); act_codes = q([SubLN](y))     for q k v, gate up
    gated_quantize          act_codes = q([SubLN](act(gate) * up))                           for down
    final_norm              x += product; y = norm(x) as two planes of int8 or float16       for the LM head
    logits_argmax           logits and the largest of each block
    next_token              the largest of all becomes the next token; the positions move on

A product arrives as the integers of decode.accumulate, in splits. It is summed and scaled here, where it is read: ``y =
sum_S(acc) * (act_scale * weight_scale) + bias``. One of decode_groups.py arrives scaled. The residual stream is fp32.

Quantizers follow numerics.py to the bit. Multiplications and additions are not fused: scales and biases round as in the
reference, and a fused ``x * (127 / peak) + 1.5 * 2**23`` would change codes at ties (the clip in between also forbids
that).

A head with integer weights keeps float accuracy: ``q = round(y * (32512 / peak)) = 255 * high + low`` are two int8 planes,
and so two integer products. For float16 weights the planes are ``high = fp16(y / peak)`` and ``low = fp16((y / peak - high)
* 2048)``.

Shape suffixes: N tokens, I width of a row, P width with padding, S splits, O columns of a product, V vocabulary.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.gpu.decode import PackedMatrix
from bitdistill.kernels.gpu.quantize import PEAK, codes_of, peak_of, quantize_tile
from bitdistill.kernels.gpu.rounding import round_to_integer
from bitdistill.kernels.numerics import ACT_BLOCK

_ACT_BLOCK = tl.constexpr(ACT_BLOCK)
LOGITS_BLOCK = 1024  # words of the vocabulary that one program scales and searches
# What `final_norm` writes and `logits_argmax` puts together: (factor of the high plane, factor of the low plane).
_PLANES = {"int8": (255.0, 1.0), "fp16": (1.0, 1.0 / 2048.0)}


@dataclass(frozen=True)
class Product:
    """A product without its bias, and perhaps without its scales: ``y = sum_S(acc) * (act_scale * weight_scale) + bias``.

    Args:
        acc: int32 (S, N, O); or float32 (1, N, O), scaled: then both scales are None.
        act_scale: float32 (planes, N): one, or one for each of the matrices side by side.
        weight_scale: float32 (O,). bias: float32 (O,) or None.
    """

    acc: Tensor
    act_scale: Tensor | None
    weight_scale: Tensor | None
    bias: Tensor | None = None

    @property
    def planes(self) -> int:
        """How many scales of activations its columns have; 1 where it is scaled."""
        return 1 if self.act_scale is None else len(self.act_scale)

    def last(self) -> "Product":
        """The product of the last row alone."""
        act_scale = None if self.act_scale is None else self.act_scale[:, -1:].contiguous()
        return Product(self.acc[:, -1:].contiguous(), act_scale, self.weight_scale, self.bias)


# --- pieces -----------------------------------------------------------------------------------------------------------


@triton.jit
def product_columns(
    acc_ptr, act_scale_ptr, weight_scale_ptr, bias_ptr, n, plane, o, inside, N, O, SPLITS: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """Columns o of row n of a product, scaled, unless it is so already: fp32, 0 where not inside."""
    row = acc_ptr + n.to(tl.int64) * O
    acc = tl.load(row + o, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(row + tl.cast(split, tl.int64) * N * O + o, mask=inside, other=0)
    y = acc.to(tl.float32)
    if acc_ptr.dtype.element_ty == tl.int32:
        y = y * (tl.load(act_scale_ptr + plane * N + n) * tl.load(weight_scale_ptr + o, mask=inside, other=0.0))
    if BIAS:
        y += tl.load(bias_ptr + o, mask=inside, other=0.0)
    return y


@triton.jit
def rms_norm_row(x, gain_ptr, i, inside, I, eps):
    """``x / sqrt(mean(x^2) + eps) * gain`` of one row; x is 0 where not inside."""
    mean = tl.sum(x * x, 0) / I
    return x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps)) * tl.load(gain_ptr + i, mask=inside, other=0.0)


@triton.jit
def quantize_row(
    y, input_scale_ptr, codes_ptr, act_scale_ptr, row, i, inside, P,
    DIVIDED: tl.constexpr, ACT_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the int8 codes of one row (y is 0 in the padding), perhaps divided by the scales of its columns, and its
    act_scale, or those of its blocks."""
    if DIVIDED:
        y = tl.div_rn(y, tl.load(input_scale_ptr + i, mask=inside, other=1.0))
    if ACT_BLOCKS:
        parts, scales = quantize_tile(tl.reshape(y, (BLOCK // _ACT_BLOCK, _ACT_BLOCK)))
        codes = tl.reshape(parts, (BLOCK,))
        block = tl.arange(0, BLOCK // _ACT_BLOCK)
        tl.store(act_scale_ptr + row * (P // _ACT_BLOCK) + block, scales, mask=block < P // _ACT_BLOCK)
    else:
        peak = peak_of(y, 0)
        codes = codes_of(y, tl.div_rn(PEAK, peak))
        tl.store(act_scale_ptr + row, tl.div_rn(peak, PEAK))
    tl.store(codes_ptr + row * P + i, codes.to(tl.int8), mask=i < P)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _embed_kernel(
    ids_ptr,
    table_ptr,
    scale_ptr,  # float32 (V,) for 2 and 8 bits, float16 groups for 4
    x_ptr,
    I,
    W,
    embedding_scale,
    BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    word = tl.load(ids_ptr + n).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < I
    if BITS == 4:
        # (tiles, PAIRS, 64, 32) bytes, (tiles, 2 * PAIRS, 64) scales: decode.pack_int4
        group = i // 32
        tile = word // 64
        byte = ((tile * PAIRS + group % PAIRS) * 64 + word % 64) * 32 + i % 32
        packed = tl.load(table_ptr + byte, mask=inside, other=0)
        code = tl.where(group < PAIRS, (packed << 4).to(tl.int8) >> 4, packed >> 4).to(tl.float32)
        scale = tl.load(scale_ptr + (tile * 2 * PAIRS + group) * 64 + word % 64, mask=inside, other=0.0).to(tl.float32)
        x = code * scale
    elif BITS == 2:
        packed = tl.load(table_ptr + word * W + i % W, mask=inside, other=0)
        field = 6 - 2 * (i // W).to(tl.int32)
        code = ((packed.to(tl.int32) << tl.where(inside, field, 0)) << 24) >> 30
        x = code.to(tl.float32) * tl.load(scale_ptr + word)
    elif BITS == 8:
        x = tl.load(table_ptr + word * W + i, mask=inside, other=0).to(tl.float32) * tl.load(scale_ptr + word)
    else:
        x = tl.load(table_ptr + word * W + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + n.to(tl.int64) * I + i, x * embedding_scale, mask=inside)


@triton.jit
def _residual_norm_kernel(
    x_ptr,  # float32 (N, I), the residual stream: updated where SPLITS > 0
    acc_ptr,
    acc_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    post_gain_ptr,
    gain_ptr,
    subln_ptr,  # float32 (PLANES, I)
    input_scale_ptr,  # float32 (PLANES, I)
    codes_ptr,  # int8 (PLANES, N, P); FORM "fp16": float16 (2, N, P)
    act_scale_ptr,  # float32 (PLANES, N), or (PLANES, N, P / 32)
    N,
    I,
    P,
    eps,
    subln_eps,
    SPLITS: tl.constexpr,  # of the product in front; 0: there is none
    BIAS: tl.constexpr,
    POST: tl.constexpr,
    NORM: tl.constexpr,
    SUBLN: tl.constexpr,
    DIVIDED: tl.constexpr,
    ACT_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
    FORM: tl.constexpr,  # "codes" | "int8" | "fp16": for a BitLinear, for an integer head, for a float16 head
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < I
    row = n.to(tl.int64)
    x = tl.load(x_ptr + row * I + i, mask=inside, other=0.0)
    if SPLITS > 0:
        y = product_columns(
            acc_ptr, acc_scale_ptr, weight_scale_ptr, bias_ptr, n, 0, i, inside, N, I, SPLITS, BIAS
        )  # fmt: skip
        if POST:
            y = rms_norm_row(y, post_gain_ptr, i, inside, I, eps)
        x += y
        tl.store(x_ptr + row * I + i, x, mask=inside)
    y = x
    if NORM:
        y = rms_norm_row(x, gain_ptr, i, inside, I, eps)
    if FORM == "codes":
        for plane in tl.static_range(PLANES):
            z = y
            if SUBLN:
                z = rms_norm_row(y, subln_ptr + plane * I, i, inside, I, subln_eps)
            quantize_row(
                z, input_scale_ptr + plane * I, codes_ptr, act_scale_ptr, plane * N + row, i, inside, P,
                DIVIDED, ACT_BLOCKS, BLOCK,
            )  # fmt: skip
    else:
        peak = peak_of(y, 0)
        if FORM == "int8":
            q = round_to_integer(tl.minimum(tl.maximum(y * tl.div_rn(32512.0, peak), -32512.0), 32512.0))
            high = round_to_integer(tl.div_rn(q, 255.0))
            low = q - high * 255.0
            tl.store(act_scale_ptr + n, tl.div_rn(peak, 32512.0))
        else:
            unit = tl.div_rn(y, peak)
            high = unit.to(tl.float16).to(tl.float32)
            low = (unit - high) * 2048.0
            tl.store(act_scale_ptr + n, peak)
        kind: tl.constexpr = codes_ptr.dtype.element_ty
        tl.store(codes_ptr + row * P + i, high.to(kind), mask=i < P)
        tl.store(codes_ptr + (N + row) * P + i, low.to(kind), mask=i < P)


@triton.jit
def _gated_kernel(
    acc_ptr,  # int32 (S, N, 2 * I): gate, up
    acc_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    subln_ptr,
    input_scale_ptr,
    codes_ptr,
    act_scale_ptr,
    N,
    I,
    P,
    subln_eps,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    UP_PLANE: tl.constexpr,  # which act_scale the up projection has: 0, or 1 if it reads codes of its own
    SILU: tl.constexpr,
    SUBLN: tl.constexpr,
    DIVIDED: tl.constexpr,
    ACT_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < I
    gate = product_columns(
        acc_ptr, acc_scale_ptr, weight_scale_ptr, bias_ptr, n, 0, i, inside, N, 2 * I, SPLITS, BIAS
    )  # fmt: skip
    up = product_columns(
        acc_ptr, acc_scale_ptr, weight_scale_ptr, bias_ptr, n, UP_PLANE, I + i, inside, N, 2 * I, SPLITS, BIAS
    )  # fmt: skip
    slope = gate
    if not SILU:  # 0.5 * (1 + tanh(z)) = 1 / (1 + exp(-2 z)), z = sqrt(2 / pi) * (x + 0.044715 x^3)
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    y = gate / (1.0 + tl.exp(-slope)) * up
    if SUBLN:
        y = rms_norm_row(y, subln_ptr, i, inside, I, subln_eps)
    quantize_row(
        y, input_scale_ptr, codes_ptr, act_scale_ptr, n.to(tl.int64), i, inside, P, DIVIDED, ACT_BLOCKS, BLOCK
    )  # fmt: skip


@triton.jit
def _logits_kernel(
    acc_ptr,  # int32 or float32 (S, 2 * N, V): the products of the high plane, then of the low plane
    act_scale_ptr,
    weight_scale_ptr,
    logits_ptr,  # float32 (N, V)
    best_ptr,  # float32 (N, blocks)
    word_ptr,  # int32 (N, blocks)
    N,
    V,
    high_factor,
    low_factor,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,  # the weights have a scale per row
    BLOCK: tl.constexpr,
):
    block, n = tl.program_id(0), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    high_row = acc_ptr + n.to(tl.int64) * V
    low_row = acc_ptr + (N + n).to(tl.int64) * V
    high, low = tl.load(high_row + v, mask=inside, other=0), tl.load(low_row + v, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):
        further = tl.cast(split, tl.int64) * 2 * N * V
        high += tl.load(high_row + further + v, mask=inside, other=0)
        low += tl.load(low_row + further + v, mask=inside, other=0)
    scale = tl.load(act_scale_ptr + n)
    if SCALED:
        scale = scale * tl.load(weight_scale_ptr + v, mask=inside, other=0.0)
    logits = (high.to(tl.float32) * high_factor + low.to(tl.float32) * low_factor) * scale
    tl.store(logits_ptr + n.to(tl.int64) * V + v, logits, mask=inside)
    logits = tl.where(inside, logits, float("-inf"))
    best = tl.max(logits, 0)
    tl.store(best_ptr + n * tl.num_programs(0) + block, best)
    tl.store(word_ptr + n * tl.num_programs(0) + block, tl.min(tl.where(logits == best, v, V), 0))


@triton.jit
def _next_token_kernel(best_ptr, word_ptr, ids_ptr, positions_ptr, blocks, last_position, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b = tl.arange(0, BLOCK)
    inside = b < blocks
    best = tl.load(best_ptr + n * blocks + b, mask=inside, other=float("-inf"))
    word = tl.load(word_ptr + n * blocks + b, mask=inside, other=2147483647)
    tl.store(ids_ptr + n, tl.min(tl.where(best == tl.max(best, 0), word, 2147483647), 0))
    tl.store(positions_ptr + n, tl.minimum(tl.load(positions_ptr + n) + 1, last_position))


# --- launch -----------------------------------------------------------------------------------------------------------


def row_warps(block: int) -> int:
    """Warps of a program that holds a row of `block` numbers: 8 numbers per thread, more in wide rows."""
    return min(16, max(1, block // 256))


def embed(ids: Tensor, table: PackedMatrix, weight_scale: Tensor | None, embedding_scale: float) -> Tensor:
    """``table[ids] * embedding_scale``, dequantized.

    Args:
        ids: int32 (N,), each below table.rows. table: the embedding (V, I).
        weight_scale: float32 (V,) for 2 and 8 bits, None for 16 and 4 (whose scales are in the table).
        embedding_scale: multiplies the rows.

    Returns: float32 (N, I). Numerics: the bits of the packed file's dequantization.
    """
    x = torch.empty(len(ids), table.columns, dtype=torch.float32, device=ids.device)
    scale = table.group_scale if table.bits == 4 else weight_scale
    block = triton.next_power_of_2(table.columns)
    _embed_kernel[(len(ids),)](
        ids, table.data, ids if scale is None else scale, x, table.columns, table.data.shape[1], embedding_scale,
        BITS=table.bits, PAIRS=table.data.shape[1] if table.bits == 4 else 0, BLOCK=block,
        num_warps=row_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
    return x


def residual_norm_quantize(
    x: Tensor,
    act_columns: int,
    gain: Tensor | None = None,
    eps: float = 0.0,
    subln: Tensor | None = None,
    subln_eps: float = 0.0,
    product: Product | None = None,
    post_gain: Tensor | None = None,
    input_scale: Tensor | None = None,
    blocks: bool = False,
) -> tuple[Tensor, Tensor]:
    """``x += [norm](product)`` in place, then int8 codes of ``[SubLN]([norm](x)) [/ input_scale]``.

    Args:
        x: float32 (N, I), contiguous: the residual stream, changed where there is a product.
        act_columns: P, of the matrices that will read the codes.
        gain: float32 (I,) of the model's norm, or None for none. eps: of both model norms.
        subln: float32 (planes, I): one set of codes for each, or None. subln_eps: theirs.
        product: what is added to x first, (N, I), or None.
        post_gain: float32 (I,) of a norm after the product (Gemma), or None.
        input_scale: float32 (planes, I), by which each set is divided before it is rounded, or None.
        blocks: whether each ACT_BLOCK columns of a token have a scale.

    Returns: (act_codes int8 (planes, N, P), zero in the padding; act_scale float32 (planes, N), or (planes, N, P / 32)).

    Raises:
        ValueError: x is not a contiguous float32 (N >= 1, I), or P is below I.

    Numerics: given the same y, codes and scales are those of reference.quantize_activation; the sum inside a norm has
    its own order.
    """
    planes = max(1 if own is None else len(own) for own in (subln, input_scale))
    codes, scale = empty_codes(planes, len(x), act_columns, x.device, blocks)
    _residual_norm(x, codes, scale, "codes", gain, eps, subln, subln_eps, product, post_gain, input_scale)
    return codes, scale


def final_norm(
    x: Tensor, act_columns: int, form: str, gain: Tensor, eps: float, product: Product | None, post_gain: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `residual_norm_quantize`, into the two planes that a head of `form` "int8" or "fp16" reads.

    Returns: (planes int8 or float16 (2 * N, P), all high rows first; act_scale float32 (N,)).
    """
    rows, kind = len(x), torch.float16 if form == "fp16" else torch.int8
    planes = torch.empty(2, rows, act_columns, dtype=kind, device=x.device)
    scale = torch.empty(1, rows, dtype=torch.float32, device=x.device)
    _residual_norm(x, planes, scale, form, gain, eps, None, 0.0, product, post_gain, None)
    return planes.flatten(0, 1), scale[0]


def empty_codes(planes: int, rows: int, act_columns: int, device: torch.device, blocks: bool) -> tuple[Tensor, Tensor]:
    """Room for codes int8 (planes, N, P) and their scales, float32 (planes, N), or (planes, N, P / 32).

    Args:
        planes: sets of codes. rows: N. act_columns: P. device: where.
        blocks: whether each ACT_BLOCK columns of a token have a scale.
    """
    shape = (planes, rows, act_columns // ACT_BLOCK) if blocks else (planes, rows)
    codes = torch.empty(planes, rows, act_columns, dtype=torch.int8, device=device)
    return codes, torch.empty(shape, dtype=torch.float32, device=device)


def _residual_norm(x, codes, scale, form, gain, eps, subln, subln_eps, product, post_gain, input_scale):
    planes, _, act_columns = codes.shape
    if x.dtype != torch.float32 or x.dim() != 2 or len(x) == 0 or not x.is_contiguous() or x.shape[1] > act_columns:
        raise ValueError(
            f"x: expected contiguous float32 (N >= 1, I <= {act_columns}); got {x.dtype} {tuple(x.shape)}. "
            "Pass whole rows of the residual stream."
        )
    rows, width = x.shape
    block = triton.next_power_of_2(act_columns)
    none = x  # a pointer that the kernel does not use
    _residual_norm_kernel[(rows,)](
        x, *pointers(product, none), _or(post_gain, none), _or(gain, none), _or(subln, none), _or(input_scale, none),
        codes, scale, rows, width, act_columns, eps, subln_eps,
        SPLITS=0 if product is None else len(product.acc), BIAS=product is not None and product.bias is not None,
        POST=post_gain is not None, NORM=gain is not None, SUBLN=subln is not None,
        DIVIDED=input_scale is not None, ACT_BLOCKS=scale.dim() == 3, PLANES=planes, FORM=form,
        BLOCK=block, num_warps=row_warps(block), enable_fp_fusion=False,
    )  # fmt: skip


def gated_quantize(
    product: Product,
    act_columns: int,
    activation: str,
    subln: Tensor | None = None,
    subln_eps: float = 0.0,
    input_scale: Tensor | None = None,
    blocks: bool = False,
) -> tuple[Tensor, Tensor]:
    """int8 codes of ``[SubLN](act(gate) * up) [/ input_scale]``.

    Args:
        product: (N, 2 * I), the columns of gate, then of up; two planes of act_scale when each has its own.
        act_columns: P of the down projection.
        activation: "silu" or "gelu_pytorch_tanh".
        subln: float32 (1, I) or None.
        subln_eps: eps of that norm.
        input_scale: float32 (1, I), by which it is divided before it is rounded, or None.
        blocks: whether each ACT_BLOCK columns of a token have a scale.

    Returns: (act_codes int8 (1, N, P), act_scale float32 (1, N), or (1, N, P / 32)).
    """
    rows, width = product.acc.shape[1], product.acc.shape[2] // 2
    codes, scale = empty_codes(1, rows, act_columns, product.acc.device, blocks)
    block = triton.next_power_of_2(act_columns)
    none = scale
    _gated_kernel[(rows,)](
        *pointers(product, none), _or(subln, none), _or(input_scale, none), codes, scale, rows, width, act_columns,
        subln_eps, SPLITS=len(product.acc), BIAS=product.bias is not None, UP_PLANE=product.planes - 1,
        SILU=activation == "silu", SUBLN=subln is not None, DIVIDED=input_scale is not None, ACT_BLOCKS=blocks,
        BLOCK=block,
        num_warps=row_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale


def logits_argmax(acc: Tensor, act_scale: Tensor, weight_scale: Tensor | None, form: str) -> tuple[Tensor, tuple]:
    """Logits out of the head's products with both planes, and the largest of each block of the vocabulary.

    Args:
        acc: (S, 2 * N, V) of decode.accumulate. act_scale: float32 (N,), with the planes from `final_norm`.
        weight_scale: float32 (V,), or None.
        form: as given to `final_norm`.

    Returns: (logits float32 (N, V), (values float32 (N, blocks), words int32 (N, blocks)) for `next_token`).
    """
    splits, rows, vocabulary = acc.shape
    rows //= 2
    blocks = triton.cdiv(vocabulary, LOGITS_BLOCK)
    logits = torch.empty(rows, vocabulary, dtype=torch.float32, device=acc.device)
    best = torch.empty(rows, blocks, dtype=torch.float32, device=acc.device)
    words = torch.empty(rows, blocks, dtype=torch.int32, device=acc.device)
    _logits_kernel[(blocks, rows)](
        acc, act_scale, _or(weight_scale, act_scale), logits, best, words, rows, vocabulary, *_PLANES[form],
        SPLITS=splits, SCALED=weight_scale is not None, BLOCK=LOGITS_BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return logits, (best, words)


def next_token(blocks: tuple[Tensor, Tensor], ids: Tensor, positions: Tensor, last_position: int) -> None:
    """The most likely words, the first among equals, into ids; positions grow by one, up to last_position.

    Args:
        blocks: from `logits_argmax`. ids, positions: int32 (N,), changed in place.
        last_position: positions stop growing there.
    """
    best, words = blocks
    _next_token_kernel[(len(best),)](
        best, words, ids, positions, best.shape[1], last_position,
        BLOCK=triton.next_power_of_2(best.shape[1]), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


def _or(tensor: Tensor | None, none: Tensor) -> Tensor:
    return none if tensor is None else tensor


def pointers(product: Product | None, none: Tensor) -> tuple[Tensor, ...]:
    """What `product_columns` reads: acc, act_scale, weight_scale, bias.

    Args:
        product: or None, where the kernel reads none. none: stands for what there is not.
    """
    if product is None:
        return none, none, none, none
    return product.acc, _or(product.act_scale, none), _or(product.weight_scale, none), _or(product.bias, none)
