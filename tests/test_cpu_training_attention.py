"""The attention kernel of training against attention written out in float64, and against PyTorch's; models that run on it."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import ranks
from bitdistill.kernels.cpu import rows
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.float_tiles import COLUMNS, ROWS, add_tile, multiply_tile
from bitdistill.kernels.cpu.training_attention import LARGEST, attention
from bitdistill.student import attention as fused
from bitdistill.student import backend
from bitdistill.student.attention import fuse_attention, unfuse_attention
from bitdistill.student.backend import choose_kernels


@jit
def _tile(more, left, left_row, left_step, right, right_step, count, out, out_row):
    if more:
        add_tile(left, left_row, left_step, right, right_step, count, out, out_row)
    else:
        multiply_tile(left, left_row, left_step, right, right_step, count, out, out_row)


@pytest.mark.parametrize("count", [0, 1, 37])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_tile_is_the_product_of_its_operands(count, transposed):
    draw = np.random.default_rng(0)
    whole = draw.integers(-8, 9, (ROWS, count + 3) if not transposed else (count + 3, ROWS)).astype(np.float32)
    left = whole[:, :count] if not transposed else whole[:count].T
    right, out = (draw.integers(-8, 9, (n, COLUMNS + 5)).astype(np.float32) for n in (count + 1, ROWS))
    whole.flags.writeable = right.flags.writeable = False
    before, product = out.copy(), left @ right[:count, :COLUMNS]
    at = whole.ctypes.data, *left.strides, right.ctypes.data, right.strides[0], count, out.ctypes.data, out.strides[0]
    _tile(True, *at)
    assert np.array_equal(out[:, :COLUMNS], before[:, :COLUMNS] + product)
    _tile(False, *at)
    assert np.array_equal(out[:, :COLUMNS], product)
    assert np.array_equal(out[:, COLUMNS:], before[:, COLUMNS:])


def operands(B, H, G, T, D, dtype=torch.float32, seed=0):
    """q, k, v and dO as a model has them: (B, T, heads, D) in memory, as parts of longer rows."""
    generator = torch.Generator().manual_seed(seed)
    rows_ = torch.randn(B, T, (2 * H + 2 * G) * D + 3, generator=generator)[..., 3:].to(dtype)
    parts = zip((H, G, G, H), rows_.split([H * D, G * D, G * D, H * D], dim=-1), strict=True)
    q, k, v, dout = (part.view(B, T, heads, D).transpose(1, 2) for heads, part in parts)
    return [x.detach().requires_grad_() for x in (q, k, v)], dout


def masks(B, T):
    """Padding on the left, a sliding window, two documents in a row, and rows that see nothing."""
    causal = torch.ones(B, 1, T, T, dtype=torch.bool).tril()
    padding = torch.arange(T) >= torch.arange(B)[:, None, None, None] % T
    documents = (torch.arange(T)[:, None] >= T // 2) == (torch.arange(T) >= T // 2)
    blind = torch.ones(T, 1, dtype=torch.bool)
    blind[T // 3 : T // 3 + 2] = False
    everything = torch.ones(B, 1, T, T, dtype=torch.bool)
    return {
        "causal": None,
        "padding": (causal & padding) | torch.eye(T, dtype=torch.bool),
        "window": causal.triu(-5)[:1],
        "documents": causal & documents,
        "blind": causal & blind,
        "everything": everything,
    }


def written_out(q, k, v, mask, scale):
    """In the dtype of the operands; a row that sees nothing is zero."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril() if mask is None else mask
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


def by_torch(q, k, v, mask, scale):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


def with_gradients(function, inputs, mask, scale, dout, dtype=None):
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*inputs, mask, scale)
    return out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def test_by_hand():
    """One head of width one: the first position sees itself, the second weighs both by e^0 and e^(0.5 * 2 * 3)."""
    q, k, v = (torch.tensor(x).view(1, 1, 2, 1) for x in ([5.0, 2.0], [0.0, 3.0], [10.0, 20.0]))
    weight = 1 / (1 + np.exp(-0.5 * 2 * 3))
    expected = torch.tensor([10.0, float(10 + 10 * weight)])
    torch.testing.assert_close(attention(q, k, v, None, 0.5).flatten(), expected)


