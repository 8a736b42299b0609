"""NaN and infinity end a stage before the optimizer's step, with their layer and rows, and the last checkpoint is good."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from bitdistill.distributed import process_group
from bitdistill.errors import UserError
from bitdistill.training.distill import fine_tune
from bitdistill.training.finite import FiniteSteps, gradients_not_finite, weights_not_finite, where_not_finite
from bitdistill.training.trainer import training_arguments
from tiny_students import student

IDS, MASK = torch.arange(3, 15).reshape(2, 6), torch.ones(2, 6, dtype=torch.int64)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_first_layer_that_is_not_finite_is_named(name):
    model = student(name)
    assert where_not_finite(model, IDS, MASK) is None
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(lambda _m, _i, output: output * torch.inf)
    assert "model.layers.1.mlp.down_proj" in where_not_finite(model, IDS, MASK)
    handle.remove()
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight[3] = torch.nan
    assert where_not_finite(model, IDS, MASK) == "weight model.layers.2.input_layernorm.weight"
    assert weights_not_finite(model) == ["model.layers.2.input_layernorm.weight"]


def test_gradients_are_named_from_the_loss_downward():
    model = student("llama")
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert gradients_not_finite(model) == []
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        model.get_parameter(name).grad[0, 0] = torch.inf
    assert gradients_not_finite(model) == [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    guard, state = FiniteSteps("distill", lambda: "training rows, from 0, 4, 7"), SimpleNamespace(global_step=11)
    with pytest.raises(UserError, match=r"1\.mlp\.up_proj.* stage distill at step 12 \(training rows, from 0, 4, 7\)"):
        guard.on_pre_optimizer_step(None, state, None, model=model)


def test_a_stage_that_meets_an_infinity_stops_before_the_step_and_keeps_a_good_checkpoint(tmp_path):
    """The loss of step 4 is infinite: its rows are named, and the checkpoint of step 2 has what step 2 made."""
    process_group.initialize("cpu", alone=True)
    model, seen = student("llama").train(), []

    def spoil(_module, _inputs, output):
        seen.append(len(seen))
        return output * (torch.inf if len(seen) > 3 else 1.0)

    model.model.layers[1].mlp.down_proj.register_forward_hook(spoil)
    rows = Dataset.from_dict({"input_ids": IDS.tolist() * 8, "labels": IDS.tolist() * 8})
    arguments = training_arguments(
        tmp_path / "checkpoints", deepspeed=None, seed=0, report_to=[], max_steps=6, save_steps=2, logging_steps=1,
        per_device_train_batch_size=2, learning_rate=1e-3,
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"loss_ce: .*step 4 \(training rows, from 0, \d+, \d+\), from output of model"
    ) as error:
        fine_tune(model, rows, arguments, pad_token_id=0, stage="teacher", run_dir=tmp_path, resume=False)
    assert "layers.1.mlp.down_proj" in str(error.value)
    kept = load_file(tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    assert not weights_not_finite(model)
