"""Health while training: every measure against a hand example, every warning where it belongs and nowhere else, and a
real Trainer under ZeRO 0 and 3."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ranks
import tiny_students
from bitdistill.student.layers import BitLinear, SubLN, bit_linears
from bitdistill.training import health
from bitdistill.training.diagnosis import ADVICE, Diagnosis, gradient_ratio, guessing_loss, rise_of_last_third

# ------------------------------------------------------------------------------------------------------- measures


class Chain(nn.Module):
    """BitLinears one after the other, called as a language model is."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x, attention_mask=None):
        return self.layers(x)


def bit_linear(rows, subln=None):
    linear = nn.Linear(len(rows[0]), len(rows), bias=False)
    linear.weight = nn.Parameter(torch.tensor(rows, dtype=torch.float32))
    return BitLinear(linear, subln)


def test_codes_by_hand():
    model = Chain(bit_linear([[2.0, -2.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]]))  # absmean 1: codes 1 -1 0 0 / 1 1 0 0
    start = health.scales(model)
    before, gains = health.snapshot(model)
    assert gains == {}
    assert before["layers.0"].tolist() == [[1, -1, 0, 0], [1, 1, 0, 0]]
    with torch.no_grad():
        model.layers[0].weight.copy_(torch.tensor([[4.0, 4.0, 0.0, 0.0], [4.0, 0.0, 0.0, 4.0]]))
    # absmean 2: codes 1 1 0 0 / 1 0 0 1: three of eight differ
    assert health.measure(model, before, start) == {
        "layers.0": {"minus": 0.0, "zeros": 0.5, "plus": 0.5, "weight_scale": 2.0, "flips": 0.375, "scale_drift": 2.0}
    }
    assert health.measure(model) == {"layers.0": {"minus": 0.0, "zeros": 0.5, "plus": 0.5, "weight_scale": 2.0}}


def test_outliers_by_hand():
    """[3, 4, 0, 0]: RMS 2.5, codes 95 127 0 0; [8, 0, 0, 0]: RMS 4; [1, 1, 1, -1]: RMS 1; zeros: 0."""
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    assert health.outliers(x[:3]).tolist() == pytest.approx([1.6, 2.0, 5 / 12])
    assert health.outliers(x[3:]).tolist() == [0.0, 0.0, 1.0]
    small = torch.tensor([[127.0, 0.4, 0.6, -126.0]])  # 0.4 rounds to no code
    assert health.outliers(small).tolist()[2] == 0.25