@pytest.mark.parametrize(
    "shape", [(2, 4, 2, 37, 64), (1, 3, 3, 128, 32), (3, 6, 2, 5, 48), (2, 2, 1, 200, 20), (2, 1, 1, 7, 130)]
)
@pytest.mark.parametrize("mask", masks(1, 4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_at_most_twice_those_of_pytorch(shape, mask, dtype):
    inputs, dout = operands(*shape, dtype)
    work = masks(shape[0], shape[3])[mask], shape[4] ** -0.5, dout
    expected = with_gradients(written_out, inputs, *work, dtype=torch.float64)
    found, theirs = with_gradients(attention, inputs, *work), with_gradients(by_torch, inputs, *work)
    for ours, other, true in zip(found, theirs, expected, strict=True):
        assert ours.dtype == dtype
        assert error(ours, true) <= 2 * max(error(other, true), torch.finfo(dtype).eps / 8)


@pytest.mark.parametrize("T", [600, 1100])
def test_long_sums_are_as_exact(T):
    inputs, dout = operands(1, 2, 1, T, 16)
    expected = with_gradients(written_out, inputs, None, 0.25, dout, dtype=torch.float64)
    found, theirs = (with_gradients(function, inputs, None, 0.25, dout) for function in (attention, by_torch))
    for ours, other, true in zip(found, theirs, expected, strict=True):
        assert error(ours, true) <= 2 * error(other, true)


def test_rows_that_see_nothing_are_zero_and_have_no_gradient():
    inputs, dout = operands(1, 2, 1, 40, 16)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    mask[..., 33:, :] = False  # one block of rows, and a part of one
    out, dq, _, dv = with_gradients(attention, inputs, mask, 0.25, dout)
    assert not out[:, :, 33:].any()
    assert not dq[:, :, 33:].any()
    dout[:, :, 33:] = 7  # does not matter
    assert torch.equal(with_gradients(attention, inputs, mask, 0.25, dout)[3], dv)
    none = with_gradients(attention, inputs, mask & False, 0.25, dout)
    assert not any(x.any() for x in none)


def test_large_scores_and_numbers_that_are_none():
    inputs, dout = operands(1, 1, 1, 9, 16)
    huge = [1e3 * x.detach() for x in inputs[:2]] + inputs[2:]
    found, expected = (with_gradients(f, huge, None, 1.0, dout) for f in (attention, written_out))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        inputs[2][0, 0, 4, 3] = torch.nan
    out = attention(*inputs, None, 0.25)
    assert out[0, 0, 4:, 3].isnan().all()  # of who looks at it
    assert not out[..., :3].isnan().any()


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 8), (2, 2, 1, 0, 8)])
def test_empty(shape):
    inputs, dout = operands(*shape)
    found = with_gradients(attention, inputs, None, 0.25, dout)
    assert [x.shape for x in found] == [dout.shape, *(x.shape for x in inputs)]


