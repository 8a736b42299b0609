"""Losses that average right: one rank with 8 micro-steps, two with 4 and four with 2 give one loss and the same weights.

29 rows of unequal lengths and answers: the last step has 13 of 16 rows, so that one micro-batch is cut and others are empty.
Documents of unequal lengths make unequal numbers of labels in the blocks of stage 2.
"""

import math

import pytest
import torch

import ranks
from bitdistill.training.row_order import RowOrder

SCRIPT = """
import json, sys
from pathlib import Path

from bitdistill.distributed import presets, process_group

world = process_group.ranks_started()
process_group.initialize("cpu", alone=world == 1)
import torch
from torch.utils.data import IterableDataset
import ranks
from test_row_cache import another_teacher, some_rows
from bitdistill.distributed.checkpoint import full_state_dict
from bitdistill.training.distill import Distillation, fine_tune
from bitdistill.training.pretrain import pretrain
from bitdistill.training.trainer import release, training_arguments

out = Path(sys.argv[-1])
ROWS = some_rows([2 + (7 * i) % 19 for i in range(29)])


class Blocks(IterableDataset):
    block_size, epochs = 12, 0

    def __iter__(self):
        draw = torch.Generator().manual_seed(3)
        for number in range(10**6):
            ids, cut = torch.randint(0, 64, (12,), generator=draw), 1 + number % 11
            labels = ids.clone()
            labels[cut : cut + number % 3] = -100
            positions = torch.cat([torch.arange(cut), torch.arange(12 - cut)])
            yield {"input_ids": ids, "labels": labels, "position_ids": positions, "block": number}

    def state_for(self, blocks):
        return {}


def train(name, folder):
    section = None if world == 1 else presets.deepspeed_config(1, precision="fp32", device="cpu")
    arguments = training_arguments(
        folder / f"{name}-checkpoints", deepspeed=section, seed=0, report_to=[], logging_steps=1, learning_rate=1e-3,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, per_device_train_batch_size=2,
        gradient_accumulation_steps=8 // world, num_train_epochs=2.0, max_steps=2 if name == "pretrain" else -1,
    )
    model = ranks.tiny_model(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = {"arguments": arguments, "stage": name, "run_dir": folder, "resume": False}
    if name == "pretrain":
        trainer, _ = pretrain(model, Blocks(), **options)
    else:
        objective = None
        if name == "distill":
            objective = Distillation(model, another_teacher(), relation_layers=[-1, 0], split_heads=2, gamma_every=1)
        trainer, _ = fine_tune(model, ROWS, pad_token_id=0, objective=objective, **options)
    lines = [line for line in trainer.state.log_history if "loss_ce" in line]
    found = [{key: value for key, value in line.items() if key.startswith("loss")} for line in lines]
    after = sorted((full_state_dict(trainer.model_wrapped) or {}).items())  # None but on rank 0
    release(trainer)
    return found, [x for key, value in after for x in (value.float() - before[key]).flatten().tolist()]


found = {name: train(name, out.parent) for name in ("teacher", "distill", "pretrain")}
if process_group.is_main():
    out.write_text(json.dumps(found))
process_group.shutdown()
"""


@pytest.mark.slow
def test_one_two_and_four_ranks_give_one_loss_and_the_same_weights(tmp_path):
    found = {world: ranks.run(tmp_path / str(world), SCRIPT, ranks=world).found for world in (1, 2, 4)}
    for world in (2, 4):
        for stage, (lines, moved) in found[1].items():
            others, also_moved = found[world][stage]
            assert len(others) == len(lines) == (2 if stage == "pretrain" else 4)
            for ours, theirs in zip(others, lines, strict=True):
                assert ours.keys() == theirs.keys()
                for name in theirs:
                    assert math.isfinite(theirs[name])
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), (world, stage, name)
            one, other = torch.tensor(moved), torch.tensor(also_moved)
            assert one.norm() > 0
            assert (other - one).norm() < 1e-3 * one.norm(), (world, stage)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_of_rows_is_that_of_one_rank_filled_up(grouped):
    lengths = [3, 9, 4, 7, 1, 8, 2, 6, 5, 9, 1] if grouped else None
    orders = {ranks_now: RowOrder(11, 2 * ranks_now, 5, lengths, 8) for ranks_now in (1, 2, 3, 4)}
    for ranks_now, order in orders.items():
        for epoch in (0, 1):
            order.set_epoch(epoch)
            orders[1].set_epoch(epoch)
            rows = list(order)
            assert len(rows) == len(order) == -(-11 // (2 * ranks_now)) * 2 * ranks_now
            assert sorted(rows[:11]) == list(range(11))
            assert rows[:11] == list(orders[1])[:11]
            assert rows[11:] == [11] * (len(rows) - 11)
    orders[1].set_epoch(0)
    first = list(orders[1])
    orders[1].set_epoch(1)
    assert list(orders[1]) != first