def test_probe_sees_what_the_quantizer_gets():
    """Behind SubLN and its gain, unpadded tokens alone; output and gradient of the first pass alone."""
    subln = SubLN(2, 0.0)
    with torch.no_grad():
        subln.weight.copy_(torch.tensor([1.0, 7.0]))
    model = Chain(bit_linear([[1.0, 1.0], [1.0, -1.0]]), bit_linear([[1.0, -1.0]], subln))
    _, gains = health.snapshot(model)
    probe = health.Probe(model, gains)
    mask = torch.tensor([[1, 1, 0]])
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [100.0, 99.0]]])
    y = model(x, attention_mask=mask)
    (y * mask[..., None]).sum().backward()
    (5 * model(7 * x, attention_mask=mask)).sum().backward()  # a second micro-batch: not counted
    seen = probe.read()
    # first: peak 1 over RMS sqrt(1/2), and one of two codes is zero; its outputs [1, 1] and [2, -2]
    root = math.sqrt(2)
    assert seen["layers.0"]["peak_to_rms"] == pytest.approx(root)
    assert seen["layers.0"]["zero_activations"] == 0.5
    assert seen["layers.0"]["output_rms"] == pytest.approx(math.sqrt(2.5))
    # second: [1, 1] -> SubLN [1, 1] -> [1, 7]: peak 7 over RMS 5, and so for [2, -2]
    assert seen["layers.1"]["peak_to_rms"] == pytest.approx(1.4)
    assert seen["layers.1"]["peak_to_rms_max"] == pytest.approx(1.4)
    assert seen["layers.1"]["zero_activations"] == 0
    # its outputs 1 - 7 and 1 + 7, in the codes 18 and 127 of 127; its gradient is the sum of what it reads: [2, 0]
    one = 7 * 18 / 127
    assert seen["layers.1"]["output_rms"] == pytest.approx(math.sqrt(((one - 7) ** 2 + (one + 7) ** 2) / 2))
    assert seen["layers.1"]["grad_norm"] == pytest.approx(2 * one, rel=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.layers[0].weight.grad = None
    model(x).sum().backward()
    assert len(seen) == 2


def test_probe_leaves_the_fused_path_and_the_numbers_alone():
    """down_proj is not hooked (on a GPU a hook would take it off the fused kernel); what it reads is computed again, and
    is what a hook on it would have seen."""
    model = tiny_students.student("qwen3", norms="all").train()
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    _, gains = health.snapshot(model)
    probe = health.Probe(model, gains)
    layers = bit_linears(model)
    for name, layer in layers.items():
        assert layer.subln is None or not layer.subln._forward_hooks
        assert bool(layer._forward_hooks) == (not name.endswith("down_proj"))
    probed = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(plain, probed)
    probed.sum().backward()
    seen = probe.read()
    assert set(seen) == set(layers)
    assert all(len(numbers) == 5 for numbers in seen.values())

    name = "model.layers.1.mlp.down_proj"
    read, given = [], []
    layers[name].subln.register_forward_hook(lambda _module, _args, y: read.append(y))
    layers[name].register_forward_hook(lambda _module, _args, y: given.append(y))
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    expected = health.outliers(read[0][mask.bool()]).tolist()
    assert [seen[name][key] for key in ("peak_to_rms", "peak_to_rms_max", "zero_activations")] == pytest.approx(
        expected
    )
    rms = given[0][mask.bool()].square().mean().sqrt().item()
    assert seen[name]["output_rms"] == pytest.approx(rms, rel=1e-5)


def test_probe_samples_tokens_evenly_and_survives_recomputation():
    model = tiny_students.student("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, gains = health.snapshot(model)
    probe = health.Probe(model, gains)
    model(input_ids=torch.randint(0, 97, (1, 8)), use_cache=False).logits.sum().backward()
    assert all(len(numbers) == 5 for numbers in probe.read().values())
    probe._mask = None
    rows = probe._sampled(torch.arange(3.0 * health.SAMPLED_TOKENS)[None, :, None])
    assert rows.flatten().tolist() == list(range(0, 3 * health.SAMPLED_TOKENS, 3))


# ------------------------------------------------------------------------------------------------------- warnings

SOUND = {
    "minus": 0.34, "zeros": 0.32, "plus": 0.34, "weight_scale": 0.02, "scale_drift": 1.1, "flips": 2e-3,
    "peak_to_rms": 6.0, "peak_to_rms_max": 12.0, "zero_activations": 0.15, "output_rms": 1.0, "grad_norm": 0.1,
}  # fmt: skip
NAMES = ("a.0.q_proj", "a.1.q_proj", "a.2.q_proj")


def diagnose(*changes, weights=1_000_000, rates=None):
    """Findings over one measurement for each of `changes`, which fall on the second of three layers."""
    diagnosis = Diagnosis(1e-3, dict.fromkeys(NAMES, weights))
    found = []
    for i, change in enumerate(changes):
        layers = {name: SOUND | (change if name == NAMES[1] else {}) for name in NAMES}
        rate = 1e-3 if rates is None else rates[i]
        found.append(diagnosis.measured({"step": 10 * (i + 1), "learning_rate": rate, "layers": layers}))
    return [[(finding.kind, finding.layers) for finding in findings] for findings in found]


def test_a_sound_stage_gives_no_warning():
    ends = [{"flips": 0.0, "grad_norm": 1e-9}] * 5
    assert diagnose(*[{}] * 20, *ends, rates=[1e-3] * 20 + [1e-5] * 5) == [[]] * 25


ALWAYS = [
    ("dead", {"minus": 0.0, "zeros": 1.0, "plus": 0.0}, 1),
    ("dead", {"output_rms": 0.0}, 1),
    ("dead", {"grad_norm": 0.0}, 2),
    ("collapse", {"minus": 0.05, "zeros": 0.9, "plus": 0.05}, 1),
    ("collapse", {"minus": 0.09, "zeros": 0.09, "plus": 0.82}, 1),
    ("saturated", {"minus": 0.49, "zeros": 0.02, "plus": 0.49}, 1),
    ("drift", {"scale_drift": 3.5}, 1),
    ("drift", {"scale_drift": 0.2}, 1),
    ("outliers", {"zero_activations": 0.9}, 2),
    ("thrash", {"flips": 0.08}, 2),
    ("frozen", {"flips": 0.0}, 3),
]


@pytest.mark.parametrize(("kind", "change", "after"), ALWAYS)
def test_each_warning_fires_once_and_names_its_layer(kind, change, after):
    expected = [[]] * (after - 1) + [[(kind, (NAMES[1],))]] + [[]] * 3
    assert diagnose(*[change] * (after + 3)) == expected


@pytest.mark.parametrize(("kind", "change", "after"), [row for row in ALWAYS if row[2] > 1])
def test_a_single_bad_measurement_is_none(kind, change, after):
    assert diagnose(*([change] * (after - 1) + [{}]) * 3) == [[]] * (3 * after)


def test_rest_at_a_low_learning_rate_is_not_frozen():
    assert diagnose(*[{"flips": 0.0}] * 6, rates=[1e-5] * 6) == [[]] * 6
    # small layers: three looks at 1,000 codes prove nothing; a hundred do, together with the other layers or not
    assert diagnose(*[{"flips": 0.0}] * 6, weights=1000) == [[]] * 6
    assert [len(found) for found in diagnose(*[{"flips": 0.0}] * 301, weights=1000)].index(1) == 299


def test_all_small_layers_frozen_together():
    diagnosis = Diagnosis(1e-3, dict.fromkeys(NAMES, 40_000))
    layers = {name: SOUND | {"flips": 0.0} for name in NAMES}
    found = [diagnosis.measured({"step": i, "learning_rate": 1e-3, "layers": layers}) for i in range(4)]
    assert [len(f) for f in found] == [0, 0, 1, 0]  # 3 x 3 x 40,000 looks: beyond 300,000
    assert found[2][0].layers == NAMES
    assert "not one code flips in 3 of 3 layers" in found[2][0].seen
    assert "100% of the peak" in found[2][0].seen


def test_lines_of_an_older_version_are_judged_by_what_they_hold():
    diagnosis = Diagnosis(1e-3, dict.fromkeys(NAMES, 10**6))
    for step in range(5):
        layers = {name: {"zeros": 0.32, "flips": 0.0, "weight_scale": 1.0} for name in NAMES}
        assert diagnosis.measured({"step": step, "layers": layers}) == []


def test_the_worst_layer_comes_first():
    diagnosis = Diagnosis(1e-3, dict.fromkeys(NAMES, 10**6))
    zeros = dict(zip(NAMES, (0.85, 0.99, 0.32), strict=True))
    layers = {name: SOUND | {"zeros": share} for name, share in zeros.items()}
    (finding,) = diagnosis.measured({"step": 50, "learning_rate": 1e-3, "layers": layers})
    assert finding.layers == (NAMES[1], NAMES[0])
    assert finding.seen == "one code holds most weights in 2 of 3 layers (worst a.1.q_proj: 99%)"
    line = finding.line("distill")
    assert (line["stage"], line["step"], line["kind"], line["do"]) == ("distill", 50, "collapse", ADVICE["collapse"])
    json.dumps(line)


def test_drowned_terms():
    def line(step, relations, gamma=2.0, task=1.0):
        return {"step": step, "gamma_attention": gamma, "grad_norm_attention": relations, "grad_norm_task": task}

    assert gradient_ratio(line(1, 3.0)) == 6
    assert gradient_ratio(line(1, 3.0, gamma=0.0)) is None  # before the first measurement, or switched off
    assert gradient_ratio({"step": 1, "gamma_attention": 3.0}) is None
    for relations, words in ((60.0, "relations is 121"), (0.001, "task is 495")):
        diagnosis = Diagnosis(1e-3, {})
        assert diagnosis.logged(line(1, relations)) == []
        assert diagnosis.logged(line(2, relations)) == []  # the same measurement once more
        (finding,) = diagnosis.logged(line(3, relations * 1.01))
        assert finding.kind == "drowned"
        assert words in finding.seen
        assert diagnosis.logged(line(4, relations)) == []
    diagnosis = Diagnosis(1e-3, {})
    assert [diagnosis.logged(line(i, 40.0 + i)) for i in range(9)] == [[]] * 9


def test_rising_loss():
    noise = torch.randn(90, generator=torch.Generator().manual_seed(0)).mul(0.05).tolist()
    falling = [2 - 0.01 * i + e for i, e in enumerate(noise)]
    flat = [1 + e for e in noise]
    rising = [2 - 0.02 * min(i, 60) + 0.02 * max(0, i - 60) + e for i, e in enumerate(noise)]
    assert rise_of_last_third(falling) is None
    assert rise_of_last_third(flat) is None
    assert rise_of_last_third([1.0] * 90) is None
    assert rise_of_last_third(rising) == pytest.approx(0.3, abs=0.1)
    assert rise_of_last_third(rising[-20:]) is None  # too few lines

    diagnosis = Diagnosis(1e-3, {})
    early = [diagnosis.logged({"step": i, "loss_ce": loss}, progress=0.4) for i, loss in enumerate(rising)]
    assert early == [[]] * 90
    (finding,) = diagnosis.logged({"step": 91, "loss_ce": rising[-1]})
    assert finding.kind == "rising"


def test_guessing():
    assert guessing_loss([[1], [2], [2], [1]]) == pytest.approx(math.log(2))
    assert guessing_loss([[1], [2], [2], [2]]) == pytest.approx(-(math.log(0.25) + 3 * math.log(0.75)) / 4)
    assert guessing_loss([[5, 1], [5, 2, 3, 4]] * 2) == pytest.approx(
        math.log(2) / 3
    )  # per token, of which they have 3 each
    assert guessing_loss([[1], [1]]) is None
    assert guessing_loss([]) is None
    assert guessing_loss([i // 3] for i in range(1000)) is None  # texts, not labels
    assert guessing_loss([i] for i in range(50)) is None  # few texts


@pytest.mark.parametrize(("loss", "warns"), [(0.69, True), (0.66, False)])
def test_a_stage_that_stays_at_chance(loss, warns):
    """Said once, at three quarters; a stage that learns in its second half has none."""
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0)).mul(0.02).tolist()
    for guessing in (math.log(2), None):
        diagnosis, said = Diagnosis(1e-3, {}, guessing), []
        for step in range(1, 41):
            line = {"step": step, "loss_ce": (0.69 if step < 20 else loss) + noise[step - 1]}
            said += diagnosis.logged(line, progress=step / 40)
        assert [(finding.kind, finding.step) for finding in said] == ([("chance", 30)] if warns and guessing else [])


# ------------------------------------------------------------------------------------------------- the callback


def sick_training(folder, steps, change, first=0, every=1, scale=0.024):
    """Runs HealthLog over a BitLinear of 120,000 weights, whose masters `change(weight, noise)` makes again in each step."""
    model = Chain(bit_linear((torch.randn(300, 400, generator=torch.Generator().manual_seed(1)) * scale).tolist()))
    weight, noise = model.layers[0].weight, torch.Generator().manual_seed(first)
    log = health.HealthLog(folder / "health.jsonl", "pretrain", every)
    args = SimpleNamespace(learning_rate=1e-5, output_dir=str(folder / "checkpoints"))
    state = SimpleNamespace(global_step=first, max_steps=100, is_world_process_zero=True)
    schedule = SimpleNamespace(get_last_lr=lambda: [1e-5])
    log.on_train_begin(args, state, None, model=model)
    for _ in range(first, steps):
        log.on_step_begin(args, state, None, model=model, lr_scheduler=schedule)
        model(torch.randn(4, 400, generator=noise)).square().sum().backward()
        with torch.no_grad():
            weight.copy_(change(weight, torch.randn(weight.shape, generator=noise).sign()))
        state.global_step += 1
        log.on_step_end(args, state, None, model=model)
    path = folder / "warnings.jsonl"
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()] if path.is_file() else []


def test_masters_in_bf16_are_called_frozen_and_in_fp32_not(tmp_path, capsys):
    assert sick_training(tmp_path / "fp32", 6, lambda w, noise: w - 1e-5 * noise) == []
    assert capsys.readouterr().out == ""
    swallowed = sick_training(tmp_path / "bf16", 6, lambda w, noise: (w.bfloat16() - 1e-5 * noise.bfloat16()).float())
    assert swallowed == ["frozen"]
    said = capsys.readouterr().out
    assert said.startswith("pretrain: WARNING at step 4, frozen: not one code flips in 1 of 1 layers (layers.0) over 3")
    assert "master weights are fp32" in said


def test_masters_that_grow_or_leave_the_middle(tmp_path):
    assert sick_training(tmp_path / "grow", 2, lambda w, noise: 2 * w) == ["drift"]
    assert sick_training(tmp_path / "binary", 1, lambda w, noise: 0.02 * w.sign()) == ["saturated"]
    assert sick_training(tmp_path / "thrash", 2, lambda w, noise: w + 0.01 * noise) == ["thrash"]
    assert sick_training(tmp_path / "empty", 2, lambda w, noise: w * (w > 0.08)) == ["collapse", "drift"]


def test_a_resumed_stage_goes_on_where_it_was(tmp_path):
    """Start scales, what was said and what was counted come back; lines beyond the checkpoint are not looked at."""
    assert sick_training(tmp_path, 4, lambda w, noise: 2 * w, every=2) == ["drift"]
    lines = (tmp_path / "health.jsonl").read_text().splitlines()
    assert [json.loads(line)["layers"]["layers.0"]["scale_drift"] for line in lines] == [4, 16]
    # no drift once more; frozen, in the third measurement without a flip
    assert sick_training(tmp_path, 6, lambda w, noise: w, first=4, every=2, scale=0.24) == ["drift", "frozen"]
    *_, last = (json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines())
    assert last["step"] == 6
    assert last["layers"]["layers.0"]["scale_drift"] == pytest.approx(10)
    assert sick_training(tmp_path, 2, lambda w, noise: w, first=1, every=2, scale=0.24) == ["drift", "frozen", "drift"]


# ---------------------------------------------------------------------------------------------- in a real Trainer

TRAIN = """
import json, sys
from pathlib import Path
import torch
import ranks
from bitdistill.distributed import process_group, presets
from bitdistill.training.health import HealthLog
from bitdistill.student.layers import bit_linears
from bitdistill.student.refine import refine
from transformers import Trainer

process_group.initialize("cpu")
zero, folder, found = process_group.without_local_rank(sys.argv[1:])
zero, folder, found = int(zero), Path(folder), Path(found)
model = ranks.tiny_model()
refine(model, gains={"model.layers.1.self_attn.o_proj": 0.5})
with torch.no_grad():
    model.model.layers[0].mlp.up_proj.weight.zero_().requires_grad_(False)
config = presets.deepspeed_config(zero, "none", precision="fp32", device="cpu")
if zero == 3:
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # gains are partitioned too
arguments = ranks.tiny_arguments(folder / "checkpoints", config, lr_scheduler_type="constant")
log = HealthLog(folder / "health.jsonl", "distill", 2)

class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

trainer = InOrder(model=model, args=arguments, train_dataset=ranks.tiny_data(), callbacks=[log])
trainer.train()
if process_group.is_main():
    lines = [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]
    warned = folder / "warnings.jsonl"
    warnings = [json.loads(line) for line in warned.read_text().splitlines()] if warned.is_file() else []
    found.write_text(json.dumps({"lines": lines, "warnings": warnings, "losses": ranks.losses(trainer)}))
process_group.barrier()
process_group.shutdown()
"""


DEAD = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return ranks.run(folder / "run", TRAIN, "0", str(folder), ranks=None)


@pytest.mark.slow
def test_a_real_step_is_measured_and_a_zeroed_layer_is_called_dead(one_process):
    found = one_process.found
    assert [line["step"] for line in found["lines"]] == [2, 4]
    for line in found["lines"]:
        assert line["learning_rate"] == 1e-2
        assert len(line["layers"]) == 14
        dead = line["layers"].pop(DEAD)
        assert (dead["zeros"], dead["flips"], dead["output_rms"]) == (1, 0, 0)
        assert "grad_norm" not in dead  # it is held frozen
        for name, layer in line["layers"].items():
            assert set(layer) == set(SOUND)
            assert layer["minus"] + layer["zeros"] + layer["plus"] == pytest.approx(1)
            if name not in ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"):  # beside and after it
                assert 0 < layer["flips"] < 0.5
                assert layer["grad_norm"] > 0
                assert layer["output_rms"] > 0
    (warning,) = [line for line in found["warnings"] if line["kind"] == "dead"]
    assert (warning["step"], warning["layers"]) == (2, [DEAD])
    assert "distill: WARNING at step 2, dead: 1 of 14 layers hold zeros alone" in one_process.stdout


@pytest.mark.slow
def test_partitioned_on_two_ranks(one_process, tmp_path):
    """Codes, scales and drift under ZeRO-3 are those of one process; rank 0's activations those of half of the batch."""
    found, alone = ranks.run(tmp_path / "run", TRAIN, "3", str(tmp_path)).found, one_process.found
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for ours, theirs in zip(found["lines"], alone["lines"], strict=True):
        for name, layer in ours["layers"].items():
            other = theirs["layers"].get(name, layer)
            assert set(layer) == set(other)
            for key in ("minus", "zeros", "plus", "weight_scale", "scale_drift", "flips"):
                assert layer[key] == pytest.approx(other[key], abs=2e-2), (name, key)
            for key in ("peak_to_rms", "output_rms", "zero_activations"):
                assert layer[key] == pytest.approx(other[key], rel=0.4, abs=0.05), (name, key)
    assert [line["kind"] for line in found["warnings"]] == [line["kind"] for line in alone["warnings"]]
