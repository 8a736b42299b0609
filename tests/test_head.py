"""The head inside the loss gives what losses.py gives on whole logits: values and the gradient of every parameter, in
every family, for one process and for ranks at every way of partitioning."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

import ranks
from bitdistill.distributed.teacher import Teacher
from bitdistill.errors import UserError
from bitdistill.student.embeddings import quantize_embeddings
from bitdistill.training.distill import Answers, Distillation
from bitdistill.training.head import head_weight, hidden_states, instead_of_logits
from bitdistill.training.losses import cross_entropy, logits_distillation, next_tokens
from bitdistill.training.pretrain import NextToken
from bitdistill.training.trainer import Counts

torch.set_num_threads(1)

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}
T = 10
MASK = torch.tensor([[1] * T, [1] * 7 + [0] * 3])
LABELS = torch.full((2, T), -100)
LABELS[0, 6:9], LABELS[1, 4], LABELS[1, 6] = torch.tensor([3, 0, 7]), 5, 50
COUNTS = Counts(answer_tokens=9, tokens=31, positions=40, step=0)  # of a step with more micro-batches than this


def tiny(family, seed=0, width=24, **settings):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    config = CONFIGS[family](vocab_size=51, pad_token_id=0, **sizes, **heads, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def batch():
    tokens = torch.randint(1, 51, (2, T), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": MASK, "labels": LABELS}


def gradients(model, terms):
    """Values of the terms, and the gradient of every parameter for the weighted sum of all of them."""
    model.zero_grad()
    sum(weight * loss for weight, loss in terms.values()).backward()
    values = {name: loss.item() for name, (_, loss) in terms.items()}
    return values, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(model, terms, expected):
    ours, theirs = gradients(model, terms), gradients(model, expected)
    assert ours[0].keys() == theirs[0].keys()
    for name, value in ours[0].items():
        assert value == pytest.approx(theirs[0][name], rel=1e-5)
    for name, gradient in ours[1].items():
        theirs_here = theirs[1][name]
        torch.testing.assert_close(gradient, theirs_here, rtol=1e-4, atol=2e-6 * theirs_here.abs().max().item())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_families(family, tied):
    model, given = tiny(family, tie_word_embeddings=tied), batch()
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits
    keys = list(model.state_dict())
    with instead_of_logits(model, hidden_states):
        hidden = model(**inputs).logits
        chosen = model(**inputs, logits_to_keep=torch.tensor([2, 5])).logits
    with head_weight(model) as weight:
        torch.testing.assert_close(hidden @ weight.T, logits)
    assert torch.equal(chosen, hidden[:, [2, 5]])
    assert torch.equal(model(**inputs).logits, logits)  # and all is as it was
    assert list(model.state_dict()) == keys

    terms = NextToken(model)(model, given, COUNTS)
    assert_same(model, terms, {"ce": (1.0, cross_entropy(logits, next_tokens(LABELS), 9))})
    terms = Answers(model)(model, given, COUNTS)
    assert_same(model, terms, {"ce": (1.0, cross_entropy(model(**inputs).logits, next_tokens(LABELS), 9))})


def distillation(student, teacher, **changes):
    settings = {
        "lambda_logits": 10.0,
        "kd_temperature": 5.0,
        "kd_tau_squared": False,
        "kd_tokens": "response",
        "relation": "none",
        "relation_layers": [-1],
        "teacher_relation_layers": None,
        "split_heads": 2,
        "relation_temperature": 1.0,
        "relation_causal": False,
        "gamma_attention": "balanced",
        "gamma_rho": 1.0,
        "gamma_every": 1,
    }
    return Distillation(student, Teacher(module=teacher, forward=teacher), **settings | changes)


@pytest.mark.parametrize("tokens", ["response", "all"])
@pytest.mark.parametrize("tau_squared", [False, True])
def test_distillation_from_a_wider_teacher(tokens, tau_squared):
    student, teacher = tiny("qwen3"), tiny("qwen3", seed=1, width=40).half().float()
    teacher.requires_grad_(False)
    given = batch()
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    objective = distillation(student, teacher, kd_tokens=tokens, kd_tau_squared=tau_squared)
    terms = objective(student, given, COUNTS)
    logits, targets = student(**inputs).logits, next_tokens(LABELS)
    rows, items = (MASK.bool(), 31) if tokens == "all" else (targets != -100, 9)
    kl = logits_distillation(
        logits, teacher(**inputs).logits, rows, temperature=5.0, tau_squared=tau_squared, num_items=items
    )
    assert_same(student, terms, {"ce": (1.0, cross_entropy(logits, targets, 9)), "logits": (10.0, kl)})


def test_balanced_gamma_reads_the_same_task_gradient():
    """The combined gradient of both terms, declared in the forward pass, passes Q, K and V as two separate ones would."""
    student, teacher = tiny("qwen3"), tiny("qwen3", seed=1).requires_grad_(False)
    given, found = batch(), []
    for scale in (1.0, 64.0):  # ranks, accumulation, loss scale
        objective = distillation(student, teacher, relation="alg1")
        terms = objective(student, given, COUNTS)
        assert set(terms) == {"ce", "logits", "attention"}
        (scale * sum(weight * loss for weight, loss in terms.values())).backward()
        objective.gamma.finish_step()
        found.append((objective.gamma.task_norm, objective.gamma.attention_norm))
    assert found[0] == pytest.approx(found[1], rel=1e-5)

    capture = objective.student_capture
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    with capture:
        logits = student(**inputs).logits
    targets = next_tokens(LABELS)
    kl = logits_distillation(logits, teacher(**inputs).logits, targets != -100, temperature=5.0, num_items=9)
    task = cross_entropy(logits, targets, 9) + 10 * kl
    squares = [g.double().square().sum() for g in torch.autograd.grad(task, capture.downstream[-1])]
    assert found[0][0] == pytest.approx(sum(squares).sqrt().item(), rel=1e-5)


def test_only_the_terms_that_are_wanted():
    student, teacher = tiny("qwen3"), tiny("qwen3", seed=1).requires_grad_(False)
    given, seen = batch(), []
    objective = distillation(student, teacher, lambda_logits=0.0, relation="alg1")
    hook = teacher.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert set(objective(student, given, COUNTS)) == {"ce", "attention"}
    hook.remove()
    assert seen == [(2, 4, 24)]  # hidden states at the positions 3, 5, 6, 7 that predict a label in a row; no logits
    student_only = distillation(student, teacher, lambda_logits=0.0)
    assert set(student_only(student, given, COUNTS)) == {"ce"}


def test_a_batch_without_an_answer_takes_part():
    student, teacher = tiny("qwen3"), tiny("qwen3", seed=1).requires_grad_(False)
    given = batch() | {"labels": torch.full((2, T), -100)}
    for counts in (COUNTS, Counts(0, 0, 20, 0)):
        for objective in (NextToken(student), Answers(student), distillation(student, teacher)):
            values, found = gradients(student, objective(student, given, counts))
            assert set(values.values()) == {0.0}
            assert all((gradient == 0).all() for gradient in found.values())
    both = gradients(student, distillation(student, teacher, kd_tokens="all")(student, given, COUNTS))[0]
    assert both["ce"] == 0
    assert both["logits"] > 0


def test_heads_that_are_more_than_a_product_are_refused():
    capped = tiny("gemma3", final_logit_softcapping=30.0)
    biased = tiny("qwen3")
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(51))
    for model, said in ((capped, "final_logit_softcapping"), (biased, "bias")):
        with pytest.raises(UserError, match=f"^model: .*{said}"), instead_of_logits(model, hidden_states):
            pass


def test_the_head_comes_back_after_an_error():
    model, given = tiny("llama"), batch()
    expected = model(given["input_ids"]).logits
    with pytest.raises(UserError, match="first"), instead_of_logits(model, hidden_states):
        raise UserError("first", expected="a", got="b", do="c.")
    assert torch.equal(model(given["input_ids"]).logits, expected)
    copy.deepcopy(model)


SCRIPT = """
import json, sys
from pathlib import Path
import ranks
from bitdistill.distributed import checkpoint, process_group, presets
from bitdistill.distributed.teacher import load_teacher

