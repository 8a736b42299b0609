"""The fused relation KL against float64 written from the formulas, and against the eager form; on a GPU where there is one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from bitdistill.kernels.gpu import relation_kl
from bitdistill.kernels.gpu.relation_kl import relation_kl_rows, unsupported
from bitdistill.training import relations
from bitdistill.training.relations import relation_loss
from gpu_launches.relation_kl import production_launches

torch.set_num_threads(1)

MASKS = {  # of 33 tokens
    "whole": torch.ones(2, 33, dtype=torch.bool),
    "left": torch.arange(33)[None] >= torch.tensor([[20], [3]]),
    "right": torch.arange(33)[None] < torch.tensor([[9], [33]]),
    "holes": torch.arange(66).reshape(2, 33) % 3 != 1,
    "nothing in one": torch.arange(33)[None] < torch.tensor([[0], [30]]),
}


def tensors(seed, B=2, heads=2, T=33, D=16, spread=1.0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, heads, T, D, generator=generator) * spread).to(device)


def a_student_of(teacher, seed, noise=0.1):
    return teacher + noise * tensors(seed, *teacher.shape, device=teacher.device)


def exact_rows(teacher, student, valid, *, causal, scales, cosine=False, split_heads=None, floor=0.0):
    """From the formulas, in float64. teacher, student: (a, b)."""
    logits = []
    for (a, b), scale in zip((teacher, student), scales, strict=True):
        a, b = (x.double().masked_fill(~valid[:, None, :, None], 0) for x in (a, b))
        if split_heads:
            a, b = (
                x.transpose(1, 2).reshape(*valid.shape, split_heads, -1).transpose(1, 2).contiguous() for x in (a, b)
            )
        if cosine:
            a, b = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (a, b))
        logits.append(scale * a @ b.repeat_interleave(a.shape[1] // b.shape[1], dim=1).mT)
    T = valid.shape[1]
    allowed = (valid[:, None, :] & (torch.ones(T, T, device=valid.device).tril() > 0)) if causal else valid[:, None, :]
    allowed = (allowed | ~valid[:, :, None])[:, None]
    log_p, log_q = (x.masked_fill(~allowed, -math.inf).log_softmax(-1) for x in logits)
    if floor:
        log_p, log_q = (x.exp().clamp_min(floor).log() for x in (log_p, log_q))
    difference = torch.where(allowed, log_p - log_q, 0.0)
    return torch.where(valid[:, None], (log_p.exp() * difference).sum(-1), 0.0)


def eager_rows(teacher, student, valid, *, causal, scales, cosine=False, split_heads=None, floor=0.0):
    """What relations.py does without the kernel, in fp32, with any two scales."""
    logits = []
    for (a, b), scale in zip((teacher, student), scales, strict=True):
        x = relations._relation_logits(a, b, valid, split_heads, cosine, 1.0)
        logits.append(x * scale if cosine else x * scale * math.sqrt(a.shape[1] * a.shape[3] // x.shape[1]))
    return relations.row_kl(logits[0].detach(), logits[1], relations._allowed(valid, causal), floor)


def run(rows, teacher, student, valid, weight, dtype=None, **options):
    """(values, gradients of the student's sides) under an arbitrary upstream gradient."""
    same = student[0] is student[1]
    leaves = [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in student[: 1 if same else 2]]
    values = rows(teacher, (leaves[0], leaves[-1]), valid, **options)
    return values.detach(), torch.autograd.grad((values * weight).sum(), leaves)


def fused_rows(teacher, student, valid, *, scales, **options):
    b = (None, None) if student[0] is student[1] else (teacher[1], student[1])
    scales = dict(zip(("scale_teacher", "scale_student"), scales, strict=True))
    return relation_kl_rows(teacher[0], b[0], student[0], b[1], valid, **scales, **options)


def check(teacher, student, valid, largest_logit=0.0, **options):
    """Fused against float64: a row within 1e-4 of its KL or twice the worst of the eager fp32 form, gradients likewise.

    largest_logit: where logits are large, their own rounding is what the gradient is uncertain by: the backward pass
    sums the products again, in another order."""
    options = {"causal": False, **options}
    heads = options.get("split_heads") or student[0].shape[1]
    generator = torch.Generator().manual_seed(9)
    weight = torch.rand(len(valid), heads, valid.shape[1], generator=generator).to(valid.device)
    expected, expected_grads = run(exact_rows, teacher, student, valid, weight, torch.float64, **options)
    eager, eager_grads = run(eager_rows, teacher, student, valid, weight, torch.float32, **options)
    values, grads = run(fused_rows, teacher, student, valid, weight, **options)
    assert values.dtype == torch.float32
    assert values.shape == expected.shape
    error, allowed = (values - expected).abs(), (eager - expected).abs().max()
    assert (error <= 2 * allowed + 1e-4 * expected).all()
    assert (values[~valid[:, None].expand_as(values)] == 0).all()
    for grad, eager_grad, expected_grad, x in zip(grads, eager_grads, expected_grads, student, strict=False):
        assert grad.shape == x.shape
        assert grad.dtype == x.dtype
        error, allowed = (grad - expected_grad).norm(), (eager_grad - expected_grad).norm()
        # the interpreter truncates bf16 where it stores it; a GPU rounds it, and q - p before
        rounding = {torch.float32: 3e-6, torch.bfloat16: 2**-8}[x.dtype]
        rounding = rounding * expected_grad.norm() + 1e-6 * largest_logit * options["scales"][1] * x.norm()
        assert error <= 2 * allowed + rounding
        assert (grad.transpose(1, 2)[~valid] == 0).all()
    return values, expected


# ------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize(("mask", "causal"), zip(MASKS, [False, True, False, True, True], strict=True))
def test_symmetric_relations_under_masks(device, mask, causal):
    teacher, valid = tensors(0, device=device), MASKS[mask].to(device)
    student = a_student_of(teacher, 1)
    check((teacher, teacher), (student, student), valid, causal=causal, scales=(0.25, 0.25))


@pytest.mark.parametrize(("T", "cosine"), [(1, False), (2, True), (17, False), (65, True)])
def test_odd_lengths(device, T, cosine):
    teacher = tensors(0, T=T, device=device)
    student = a_student_of(teacher, 1)
    valid = torch.ones(2, T, dtype=torch.bool, device=device)
    values, _ = check((teacher, teacher), (student, student), valid, causal=True, cosine=cosine, scales=(0.7, 0.4))
    assert (values[:, :, 0] == 0).all()  # one key: probability 1 in both


@pytest.mark.parametrize(("heads", "kv_heads", "teacher_kv_heads"), [(2, 2, 2), (4, 2, 1), (3, 1, 3)])
def test_queries_and_grouped_keys(device, heads, kv_heads, teacher_kv_heads):
    teacher = (tensors(0, heads=heads, D=8, device=device), tensors(1, heads=teacher_kv_heads, D=8, device=device))
    student = (tensors(2, heads=heads, device=device), tensors(3, heads=kv_heads, device=device))
    check(teacher, student, MASKS["left" if kv_heads == 2 else "right"].to(device), causal=True, scales=(0.3, 0.25))


@pytest.mark.parametrize(("split_heads", "cosine"), [(1, True), (2, False), (4, True)])
def test_models_of_different_shape_regrouped(device, split_heads, cosine):
    teacher, student = tensors(0, heads=3, D=8, device=device), tensors(1, heads=2, D=6, device=device)
    options = {"scales": (0.2, 0.3), "cosine": cosine, "split_heads": split_heads}
    check((teacher, teacher), (student, student), MASKS["holes"].to(device), **options)


@pytest.mark.parametrize("width", [1, 5, 128, 256])
def test_head_widths(device, width):
    teacher = tensors(0, B=1, heads=1, T=40, D=width, device=device)
    student = a_student_of(teacher, 1)
    valid = torch.ones(1, 40, dtype=torch.bool, device=device)
    check((teacher, teacher), (student, student), valid, scales=(width**-0.5, width**-0.5))


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.1])
def test_row_error_of_small_divergences(device, noise):
    """The claim of the docstring: KLs of 1e-7 .. 1e-3 under a log Z of 5, each row within 1e-4."""
    teacher = tensors(0, B=1, T=150, heads=1, D=32, device=device)
    student = a_student_of(teacher, 1, noise)
    valid = torch.ones(1, 150, dtype=torch.bool, device=device)
    values, expected = check((teacher, teacher), (student, student), valid, cosine=True, scales=(1.0, 1.0))
    assert ((values - expected).abs() <= 1e-4 * expected).all()


