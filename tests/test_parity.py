"""The proof of parity: that it holds, and that it fails on every other student and every other runtime."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitdistill.errors import UserError
from bitdistill.export import parity
from bitdistill.export.parity import prove_parity
from bitdistill.export.write import write_packed
from bitdistill.kernels.reference import quantize_weight
from bitdistill.runtime import compiled, plain
from bitdistill.runtime.cpu import Runtime
from bitdistill.student.layers import bit_linears
from bitdistill.student.refine import refine
from tiny_students import CONFIGS, prompt, student

DATA = Path(os.environ.get("BITDISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
PROMPTS = [prompt(20), prompt(1, seed=1), prompt(40, seed=2)]


@pytest.fixture
def qwen3(tmp_path):
    model = student("qwen3")
    path = tmp_path / "student.safetensors"
    write_packed(path, model)
    return path, model


def refused(field, call):
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.field == field, caught.value


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("norms", "packing", "embedding"),
    [("two", "base3", "fp16"), ("all", "2bit", "int8"), ("none", "base3", "int4"), ("two", "2bit", "ternary")],
)
def test_parity_holds(tmp_path, name, norms, packing, embedding):
    model = student(name, norms)
    model.train(embedding == "int4")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    write_packed(tmp_path / "s", model, packing=packing, embedding=embedding)
    proof = prove_parity(tmp_path / "s", model, PROMPTS)
    assert proof["linears"] == 21
    assert proof["tokens"] == 61
    assert proof["product_max_diff"] == 0
    assert proof["unrounded_max_diff"] < 1e-4
    assert proof["embedding_mean_kl"] > 0
    json.dumps(proof)
    # the model is as it was
    assert model.training == (embedding == "int4")
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all("forward" not in vars(layer) and not layer._forward_hooks for layer in bit_linears(model).values())


def _flip_code(model):
    weight = bit_linears(model)["model.layers.2.mlp.up_proj"].weight.data
    weight[4, 4] = -weight[4, 4] if quantize_weight(weight)[0][4, 4] else weight.abs().mean() * 2


def _double_weight(model):
    bit_linears(model)["model.layers.0.self_attn.k_proj"].weight.data *= 2


def _swap_rows(model):
    weight = model.model.embed_tokens.weight.data
    weight[[3, 4]] = weight[[4, 3]].clone()


def _shift_subln(model):
    bit_linears(model)["model.layers.2.mlp.down_proj"].subln.weight.data[5] += 0.05


def _shift_norm(model):
    model.model.layers[0].input_layernorm.weight.data *= 1.001


def _shift_bias(model):
    bit_linears(model)["model.layers.1.self_attn.v_proj"].bias.data[0] += 0.02


def _other_rope(model):
    model.model.rotary_emb.inv_freq *= 1.01


def _other_window(model):
    model.config.sliding_window = 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip_code, "1 of 6272 weight codes differ"),
        (_double_weight, "weight_scale differs"),
        (_swap_rows, "model.embed_tokens: 128 of 6208 entries"),
        (_shift_subln, "another function"),
        (_shift_norm, "another function"),
        (_shift_bias, "v_proj: the quantized product (.*) differs"),
        (_other_rope, "another function"),
        (_other_window, "another function"),
    ],
)
def test_parity_fails_on_another_student(tmp_path, change, message):
    model = student("qwen2")
    write_packed(tmp_path / "s", model)
    change(model)
    with pytest.raises(RuntimeError, match=message):
        prove_parity(tmp_path / "s", model, PROMPTS)
    assert model.config._attn_implementation == "sdpa"


def _truncates(x):
    peak = np.abs(x).max(axis=-1, keepdims=True)
    return (x * (127 / peak)).astype(np.int8), peak / np.float32(127)


def _clips_at_126(x):
    codes, scale = quantize_activation(x)
    return np.clip(codes, -126, 126), scale


def _other_scale(x):
    codes, scale = quantize_activation(x)
    return codes, scale * np.float32(1 + 1e-5)


quantize_activation = plain.quantize_activation


@pytest.mark.parametrize("witness", ["plain", "compiled"])
@pytest.mark.parametrize("wrong", [_truncates, _clips_at_126, _other_scale])
def test_parity_fails_on_a_wrong_activation_quantizer(tmp_path, monkeypatch, wrong, witness):
    """Weights, tables and the unrounded function are all right, and the logits hardly differ."""
    model = student("gemma3")
    write_packed(tmp_path / "s", model)

    def product(packed, name, x):
        with monkeypatch.context() as patch:
            patch.setattr(plain, "quantize_activation", wrong)
            return plain.plain_product(packed, name, x)

    monkeypatch.setattr(parity, f"{witness}_product", product)
    with pytest.raises(RuntimeError, match=rf"the quantized product \({witness}\) differs"):
        prove_parity(tmp_path / "s", model, PROMPTS)
    assert not any(layer._forward_hooks for layer in bit_linears(model).values())


@pytest.mark.parametrize("packing", ["2bit", "base3"])
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_products_are_bit_for_bit(tmp_path, name, packing):
    model = student(name)
    write_packed(tmp_path / "s", model, packing=packing)
    packed = Runtime(tmp_path / "s", threads=1).model
    rng = np.random.default_rng(0)
    for key, linear in packed.config.linears.items():
        x = rng.standard_normal((5, linear.in_features)).astype(np.float32)
        x[3] = 0
        want = plain.plain_product(packed, key, x)
        np.testing.assert_array_equal(compiled.compiled_product(packed, key, x), want)
        np.testing.assert_array_equal(compiled.compiled_product(packed, key, x[1:2]), want[1:2])


def test_parity_fails_on_other_logits(qwen3, monkeypatch):
    """Every part is right, and yet the whole is not."""
    logits = Runtime.logits

    def stale(self, ids, **options):
        got = logits(self, ids, **options)
        return got[np.arange(len(got)) // 2]

    path, model = qwen3
    monkeypatch.setattr(Runtime, "logits", stale)
    with pytest.raises(RuntimeError, match="mean KL of the runtime"):
        prove_parity(path, model, PROMPTS)


def test_parity_needs_prompts_and_fp32(qwen3):
    path, model = qwen3
    refused("validation_file", lambda: prove_parity(path, model, []))
    refused("validation_file", lambda: prove_parity(path, model, [[3], []]))
    refused("validation_file", lambda: prove_parity(path, model, [[3] * 65]))
    refused("student", lambda: prove_parity(path, model.bfloat16(), PROMPTS))


@pytest.mark.parametrize("name", ["stories260K-hf", "base-6m"])
def test_parity_of_real_models(tmp_path, name):
    folder = DATA / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set BITDISTILL_DATA to the folder with the real models")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    refine(model)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    sizes = write_packed(tmp_path / "s", model, tokenizer_json=tokenizer, embedding="int8")
    text = "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it."
    proof = prove_parity(tmp_path / "s", model, [AutoTokenizer.from_pretrained(folder)(text).input_ids])
    assert 1.6 <= sizes["bits_per_weight"] < (1.67 if name == "stories260K-hf" else 1.606)  # 172 rows fill 11 groups
    assert proof["product_max_diff"] == 0
    assert proof["unrounded_max_diff"] < 1e-4
    assert proof["same_top1"] >= 0.9