process_group.initialize("cpu")
import torch
from test_head import distillation
from bitdistill.student.embeddings import quantize_embeddings
from bitdistill.training.trainer import Counts

found = {}
for zero, offload, tokens, precision, embedding in json.loads(sys.argv[-3]):
    arguments = ranks.tiny_arguments(Path("out"), presets.deepspeed_config(zero, precision=precision, device="cpu"))
    trainer = ranks.tiny_trainer(arguments)
    quantize_embeddings(trainer.model, embedding)
    teacher = load_teacher(sys.argv[-2], dtype=torch.float32, device="cpu", offload=offload)
    objective = distillation(trainer.model, teacher.module, kd_tokens=tokens)
    objective.teacher = teacher

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = dict(inputs) | {"attention_mask": torch.ones_like(inputs["input_ids"])}
        terms = objective(model, batch, Counts(4 * 11, 4 * 12, 4 * 12, 0))
        return sum(weight * loss for weight, loss in terms.values()) * process_group.world_size()

    trainer.compute_loss, trainer.model_accepts_loss_kwargs = compute_loss, True
    trainer.train()
    state = checkpoint.full_state_dict(trainer.model_wrapped)
    name = f"{zero}-{tokens}-{precision}-{embedding}"
    if process_group.is_main():
        torch.save(state, name)
    found[name] = ranks.losses(trainer)