@pytest.mark.parametrize("spread", [3.0, 20.0, 200.0])
@pytest.mark.parametrize("noise", [1e-4, 1.0, 300.0])
def test_logits_far_apart(device, spread, noise):
    """One-hot rows, and a student that puts its weight where the teacher has none: no overflow, no loss of the small."""
    teacher = tensors(0, B=1, heads=1, T=65, spread=spread, device=device)
    student = a_student_of(teacher, 1, noise)
    valid = torch.ones(1, 65, dtype=torch.bool, device=device)
    largest = max(x.square().sum(-1).max().item() for x in (teacher, student))
    values, _ = check((teacher, teacher), (student, student), valid, largest, scales=(1.0, 1.0))
    assert values.isfinite().all()


def test_gradient_of_rows_that_are_one_hot(device):
    """Tokens that relate to themselves by all but 1e-9: the gradient is made of what is left, and has its digits."""
    teacher = tensors(0, B=1, heads=1, T=100, D=32, spread=5.0, device=device)
    student = a_student_of(teacher, 1)
    valid = torch.ones(1, 100, dtype=torch.bool, device=device)
    values, _ = check((teacher, teacher), (student, student), valid, scales=(32**-0.5, 32**-0.5))
    assert values.median() < 1e-12


def test_opposite_tiles(device, monkeypatch):
    """The teacher's weight is in the first tile of keys, the student's in the last, each out of the other's sight."""
    monkeypatch.setattr(relation_kl, "_tile", lambda *_: (32, 16, 4))
    growth = torch.linspace(1, 20, 33, device=device)[None, None, :, None]
    teacher = tensors(0, B=1, heads=1, device=device) * growth.flip(2)
    student = tensors(1, B=1, heads=1, device=device) * growth
    keys = tensors(2, B=1, heads=1, device=device) * growth.flip(2), tensors(3, B=1, heads=1, device=device) * growth
    valid = torch.ones(1, 33, dtype=torch.bool, device=device)
    check((teacher, keys[0]), (student, keys[1]), valid, 2e4, scales=(3.0, 3.0))
    check((teacher, teacher), (student, student), valid, 2e4, scales=(3.0, 3.0))


