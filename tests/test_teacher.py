"""The offloaded teacher gives the resident one's logits, bit for bit, beside students of stage 2 and 3."""

import pytest
import torch

import ranks
from bitdistill.distributed import teacher

SCRIPT = """
import json, sys
from pathlib import Path
import ranks
from bitdistill.distributed import process_group, presets, teacher

process_group.initialize("cpu")
import torch
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_config

folder = Path(sys.argv[-2])
tokens = torch.arange(2 * 40).reshape(2, 40) % 64
tokens = (tokens * (2 * process_group.rank() + 3)) % 64  # another batch on each rank
found = {}
for zero in (2, 3):
    arguments = ranks.tiny_arguments(Path("out"), presets.deepspeed_config(zero, precision="bf16", device="cpu"))
    config_of_student = deepspeed_config()
    assert config_of_student is arguments.hf_deepspeed_config.config
    pairs = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"beside stage {zero}, {dtype}"
        resident = teacher.load_teacher(folder, dtype=dtype, device="cpu")
        found[f"student's config is back {name}"] = deepspeed_config() is config_of_student
        found[f"resident is whole {name}"] = all(
            p.numel() and not hasattr(p, "ds_id") for p in resident.module.parameters()
        )
        offloaded = teacher.load_teacher(folder, dtype=dtype, device="cpu", offload="cpu")
        found[f"student's config is back again {name}"] = (
            deepspeed_config() is config_of_student and is_deepspeed_zero3_enabled() == (zero == 3)
        )
        weights = list(offloaded.module.parameters())
        found[f"frozen {name}"] = all(hasattr(p, "ds_id") and p.dtype == dtype and not p.requires_grad for p in weights)
        found[f"elsewhere {name}"] = any(p.numel() == 0 for p in weights)
        found[f"eval {name}"] = not (resident.module.training or offloaded.module.training)
        found[f"module names {name}"] = [n for n, _ in resident.module.named_modules()] == [
            n for n, _ in offloaded.module.named_modules()
        ]
        frequencies = [b for n, b in offloaded.module.named_buffers() if n.endswith("inv_freq")]
        found[f"rope in fp32 {name}"] = bool(frequencies) and all(b.dtype == torch.float32 for b in frequencies)
        pairs[dtype] = resident, offloaded

    ranks.tiny_trainer(arguments).train()  # the student is real, and trains under autocast

    for dtype, (resident, offloaded) in pairs.items():
        name = f"beside stage {zero}, {dtype}"
        taps = []
        offloaded.module.model.layers[1].self_attn.q_proj.register_forward_hook(lambda m, i, o, t=taps: t.append(o))
        a, b = (t(input_ids=tokens).logits for t in (resident, offloaded))
        with torch.autocast("cpu", dtype=torch.bfloat16):  # the student's autocast does not reach the teacher
            c, d = (t(input_ids=tokens).logits for t in (resident, offloaded))
        found[f"logits equal {name}"] = all(torch.equal(a, x) for x in (b, c, d)) and a.dtype == dtype
        found[f"hooked {name}"] = len(taps) == 2 and taps[0].shape == (2, 40, 32)
        weight = torch.ones(64, requires_grad=True)
        (b.float() * weight).sum().backward()  # usable in a loss, and without a graph of its own
        found[f"in a loss {name}"] = not b.requires_grad and weight.grad is not None
        if process_group.is_main():
            torch.save(a, f"logits-{zero}-{dtype}.pt")
everywhere = process_group.all_reduce_sum(float(all(found.values())))
found["on every rank"] = everywhere == process_group.world_size() == 2
if process_group.is_main():
    Path(sys.argv[-1]).write_text(json.dumps(found))
process_group.shutdown()
"""


@pytest.mark.slow
def test_offloaded_equals_resident_beside_a_student(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    made = ranks.tiny_model(seed=5)
    for parameter in made.parameters():
        parameter.data.mul_(8)  # logits far from uniform
    made.save_pretrained(tmp_path / "teacher")
    found = ranks.run(tmp_path, SCRIPT, str(tmp_path / "teacher")).found
    assert [name for name, good in found.items() if not good] == []
    assert len(found) == 2 * 2 * 11 + 1

    tokens = (torch.arange(2 * 40).reshape(2, 40) % 64 * 3) % 64
    for dtype in (torch.float32, torch.bfloat16):  # and both equal a model that never met DeepSpeed
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=dtype).eval()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.no_grad():
            logits = plain(input_ids=tokens).logits
        torch.set_num_threads(threads)
        for zero in (2, 3):
            assert torch.equal(torch.load(tmp_path / f"logits-{zero}-{dtype}.pt"), logits)


def test_products_in_bf16_leave_everything_between_them_in_fp32(tmp_path):
    """The linear layers alone are rounded: the tied head and what leaves the model stay fp32, the logits move by bf16's error."""
    ranks.tiny_model().save_pretrained(tmp_path)
    tokens = torch.arange(24).reshape(2, 12)
    exact = teacher.load_teacher(tmp_path, dtype=torch.float32, device="cpu")
    rounded = teacher.load_teacher(tmp_path, dtype=torch.float32, device="cpu", products=torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in rounded.module.named_parameters()}
    assert {dtype for name, dtype in kinds.items() if "_proj" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in kinds.items() if "_proj" not in name} == {torch.float32}
    seen = []
    rounded.module.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    a, b = (one(input_ids=tokens).logits.float() for one in (exact, rounded))
    assert seen == [torch.float32]  # the residual stream
    assert 0 < (a - b).norm() / a.norm() < 0.03
