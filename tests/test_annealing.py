"""Annealing into ternary: the schedule, what lies between full precision and ternary, and a stage that ends ternary."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerControl, TrainerState

import tiny_students
from bitdistill.command_line import parse_config
from bitdistill.errors import UserError
from bitdistill.kernels.reference import bit_linear, quantize_activation, quantize_weight, rms_norm
from bitdistill.student import layers, sharing
from bitdistill.student.annealed import (
    END_TEMPERATURE,
    START_TEMPERATURE,
    annealed_linear,
    soft_ternary,
    temperature_at,
)
from bitdistill.student.layers import BitLinear, GatedMLP, SubLN, bit_linears
from bitdistill.student.refine import save_student
from bitdistill.student.sharing import WeightCodes
from bitdistill.training.annealing import Annealing, annealing_at, set_annealing


def make_layer(subln=False, bias=False, I=24, O=16):
    torch.manual_seed(0)
    layer = BitLinear(nn.Linear(I, O, bias=bias), SubLN(I, 1e-6) if subln else None)
    return layer, torch.randn(3, 5, I)


def test_schedule():
    assert [annealing_at(step, 10, 0.2, 0.6) for step in (0, 2, 3, 4, 6, 9)] == pytest.approx([0, 0, 0.25, 0.5, 1, 1])
    assert [annealing_at(step, 10, 0.9, 0.9) for step in (0, 8, 9)] == [0, 0, 1]  # 90 % full precision, then a jump
    assert annealing_at(0, 10, 0.0, 0.0) == 1


@pytest.mark.parametrize("kind", ["linear", "softmax"])
@pytest.mark.parametrize("subln", [False, True])
def test_the_ends_are_full_precision_and_the_ordinary_layer(kind, subln):
    layer, x = make_layer(subln, bias=True)
    ordinary = layer(x)
    inside = x if not subln else rms_norm(x, layer.subln.weight, layer.subln.eps)
    layer.annealing, layer.annealing_kind = 0.0, kind
    assert torch.allclose(layer(x), F.linear(inside, layer.weight, layer.bias), rtol=1e-6, atol=1e-6)
    layer.annealing = 1.0
    assert torch.equal(layer(x), ordinary)
    expected = bit_linear(inside, layer.weight, layer.bias)  # a fused norm sums in another order
    assert torch.allclose(ordinary, expected, rtol=1e-5, atol=1e-6) if subln else torch.equal(ordinary, expected)


def test_linear_by_hand_and_its_gradient():
    """absmean 1, codes 1 0 -1 0; the token's peak 12.7 makes steps of 0.1."""
    weight = torch.tensor([[2.4, 0.4, -0.8, 0.4]], requires_grad=True)
    x = torch.tensor([[12.7, 1.04, 0.0, -3.02]], requires_grad=True)
    codes, scale = quantize_weight(weight)
    y = annealed_linear(x, weight, codes * scale, None, "linear", 0.25)
    mixed = torch.tensor([2.05, 0.3, -0.85, 0.3])
    inputs = torch.tensor([12.7, 1.03, 0.0, -3.015])
    assert y.item() == pytest.approx((mixed * inputs).sum().item(), rel=1e-6)
    y.sum().backward()
    assert torch.allclose(x.grad[0], mixed)
    assert torch.allclose(weight.grad[0], 0.75 * inputs)  # the quantized weight was given without its gradient


@pytest.mark.parametrize("annealing", [0.0, 0.3, 0.999])
def test_linear_gradient_is_straight_through(annealing):
    """As if neither quantizer were there: dW = dY^T x_l, dX = dY w_l."""
    layer, x = make_layer()
    layer.annealing = annealing
    x.requires_grad_()
    dy = torch.randn(3, 5, 16)
    layer(x).backward(dy)
    codes, scale = quantize_weight(layer.weight)
    mixed = layer.weight + annealing * (codes * scale - layer.weight)
    act_codes, act_scale = quantize_activation(x)
    inputs = x + annealing * (act_codes * act_scale - x)
    assert torch.allclose(x.grad, dy @ mixed, atol=1e-5)
    assert torch.allclose(layer.weight.grad, torch.einsum("bto,bti->oi", dy, inputs), atol=1e-5)


def test_soft_codes_by_hand():
    """w / s = 0.5 with s = 1, T = 0.5: weights e^-4.5, e^-0.5, e^-0.5."""
    weight = torch.tensor([[0.5, 1.5, -1.0, 1.0]])
    below, middle = math.exp(-4.5), math.exp(-0.5)
    assert soft_ternary(weight, 0.5)[0, 0].item() == pytest.approx((middle - below) / (below + 2 * middle), rel=1e-5)
    assert soft_ternary(weight, 0.5)[0, 2].item() == -soft_ternary(weight, 0.5)[0, 3].item()
    assert torch.equal(soft_ternary(torch.zeros(2, 3), 0.5), torch.zeros(2, 3))
    assert soft_ternary(1e6 * torch.eye(2), END_TEMPERATURE).isfinite().all()