@pytest.mark.parametrize(("scale", "causal"), [(1.0, False), (12.0, False), (12.0, True), (30.0, True)])
def test_floor(device, scale, causal):
    """12: some probabilities are below the floor in one model only. 30: most in both."""
    teacher = tensors(0, D=5, device=device)
    student = a_student_of(teacher, 1, 0.5)
    options = {"cosine": True, "causal": causal, "scales": (scale, scale)}
    values, _ = check((teacher, teacher), (student, student), MASKS["holes"].to(device), floor=1e-8, **options)
    plain = fused_rows((teacher, teacher), (student, student), MASKS["holes"].to(device), floor=0.0, **options)
    assert torch.equal(values, plain) == (scale == 1.0)


def test_a_floor_out_of_reach_costs_nothing(device):
    numbers = []
    for scale in (1.0, 30.0):
        x = tensors(0, device=device).requires_grad_()
        rows = relation_kl_rows(
            x.detach(),
            None,
            x,
            None,
            MASKS["left"].to(device),
            causal=False,
            scale_teacher=scale,
            scale_student=scale,
            cosine=True,
            floor=1e-8,
        )
        numbers.append([saved.shape for saved in rows.grad_fn.saved_tensors if saved is not None][3])
    assert numbers == [(3, 2, 2, 33), (4, 2, 2, 33)]


