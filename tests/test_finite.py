"""NaN and infinity end a stage before the optimizer's step, with their layer and rows, and the last checkpoint is good."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from bitdistill.distributed import process_group
from bitdistill.errors import UserError
from bitdistill.training.distill import fine_tune
from bitdistill.training.finite import FiniteSteps, weights_not_finite, where_not_finite
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


def guarded(name, learning_rate=1e-3):
    """A model, its optimizer, and the guard, as a Trainer would have set it up at the beginning of step 12."""
    model = student(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    guard = FiniteSteps("distill", lambda: "training rows, from 0, 4, 7", lambda: {"student": model})
    guard.on_train_begin(None, None, None, model=model, optimizer=SimpleNamespace(optimizer=optimizer))
    guard.on_step_begin(None, SimpleNamespace(global_step=11), None)
    return model, optimizer, guard


def test_the_gradient_nearest_to_the_loss_is_named_and_no_weight_has_moved():
    """The NaN arises in one layer's gradient; those of all layers below it follow, and clipping would spread it to the rest."""
    model, optimizer, guard = guarded("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda _m, _i, output: output.register_hook(lambda gradient: gradient * torch.nan) and None
    )
    model(input_ids=IDS, labels=IDS).loss.backward()
    wrong = guard.gradients_not_finite()
    assert wrong[0] == "model.layers.1.mlp.down_proj.weight"
    assert not any(name.startswith(("model.layers.2", "model.norm")) for name in wrong)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(
        UserError, match=r"1\.mlp\.down_proj\.weight, in stage distill at step 12 \(training rows, from 0, 4, 7\)"
    ):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_finite_gradients_pass_and_each_step_is_looked_at_anew():
    model, optimizer, guard = guarded("llama")
    for step in (11, 12):
        for _ in range(2):  # micro-steps
            model(input_ids=IDS, labels=IDS).loss.backward()
        assert guard.gradients_not_finite() == []
        optimizer.step()
        guard.on_step_begin(None, SimpleNamespace(global_step=step + 1), None)
    with torch.no_grad():
        model.get_input_embeddings().weight[IDS[0, 0]] = torch.inf
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(UserError, match=r"grad_norm.*step 14"):
        optimizer.step()
    guard.on_train_end(None, None, None)
    guard.on_step_begin(None, SimpleNamespace(global_step=14), None)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()  # without its hooks it sees nothing


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
        UserError,
        match=r"loss_ce, in stage teacher at step 4 \(training rows, from 0, \d+, \d+\), from output of model",
    ) as error:
        fine_tune(model, rows, arguments, pad_token_id=0, stage="teacher", run_dir=tmp_path, resume=False)
    assert "layers.1.mlp.down_proj" in str(error.value)
    kept = load_file(tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    assert not weights_not_finite(model)
