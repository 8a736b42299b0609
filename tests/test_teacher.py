"""The offloaded teacher gives the resident one's logits, bit for bit, beside students of stage 2 and 3."""

import pytest
import ranks

SCRIPT = """
import json, sys
from pathlib import Path
import ranks
from bitdistill.distributed import launch, presets, teacher

launch.initialise("cpu")
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_config

folder = Path(sys.argv[-2])
tokens = torch.arange(2 * 40).reshape(2, 40) % 64
tokens = (tokens * (launch.rank() + 3)) % 64  # another batch on each rank
found = {}
for zero in (2, 3):
    arguments = ranks.tiny_arguments(Path("out"), presets.deepspeed_config(zero, precision="bf16", device="cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        resident = teacher.load_teacher(folder, dtype=dtype, device="cpu")
        found[f"config of the student is back {zero} {dtype}"] = (
            is_deepspeed_zero3_enabled() == (zero == 3) and deepspeed_config() is arguments.hf_deepspeed_config.config
        )
        assert all(p.numel() and not hasattr(p, "ds_id") for p in resident.module.parameters())
        offloaded = teacher.load_teacher(folder, dtype=dtype, device="cpu", offload="cpu")
        assert deepspeed_config() is arguments.hf_deepspeed_config.config
        found[f"parameters are elsewhere {zero} {dtype}"] = all(
            hasattr(p, "ds_id") and p.dtype == dtype and not p.requires_grad for p in offloaded.module.parameters()
        ) and any(p.numel() == 0 for p in offloaded.module.parameters())
        found[f"eval {zero} {dtype}"] = not (resident.module.training or offloaded.module.training)
        found[f"names {zero} {dtype}"] = [n for n, _ in resident.module.named_modules()] == [
            n for n, _ in offloaded.module.named_modules()
        ]
        rope = [b for n, b in offloaded.module.named_buffers() if n.endswith("inv_freq")]
        found[f"rope fp32 {zero} {dtype}"] = bool(rope) and all(b.dtype == torch.float32 for b in rope)

        student = ranks.tiny_trainer(arguments)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() if zero == 2 else None
        taps = []
        handle = offloaded.module.model.layers[1].self_attn.q_proj.register_forward_hook(
            lambda module, inputs, output: taps.append(output)
        )
        student.train()  # the teacher stands beside a student that really trains
        a, b = (t(input_ids=tokens).logits for t in (resident, offloaded))
        with torch.autocast("cpu", dtype=torch.bfloat16):  # the student's autocast does not reach the teacher
            c, d = (t(input_ids=tokens).logits for t in (resident, offloaded))
        found[f"equal {zero} {dtype}"] = all(torch.equal(a, x) for x in (b, c, d)) and a.dtype == dtype
        if plain is not None:
            with torch.no_grad():
                found[f"equal plain {zero} {dtype}"] = torch.equal(a, plain(input_ids=tokens).logits)
        found[f"hooked {zero} {dtype}"] = len(taps) == 2 and taps[0].shape == (2, 40, 32)
        weight = torch.ones(64, requires_grad=True)
        (b.float() * weight).sum().backward()  # usable in a loss, and without a graph of its own
        found[f"in a loss {zero} {dtype}"] = not b.requires_grad and weight.grad is not None
        handle.remove()
everywhere = launch.all_reduce_sum(float(all(found.values())))
found["on every rank"] = everywhere == launch.world_size() == 2
if launch.is_main():
    Path(sys.argv[-1]).write_text(json.dumps(found))
launch.shutdown()
"""


@pytest.mark.slow
def test_offloaded_equals_resident_beside_a_student(tmp_path):
    teacher = ranks.tiny_model(seed=5)
    for parameter in teacher.parameters():
        parameter.data.mul_(8)  # logits far from uniform
    teacher.save_pretrained(tmp_path / "teacher")
    found = ranks.run(tmp_path, SCRIPT, str(tmp_path / "teacher")).found
    assert [name for name, good in found.items() if not good] == []
    assert len(found) > 20