@pytest.mark.parametrize("options", [{}, {"cosine": True, "floor": 1e-8}])
def test_equal_models_are_at_zero_exactly(device, options):
    teacher = tensors(0, spread=3.0, device=device)
    student = teacher.clone().requires_grad_()
    options = {"causal": True, "scales": (1.0, 1.0), **options}
    values = fused_rows((teacher, teacher), (student, student), MASKS["holes"].to(device), **options)
    assert (values == 0).all()
    assert (torch.autograd.grad(values.sum(), student)[0] == 0).all()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_bf16_inputs(device, mixed, cosine):
    """Products of bf16 are exact: the rows are as good as those of the same values in fp32."""
    teacher = tensors(0, heads=1, D=32, device=device).bfloat16()
    student = a_student_of(teacher.float(), 1).to(torch.float32 if mixed else torch.bfloat16)
    check((teacher, teacher), (student, student), MASKS["left"].to(device), cosine=cosine, scales=(0.5, 0.5))
    keys = [tensors(seed, heads=1, D=32, device=device).to(x.dtype) for seed, x in ((3, teacher), (4, student))]
    if not cosine:
        check((teacher, keys[0]), (student, keys[1]), MASKS["left"].to(device), causal=True, scales=(0.5, 0.5))


@pytest.mark.parametrize("cosine", [False, True])
def test_what_padding_holds_does_not_matter(device, cosine):
    teacher, valid = tensors(0, device=device), MASKS["left"].to(device)
    student = a_student_of(teacher, 1)
    padded = ~valid[:, None, :, None]
    options = {"causal": False, "scales": (0.5, 0.5), "cosine": cosine}
    weight = torch.ones(2, 2, 33, device=device)
    clean = run(fused_rows, (teacher, teacher), (student, student), valid, weight, **options)
    teacher, student = teacher.masked_fill(padded, math.nan), student.masked_fill(padded, math.inf)
    weight = weight.masked_fill(padded[..., 0], math.inf)
    leaf = student.clone().requires_grad_()
    values = fused_rows((teacher, teacher), (leaf, leaf), valid, **options)
    (grad,) = torch.autograd.grad(values, leaf, weight)
    assert torch.equal(values, clean[0])
    assert torch.equal(grad, clean[1][0])


@pytest.mark.parametrize("cosine", [False, True])
def test_more_padding_changes_no_bit(device, cosine):
    teacher = tensors(0, B=1, heads=1, device=device)
    student = a_student_of(teacher, 1)
    valid = torch.ones(1, 33, dtype=torch.bool, device=device)
    options = {"causal": True, "scales": (0.5, 0.5), "cosine": cosine}
    weight = torch.ones(1, 1, 97, device=device)
    short, (short_grad,) = run(
        fused_rows, (teacher, teacher), (student, student), valid, weight[..., :33].contiguous(), **options
    )
    teacher, student = (torch.nn.functional.pad(x, (0, 0, 0, 64), value=7.0) for x in (teacher, student))
    valid = torch.nn.functional.pad(valid, (0, 64))
    long, (long_grad,) = run(fused_rows, (teacher, teacher), (student, student), valid, weight, **options)
    assert torch.equal(long[..., :33], short)
    assert torch.equal(long_grad[:, :, :33], short_grad)


