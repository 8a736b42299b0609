"""Row KL of two token relations, and its gradient, without a T x T matrix in memory: operators, launches and tiles.

relation_kernels.py has the mathematics, and ``relations.row_kl`` is the reference. Kept for the backward pass are the
inputs and three fp32 numbers per row (four where a floor is reached, two more for cosines): O(B H T).

Cost, a head of width D and T tokens: forward 2 products (4 T^2 D FLOP) and 2 T^2 exp2; backward of a symmetric relation 3
products (6 T^2 D FLOP) and 4 T^2 exp2; of Q and K two launches of 3 products and 2 T^2 exp2 each; causal, half of it.
Bytes: a block of ROWS tokens reads itself and all keys of its head, ``(1 + ceil(T / ROWS)) * T * D`` elements a head of each
model, nearly all from the L2 cache. (B 32, T 512, Q, K and V of 32 heads of 128 in all: 344 GFLOP, 1.6e9 exp2.)

Padded tokens are never loaded, and tokens before the first or after the last of a sequence are not even looped over. How
far a batch was padded on the right changes no bit of the result.

Shape suffixes: B sequences, H heads of the relation, T tokens, D width of a head.
"""

import math

import torch
import triton
from torch import Tensor
from triton import knobs

from bitdistill.kernels.gpu.relation_kernels import inverse_norms, relation_backward, relation_forward, token_spans

MAX_WIDTH = 256
INTERPRETED = bool(knobs.runtime.interpret)


def unsupported(teacher: Tensor, student: Tensor, split_heads: int | None) -> str:
    """Why ``relation_kl_rows`` cannot take these (B, H, T, D) tensors; "" if it can.

    Returns: half a sentence: "float16 inputs", "heads of 512 channels, more than 256", ...
    """
    for x in (teacher, student):
        width = x.shape[1] * x.shape[3] // (split_heads or x.shape[1])
        if width > MAX_WIDTH:
            return f"heads of {width} channels, more than {MAX_WIDTH}"
        if x.dtype not in (torch.bfloat16, torch.float32):
            return f"{str(x.dtype).removeprefix('torch.')} inputs"
    if student.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(student.device) < (8, 0):
        return "a GPU older than sm_80"
    return ""


def relation_kl_rows(
    teacher_a: Tensor,
    teacher_b: Tensor | None,
    student_a: Tensor,
    student_b: Tensor | None,
    valid_BT: Tensor,
    *,
    causal: bool,
    scale_teacher: float,
    scale_student: float,
    cosine: bool = False,
    split_heads: int | None = None,
    floor: float = 0.0,
) -> Tensor:
    """``KL(softmax(teacher_i) || softmax(student_i))`` of each row of two relations of tokens.

    Args:
        teacher_a, student_a: (B, H, T, D) bf16 or fp32, whose tokens are the rows; any strides. Widths D may differ.
        teacher_b, student_b: (B, G, T, D), whose tokens are the keys, G dividing H; None for a itself.
        valid_BT: bool; other tokens are neither rows nor keys, and what they hold is not read.
        causal: a token relates to those not after it, itself included.
        scale_teacher, scale_student: factors of the products, positive.
        cosine: of ``x / max(|x|, 1e-12)`` instead of x. Not with b.
        split_heads: heads that H * D of both models are regrouped to; None keeps them. Not with b.
        floor: lower clamp of both probabilities, as in ``relations.row_kl``; 0 for none.

    Returns: fp32 (B, H or split_heads, T), 0 in rows that are not valid. The gradient flows to the student's sides and
    cannot be differentiated again.

    Raises:
        ValueError: what ``unsupported`` names.

    Numerics: rows within 1e-4 of the KL (bf16 inputs: of the KL of what they hold), also where it is 1e-6 of log Z; the
    same models give 0. Deterministic.

    Source: arXiv 2510.13998, equations 10-12 and Algorithm 1.
    """
    reason = unsupported(teacher_a, student_a, split_heads)
    if reason:
        raise ValueError(
            f"relation_kl_rows: expected bf16 or fp32 heads of at most {MAX_WIDTH} channels on a GPU from sm_80 on; "
            f"got {reason}. Use relations.row_kl."
        )
    assert (teacher_b is None) == (student_b is None), "the same form of relation in both models"
    assert student_b is None or not (cosine or split_heads), "cosines and regrouped heads are of a tensor with itself"
    heads = split_heads or student_a.shape[1]
    if not floor or (cosine and math.exp(-2 * max(scale_teacher, scale_student)) / max(valid_BT.shape[1], 1) > floor):
        floor = 0.0  # cosines are within -1..1: no probability is as low as that
    sides = [None if x is None else _dense_channels(x) for x in (teacher_a, teacher_b, student_a, student_b)]
    return torch.ops.bitdistill.relation_kl_rows(
        *sides, valid_BT, causal, scale_teacher, scale_student, cosine, heads, floor
    )[0]


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _tile_family(device: torch.device) -> str:
    """Whose tiles a device takes, out of launches.TARGETS; interpreted, the H200's."""
    if torch.version.hip:
        return "gfx942"
    # sm_86, sm_89 and sm_120 have as much shared memory as an sm_80 tile needs, and no more
    return "sm_90" if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"


