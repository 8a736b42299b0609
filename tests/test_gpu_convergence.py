"""Fifty steps of training on the kernels and on the reference: the same loss curve."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

pytest.importorskip("triton")

from bitdistill.kernels.gpu import bit_linear, matmul
from bitdistill.student import layers, sharing
from bitdistill.student.layers import use_backward
from bitdistill.student.refine import refine
from bitdistill.student.sharing import WeightCodes

STEPS = 50


def train(kernels, backward, steps, device, monkeypatch):
    """The loss of every step of a small student that learns a fixed text."""
    if device == "cpu":  # the interpreter takes its time by the instruction, not by the value: few large tiles
        monkeypatch.setattr(matmul, "FP32_TILES", (matmul.Tile(128, 128, 128, 4, 1),))
    for module in (layers, sharing):
        monkeypatch.setattr(module, "kernels_for", lambda device: kernels)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=32, tie_word_embeddings=True, initializer_range=0.1, **sizes, **heads)
    student = Qwen3ForCausalLM(config).to(device)
    refine(student)
    use_backward(student, backward)
    tokens = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(1)).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    codes, history = WeightCodes(student), []
    for step in range(steps):
        with codes.hold(step=step):
            loss = student(input_ids=tokens, labels=tokens).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return torch.tensor(history)


def test_the_loss_curves_are_one(device, monkeypatch):
    """fp32. Exact gradients differ in the order of sums only, which may flip a code now and then: within 1e-3 of the loss at
    every step (seen: 2e-7). Fast gradients carry int8 noise: within 10 % at every step (seen: 7 %)."""
    reference = train(None, "exact", STEPS, device, monkeypatch)
    assert reference[-1] < 0.5 * reference[0], "then it learns too little to compare"
    exact = train(bit_linear, "exact", STEPS, device, monkeypatch)
    assert ((exact - reference).abs() <= 1e-3 * reference).all()
    fast = train(bit_linear, "fast", STEPS // 2, device, monkeypatch)
    assert ((fast - reference[: STEPS // 2]).abs() <= 0.1 * reference[: STEPS // 2]).all()
