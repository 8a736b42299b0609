"""The capture must change nothing and miss nothing: logits bit for bit those of sdpa, q, k, v those made by hand."""

import gc
import json
import math
import weakref

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import ranks
from bitdistill.errors import UserError
from bitdistill.training.capture import ATTENTION_NAME, AttentionCapture
from bitdistill.training.gamma import BalancedGamma
from bitdistill.training.losses import cross_entropy, next_tokens
from bitdistill.training.relations import relation_loss

torch.set_num_threads(1)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
T = 12
PADDINGS = {
    "none": torch.ones(2, T, dtype=torch.long),
    "left": torch.tensor([[0] * 5 + [1] * 7, [1] * T]),
    "right": torch.tensor([[1] * 7 + [0] * 5, [1] * T]),
}


def tiny(family, seed=0, layers=4, **settings):
    config_class, model_class = FAMILIES[family]
    if family == "gemma3":  # a window shorter than the text, or the sliding mask is not tested
        kinds = ["sliding_attention", "full_attention"] * (layers // 2)
        settings = {"sliding_window": 4, "layer_types": kinds, "query_pre_attn_scalar": 24} | settings
    config = config_class(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        pad_token_id=0,
        **settings,
    )
    torch.manual_seed(seed)
    model = model_class(config)
    for parameter in model.parameters():  # livelier than the initial 0.02: attention must be far from uniform
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(seed=1):
    torch.manual_seed(seed)
    return torch.randint(1, 50, (2, T))


def rotate_by_hand(x_BHTD, theta):
    """RoPE in the half-split form: channels d and d + D/2 turn by t * theta^(-2d/D)."""
    half = x_BHTD.shape[-1] // 2
    angles = torch.arange(T)[:, None] * theta ** (-torch.arange(half) / half)
    first, second = x_BHTD[..., :half], x_BHTD[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def norm_by_hand(x, weight, eps, one_centered):
    return x * (x.square().mean(-1, keepdim=True) + eps) ** -0.5 * (1 + weight if one_centered else weight)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_sdpa_bit_for_bit(family, padding):
    model, tokens, mask = tiny(family), batch(), PADDINGS[padding]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        capture = AttentionCapture(model, [1])
        with capture:
            inside = model(tokens, attention_mask=mask).logits
        outside = model(tokens, attention_mask=mask).logits
        unmasked = model(tokens, attention_mask=torch.ones_like(mask)).logits
    assert torch.equal(inside, expected)
    assert torch.equal(outside, expected)
    if padding != "none":  # the mask does matter here
        assert not torch.equal(unmasked[0, -1], expected[0, -1])


def test_the_sliding_window_survives():
    """A token seven places back is out of reach of two layers with a window of four."""
    model, tokens = tiny("gemma3", layers=2, layer_types=["sliding_attention"] * 2), batch()
    AttentionCapture(model, [0])
    other = tokens.clone()
    other[:, 0] = (tokens[:, 0] + 1) % 50
    with torch.no_grad():
        a, b = (model(x).logits for x in (tokens, other))
    assert not torch.equal(a[:, 6], b[:, 6])  # 3 places in each layer
    assert torch.equal(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("family", FAMILIES)
def test_qkv_by_hand(family):
    model, tokens = tiny(family, rms_norm_eps=1e-6), batch()
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states
        capture = AttentionCapture(model, [-2, 1, 3])
        with capture:
            model(tokens)
    assert list(capture.qkv) == [1, -2, 3]  # as the layers run
    for layer, (q, k, v) in capture.qkv.items():
        block = model.model.layers[layer]
        one_centered = family == "gemma3"
        x = norm_by_hand(hidden[layer % 4], block.input_layernorm.weight, 1e-6, one_centered)
        theta = 10_000.0
        if family == "gemma3" and model.config.layer_types[layer] == "full_attention":
            theta = 1_000_000.0
        made = {}
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            projection = getattr(block.self_attn, f"{name}_proj")
            made[name] = torch.nn.functional.linear(x, projection.weight, projection.bias)
            made[name] = made[name].unflatten(-1, (heads, 12)).transpose(1, 2)
            if name != "v":
                if family in ("qwen3", "gemma3"):
                    weight = getattr(block.self_attn, f"{name}_norm").weight
                    made[name] = norm_by_hand(made[name], weight, 1e-6, one_centered)
                made[name] = rotate_by_hand(made[name], theta)
        for got, expected in ((q, made["q"]), (k, made["k"]), (v, made["v"])):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def all_gradients(model, teacher_qkv, *, checkpointing, backward_inside):
    """Loss and gradients of CE + relations at layer -2, gamma balanced on the residual stream."""
    tokens = batch()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    capture = AttentionCapture(model, [-2], require_grad=True)
    with capture:
        logits = model(tokens, attention_mask=PADDINGS["left"], use_cache=False).logits
        captured = capture.qkv[-2]
        if backward_inside:
            logits.sum().backward(retain_graph=True)
            model.zero_grad()
            assert capture.qkv[-2] is captured, "the recomputation wrote the store"
    ce = cross_entropy(logits, next_tokens(tokens.where(PADDINGS["left"].bool(), -100)))
    relations = relation_loss(teacher_qkv, captured, PADDINGS["left"], split_heads=2)
    gamma = BalancedGamma(1.0)
    gamma.watch(ce, relations, captured, capture.downstream[-2])
    (ce + 0.3 * relations).backward()
    value = gamma.finish_step()
    assert gamma.updates == 1
    assert capture.qkv[-2] is captured
    return value, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family):
    teacher, tokens = tiny(family, seed=5), batch()
    capture = AttentionCapture(teacher, [-2])
    with capture, torch.no_grad():
        teacher(tokens, attention_mask=PADDINGS["left"])
    teacher_qkv = capture.qkv[-2]
    plain = all_gradients(tiny(family), teacher_qkv, checkpointing=False, backward_inside=False)
    recomputed = all_gradients(tiny(family), teacher_qkv, checkpointing=True, backward_inside=True)
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)
    alone = all_gradients(tiny(family), teacher_qkv, checkpointing=True, backward_inside=False)
    torch.testing.assert_close(alone, plain, rtol=1e-5, atol=1e-6)


def test_the_graph_forks_at_qkv():
    """The two branches part the gradient: the task's alone downstream, the relations' alone at qkv, both below."""
    model, tokens = tiny("qwen3"), batch()
    capture = AttentionCapture(model, [1], require_grad=True)
    with capture:
        logits = model(tokens).logits
    assert all(torch.equal(a, b) for a, b in zip(capture.qkv[1], capture.downstream[1], strict=True))
    ce = cross_entropy(logits, next_tokens(tokens))
    relations = sum(x.square().sum() for x in capture.qkv[1])
    seen = {}
    for name in ("qkv", "downstream"):
        for index, x in enumerate(getattr(capture, name)[1]):
            x.register_hook(lambda g, key=(name, index): seen.update({key: g}))
    gamma = BalancedGamma(1.0)
    gamma.watch(ce, relations, capture.qkv[1], capture.downstream[1])
    alone = torch.autograd.grad(ce, capture.downstream[1], retain_graph=True)
    seen.clear()
    gamma._squares[0] = 0  # the pass above went through the hooks too
    (5 * (ce + 2 * relations)).backward()
    for index in range(3):
        torch.testing.assert_close(seen["downstream", index], 5 * alone[index])
        torch.testing.assert_close(seen["qkv", index], 20 * capture.qkv[1][index])
    gamma.finish_step()
    assert gamma.task_norm == pytest.approx(math.sqrt(sum(g.double().square().sum() for g in alone)), rel=1e-5)
    expected = 2 * math.sqrt(sum(x.detach().double().square().sum() for x in capture.qkv[1]))
    assert gamma.attention_norm == pytest.approx(expected, rel=1e-5)


def test_the_relations_reach_only_the_layers_below():
    model = tiny("qwen3")
    capture = AttentionCapture(model, [2], require_grad=True)
    with capture:
        model(batch())
    sum(x.square().sum() for x in capture.qkv[2]).backward()
    touched = {int(n.split(".")[2]) for n, p in model.named_parameters() if p.grad is not None and ".layers." in n}
    assert touched == {0, 1, 2}
    assert model.model.layers[2].mlp.up_proj.weight.grad is None


def test_reentrant_checkpointing_is_refused_for_the_student():
    model = tiny("qwen3").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    student = AttentionCapture(model, [1], require_grad=True)
    with student, pytest.raises(ValueError, match="use_reentrant"):
        model(batch(), use_cache=False)
    teacher = AttentionCapture(model, [1])  # which needs no gradient
    with teacher:
        model(batch(), use_cache=False)
    assert not teacher.qkv[1][0].requires_grad


def test_a_frozen_or_ungraded_student_is_refused():
    model = tiny("qwen3")
    capture = AttentionCapture(model, [1], require_grad=True)
    with capture, torch.no_grad(), pytest.raises(ValueError, match="switched off"):
        model(batch())
    model.requires_grad_(False)
    with capture, pytest.raises(ValueError, match="no gradient"):
        model(batch())
    model.requires_grad_(True)
    with capture:  # and it works again
        model(batch())
    assert capture.qkv[1][0].requires_grad


def test_teacher_and_student_in_one_step():
    teacher, student, tokens = tiny("qwen3", seed=1, layers=2), tiny("qwen3", seed=2), batch()
    ours, theirs = AttentionCapture(student, [-1], require_grad=True), AttentionCapture(teacher, [-1, 0])
    with ours, theirs:
        with torch.no_grad():
            teacher(tokens)
        student(tokens)
    assert theirs.qkv.keys() == {-1, 0}
    assert ours.qkv.keys() == {-1}
    for capture, model in ((ours, student), (theirs, teacher)):
        alone = AttentionCapture(model, [-1])
        with alone, torch.no_grad():
            model(tokens)
        assert all(torch.equal(a, b) for a, b in zip(capture.qkv[-1], alone.qkv[-1], strict=True))
    assert not torch.equal(ours.qkv[-1][0], theirs.qkv[-1][0])


def test_the_latest_forward_counts_and_outside_nothing_does():
    model = tiny("qwen3")
    capture = AttentionCapture(model, [1])
    with capture, torch.no_grad():
        model(batch(1))
        first = capture.qkv[1][0]
        model(batch(2))
        second = capture.qkv[1][0]
    assert not torch.equal(first, second)
    with torch.no_grad():
        model(batch(1))
    assert capture.qkv[1][0] is second
    with capture:
        assert capture.qkv == {}


def test_nothing_is_kept_alive():
    model = tiny("qwen3")
    capture = AttentionCapture(model, [1])
    with capture:
        model(batch())
    kept = [weakref.ref(x) for x in (*capture.qkv[1], *capture.downstream[1])]
    capture.clear()
    gc.collect()
    assert all(x() is None for x in kept)
    with capture:
        model(batch())
    q = weakref.ref(capture.qkv[1][0])
    del capture
    gc.collect()
    assert q() is None
    model(batch())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_after_an_error_in_the_forward_pass():
    model = tiny("qwen3")
    capture = AttentionCapture(model, [1])
    with pytest.raises(IndexError), capture:
        model(torch.tensor([[1000]]))  # no such token
    with capture, torch.no_grad():
        model(batch())
    assert capture.qkv[1][0].shape == (2, 4, T, 12)


def test_a_saved_model_does_not_name_the_capture(tmp_path):
    model = tiny("qwen3")
    AttentionCapture(model, [1])
    assert model.config._attn_implementation == ATTENTION_NAME
    model.save_pretrained(tmp_path)
    assert ATTENTION_NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert Qwen3ForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_generation_with_a_captured_model():
    model, tokens, mask = tiny("gemma3"), batch(), PADDINGS["left"]
    model.set_attn_implementation("sdpa")
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    AttentionCapture(model, [1])
    assert torch.equal(model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("layers", [[4], [-5], [0, 9], [], [1, -3], [2, 2]])
def test_layers_that_do_not_exist_or_come_twice(layers):
    with pytest.raises(UserError) as error:
        AttentionCapture(tiny("llama"), layers)
    assert error.value.field == "distill.relation_layers"


def test_nesting_is_refused():
    model = tiny("llama")
    capture, other = AttentionCapture(model, [1]), AttentionCapture(model, [0, 1])
    with capture:
        with pytest.raises(AssertionError, match="already"):
            capture.__enter__()
        with pytest.raises(AssertionError, match="already"):
            other.__enter__()
        with torch.no_grad():
            model(batch())
    assert other.qkv == {}
    with other, torch.no_grad():
        model(batch())
    assert other.qkv.keys() == {0, 1}


DEEPSPEED = """
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
import deepspeed
import torch
from test_capture import PADDINGS, batch, tiny
from bitdistill.training.capture import AttentionCapture
from bitdistill.training.gamma import BalancedGamma
from bitdistill.training.losses import cross_entropy, next_tokens
from bitdistill.training.relations import relation_loss

deepspeed.init_distributed("gloo")
for stage in (0, 2, 3):
    for checkpointing in (False, True):
        teacher, model = tiny("qwen3", seed=5), tiny("qwen3").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
            },
        )
        theirs, ours = AttentionCapture(teacher, [-2]), AttentionCapture(engine.module, [-2], require_grad=True)
        gamma, mask = BalancedGamma(1.0), PADDINGS["left"]
        for step in range(2):
            tokens = batch(step)
            with theirs, torch.no_grad():
                teacher(tokens, attention_mask=mask)
            with ours:
                logits = engine(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            ce = cross_entropy(logits, next_tokens(tokens.where(mask.bool(), -100)))
            relations = relation_loss(theirs.qkv[-2], ours.qkv[-2], mask, split_heads=2)
            gamma.watch(ce, relations, ours.qkv[-2], ours.downstream[-2])
            engine.backward(ce + gamma.gamma * relations)
            gamma.finish_step()
            engine.step()
        print("RESULT", stage, checkpointing, ce.item(), relations.item(), gamma.task_norm, gamma.attention_norm)
"""


@pytest.mark.slow
def test_under_deepspeed_every_stage_measures_the_same(tmp_path):
    """Hooks of the engine allow one backward pass per forward: the balanced gamma must do with that one."""
    result = ranks.run(tmp_path, DEEPSPEED, ranks=1)
    lines = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("RESULT")]
    assert len(lines) == 6, result.stderr[-3000:]
    numbers = torch.tensor([[float(x) for x in line[2:]] for line in lines])
    torch.testing.assert_close(numbers, numbers[:1].expand_as(numbers), rtol=1e-5, atol=0)
    assert (numbers > 0).all()