def _tile(part: str, block: int, itemsize: int, cosine: bool, clamped: bool, role: str) -> tuple[int, int, int]:
    """(ROWS, KEYS, num_warps): what compiles without spills at least where it matters (bench/gpu_compile.py).

    On sm_90 two blocks of four warps share a multiprocessor, so that one multiplies while the other exponentiates.

    Args:
        block: channels of the widest head, a power of two. itemsize: bytes of an input.
        role: "forward", "both" (backward of a symmetric relation), "row", "key".
    """
    if part == "gfx942":
        if itemsize == 4:
            return 32, 16, 4
        if role == "forward" and not clamped:
            return 64, 32, 4
        return (64, 16, 4) if block <= 128 else (32, 16, 4)
    if itemsize == 4:  # products in fp32, off the tensor cores
        return (32, 32, 8) if block <= 128 else (32, 16, 8)
    if role == "forward":
        if block > 128:
            return 64, 32, 8
        return (64, 32, 4) if clamped else (64, 64, 4)
    if clamped or block > 128:
        return 32, 32, 8
    if part == "sm_80" or role == "key":
        return 64, 32, 8
    return (64, 32, 4) if cosine else (64, 64, 4)


def _call(role, part, sides, valid, spans, norms, numbers, settings, **outputs) -> tuple[tuple, dict]:
    """The grid and all arguments, by name, of a kernel in a role; constexprs are in capitals.

    Args:
        role: as in ``_tile``. sides: (x, y) of the teacher and (x, y) of the student, x the block's own tokens.
        settings: (causal, scale_teacher, scale_student, cosine, heads, floor).
        outputs: kl_out, or grad_kl and grad_x.
    """
    causal, scale_teacher, scale_student, cosine, heads, floor = settings
    x_t, y_t, x_s, y_s = sides
    symmetric = x_s is y_s
    widths = [x.shape[1] * x.shape[3] // heads if symmetric else x.shape[3] for x in (x_t, x_s)]
    blocks = [max(16, triton.next_power_of_2(width)) for width in widths]
    group_xt, group_yt, group_xs, group_ys = (1 if symmetric else heads // x.shape[1] for x in sides)
    itemsize = max(x.element_size() for x in sides)
    rows, keys, warps = _tile(part, max(blocks), itemsize, cosine, floor > 0, role)
    strided = {"xt": x_t, "yt": y_t, "xs": x_s, "ys": y_s}
    if "grad_x" in outputs:
        strided["gx"] = outputs["grad_x"]
    strides = {f"{name}_{axis}": x.stride(i) for name, x in strided.items() for i, axis in enumerate("bht")}
    own = {}
    if role != "forward":
        own = {"H": heads, "GROUP_XT": group_xt, "REPEAT": group_xs, "AS_ROW": role != "key", "AS_KEY": role != "row"}
    arguments = {
        **dict(zip(("x_t", "y_t", "x_s", "y_s"), sides, strict=True)),
        **{"valid": valid, "spans": spans, "numbers": numbers},
        **{"norm_t": norms[0] if cosine else None, "norm_s": norms[1] if cosine else None},
        **outputs,
        **strides,
        **own,
        **{"T": valid.shape[1], "scale": scale_teacher, "ratio": scale_student / scale_teacher},
        **{"floor": floor, "floor_log2": math.log2(floor) if floor else 0.0},
        **{"CAUSAL": causal, "COSINE": cosine, "CLAMPED": floor > 0, "GROUP_YT": group_yt, "GROUP_YS": group_ys},
        **{"DIM_T": x_t.shape[3], "WIDTH_T": widths[0], "BLOCK_T": blocks[0]},
        **{"DIM_S": x_s.shape[3], "WIDTH_S": widths[1], "BLOCK_S": blocks[1]},
        **{"ROWS": rows, "KEYS": keys, "INTERPRETED": INTERPRETED},
        **{"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True},
    }
    return (triton.cdiv(valid.shape[1], rows), heads // group_xs, valid.shape[0]), arguments


def _norm_call(x, valid, norm, heads) -> tuple[tuple, dict]:
    width = x.shape[1] * x.shape[3] // heads
    block = max(16, triton.next_power_of_2(width))
    rows = 4096 // block
    arguments = {
        **{"x": x, "valid": valid, "norms": norm, "T": valid.shape[1]},
        **dict(zip(("x_b", "x_h", "x_t"), x.stride(), strict=False)),
        **{"DIM": x.shape[3], "WIDTH": width, "BLOCK": block, "ROWS": rows, "INTERPRETED": INTERPRETED},
    }
    return (triton.cdiv(valid.shape[1], rows), heads, valid.shape[0]), arguments


@torch.library.custom_op("bitdistill::relation_kl_rows", mutates_args=())
def _rows(
    teacher_a: Tensor,
    teacher_b: Tensor | None,
    student_a: Tensor,
    student_b: Tensor | None,
    valid_BT: Tensor,
    causal: bool,
    scale_teacher: float,
    scale_student: float,
    cosine: bool,
    heads: int,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL (B, H, T), the rows' numbers (3 or 4, B, H, T), inverse norms (0 or 2, B, H, T) and token spans (B, 2).

    Numbers: log2 Z of the teacher, the shift in two parts, and where a floor bites the sum of ``seen``.
    """
    kl, numbers, norms, spans = _fake_rows(
        teacher_a, teacher_b, student_a, student_b, valid_BT, causal, scale_teacher, scale_student, cosine, heads, floor
    )
    if kl.numel() == 0:
        return kl, numbers, norms, spans
    valid = valid_BT.contiguous().view(torch.uint8)
    sides = (teacher_a, teacher_a if teacher_b is None else teacher_b)
    sides += (student_a, student_a if student_b is None else student_b)
    settings = causal, scale_teacher, scale_student, cosine, heads, floor
    with torch.cuda.device_of(kl):
        token_spans[(len(valid),)](valid, spans, valid.shape[1], BLOCK=1024)
        if cosine:
            for x, norm in ((teacher_a, norms[0]), (student_a, norms[1])):
                grid, arguments = _norm_call(x, valid, norm, heads)
                inverse_norms[grid](**arguments)
        grid, arguments = _call(
            "forward", _tile_family(kl.device), sides, valid, spans, norms, numbers, settings, kl_out=kl
        )
        relation_forward[grid](**arguments)
    return kl, numbers, norms, spans


@_rows.register_fake
def _fake_rows(
    teacher_a, teacher_b, student_a, student_b, valid_BT, causal, scale_teacher, scale_student, cosine, heads, floor
):
    B, T = valid_BT.shape
    like = {"dtype": torch.float32, "device": student_a.device}
    return (
        torch.empty(B, heads, T, **like),
        torch.empty(4 if floor else 3, B, heads, T, **like),
        torch.empty(2 if cosine else 0, B, heads, T, **like),
        torch.empty(B, 2, dtype=torch.int32, device=student_a.device),
    )


@torch.library.custom_op("bitdistill::relation_kl_rows_backward", mutates_args=())
def _rows_backward(
    grad_kl: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor | None,
    student_a: Tensor,
    student_b: Tensor | None,
    valid_BT: Tensor,
    numbers: Tensor,
    norms: Tensor,
    spans: Tensor,
    causal: bool,
    scale_teacher: float,
    scale_student: float,
    cosine: bool,
    heads: int,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of student_a and of student_b, the latter empty where that is None."""
    grad_a, grad_b = _fake_rows_backward(grad_kl, teacher_a, teacher_b, student_a, student_b)
    if student_a.numel() == 0:
        return grad_a, grad_b
    valid, grad_kl = valid_BT.contiguous().view(torch.uint8), grad_kl.contiguous()
    settings = causal, scale_teacher, scale_student, cosine, heads, floor
    if student_b is None:
        launches = [("both", (teacher_a, teacher_a, student_a, student_a), grad_a)]
    else:
        launches = [
            ("row", (teacher_a, teacher_b, student_a, student_b), grad_a),
            ("key", (teacher_b, teacher_a, student_b, student_a), grad_b),
        ]
    with torch.cuda.device_of(grad_kl):
        for role, sides, grad_x in launches:
            grid, arguments = _call(
                role,
                _tile_family(grad_kl.device),
                sides,
                valid,
                spans,
                norms,
                numbers,
                settings,
                grad_kl=grad_kl,
                grad_x=grad_x,
            )
            relation_backward[grid](**arguments)
    return grad_a, grad_b


@_rows_backward.register_fake
def _fake_rows_backward(grad_kl, teacher_a, teacher_b, student_a, student_b, *_):
    return torch.empty_like(student_a), student_a.new_empty(0) if student_b is None else torch.empty_like(student_b)


def _save(ctx, inputs, output):
    *tensors, causal, scale_teacher, scale_student, cosine, heads, floor = inputs
    ctx.settings = causal, scale_teacher, scale_student, cosine, heads, floor
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_kl, *_):
    grads = [None] * 11
    if grad_kl is not None:
        grad_a, grad_b = torch.ops.bitdistill.relation_kl_rows_backward(grad_kl, *ctx.saved_tensors, *ctx.settings)
        grads[2], grads[3] = grad_a, None if ctx.saved_tensors[3] is None else grad_b
    return tuple(grads)


_rows.register_autograd(_differentiate, setup_context=_save)