def test_columns_that_are_not_neighbors_and_gradients_that_are_expanded():
    inputs, dout = operands(2, 2, 1, 9, 16)
    strided = [x.detach().transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]
    dout = dout[:, :1, :1, :1].expand(dout.shape)
    mask = masks(2, 9)["padding"]
    crossed = mask.transpose(2, 3).contiguous().transpose(2, 3)
    expected = with_gradients(attention, inputs, mask, 0.25, dout.contiguous())
    found = with_gradients(attention, strided, crossed, 0.25, dout)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(rows, "LEAST", 1)
    inputs, dout = operands(3, 4, 2, 70, 32)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(with_gradients(attention, inputs, masks(3, 70)["padding"], 0.25, dout))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The shapes that the kernel was called with."""
    from bitdistill.kernels.cpu import training_attention

    seen, original = [], training_attention.attention
    monkeypatch.setattr(
        training_attention, "attention", lambda q, *rest: (seen.append(tuple(q.shape)), original(q, *rest))[1]
    )
    yield seen
    unfuse_attention()


def loss_and_gradients(model, **batch):
    model.zero_grad()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def test_a_model_trains_on_it_and_is_as_it_was_afterwards(calls):
    model = ranks.tiny_model()
    model.set_attn_implementation("sdpa")
    tokens = torch.arange(24).reshape(2, 12)
    padded = torch.ones(2, 12, dtype=torch.long)
    padded[1, :4] = 0
    for batch in ({"input_ids": tokens}, {"input_ids": tokens, "attention_mask": padded}):
        expected = loss_and_gradients(model, **batch)
        assert not calls
        assert fuse_attention()
        found = loss_and_gradients(model, **batch)
        assert len(calls) == model.config.num_hidden_layers
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        unfuse_attention()
        calls.clear()
        assert torch.equal(loss_and_gradients(model, **batch)[0], expected[0])
    assert not calls
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward


def test_under_autocast_operands_are_of_its_dtype(calls):
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    (q, k, v), dout = operands(2, 4, 2, 6, 16)
    results = []
    for function in (fused._attention, sdpa_attention_forward):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(module, q, k, v.bfloat16(), None)[0]
        results.append([out, *torch.autograd.grad(out, (q, k, v), dout.transpose(1, 2).bfloat16())])
    assert len(calls) == 1
    assert [x.dtype for x in results[0]] == [x.dtype for x in results[1]] == [torch.bfloat16] + 3 * [torch.float32]
    torch.testing.assert_close(*results, rtol=0.05, atol=0.02)


def test_captured_layers_run_on_it(calls):
    from bitdistill.training.capture import AttentionCapture

    model, tokens = ranks.tiny_model(), torch.arange(24).reshape(2, 12)
    fuse_attention()
    with AttentionCapture(model, [-1]) as capture:
        model(input_ids=tokens)
    assert len(calls) == model.config.num_hidden_layers
    assert capture.qkv[-1][0].shape == calls[-1]


def test_what_the_kernel_does_not_know_runs_as_transformers_wrote_it(calls):
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    (q, k, v), _ = operands(2, 4, 2, 6, 16)
    plain = torch.randn(2, 1, 6, 6)
    few = [x[:, :, :1] for x in (q, k, v)]
    long = operands(1, 1, 1, LARGEST // 16 + 1, 16)[0]
    unknown = [
        ((q, k, v, plain), {}),
        ((q, k, v, None), {"is_causal": False}),
        ((few[0], k, v, None), {}),
        ((q, k, v, None), {"position_bias": plain}),
        ((q.half(), k.half(), v.half(), None), {}),
        ((q.double(), k.double(), v.double(), None), {}),
        ((q.detach().bfloat16(), k.detach().bfloat16(), v.detach().bfloat16(), None), {}),
        ((*long, None), {}),
    ]
    for arguments, named in unknown:
        groups = torch.nn.Module()
        groups.is_causal, groups.num_key_value_groups = True, arguments[0].shape[1] // arguments[1].shape[1]
        ours, theirs = (f(groups, *arguments, **named)[0] for f in (fused._attention, sdpa_attention_forward))
        assert torch.equal(ours, theirs)
    torch.manual_seed(0)
    dropped = fused._attention(module, q, k, v, None, dropout=0.5)[0]
    torch.manual_seed(0)
    assert torch.equal(dropped, sdpa_attention_forward(module, q, k, v, None, dropout=0.5)[0])
    assert not calls
    out = fused._attention(module, *few, None, scaling=0.3)[0]
    torch.testing.assert_close(out, sdpa_attention_forward(module, *few, None, scaling=0.3)[0])
    assert calls == [(2, 4, 1, 16)]


def test_it_is_left_alone_where_it_is_not_wanted_or_not_right(calls, monkeypatch):
    try:
        choose_kernels("reference")
        assert not fuse_attention()
        assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    finally:
        choose_kernels("auto")
    monkeypatch.setattr(backend._Chosen, "attention", False)
    assert not fuse_attention()
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
