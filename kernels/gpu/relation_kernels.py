"""Triton kernels of the row KL of two token relations and of its gradient; relation_kl.py launches them.

For each sequence, head and token i, with a teacher's and a student's relation of token i to the keys j that it may see,

    a_ij = scale_teacher * x_i . y_j      b_ij = scale_student * x'_i . y'_j      p_i = softmax(a_i)   q_i = softmax(b_i)
    KL_i = sum_j p_ij (log p_ij - log q_ij)              dKL_i / db_ij = q_ij - p_ij

y is x itself (Q to Q, K to K, V to V: a token's gradient has a part as row and a part as key) or another tensor (Q to K,
with grouped key heads).

Forward, one pass over tiles of keys. A KL of 1e-6 under a log Z of 8 survives only if no two logarithms are subtracted. So
a tile is centered on its own mean difference of the logits, ``d_ij = b_ij - a_ij - E_p[b - a]``, and summed from terms
``p (expm1(d) - d) >= 0``. Tiles are joined by the chain rule, KL(all) = KL between the tiles + sum of share * KL(tile):
the same sum once more, over two parts. A row ends with its KL, ``log2 Z`` of the teacher, and the shift ``log Z_student -
log Z_teacher``. The shift is kept in two parts, the center of the heaviest tile and a small rest: ``b - a - center`` is exact
where it matters, so that even in a row that is one-hot the gradient ``p expm1(b - a - shift)`` has its digits.

Backward: the logits again, then ``q - p`` from the numbers of the rows. Whoever owns tokens x sums over all others y: as row
with the numbers of its own rows, as key with those of the rows y. No atomics, and the same bits every time.

Cosine relations: the raw inputs are multiplied; inverse norms, found before, enter the products in fp32, and the gradient is
projected at the end. Where a probability can be under ``floor``, a second pass over the keys with the final log Z
corrects the KL by ``p log(q/p) - p' log(q'/p')`` and sums what the clamps change in the gradient.

Logits are in units of log 2 where they go into exp2 (a), in natural units where they are differences (d). bf16 tiles are
multiplied as they are (the products are exact, the sums fp32); ``q - p`` is rounded to the inputs' dtype for its
product with y. fp32 tiles are multiplied in fp32, off the tensor cores.

Names: x the tokens of a program, y those it loops over; _t teacher, _s student; WIDTH channels of a head, DIM of a head in
memory, BLOCK their power of two. Shapes: B sequences, H heads of the relation, T tokens.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)
NEAR = tl.constexpr(0.25)  # below it a polynomial, above it a difference of exponentials: both good to 1e-5 of the term
HEADROOM = tl.constexpr(60.0)  # log2 of how far a student's weight may exceed the teacher's largest before it is scaled
SMALLEST_NORM = tl.constexpr(1e-12)  # of F.normalize


@triton.jit
def _excess(x):
    """``(e^x - 1 - x) / x`` for abs x < 0.25; relative error 4e-7."""
    return x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))


@triton.jit
def _log1p(x):
    s = x / (2.0 + x)
    z = s * s
    near = 2.0 * s * (1.0 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7))))
    return tl.where(tl.abs(x) < 0.125, near, tl.log2(tl.maximum(1.0 + x, 1e-30)) * LN2)


@triton.jit
def _kl_terms(p, q_log2, d):
    """``p (e^d - 1 - d)``, where ``p e^d = 2^q_log2``: without cancellation where d is small, without overflow
    where it is large."""
    return tl.where(tl.abs(d) < NEAR, p * d * _excess(d), tl.exp2(q_log2) - p * (1.0 + d))


@triton.jit
def _log_growth(sum_of_terms, over):
    """``log(sum of p e^d)`` for weights p of sum 1 and mean d of 0, from the sum of ``_kl_terms``: their KL. Where
    ``over > 0``, exponentials were held back by 2^over and everything else is nothing beside them."""
    held_back = over * LN2 + tl.log2(tl.maximum(sum_of_terms, 1e-30)) * LN2
    return tl.where(over > 0.0, held_back, _log1p(sum_of_terms))


@triton.jit
def _tokens(valid, b, tokens, T):
    return tl.load(valid + b.to(tl.int64) * T + tokens, mask=tokens < T, other=0) != 0


@triton.jit
def _seen(rows, keys, here_y, CAUSAL: tl.constexpr):
    seen = here_y[None, :]
    if CAUSAL:
        seen = seen & (keys[None, :] <= rows[:, None])
    return seen


@triton.jit
def _reach(spans, b, start_x, ROWS: tl.constexpr, STEP: tl.constexpr, CAUSAL: tl.constexpr, AFTER: tl.constexpr):
    """Which tokens y a block of tokens x has to do with: from, to. None where all of the block is padding."""
    first, last = tl.load(spans + 2 * b), tl.load(spans + 2 * b + 1)
    idle = (start_x >= last) | (start_x + ROWS <= first)
    if CAUSAL and AFTER:
        first = tl.maximum(first, start_x)
    if CAUSAL and not AFTER:
        last = tl.minimum(last, start_x + ROWS)
    return first // STEP * STEP, tl.where(idle, 0, last)


@triton.jit
def _row_numbers(numbers, stride, grad_kl, row, tokens, here, T, CLAMPED: tl.constexpr):
    """(log2 Z of the teacher, shift in two parts, sum of seen if clamped, gradient of the KL, 0 for padding)."""
    inside = tokens < T
    grad = tl.load(grad_kl + row * T + tokens, mask=inside, other=0.0)
    numbers += row * T + tokens
    log_z = tl.load(numbers, mask=inside, other=0.0)
    center = tl.load(numbers + stride, mask=inside, other=0.0)
    rest = tl.load(numbers + 2 * stride, mask=inside, other=0.0)
    seen = tl.load(numbers + 3 * stride, mask=inside, other=0.0) if CLAMPED else 0.0
    return log_z, center, rest, seen, tl.where(here, grad, 0.0)


# fmt: off
@triton.jit
def _addresses(
    x, b, head, tokens, stride_b, stride_h, stride_t, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Of a head of WIDTH channels; in memory heads have DIM: channel c of all lies at (c // DIM, c % DIM)."""
    if WIDTH == DIM:
        channels = head.to(tl.int64) * stride_h + tl.arange(0, BLOCK)
    else:
        channels = head * WIDTH + tl.arange(0, BLOCK)
        channels = (channels // DIM).to(tl.int64) * stride_h + channels % DIM
    return x + b.to(tl.int64) * stride_b + tokens.to(tl.int64)[:, None] * stride_t + channels[None, :]


@triton.jit
def _here(valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    here = valid[:, None]
    if BLOCK != WIDTH:
        here = here & (tl.arange(0, BLOCK) < WIDTH)[None, :]
    return here


@triton.jit
def _load(
    x, b, head, tokens, valid, stride_b, stride_h, stride_t, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """(tokens, BLOCK) of a head, zero where a token is not valid and beyond WIDTH."""
    addresses = _addresses(x, b, head, tokens, stride_b, stride_h, stride_t, DIM, WIDTH, BLOCK)
    tile = tl.load(addresses, mask=_here(valid, WIDTH, BLOCK), other=0.0)
    return tile.to(tl.float32) if INTERPRETED else tile  # the interpreter cannot compute in bf16


@triton.jit
def _norms(norm_t, norm_s, row, tokens, T, COSINE: tl.constexpr):
    """``1 / |x|`` in the teacher, and the student's over the teacher's."""
    if COSINE:
        unit = tl.load(norm_t + row * T + tokens, mask=tokens < T, other=1.0)
        ratio = tl.load(norm_s + row * T + tokens, mask=tokens < T, other=1.0) / unit
    else:
        unit, ratio = 1.0, 1.0
    return unit, ratio


@triton.jit
def _logits(
    x_t, y_t, x_s, y_s, unit_x, unit_y, ratio_x, ratio_y, scale, ratio, COSINE: tl.constexpr
):
    """``(a log2(e), b - a)``. The difference is taken before the common factor: equal models differ by 0 exactly."""
    a = tl.dot(x_t, tl.trans(y_t), input_precision="ieee")
    b = tl.dot(x_s, tl.trans(y_s), input_precision="ieee")
    if COSINE:
        unit = (unit_x * scale)[:, None] * unit_y[None, :]
        d = (b * (ratio_x * ratio)[:, None] * ratio_y[None, :] - a) * unit
        a = a * unit * LOG2E
    else:
        d = (b * ratio - a) * scale
        a = a * (scale * LOG2E)
    return a, d


@triton.jit
def _summarize(a, d):
    """What a tile's keys amount to, a row: (log2 Z of the teacher, shift in two parts, KL). ``a = -inf``: not a key."""
    top = tl.maximum(tl.max(a, 1), LOWEST)
    p_log2 = a - top[:, None]
    p = tl.exp2(p_log2)
    total = tl.maximum(tl.sum(p, 1), 1.0)  # the largest is 1; without a key top stays at LOWEST
    center = tl.sum(p * d, 1) / total
    d -= center[:, None]
    q_log2 = p_log2 + d * LOG2E
    over = tl.maximum(tl.max(q_log2, 1) - HEADROOM, 0.0)
    kl = _log_growth(tl.sum(_kl_terms(p, q_log2 - over[:, None], d), 1) / total, over)
    return top + tl.log2(total), center, tl.sum(p * d, 1) / total + kl, kl  # the mean of d: what center was rounded by


@triton.jit
def _join(log_z, center, rest, kl, log_z_2, center_2, rest_2, kl_2):
    """The same of two sets of keys together. The center of the heavier set is kept: rest stays small and exact."""
    top = tl.maximum(log_z, log_z_2)
    new_log_z = top + tl.log2(tl.exp2(log_z - top) + tl.exp2(log_z_2 - top))
    p_log2, p_2_log2 = log_z - new_log_z, log_z_2 - new_log_z
    p, p_2 = tl.exp2(p_log2), tl.exp2(p_2_log2)
    apart = (center_2 - center) + (rest_2 - rest)
    d, d_2 = -p_2 * apart, p * apart
    q_log2, q_2_log2 = p_log2 + d * LOG2E, p_2_log2 + d_2 * LOG2E
    over = tl.maximum(tl.maximum(q_log2, q_2_log2) - HEADROOM, 0.0)
    between = _log_growth(_kl_terms(p, q_log2 - over, d) + _kl_terms(p_2, q_2_log2 - over, d_2), over)
    heavier = p_2 > p
    rest = tl.where(heavier, rest_2 - d_2, rest - d) + between
    return new_log_z, tl.where(heavier, center_2, center), rest, p * kl + p_2 * kl_2 + between


@triton.jit
def _clamped(p_log2, d, floor, floor_log2):
    """Of ``p' = max(p, floor)`` and q' likewise: (what KL changes by, p' where q' still moves with q, less p)."""
    q_log2 = p_log2 + d * LOG2E
    p = tl.exp2(p_log2)
    raised = tl.maximum(p, floor)
    d_raised = (tl.maximum(q_log2, floor_log2) - tl.maximum(p_log2, floor_log2)) * LN2
    low = (p_log2 < floor_log2) | (q_log2 < floor_log2)
    return tl.where(low, p * d - raised * d_raised, 0.0), tl.where(q_log2 < floor_log2, 0.0, raised) - p


@triton.jit
def _change(a, d, numbers, floor, floor_log2, CLAMPED: tl.constexpr, ROW_AXIS: tl.constexpr):
    """``grad_i dKL_i / db_ij``: ``q - p``, and with clamps ``q - p - seen_ij + q sum_j seen_ij``. ROW_AXIS: where rows
    i are in a and d."""
    log_z, center, rest, seen, grad_kl = numbers
    p_log2 = a - tl.expand_dims(log_z, 1 - ROW_AXIS)
    d = (d - tl.expand_dims(center, 1 - ROW_AXIS)) - tl.expand_dims(rest, 1 - ROW_AXIS)
    p, q = tl.exp2(p_log2), tl.exp2(p_log2 + d * LOG2E)
    change = tl.where(tl.abs(d) < NEAR, p * (d + d * _excess(d)), q - p)
    if CLAMPED:
        change += q * tl.expand_dims(seen, 1 - ROW_AXIS) - _clamped(p_log2, d, floor, floor_log2)[1]
    return change * tl.expand_dims(grad_kl, 1 - ROW_AXIS)


# ------------------------------------------------------------------------------------------------- kernels


@triton.jit
def token_spans(valid, spans, T, BLOCK: tl.constexpr):
    """The first valid token of a sequence and one past its last: what lies outside is not even looped over."""
    b = tl.program_id(0)
    first, last = T, 0
    for start in range(0, T, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        here = _tokens(valid, b, tokens, T)
        first = tl.minimum(first, tl.min(tl.where(here, tokens, T), 0))
        last = tl.maximum(last, tl.max(tl.where(here, tokens + 1, 0), 0))
    tl.store(spans + 2 * b, first)
    tl.store(spans + 2 * b + 1, last)


@triton.jit
def inverse_norms(
    x, valid, norms, x_b, x_h, x_t, T,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """``1 / max(|x|, 1e-12)``, fp32 (B, H, T)."""
    h, b = tl.program_id(1), tl.program_id(2)
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = _tokens(valid, b, tokens, T)
    tile = _load(x, b, h, tokens, here, x_b, x_h, x_t, DIM, WIDTH, BLOCK, INTERPRETED).to(tl.float32)
    norm = tl.sqrt(tl.sum(tile * tile, 1))
    row = b.to(tl.int64) * tl.num_programs(1) + h
    tl.store(norms + row * T + tokens, 1.0 / tl.maximum(norm, SMALLEST_NORM), mask=tokens < T)


@triton.jit
def relation_forward(
    x_t, y_t, x_s, y_s, valid, spans, norm_t, norm_s, kl_out, numbers,
    xt_b, xt_h, xt_t, yt_b, yt_h, yt_t, xs_b, xs_h, xs_t, ys_b, ys_h, ys_t, T,
    scale, ratio, floor, floor_log2,
    CAUSAL: tl.constexpr, COSINE: tl.constexpr, CLAMPED: tl.constexpr,
    GROUP_YT: tl.constexpr, GROUP_YS: tl.constexpr, DIM_T: tl.constexpr, DIM_S: tl.constexpr,
    WIDTH_T: tl.constexpr, WIDTH_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """KL, log2 Z of the teacher, shift (and the sum of seen) of ROWS rows of a head. Grid (blocks of rows, H, B)."""
    start_x, h, b = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    row = b.to(tl.int64) * tl.num_programs(1) + h
    rows = start_x + tl.arange(0, ROWS)
    here_x = _tokens(valid, b, rows, T)
    tile_xt = _load(x_t, b, h, rows, here_x, xt_b, xt_h, xt_t, DIM_T, WIDTH_T, BLOCK_T, INTERPRETED)
    tile_xs = _load(x_s, b, h, rows, here_x, xs_b, xs_h, xs_t, DIM_S, WIDTH_S, BLOCK_S, INTERPRETED)
    unit_x, ratio_x = _norms(norm_t, norm_s, row, rows, T, COSINE)
    first, last = _reach(spans, b, start_x, ROWS, KEYS, CAUSAL, False)

    log_z = tl.full((ROWS,), LOWEST, tl.float32)
    center = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    kl = tl.zeros((ROWS,), tl.float32)
    for start_y in range(first, last, KEYS):
        keys = start_y + tl.arange(0, KEYS)
        here_y = _tokens(valid, b, keys, T)
        tile_yt = _load(y_t, b, h // GROUP_YT, keys, here_y, yt_b, yt_h, yt_t, DIM_T, WIDTH_T, BLOCK_T, INTERPRETED)
        tile_ys = _load(y_s, b, h // GROUP_YS, keys, here_y, ys_b, ys_h, ys_t, DIM_S, WIDTH_S, BLOCK_S, INTERPRETED)
        unit_y, ratio_y = _norms(norm_t, norm_s, row, keys, T, COSINE)
        a, d = _logits(tile_xt, tile_yt, tile_xs, tile_ys, unit_x, unit_y, ratio_x, ratio_y, scale, ratio, COSINE)
        a = tl.where(_seen(rows, keys, here_y, CAUSAL), a, float("-inf"))
        log_z_2, center_2, rest_2, kl_2 = _summarize(a, d)
        log_z, center, rest, kl = _join(log_z, center, rest, kl, log_z_2, center_2, rest_2, kl_2)

    log_z = tl.where(here_x, log_z, 0.0)
    numbers += row * T + rows
    stride = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * T
    if CLAMPED:
        seen = tl.zeros((ROWS,), tl.float32)
        for start_y in range(first, last, KEYS):
            keys = start_y + tl.arange(0, KEYS)
            here_y = _tokens(valid, b, keys, T)
            tile_yt = _load(y_t, b, h // GROUP_YT, keys, here_y, yt_b, yt_h, yt_t, DIM_T, WIDTH_T, BLOCK_T, INTERPRETED)
            tile_ys = _load(y_s, b, h // GROUP_YS, keys, here_y, ys_b, ys_h, ys_t, DIM_S, WIDTH_S, BLOCK_S, INTERPRETED)
            unit_y, ratio_y = _norms(norm_t, norm_s, row, keys, T, COSINE)
            a, d = _logits(tile_xt, tile_yt, tile_xs, tile_ys, unit_x, unit_y, ratio_x, ratio_y, scale, ratio, COSINE)
            a = tl.where(_seen(rows, keys, here_y, CAUSAL), a, float("-inf"))
            corrections, seen_2 = _clamped(a - log_z[:, None], d - (center + rest)[:, None], floor, floor_log2)
            kl += tl.sum(corrections, 1)
            seen += tl.sum(seen_2, 1)
        tl.store(numbers + 3 * stride, tl.where(here_x, seen, 0.0), mask=rows < T)
    tl.store(numbers, log_z, mask=rows < T)
    tl.store(numbers + stride, tl.where(here_x, center, 0.0), mask=rows < T)
    tl.store(numbers + 2 * stride, tl.where(here_x, rest, 0.0), mask=rows < T)
    tl.store(kl_out + row * T + rows, tl.where(here_x, kl, 0.0), mask=rows < T)


@triton.jit
def relation_backward(
    x_t, y_t, x_s, y_s, valid, spans, norm_t, norm_s, grad_kl, numbers, grad_x,
    xt_b, xt_h, xt_t, yt_b, yt_h, yt_t, xs_b, xs_h, xs_t, ys_b, ys_h, ys_t, gx_b, gx_h, gx_t, T, H,
    scale, ratio, floor, floor_log2,
    AS_ROW: tl.constexpr, AS_KEY: tl.constexpr, CAUSAL: tl.constexpr, COSINE: tl.constexpr, CLAMPED: tl.constexpr,
    REPEAT: tl.constexpr, GROUP_XT: tl.constexpr, GROUP_YT: tl.constexpr, GROUP_YS: tl.constexpr,
    DIM_T: tl.constexpr, DIM_S: tl.constexpr,
    WIDTH_T: tl.constexpr, WIDTH_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """Gradient of ROWS tokens x of a head, over all tokens y: as rows, as keys of the rows y, or as both.

    Grid (blocks of tokens, heads of x, B). REPEAT heads of the relation share a head of x (grouped keys): they are
    summed here. GROUP_*: heads of the relation to one head of a tensor.
    """
    start_x, head_x, b = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    mine = start_x + tl.arange(0, ROWS)
    here_x = _tokens(valid, b, mine, T)
    tile_xs = _load(x_s, b, head_x, mine, here_x, xs_b, xs_h, xs_t, DIM_S, WIDTH_S, BLOCK_S, INTERPRETED)
    first, last = _reach(spans, b, start_x, ROWS, KEYS, CAUSAL & (AS_ROW != AS_KEY), AS_KEY)
    unit_x, ratio_x = _norms(norm_t, norm_s, b.to(tl.int64) * H + head_x, mine, T, COSINE)  # cosines: no grouped keys

    stride = tl.num_programs(2).to(tl.int64) * H * T
    grad = tl.zeros((ROWS, BLOCK_S), tl.float32)
    for repeat in range(REPEAT):
        h = head_x * REPEAT + repeat
        row = b.to(tl.int64) * H + h
        tile_xt = _load(x_t, b, h // GROUP_XT, mine, here_x, xt_b, xt_h, xt_t, DIM_T, WIDTH_T, BLOCK_T, INTERPRETED)
        if AS_ROW:
            numbers_x = _row_numbers(numbers, stride, grad_kl, row, mine, here_x, T, CLAMPED)
        for start_y in range(first, last, KEYS):
            others = start_y + tl.arange(0, KEYS)
            here_y = _tokens(valid, b, others, T)
            tile_yt = _load(y_t, b, h // GROUP_YT, others, here_y, yt_b, yt_h, yt_t, DIM_T, WIDTH_T, BLOCK_T, INTERPRETED)
            tile_ys = _load(y_s, b, h // GROUP_YS, others, here_y, ys_b, ys_h, ys_t, DIM_S, WIDTH_S, BLOCK_S, INTERPRETED)
            unit_y, ratio_y = _norms(norm_t, norm_s, row, others, T, COSINE)
            a, d = _logits(tile_xt, tile_yt, tile_xs, tile_ys, unit_x, unit_y, ratio_x, ratio_y, scale, ratio, COSINE)
            change = tl.zeros((ROWS, KEYS), tl.float32)
            if AS_ROW:
                a_x = tl.where(_seen(mine, others, here_y, CAUSAL), a, float("-inf"))
                change += _change(a_x, d, numbers_x, floor, floor_log2, CLAMPED, 0)
            if AS_KEY:
                numbers_y = _row_numbers(numbers, stride, grad_kl, row, others, here_y, T, CLAMPED)
                a_y = tl.where(mine[:, None] <= others[None, :], a, float("-inf")) if CAUSAL else a
                change += _change(a_y, d, numbers_y, floor, floor_log2, CLAMPED, 1)
            if COSINE:
                change *= (unit_y * ratio_y)[None, :]
            grad = tl.dot(change.to(tile_ys.dtype), tile_ys, grad, input_precision="ieee")

    grad *= scale * ratio
    if COSINE:  # x / |x|: no gradient along x
        inverse = unit_x * ratio_x
        # loaded again, so that it need not stay in registers all the while
        x = _load(x_s, b, head_x, mine, here_x, xs_b, xs_h, xs_t, DIM_S, WIDTH_S, BLOCK_S, INTERPRETED).to(tl.float32)
        along = tl.where(inverse * SMALLEST_NORM < 1.0, tl.sum(grad * x, 1) * inverse * inverse, 0.0)
        grad = (grad - along[:, None] * x) * inverse[:, None]
    grad = tl.where(here_x[:, None], grad, 0.0)
    addresses = _addresses(grad_x, b, head_x, mine, gx_b, gx_h, gx_t, DIM_S, WIDTH_S, BLOCK_S)
    tl.store(addresses, grad.to(grad_x.dtype.element_ty), mask=_here(mine < T, WIDTH_S, BLOCK_S))
# fmt: on
