"""Presets: what is refused, what is fixed, and that transformers and DeepSpeed train with each of them the same."""

import itertools
import json
import os
import sys
from pathlib import Path

import pytest

import ranks
from bitdistill.distributed.presets import deepspeed_config, products, teacher_config
from bitdistill.errors import UserError

VALID = [
    (zero, offload)
    for zero, offload in itertools.product((0, 1, 2, 3), ("none", "cpu", "nvme"))
    if offload == "none" or (offload == "cpu" and zero > 0) or (offload == "nvme" and zero == 3)
]


def test_auto_takes_bf16_where_there_are_instructions_for_it_and_the_users_word_wins():
    def resolved(precision, device, **has):
        return [products(precision, device, ternary=ternary, **has) for ternary in (False, True)]

    assert resolved("auto", "cpu", has_bf16=True) == [("bf16", None), ("fp32", "bf16")]
    assert resolved("auto", "cpu", has_bf16=False) == [("fp32", None)] * 2
    assert resolved("auto", "cuda", has_bf16=False) == [("bf16", None)] * 2
    for precision in ("fp32", "bf16"):
        for device, has_bf16 in itertools.product(("cpu", "cuda"), (False, True)):
            assert resolved(precision, device, has_bf16=has_bf16) == [(precision, None)] * 2


@pytest.mark.parametrize(("zero", "offload"), VALID)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_parameters_are_fp32_in_every_combination(zero, offload, precision):
    config = deepspeed_config(zero, offload, precision=precision, device="cuda", nvme_path="/disk")
    assert json.loads(json.dumps(config)) == config
    assert not config["bf16"]["enabled"]
    assert not config["fp16"]["enabled"]
    assert ("torch_autocast" in config) == (precision != "fp32")
    section = config["zero_optimization"]
    assert section["stage"] == zero
    assert ("offload_optimizer" in section) == (offload != "none")
    assert ("offload_param" in section) == (offload != "none" and zero == 3)
    assert ("nvme_path" in section.get("offload_param", {})) == (offload == "nvme")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"zero": 4}, "zero"),
        ({"zero": "3"}, "zero"),
        ({"zero": 0, "offload": "cpu"}, "offload"),
        ({"zero": 0, "offload": "nvme", "nvme_path": "/d"}, "offload"),
        ({"zero": 2, "offload": "nvme", "nvme_path": "/d"}, "offload"),
        ({"zero": 3, "offload": "nvme"}, "nvme_path"),
        ({"zero": 3, "offload": "disk"}, "offload"),
        ({"precision": "fp16"}, "precision"),
        ({"precision": "int8"}, "precision"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_refusals_name_field_expectation_and_remedy(arguments, field):
    with pytest.raises(UserError, match=rf"^{field}: expected .+; got .+\. .+\.$"):
        deepspeed_config(**{"zero": 2, "precision": "fp32", "device": "cpu"} | arguments)


def test_teacher_needs_an_offload():
    assert teacher_config("cpu", precision="bf16", device="cpu")["zero_optimization"]["stage"] == 3
    with pytest.raises(UserError, match=r"^offload: expected 'cpu' or 'nvme'"):
        teacher_config("none", precision="bf16", device="cpu")
    with pytest.raises(UserError, match=r"^nvme_path: "):
        teacher_config("nvme", precision="bf16", device="cpu")


def test_presets_import_neither_torch_nor_deepspeed(tmp_path):
    script = "import sys, json, bitdistill.distributed.presets\n" + (
        "json.dump([m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules], open(sys.argv[-1], 'w'))"
    )
    assert ranks.run(tmp_path, script, ranks=None, fresh=True).found == []


TRAIN_ALL = """
import json, sys
from pathlib import Path
import ranks
from bitdistill.distributed import checkpoint, process_group, presets

process_group.initialize("cpu")
import torch
found = {}
for zero, offload, precision in json.loads(sys.argv[1]):
    config = presets.deepspeed_config(zero, offload, precision=precision, device="cpu")
    trainer = ranks.tiny_trainer(ranks.tiny_arguments(Path("out"), config))
    trainer.train()
    state = checkpoint.full_state_dict(trainer.model_wrapped)
    name = f"{zero}-{offload}-{precision}"
    torch.save(state, name)
    found[name] = ranks.losses(trainer)
Path(sys.argv[-1]).write_text(json.dumps(found))
process_group.shutdown()
"""


@pytest.mark.slow
def test_every_preset_trains_alike_on_a_machine_without_compiler(tmp_path):
    import torch

    combinations = [(z, o, p) for (z, o), p in itertools.product(VALID, ("fp32", "bf16")) if o != "nvme"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "extensions").mkdir()
    no_compiler = {
        "PATH": str(tmp_path / "bin"),
        "CC": "/bin/false",
        "CXX": "/bin/false",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV", sys.prefix),
    }
    outcome = ranks.run(tmp_path, TRAIN_ALL, json.dumps(combinations), ranks=None, env=no_compiler, fresh=True)
    assert list((tmp_path / "extensions").iterdir()) == [], "something was compiled"

    plain_losses, plain_state = ranks.plain_training()
    assert len(outcome.found) == len(combinations)
    for name, found in outcome.found.items():
        state = torch.load(Path(tmp_path, name))
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}, name
        assert state.keys() == plain_state.keys(), name
        if name.endswith("fp32"):
            assert found == pytest.approx(plain_losses, abs=2e-6), name
            for key, value in plain_state.items():
                # Adam's g / (|g| + 1e-8) turns the rounding of a gradient near 0 into 1e-5, of steps of 1e-2:
                # additive noise of 1e-7 of the largest gradient moves plain torch as far.
                torch.testing.assert_close(state[key], value, atol=5e-5, rtol=0, msg=f"{name}: {key}")
        else:  # bf16 matmuls: near, and not the same
            assert found != pytest.approx(plain_losses, abs=2e-6), name
            assert found == pytest.approx(plain_losses, abs=2e-2), name
            # What was subtracted from an fp32 master survives: bf16 parameters would have 16 zero bits at the end.
            assert (state["lm_head.weight"].bfloat16().float() != state["lm_head.weight"]).float().mean() > 0.9, name
