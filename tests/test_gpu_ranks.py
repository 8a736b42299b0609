"""The kernels (interpreted) in our Trainer, on two ranks, under DeepSpeed's ZeRO 2 and 3: the losses of the reference, and
weights quantized once per step where they stay whole."""

import pytest

import ranks

pytest.importorskip("triton")

pytestmark = [pytest.mark.slow]

SCRIPT = """
import json, os, sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
zero, out = int(sys.argv[-2]), Path(sys.argv[-1])

import torch
from bitdistill.distributed import process_group, presets

process_group.initialize("cpu")
import ranks
from bitdistill.student import divided_codes, layers, sharing
from bitdistill.kernels.gpu import bit_linear, matmul, quantize
from bitdistill.training.losses import cross_entropy, next_tokens
from bitdistill.student.refine import refine
from bitdistill.training.trainer import Objective, StageTrainer, collate_blocks, release

matmul.FP32_TILES = (matmul.Tile(128, 128, 128, 4, 1),)
calls = {"quantize_weights": 0, "quantize_activation": 0, "int8_linear": 0}


def count(module, name):
    function = getattr(module, name)

    def wrapper(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    setattr(module, name, wrapper)


count(quantize, "quantize_weights")
count(quantize, "quantize_activation")
count(matmul, "int8_linear")


class NextToken(Objective):
    def __call__(self, model, batch, counts):
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return {"ce": (1.0, cross_entropy(logits, next_tokens(batch["labels"]), counts.answer_tokens))}


class InOrder(StageTrainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(kernels):
    for module in (divided_codes, layers, sharing):
        module.kernels_for = lambda device: kernels
    model = ranks.tiny_model()
    refine(model)
    config = presets.deepspeed_config(zero, precision="fp32", device="cpu")
    folder = out.parent / ("kernels" if kernels else "reference")
    folder.mkdir(exist_ok=True)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = InOrder(
        objective=NextToken(), stage="test", run_dir=folder, model=model, train_dataset=ranks.tiny_data(),
        data_collator=collate_blocks,
        args=ranks.tiny_arguments(folder, config, remove_unused_columns=False, gradient_checkpointing=zero == 2,
                                  gradient_checkpointing_kwargs={"use_reentrant": False}, **options),
    )
    trainer.train()
    history = ranks.losses(trainer)
    release(trainer)
    return history


found = {"reference": train(None)}
assert not any(calls.values())
found |= {"kernels": train(bit_linear), "calls": calls}
if process_group.is_main():
    out.write_text(json.dumps(found))
process_group.shutdown()
"""


@pytest.mark.parametrize("zero", [2, 3])
def test_losses_equal_the_reference(zero, tmp_path):
    found = ranks.run(tmp_path / "run", SCRIPT, str(zero), limit_seconds=400).found
    assert len(found["reference"]) == 2
    assert found["kernels"] == pytest.approx(found["reference"], rel=1e-4)
    steps, micro_steps, decoder_layers = 2, 2, 2
    passes = steps * micro_steps * decoder_layers
    if zero == 2:  # checkpointed: all is computed twice, one launch per step for all weights; q/k/v, o, gate/up, down
        expected = {"quantize_weights": steps, "quantize_activation": 2 * 2 * passes, "int8_linear": 2 * 4 * passes}
    else:  # the codes of divided weights are gathered (divided_codes.py); q, k, v and gate, up share those of their input still
        expected = {"quantize_weights": 0, "quantize_activation": 4 * passes, "int8_linear": 7 * passes}
    assert found["calls"] == expected