def test_soft_codes_have_their_true_gradient():
    torch.manual_seed(0)
    weight = torch.randn(6, 9, requires_grad=True)
    with torch.no_grad():
        scale = quantize_weight(weight)[1]
    for temperature in (START_TEMPERATURE, 0.15):
        distances = torch.stack([-((weight / scale - k) ** 2) / temperature for k in (-1, 0, 1)])
        expected = scale * (torch.softmax(distances, 0) * torch.tensor([-1.0, 0, 1]).view(3, 1, 1)).sum(0)
        got, dy = soft_ternary(weight, temperature), torch.randn(6, 9)
        assert torch.allclose(got, expected, atol=1e-6)
        (want,) = torch.autograd.grad(expected, weight, dy)
        (have,) = torch.autograd.grad(got, weight, dy)
        assert torch.allclose(have, want, atol=1e-5)


def test_soft_codes_harden():
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    codes, scale = quantize_weight(weight)
    errors = [(soft_ternary(weight, temperature_at(a)) - codes * scale).abs().mean().item() for a in (0.2, 0.6, 0.9, 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]
    clear = ((weight / scale).abs() - 0.5).abs() > 0.2
    assert (soft_ternary(weight, END_TEMPERATURE) - codes * scale)[clear].abs().max() < 0.02 * scale


def test_the_start_temperature_costs_least():
    """Gaussian weights, in units of their absmean: START_TEMPERATURE has the least squared error, below that of codes."""
    torch.manual_seed(0)
    weight = torch.randn(512, 512)

    def error(temperature):
        return (soft_ternary(weight, temperature) - weight).square().mean().item()

    assert error(START_TEMPERATURE) < min(error(START_TEMPERATURE + d) for d in (-0.1, -0.05, 0.05, 0.1))
    codes, scale = quantize_weight(weight)
    assert error(START_TEMPERATURE) < (codes * scale - weight).square().mean().item()


def test_callback_is_a_function_of_the_step_and_ends_ternary():
    model = tiny_students.student("qwen3")
    callback = Annealing("linear", 0.25, 0.75)
    state = TrainerState(max_steps=8)
    for state.global_step, expected in ((2, 0.0), (3, 0.25), (7, 1.0), (5, 0.75)):  # in any order: resumed at any step
        callback.on_step_begin(None, state, TrainerControl(), model=model)
        assert callback.value == expected
        assert {layer.annealing for layer in bit_linears(model).values()} == {expected}
    with pytest.raises(AssertionError, match="saved when it is ternary"):
        save_student("nowhere", model)
    callback.on_train_end(None, state, TrainerControl(), model=model)
    assert {layer.annealing for layer in bit_linears(model).values()} == {1.0}
    with pytest.raises(AssertionError, match="refined model"):
        set_annealing(nn.Linear(2, 2), "linear", 0.5)


def test_neither_the_gate_nor_the_code_cache_of_the_kernels_is_used(monkeypatch):
    """Where there are kernels, a layer on its way does without them."""

    class NoKernels:
        def __getattr__(self, name):
            raise AssertionError(f"used {name} of the kernels")

    model = tiny_students.student("llama")
    mlp = next(module for module in model.modules() if isinstance(module, GatedMLP))
    x = torch.randn(2, 4, mlp.gate_proj.in_features)
    set_annealing(model, "linear", 0.5)
    expected = mlp(x)
    for module in (layers, sharing):
        monkeypatch.setattr(module, "kernels_for", lambda device: NoKernels())
    with WeightCodes(model).hold():
        assert torch.equal(mlp(x), expected)
        assert all(layer.held is None for layer in bit_linears(model).values())
    set_annealing(model, "linear", 1.0)
    with pytest.raises(AssertionError, match="of the kernels"):
        mlp(x)


def test_bf16_autocast():
    layer, x = make_layer(subln=True, bias=True)
    layer.annealing = 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), atol=0.05)


def test_settings_are_checked():
    arguments = [
        "--pretrain.annealing",
        "linear",
        "--pretrain.annealing_start",
        "0.9",
        "--pretrain.annealing_end",
        "0.9",
    ]
    assert parse_config(arguments)[0].pretrain.annealing_end == 0.9
    assert parse_config([])[0].pretrain.annealing == "none"
    with pytest.raises(UserError, match="annealing_start"):
        parse_config([*arguments, "--pretrain.annealing_end", "0.5"])
    with pytest.raises(UserError, match="annealing_end: expected a number"):
        parse_config([*arguments, "--pretrain.annealing_end", "1.0"])
    with pytest.raises(UserError, match="annealing"):
        parse_config(["--pretrain.annealing", "square"])
