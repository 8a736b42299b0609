"""The gradient of a tied embedding: the head's table with the lookup's rows, as autograd adds two tables."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitdistill.student.lookup import fuse_lookup, unfuse_lookup

SIZES = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.tensor([[5, 7, 5, 0, 96], [7, 7, 1, 0, 0]])


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **({"tie_word_embeddings": True} | settings)))


def gradient(model, backward_passes=1, loss=lambda output: output.loss):
    model.zero_grad()
    for _ in range(backward_passes):
        loss(model(input_ids=IDS, labels=IDS, output_hidden_states=True)).backward()
    return model.get_input_embeddings().weight.grad.clone()


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("passes", [1, 2])
def test_the_gradient_is_that_of_two_tables(padding, passes):
    model = llama(pad_token_id=padding)
    expected = gradient(model, passes)
    assert fuse_lookup(model)
    assert model.get_input_embeddings()(IDS).equal(nn.functional.embedding(IDS, model.get_input_embeddings().weight))
    torch.testing.assert_close(gradient(model, passes), expected, rtol=1e-5, atol=1e-7)
    unfuse_lookup(model)
    assert gradient(model, passes).equal(expected)


def test_hand_example():
    """Two tokens, the first one twice: its row of the lookup's gradient is the sum of two."""
    model = llama()
    embedding = model.get_input_embeddings()
    assert fuse_lookup(model)
    rows = embedding(torch.tensor([[3, 3, 4]]))
    (rows * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    found = embedding.weight.grad
    assert found[3].equal(torch.full((16,), 11.0))
    assert found[4].equal(torch.full((16,), 100.0))
    assert not found[5:].any()
    assert not found[:3].any()


def test_a_loss_that_does_not_reach_the_head_has_the_lookups_gradient_alone():
    model, of_states = llama(), lambda output: output.hidden_states[-1].square().sum()
    expected = gradient(model, loss=of_states)
    assert fuse_lookup(model)
    torch.testing.assert_close(gradient(model, loss=of_states), expected, rtol=1e-5, atol=1e-7)


def test_hooks_of_the_weight_see_the_whole_gradient():
    model, seen = llama(), []
    assert fuse_lookup(model)
    model.get_input_embeddings().weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    assert gradient(model).equal(seen[0])


def test_what_is_left_to_autograd():
    """Two tables, frozen ones, and an embedding that scales what it reads."""
    assert not fuse_lookup(llama(tie_word_embeddings=False))
    frozen = llama()
    frozen.get_input_embeddings().weight.requires_grad_(False)
    assert not fuse_lookup(frozen)
    model = llama()
    model.set_input_embeddings(type("Scaled", (nn.Embedding,), {})(97, 16))
    model.tie_weights()
    assert not fuse_lookup(model)
    unfuse_lookup(model)  # nothing to undo