if process_group.is_main():
    Path(sys.argv[-1]).write_text(json.dumps(found))
process_group.shutdown()
"""


@pytest.mark.slow
def test_two_ranks_at_every_stage_train_like_one_process(tmp_path):
    """Tied embeddings, gathered for the head's forward alone under ZeRO-3, beside a teacher that is itself partitioned; also
    quantized ones, whose master is partitioned."""
    made = ranks.tiny_model(seed=5)
    for parameter in made.parameters():
        parameter.data.mul_(4)
    made.save_pretrained(tmp_path / "teacher")
    cases = [[0, "none", "all", "fp32", "fp16"], [2, "none", "response", "fp32", "fp16"]]
    cases += [[3, "cpu", "all", "fp32", "fp16"], [3, "cpu", "response", "bf16", "fp16"]]
    cases += [[0, "none", "response", "fp32", "ternary"], [3, "none", "all", "fp32", "int4"]]
    found = ranks.run(tmp_path / "run", SCRIPT, json.dumps(cases), str(tmp_path / "teacher")).found
    teacher, data = made.requires_grad_(False), ranks.tiny_data()
    expected = {}
    for tokens, embedding in {(case[2], case[4]) for case in cases}:
        model = ranks.tiny_model()
        quantize_embeddings(model, embedding)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for step in range(ranks.STEPS):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / ranks.STEPS)
            tokens_BT = torch.stack([row["input_ids"] for row in data[step * 4 : step * 4 + 4]])
            logits, targets = model(input_ids=tokens_BT).logits, next_tokens(tokens_BT)
            rows = torch.ones_like(targets, dtype=torch.bool) if tokens == "all" else targets != -100
            kl = logits_distillation(logits, teacher(input_ids=tokens_BT).logits, rows)
            loss = cross_entropy(logits, targets) + 10 * kl
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            expected.setdefault((tokens, embedding), []).append(loss.item())
        expected[tokens, embedding, "state"] = model.state_dict()
    assert len(found) == 6
    for name, history in found.items():
        _, tokens, precision, embedding = name.split("-")
        assert history == pytest.approx(expected[tokens, embedding], rel=1e-4 if precision == "fp32" else 0.02)
        if precision != "fp32":
            continue
        state = torch.load(tmp_path / "run" / name)
        want = expected[tokens, embedding, "state"]
        assert state.keys() == want.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, want[key], rtol=1e-3, atol=2e-4)
