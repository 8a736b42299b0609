"""Our CPU kernels inside models of transformers: students as they were trained, and exports as transformers loads them."""

import pytest
import torch
from test_gguf_file import byte_level
from test_weight_scales import wide_student
from torch import nn
from transformers import AutoModelForCausalLM

import bitdistill
import tiny_students
from bitdistill.errors import UserError
from bitdistill.export.hugging_face import write_hugging_face
from bitdistill.kernels.reference import bit_linear, quantize_weight, quantize_weight_groups, spread_scales
from bitdistill.student import layers, sharing
from bitdistill.student.layers import bit_linears
from bitdistill.student.packed_linear import PackedLinear, Ternary, accelerate, ternary_of


@pytest.mark.parametrize("columns", [None, 200, 128, 64])
@pytest.mark.parametrize("act_scale", ["token", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_is_the_reference_bit_for_bit(columns, act_scale, dtype):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(37, 200), torch.randn(37), torch.randn(3, 5, 200, dtype=dtype)
    codes, scale = quantize_weight(weight) if columns is None else quantize_weight_groups(weight, columns)
    module = PackedLinear(Ternary(codes, scale, columns), bias, act_scale)
    expected = bit_linear(x, weight, bias, (codes, scale), columns, act_scale)
    assert torch.equal(module(x), expected)
    assert torch.equal(module(x[0, 0]), expected[0, 0])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        big = torch.randn(64, 200)
        assert torch.equal(module(big), bit_linear(big, weight, bias, (codes, scale), columns, act_scale))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("columns", [None, 512, 256, 64])
def test_ternary_matrices_are_recognized(columns):
    weight = torch.randn(24, 512)
    codes, scale = quantize_weight(weight) if columns is None else quantize_weight_groups(weight, columns)
    found = ternary_of(codes * spread_scales(scale, 512, columns))
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.scale, scale)
    assert found.columns == columns
    assert ternary_of(weight) is None
    assert ternary_of(torch.zeros(3, 64)).scale == 0


@pytest.mark.parametrize("family", ["llama_biases", "qwen2", "qwen3", "gemma3"])
def test_a_student_computes_what_it_computed(family, monkeypatch):
    """In plain PyTorch: the kernels of training may add the groups in another order."""
    model, ids = wide_student("group", family=family), torch.tensor([tiny_students.prompt(20)])
    with torch.no_grad(), monkeypatch.context() as patch:
        for module in (layers, sharing):
            patch.setattr(module, "kernels_for", lambda device: None)
        expected = model(ids).logits
    inside = {name: layer for name, layer in bit_linears(model).items() if layer.subln is not None}
    assert bitdistill.accelerate(model) == 21
    assert inside
    assert torch.equal(model(ids).logits, expected)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 20


@pytest.mark.parametrize("name", ["llama_biases", "qwen3"])
def test_an_export_that_transformers_loaded(name, tmp_path):
    """Every projection then computes what the student's does on the same input, bit for bit."""
    model = tiny_students.student(name, norms="none")
    write_hugging_face(tmp_path / "folder", model, byte_level(), "transformers")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    assert accelerate(loaded) == 21
    for path, layer in bit_linears(model).items():
        packed, x = loaded.get_submodule(path), torch.randn(4, layer.in_features)
        expected = bit_linear(x, layer.weight, None if layer.bias is None else packed.bias[: layer.out_features])
        assert torch.equal(packed(x), expected.detach())
    assert loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).shape[1] > 3


def test_refusals():
    with pytest.raises(UserError, match=r"model: expected ternary projections.*q_proj, which has more values"):
        accelerate(tiny_students.model("llama"))
    with pytest.raises(UserError, match="model: expected a causal language model on a CPU"):
        accelerate(nn.Linear(3, 3))
