"""RMSNorm's kernel against float64, beside transformers' own; and the norms of a model that run on it."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import ranks
from bitdistill.distributed.teacher import Teacher
from bitdistill.kernels.cpu.rms_norm import rms_norm
from bitdistill.student import norms
from bitdistill.training.teachers import LiveTeacher


def gradients(function, x, gain, dy):
    """y, dx, dgain."""
    x, gain = (tensor.detach().clone().requires_grad_() for tensor in (x, gain))
    y = function(x, gain)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, gain.grad


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 5, 17), (130, 64), (4, 33, 576), (2, 0, 8)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 300.0])
def test_against_float64_and_transformers(shape, scale):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) * scale for _ in range(2))
    gain = 1 + 0.3 * torch.randn(shape[-1], generator=generator)

    def exact(x, gain):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain

    def theirs(x, gain):
        norm = LlamaRMSNorm(shape[-1], 1e-5)
        norm.weight.data, x_hat = gain.detach(), x
        return torch.func.functional_call(norm, {"weight": gain}, (x_hat,))

    expected = gradients(exact, x.double(), gain.double(), dy.double())
    ours = gradients(lambda x, gain: rms_norm(x, gain, 1e-5), x, gain, dy)
    plain = gradients(theirs, x, gain, dy)
    for a, b, true in zip(ours, plain, expected, strict=True):
        assert a.shape == true.shape
        if true.numel():
            error, of_torch = ((one.double() - true).abs().max() for one in (a, b))
            assert error <= 2 * of_torch + 4e-7 * true.abs().max()


def test_views_and_read_only_inputs():
    x = torch.randn(6, 40)[:, 3:35].t()  # neither contiguous nor aligned
    gain = torch.ones(6)
    torch.testing.assert_close(rms_norm(x, gain, 1e-6), LlamaRMSNorm(6)(x), rtol=1e-6, atol=1e-6)
    frozen = torch.from_numpy(torch.randn(4, 8).numpy().copy())
    with torch.inference_mode():
        torch.testing.assert_close(rms_norm(frozen, torch.ones(8), 1e-6), LlamaRMSNorm(8)(frozen), rtol=1e-6, atol=1e-6)


def test_a_model_trains_on_it_and_is_as_it_was_afterwards(monkeypatch):
    model = ranks.tiny_model()
    tokens = torch.arange(24).reshape(2, 12)

    def loss_and_gradient():
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected, keys = loss_and_gradient(), list(model.state_dict())
    count = sum(isinstance(module, Qwen3RMSNorm) for module in model.modules())
    assert norms.fuse_norms(model) == count > 0
    called = []
    monkeypatch.setattr(type(model.model.norm), "forward", lambda *arguments: called.append(1))
    loss, found = loss_and_gradient()
    assert not called  # every one runs on the kernel
    monkeypatch.undo()
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(found, expected[1], rtol=1e-4, atol=1e-6)
    norms.unfuse_norms(model)
    assert all("forward" not in vars(module) for module in model.modules())
    torch.testing.assert_close(loss_and_gradient()[0], expected[0], rtol=0, atol=0)


def test_half_precision_runs_as_transformers_wrote_it():
    model = ranks.tiny_model().bfloat16()
    tokens = torch.arange(24).reshape(2, 12)
    expected = model(input_ids=tokens).logits
    norms.fuse_norms(model)
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_a_live_teacher_runs_on_it_too():
    model = ranks.tiny_model().requires_grad_(False)
    expected = model(input_ids=torch.arange(24).reshape(2, 12)).logits
    LiveTeacher(Teacher(model, model), [])
    served = [module for module in model.modules() if isinstance(module, Qwen3RMSNorm)]
    assert served
    assert all("forward" in vars(norm) for norm in served)
    torch.testing.assert_close(model(input_ids=torch.arange(24).reshape(2, 12)).logits, expected)