def test_zero_vectors_and_extreme_norms(device):
    """A cosine of a zero vector is 0; norms from 1e-10 to 1e15 go in, unit vectors come out."""
    teacher = tensors(0, B=1, heads=1, device=device)
    student = a_student_of(teacher, 1)
    sizes = 10.0 ** torch.linspace(-10, 15, 33, device=device)[None, None, :, None]
    valid = MASKS["whole"][:1].to(device)
    options = {"causal": False, "cosine": True, "scales": (1.0, 1.0)}
    values = fused_rows((teacher * sizes, teacher * sizes), (student, student), valid, **options)
    same = fused_rows((teacher, teacher), (student, student), valid, **options)
    torch.testing.assert_close(values, same, rtol=1e-4, atol=1e-9)
    teacher[:, :, 5] = 0
    student[:, :, 6] = 0
    check((teacher, teacher), (student, student), valid, cosine=True, scales=(1.0, 1.0))


@pytest.mark.parametrize("layout", ["tokens first", "slice", "strided channels", "expanded"])
def test_any_strides(device, layout):
    teacher = tensors(0, B=1, device=device)
    student = a_student_of(teacher, 1)
    scattered = {
        "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "slice": lambda x: torch.stack([x, x + 1], 3)[..., 0, :],
        "strided channels": lambda x: x.mT.contiguous().mT,
        "expanded": lambda x: x[:, :1].expand(-1, 2, -1, -1),
    }[layout]
    valid, options = MASKS["holes"][:1].to(device), {"causal": False, "scales": (0.5, 0.5), "split_heads": 1}
    weight = torch.rand(1, 1, 33, generator=torch.Generator().manual_seed(2)).to(device)
    whole = [scattered(x).contiguous() for x in (teacher, student)]
    expected, (expected_grad,) = run(fused_rows, (whole[0],) * 2, (whole[1],) * 2, valid, weight, **options)
    leaf = student.clone().requires_grad_()
    x = scattered(leaf)
    values = fused_rows((scattered(teacher),) * 2, (x, x), valid, **options)
    assert torch.equal(values, expected)
    (grad,) = torch.autograd.grad((values * weight).sum(), x)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("shape", [(0, 2, 7, 16), (2, 2, 0, 16)])
def test_empty_batches(device, shape):
    x = torch.randn(shape, device=device)
    student = x.clone().requires_grad_()
    valid = torch.ones(shape[0], shape[2], dtype=torch.bool, device=device)
    values = fused_rows((x, x), (student, student), valid, causal=False, scales=(1.0, 1.0))
    assert values.shape == (shape[0], 2, shape[2])
    values.sum().backward()
    assert student.grad.shape == shape


@pytest.mark.parametrize("keys", [None, 1])
def test_every_output_is_written(device, monkeypatch, keys):
    """Memory comes with what others left in it."""
    teacher, student = tensors(0, device=device), tensors(1, device=device)
    sides = [(x, x if keys is None else tensors(2, heads=keys, device=device)) for x in (teacher, student)]
    options = {"causal": True, "scales": (30.0, 30.0), **({"cosine": True, "floor": 1e-8} if keys is None else {})}
    valid, weight = MASKS["nothing in one"].to(device), torch.ones(2, 2, 33, device=device)
    clean = run(fused_rows, *sides, valid, weight, **options)

    def poisoned(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(math.nan if x.is_floating_point() else 77)

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    dirty = run(fused_rows, *sides, valid, weight, **options)
    assert torch.equal(clean[0], dirty[0])
    assert all(torch.equal(a, b) for a, b in zip(clean[1], dirty[1], strict=True))


def test_nothing_of_the_size_of_a_relation_is_kept(device):
    """B H T numbers, four or five times over, beside the inputs."""
    B, H, T, D = 1, 2, 150, 8
    saved = []
    student = tensors(1, B, H, T, D, device=device).requires_grad_()
    teacher = tensors(0, B, H, T, D, device=device)
    valid = torch.ones(B, T, dtype=torch.bool, device=device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fused_rows((teacher, teacher), (student, student), valid, causal=False, cosine=True, scales=(1.0, 1.0))
    inputs = {teacher.data_ptr(), student.data_ptr(), valid.data_ptr()}
    ours = [x for x in saved if x.data_ptr() not in inputs]
    assert sum(x.numel() for x in ours) <= 5 * B * H * T + 2 * B
    assert max(x.numel() for x in saved) < H * T * T / 10


def test_the_same_bits_every_time(device):
    teacher, student = tensors(0, device=device), tensors(1, device=device)
    weight = torch.ones(2, 2, 33, device=device)
    runs = [
        run(
            fused_rows,
            (teacher,) * 2,
            (student,) * 2,
            MASKS["left"].to(device),
            weight,
            causal=False,
            scales=(1.0, 1.0),
        )
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1][0], runs[1][1][0])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    group=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    T=st.integers(1, 50),
    D=st.integers(1, 40),
    causal=st.booleans(),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(B, group, kv_heads, T, D, causal, symmetric, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher, student = (tensors(seed + i, B, group * kv_heads, T, D, device=device) for i in (0, 1))
    keys = [tensors(seed + i, B, kv_heads, T, D, device=device) for i in (2, 3)]
    valid = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)).to(device) < 0.7
    sides = ((teacher, teacher), (student, student)) if symmetric else ((teacher, keys[0]), (student, keys[1]))
    check(*sides, valid, causal=causal, scales=(0.3, 0.4))


