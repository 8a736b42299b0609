"""Stage 1 on every family: counts, function, saving and loading."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bitdistill.errors import UserError
from bitdistill.kernels.reference import bit_linear, rms_norm
from bitdistill.names import PROJECTIONS
from bitdistill.student.calibration import calibrate_gains
from bitdistill.student.layers import assert_fp32_masters, bit_linears
from bitdistill.student.loading import check_same_vocabulary, load_language_model, load_tokenizer
from bitdistill.student.refine import load_student, refine, save_student

SHAPE = dict(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def tiny(family, **changes):
    torch.manual_seed(0)
    shape = SHAPE | changes
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
        for layer in model.model.layers:  # random, so that a lost bias is noticed
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
        return model
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16))
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape, head_dim=16, sliding_window=8))


FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
TOKENS = torch.arange(24).reshape(2, 12) % 67


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("norms", "sublns"), [("two", 4), ("all", 14), ("none", 0)])
def test_counts_and_forward(family, norms, sublns):
    model = tiny(family)
    weights = {name: p for name, p in model.named_parameters()}
    result = refine(model, norms=norms)
    assert result.ternary == 14
    assert result.kept == ("lm_head",)
    assert result.sublns == sublns
    assert result.biases == (6 if family == "qwen2" else 0)
    assert "14 of 15 linears ternary" in str(result)
    for name, layer in bit_linears(model).items():
        assert layer.weight is weights[f"{name}.weight"]  # the same Parameter object: keys, ties, partitions survive
    assert torch.isfinite(model(TOKENS).logits).all()
    assert_fp32_masters(model)


def test_mlp_is_the_papers_equation():
    """X' = SubLN((Y W_up) * act(Y W_gate)) W_down on a real block, written out."""
    model = tiny("llama")
    refine(model)
    mlp = model.model.layers[1].mlp
    torch.nn.init.uniform_(mlp.down_proj.subln.weight)
    y = torch.randn(3, 32)
    up, gate = bit_linear(y, mlp.up_proj.weight), bit_linear(y, mlp.gate_proj.weight)
    normed = rms_norm(up * torch.nn.functional.silu(gate), mlp.down_proj.subln.weight, model.config.rms_norm_eps)
    assert torch.equal(mlp(y), bit_linear(normed, mlp.down_proj.weight))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_computes_what_the_familys_own_code_does(family):
    model = tiny(family)
    before = model.model.layers[0].mlp
    refine(model)
    after, y = model.model.layers[0].mlp, torch.randn(3, 32)
    assert type(after) is not type(before)
    assert after.act_fn is before.act_fn
    assert torch.allclose(after(y), type(before).forward(after, y), rtol=1e-5, atol=1e-5)  # a fused gate rounds less


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norms", ["two", "all"])
def test_reload_is_bit_exact_with_trained_gains(tmp_path, family, norms):
    model = tiny(family)
    refine(model, norms=norms)
    for layer in bit_linears(model).values():
        if layer.subln is not None:
            torch.nn.init.uniform_(layer.subln.weight)
    save_student(tmp_path / "s", model)
    again = load_student(tmp_path / "s")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(model.eval()(TOKENS).logits, again.eval()(TOKENS).logits)


