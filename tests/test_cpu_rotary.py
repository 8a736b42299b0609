"""The rotary kernel against transformers, bit for bit; and models that run on it."""

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

import ranks
from bitdistill.kernels.cpu import rows
from bitdistill.kernels.cpu.rotary import rotary
from bitdistill.student.rotary import fuse_rotary, unfuse_rotary


def queries_and_keys(B, H, G, T, D, seed=0):
    """q, k as parts of one product's rows, cos, sin, and gradients."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(B, T, (H + G) * D + 3, generator=generator)
    q, k = (part.view(B, T, -1, D).transpose(1, 2) for part in rows[..., 3:].split([H * D, G * D], dim=-1))
    angles = torch.randn(B, T, D, generator=generator) * 9
    dq, dk = torch.randn(B, H, T, D, generator=generator), torch.randn(B, T, G, D, generator=generator).transpose(1, 2)
    return q, k, angles.cos(), angles.sin(), dq, dk


def with_gradients(function, q, k, cos, sin, dq, dk):
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    outputs = function(q, k, cos, sin)
    return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, (q, k), (dq, dk))


@pytest.mark.parametrize("shape", [(2, 3, 1, 5, 64), (1, 1, 1, 1, 2), (3, 2, 2, 70, 34), (2, 4, 2, 9, 96)])
@pytest.mark.parametrize("threads", [1, 3])
def test_bit_for_bit_transformers(shape, threads, monkeypatch):
    monkeypatch.setattr(rows, "LEAST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensors = queries_and_keys(*shape)
    expected = with_gradients(modeling_llama.apply_rotary_pos_emb, *tensors)
    found = with_gradients(rotary, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one_for_all = [x[:1] for x in tensors[2:4]]  # cos and sin of all sequences are the same
    expected = modeling_llama.apply_rotary_pos_emb(*tensors[:2], *one_for_all)
    assert all(torch.equal(a, b) for a, b in zip(rotary(*tensors[:2], *one_for_all), expected, strict=True))


def test_queries_and_keys_of_bf16_products_have_the_same_bits():
    """Under autocast q and k are bf16, cos and sin float32, and so is the result."""
    q, k, cos, sin, _, _ = queries_and_keys(2, 3, 1, 5, 64)
    tensors = q.bfloat16(), k.bfloat16(), cos, sin
    expected = modeling_qwen3.apply_rotary_pos_emb(*tensors)
    model, served = ranks.tiny_model(), []
    assert fuse_rotary(model)
    ours = modeling_qwen3.apply_rotary_pos_emb
    found = ours.func(lambda *_: served.append(False), *tensors)  # in place of transformers' function
    unfuse_rotary(model)
    assert not served
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_columns_that_are_not_neighbors():
    q, k, cos, sin, dq, dk = queries_and_keys(2, 2, 1, 4, 16)
    q, dk = q.transpose(2, 3).contiguous().transpose(2, 3), dk[..., :1].expand(dk.shape)
    expected = with_gradients(modeling_llama.apply_rotary_pos_emb, q, k, cos, sin, dq, dk)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(rotary, q, k, cos, sin, dq, dk), expected, strict=True))


def test_a_model_trains_on_it_with_the_same_bits_and_is_as_it_was_afterwards():
    model = ranks.tiny_model()
    tokens = torch.arange(24).reshape(2, 12)
    original = modeling_qwen3.apply_rotary_pos_emb

    def loss_and_gradient():
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    expected = loss_and_gradient()
    for _ in range(2):  # once is enough
        assert fuse_rotary(model)
    assert modeling_qwen3.apply_rotary_pos_emb is not original
    loss, gradients = loss_and_gradient()
    half = model.bfloat16()(input_ids=tokens).logits  # as transformers wrote it
    unfuse_rotary(model)
    assert modeling_qwen3.apply_rotary_pos_emb is original
    assert torch.equal(loss, expected[0])
    torch.testing.assert_close(gradients, expected[1], rtol=1e-5, atol=1e-7)  # attention's own depend on strides
    assert torch.equal(model(input_ids=tokens).logits, half)
    assert not fuse_rotary(torch.nn.Linear(2, 2))