@pytest.mark.parametrize("keys", [False, True])
def test_torch_accepts_the_ops(device, keys):
    teacher, student = (tensors(i, heads=2, T=9, device=device) for i in (0, 1))
    b = [tensors(i, heads=1, T=9, device=device) for i in (2, 3)] if keys else [None, None]
    student.requires_grad_()
    if keys:
        b[1].requires_grad_()
    valid = torch.ones(2, 9, dtype=torch.bool, device=device)
    arguments = (teacher, b[0], student, b[1], valid, True, 1.0, 0.5, False, 2, 0.0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.bitdistill.relation_kl_rows, arguments, test_utils=checks)


def test_teacher_and_second_derivative_get_nothing(device):
    teacher, student = (tensors(i, device=device).requires_grad_() for i in (0, 1))
    values = fused_rows((teacher,) * 2, (student,) * 2, MASKS["left"].to(device), causal=False, scales=(1.0, 1.0))
    grads = torch.autograd.grad(values.sum(), [teacher, student], create_graph=True, allow_unused=True)
    assert grads[0] is None
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grads[1].sum(), student)


def test_what_is_not_supported_is_said():
    half, wide, fine = torch.empty(1, 2, 3, 8).half(), torch.empty(1, 2, 3, 512), torch.empty(1, 2, 3, 8)
    assert unsupported(fine, fine, None) == ""
    assert unsupported(half, fine, None) == "float16 inputs"
    assert unsupported(fine, wide, None) == "heads of 512 channels, more than 256"
    assert unsupported(fine, wide, 4) == ""
    valid = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="512 channels"):
        relation_kl_rows(wide, None, wide, None, valid, causal=False, scale_teacher=1.0, scale_student=1.0)


# ------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("cosine", [False, True])
def test_bytes_moved(moved_bytes, monkeypatch, cosine):
    """A block of rows reads itself and all keys of its head: (1 + T / ROWS) * T * D elements a head of a model, plus
    numbers of rows and masks. Backward the same, cosines read the student's own tokens once more."""
    B, H, T, D, ROWS, KEYS = 1, 2, 64, 32, 16, 32
    monkeypatch.setattr(relation_kl, "_tile", lambda *_: (ROWS, KEYS, 4))
    teacher, student = tensors(0, B, H, T, D), tensors(1, B, H, T, D).requires_grad_()
    valid = torch.ones(B, T, dtype=torch.bool)
    blocks, side = T // ROWS, B * H * T * D * 4
    mask = B * H * blocks * (ROWS + T)  # a byte per token
    spans = B * H * blocks * 8
    with moved_bytes() as moved:
        values = fused_rows((teacher,) * 2, (student,) * 2, valid, causal=False, cosine=cosine, scales=(1.0, 1.0))
    vectors = 2 * 4 * B * H * blocks * (ROWS + T) if cosine else 0
    norms = 2 * (side + B * H * T) if cosine else 0
    assert moved.loaded == 2 * (1 + blocks) * side + mask + spans + vectors + norms + B * T
    assert moved.stored == (4 + (2 if cosine else 0)) * 4 * B * H * T + 8 * B
    with moved_bytes() as moved:
        values.sum().backward()
    numbers = 4 * 4 * B * H * blocks * (ROWS + T)
    again = side if cosine else 0
    assert moved.loaded == 2 * (1 + blocks) * side + mask + spans + vectors + numbers + again
    assert moved.stored == side