def test_tied_embedding_stays_tied(tmp_path):
    model = tiny("qwen3", tie_word_embeddings=True)
    refine(model)
    save_student(tmp_path, model)
    again = load_student(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(model.eval()(TOKENS).logits, again.eval()(TOKENS).logits)


def test_loading_refuses_what_is_wrong(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny("qwen3")
    refine(model)
    save_student(tmp_path, model)
    path = tmp_path / "model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    gain = next(key for key in tensors if "subln" in key)

    save_file({key: value for key, value in tensors.items() if key != gain}, path)
    with pytest.raises(UserError, match=f"1 missing: {gain}"):
        load_student(tmp_path)
    save_file(tensors | {"stranger": torch.ones(1)}, path)
    with pytest.raises(UserError, match="1 extra: stranger"):
        load_student(tmp_path)
    save_file(tensors | {gain: torch.ones(3)}, path)
    with pytest.raises(UserError, match="of another shape"):
        load_student(tmp_path)
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="whole safetensors file"):
        load_student(tmp_path)
    path.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"bitdistill": {"format_version": 99}}))
    with pytest.raises(UserError, match="format_version 3 or less; got 99"):
        load_student(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "bitdistill"}))
    with pytest.raises(UserError, match="foreign checkpoint"):
        load_student(tmp_path)
    for name in ("norms", "embedding", "weight_quantizer", "weight_scale"):
        damaged = config | {"bitdistill": config["bitdistill"] | {name: [[]]}}
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="what stage 1 writes"):
            load_student(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": []}))
    with pytest.raises(UserError, match="describes a model"):
        load_student(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        load_student(tmp_path)
    with pytest.raises(UserError, match="finished stage"):
        load_student(tmp_path / "nowhere")


def test_refusals():
    with pytest.raises(UserError, match=r"model_type among .*gpt2"):
        refine(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=10)))
    model = tiny("llama")
    with pytest.raises(UserError, match="one of two, all, none"):
        refine(model, norms="three")
    refine(model)
    with pytest.raises(UserError, match="converted one"):
        refine(model)
    with pytest.raises(AssertionError, match="fp32"):
        assert_fp32_masters(model.bfloat16())
    with pytest.raises(UserError, match="68 words"):
        check_same_vocabulary(tiny("llama", vocab_size=68).config, model.config)


def test_model_loading_errors(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no such folder"):
        load_language_model("/no/such/folder")
    with pytest.raises(UserError, match="local folder"):
        load_language_model("nobody/such-a-model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never-heard-of"}))
    with pytest.raises(UserError, match="model"):
        load_language_model(tmp_path)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=10)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="gpt2"):
        load_language_model(tmp_path / "gpt2")
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path / "gpt2")
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    loaded = load_language_model(tmp_path / "base")
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match="model"):
        load_language_model(tmp_path / "base")
    refine(model)
    save_student(tmp_path / "student", model)
    with pytest.raises(UserError, match="ternary student"):
        load_language_model(tmp_path / "student")


def test_calibrated_gains_are_the_rms_of_the_inputs():
    model = tiny("llama").eval()
    mask = torch.ones_like(TOKENS)
    mask[1, 7:] = 0
    seen = {}
    layer = model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.setdefault("x", args[0].clone()))
    gains = calibrate_gains(model, [{"input_ids": TOKENS, "attention_mask": mask}])
    handle.remove()
    assert len(gains) == 4
    expected = seen["x"][mask.bool()].double().square().mean().sqrt().item()
    assert gains["model.layers.0.mlp.down_proj"] == pytest.approx(expected, rel=1e-6)
    refine(model, gains=gains)
    gain = model.model.layers[0].mlp.down_proj.subln.weight
    assert torch.allclose(gain, torch.full_like(gain, expected), rtol=1e-6)
    assert len(calibrate_gains(tiny("qwen3"), [{"input_ids": TOKENS}], norms="all")) == 14
    with pytest.raises(UserError, match="at least one block"):
        calibrate_gains(tiny("qwen3"), [])


def test_calibration_starts_nearer_to_the_base():
    """What calibration is for: the student's output before training lies nearer to the base model's."""
    base = tiny("llama").eval()
    with torch.no_grad():
        for p in base.parameters():
            p.mul_(3.0)  # activations far from unit RMS
        wanted = base(TOKENS).logits
        distances = {}
        for name in ("one", "calibrated"):
            model = tiny("llama").eval()
            model.load_state_dict(base.state_dict())
            refine(model, gains=calibrate_gains(model, [{"input_ids": TOKENS}]) if name == "calibrated" else None)
            distances[name] = (model(TOKENS).logits - wanted).norm().item()
    assert distances["calibrated"] < distances["one"]


def test_projection_names_cover_every_linear_of_a_block():
    for family in FAMILIES:
        model = tiny(family)
        linears = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        assert linears == {*PROJECTIONS, "lm_head"}
        assert AutoModelForCausalLM is not None