def test_padding_is_not_even_loaded(moved_bytes, monkeypatch):
    monkeypatch.setattr(relation_kl, "_tile", lambda *_: (16, 16, 4))
    x = tensors(0, B=1, heads=1, T=128, D=16)
    loaded = []
    for tokens in (32, 128):
        valid = torch.arange(128)[None] < tokens
        with moved_bytes() as moved:
            fused_rows((x, x), (x, x), valid, causal=False, scales=(1.0, 1.0))
        loaded.append(moved.loaded)
    assert loaded[0] < loaded[1] / 8


# ------------------------------------------------------------------------------------------- inside the loss


@pytest.fixture
def fused(monkeypatch):
    """relation_loss as on a GPU."""
    monkeypatch.setattr(relations, "_fused", lambda *_: True)


def qkv(seed, device, heads=2, kv_heads=1, D=8, T=33, dtype=torch.float32):
    return [
        tensors(seed + i, heads=h, D=D, T=T, device=device).to(dtype) for i, h in enumerate((heads, kv_heads, kv_heads))
    ]


@pytest.mark.parametrize(
    ("convention", "options", "mask"),
    [
        ("eq12", {}, "nothing in one"),
        ("eq12", {"split_heads": 1, "causal": True, "weights": (0.5, 0.0, 2.0)}, "left"),
        ("alg1", {}, None),
        ("alg1", {"split_heads": 2, "temperature": 0.05, "causal": True}, "nothing in one"),
        ("pr382", {"split_heads": 2, "num_layers": 3}, "left"),
        ("attention_maps", {"temperature": 2.0}, "nothing in one"),
        ("attention_maps", {}, None),
    ],
)
def test_the_loss_is_the_eager_loss(device, monkeypatch, convention, options, mask):
    teacher, valid = qkv(0, device), None if mask is None else MASKS[mask].to(device)
    results = []
    for is_fused in (False, True):
        monkeypatch.setattr(relations, "_fused", lambda *_, answer=is_fused: answer)
        student = [x.clone().requires_grad_() for x in qkv(3, device)]
        loss = relation_loss(teacher, student, valid, convention=convention, num_items=50.0, **options)
        results.append((loss, torch.autograd.grad(loss, student, allow_unused=True, materialize_grads=True)))
    (expected, expected_grads), (loss, grads) = results
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()


@pytest.mark.parametrize("convention", relations.RELATION_CONVENTIONS)
def test_the_loss_without_tokens_and_of_equal_models(device, fused, convention):
    split_heads = None if convention == "attention_maps" else 1
    teacher = qkv(0, device, T=20, dtype=torch.bfloat16)
    student = [x.clone().requires_grad_() for x in teacher]
    for mask in (MASKS["left"][:, :20].to(device), torch.zeros(2, 20, device=device)):
        loss = relation_loss(teacher, student, mask, convention=convention, split_heads=split_heads)
        assert loss.item() == 0
        grads = torch.autograd.grad(loss, student, allow_unused=True, materialize_grads=True)
        assert all((grad == 0).all() for grad in grads)


def test_cpu_tensors_take_the_eager_form():
    x = tensors(0)
    assert not relations._fused(x, x, None)


def test_every_part_compiles_what_it_launches():
    """The launches that are compiled ahead of time are made by the code that launches, for every part."""
    launches = production_launches()
    assert {part for launch in launches for part in launch.only} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for launch in launches:
        assert set(launch.signature) | set(launch.constexprs) == set(launch.kernel.arg_names)
