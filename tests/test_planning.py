"""The planner: its arithmetic on a model of round numbers, what fits first, published sizes, and the command."""

import dataclasses
import json

import pytest
from transformers import Qwen3Config

from bitdistill import cli, planning
from bitdistill.errors import UserError
from bitdistill.planning import Device, Setting, Shape, Work, activation_bytes, memory_parts, plans, shape_of

ROUND = Shape(
    parameters=1000,
    linear_weights=800,
    vocabulary=10,
    hidden=4,
    intermediate=8,
    layers=2,
    query_width=4,
    key_value_width=2,
)
QWEN3_4B = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 2560, "intermediate_size": 9728,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True, "max_position_embeddings": 40960, "hidden_act": "silu", "rms_norm_eps": 1e-6,
}  # fmt: skip


def work(**changes):
    return dataclasses.replace(
        Work(ROUND, total_tokens=8000, tokens_per_micro_step=100, tokens_per_step=400), **changes
    )


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"),
    [(0, 4000, 4000, 8000), (1, 4000, 4000, 2000), (2, 4000, 1000, 2000), (3, 1000, 1000, 2000)],
)
def test_zero_divides_what_the_paper_says(zero, weights, gradients, optimizer):
    parts, host = memory_parts(work(), Setting(zero), 4, "cuda")
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (weights, gradients, optimizer)
    assert parts["codes"] == 800
    assert host == 0


def test_offload_moves_bytes_to_the_host():
    parts, host = memory_parts(work(), Setting(3, offload=True), 4, "cuda")
    assert "optimizer" not in parts
    assert "weights" not in parts
    assert host == 2000 + 1000 + 1000  # moments, DeepSpeed's flat copy, weights: a quarter of 8, 4 and 4 bytes each


def test_a_teacher_is_whole_or_a_share_on_the_host():
    resident, _ = memory_parts(work(teacher=ROUND), Setting(0), 4, "cuda")
    offloaded, host = memory_parts(work(teacher=ROUND), Setting(0, teacher_offload=True), 4, "cuda")
    assert resident["teacher"] == 2000
    assert host == 500
    assert offloaded["teacher"] == 2 * 2000 / 2  # two of its two layers at a time


def test_states_of_a_teacher_by_hand():
    """Two layers of width 4, 100 tokens: the teacher's in its own dtype, and in fp32 what a forced layer reads."""
    for kind, item in (("cuda", 2), ("cpu", 4)):
        assert "states" not in memory_parts(work(teacher=ROUND), Setting(0), 1, kind)[0]
        compared, forced = (
            memory_parts(work(teacher=ROUND, states=True, forced=forced), Setting(0), 1, kind)[0]["states"]
            for forced in (False, True)
        )
        assert (compared, forced) == (100 * 2 * 4 * item, 100 * 2 * 4 * (item + 4))


def test_activations_by_hand():
    """Of a token and layer on a CPU: 4 x 2 x 4 of the residual stream, 4 x (5 x 4 + 2 x 8) between, 2 x 4 + 4 + 8 codes."""
    assert activation_bytes(ROUND, 1, "cpu") == 2 * (32 + 144 + 20)
    assert activation_bytes(ROUND, 1, "cuda") == 2 * (32 + 72 + 20)
    assert activation_bytes(ROUND, 1, "cpu", ternary=False) == 2 * (32 + 144 + 80)
    assert activation_bytes(ROUND, 7, "cpu", checkpointing=True) == 7 * (2 * 16 + 196)


def test_time_network_and_cost_by_hand():
    device = Device("cuda", 1e12, flop_per_second=1e3, link_bytes_per_second=1e3, price_per_hour=2.0)
    plan = next(plan for plan in plans(work(), device, 4) if plan.setting == Setting(1))
    computing = 6 * (800 + 40) * 400 / 4e3
    assert plan.network_bytes == 3 * 4 * 1000 * 3 / 4
    assert plan.step_seconds == pytest.approx(computing + 9.0)
    assert plan.days == pytest.approx(20 * plan.step_seconds / 86400)
    assert plan.cost == pytest.approx(plan.days * 24 * 2 * 4)
    measured = next(p for p in plans(work(), device, 4, tokens_per_second=50.0) if p.setting == Setting(1))
    assert measured.step_seconds == pytest.approx(400 / 200 + 9.0)


def test_what_a_rank_sends_by_hand():
    """1,000 parameters, of which 800 ternary, on two ranks: half of 4 bytes each time. bench/communication.py counts it."""
    sent = [planning.sent_bytes(1000, 800, zero, 2, micro_steps=3) for zero in (0, 1, 2)]
    assert sent == [2 * 2000, 3 * 2000, 7 * 2000]
    assert planning.sent_bytes(1000, 0, 3, 2, micro_steps=3) == (3 + 3) * 2000
    assert planning.sent_bytes(1000, 800, 3, 2, micro_steps=3) == 3 * 2000 + 3 * 400 + 100
    assert planning.sent_bytes(1000, 800, 3, 2, micro_steps=3, live=199) == 3 * 2000 + 2 * 3 * 400 + 100
    assert planning.sent_bytes(1000, 800, 3, 2, 3, tied=100, live=199) == 3 * 2000 + 2 * 3 * (400 + 200) + 100


def test_what_fits_comes_first_and_then_the_fastest():
    small = Device("cuda", planning.PROCESS_BYTES["cuda"] / planning.FILLED + 13_000_000, 1e9, 1e9, 1.0)
    found = plans(work(student=dataclasses.replace(ROUND, parameters=1_000_000)), small, 4)
    assert [plan.fits for plan in found] == sorted((plan.fits for plan in found), reverse=True)
    assert 0 < sum(plan.fits for plan in found) < len(found)
    assert not any(plan.fits for plan in found if plan.setting.zero == 0)  # 16 bytes for each parameter
    assert len({plan.setting for plan in found}) == len(found)


def test_a_published_size():
    """Qwen3-4B: 4.0 billion parameters, 3.6 without the embedding (its model card)."""
    shape = shape_of(Qwen3Config(**{key: value for key, value in QWEN3_4B.items() if key != "model_type"}))
    assert round(shape.parameters / 1e9, 1) == 4.0
    assert round((shape.parameters - shape.vocabulary * shape.hidden) / 1e9, 1) == 3.6
    assert (shape.query_width, shape.key_value_width, shape.layers) == (4096, 1024, 36)


@pytest.mark.parametrize("text", ["8xV999", "0xH100", "-1xH100", "H", "x", "8x", "1.5xH100", ""])
def test_unknown_devices(text):
    with pytest.raises(UserError, match="as in 8xH200"):
        planning.devices_of(text)


def test_known_devices():
    assert planning.devices_of("8xH200") == (8, "H200")
    assert planning.devices_of("h100") == (1, "H100")
    assert planning.devices_of("2xRTX4090") == (2, "RTX4090")
    assert planning.devices_of("2xcpu") == (2, "CPU")


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["bitdistill", "plan", *arguments])
    status = cli.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    return str(tmp_path)


def test_the_command_needs_nothing_but_a_config(monkeypatch, capsys, folder):
    status, out, _ = run(monkeypatch, capsys, "--model", folder, "--gpus", "8xH200", "--tokens", "10e9")
    assert status == 0
    assert f"--model {folder} --zero" in out.splitlines()[-1]
    assert "deepspeed --num_gpus 8" in out
    assert "1e+10 tokens on 8 x H200" in out


def test_stage_2_has_a_teacher_where_states_are_compared(monkeypatch, capsys, folder):
    def parts(*arguments):
        out = run(monkeypatch, capsys, "--model", folder, "--gpus", "8xH200", *arguments)[1]
        return out[out.index("GiB per rank of the first line") : out.index("Assumed:")]

    assert "teacher" in parts()
    assert "states" in parts()
    assert "teacher" not in parts("--hidden_states", "false")
    assert "states" not in parts("--stage", "distill", "--teacher_cache", "true")
    assert "states" in parts("--stage", "distill")


def test_one_cpu_needs_no_deepspeed(monkeypatch, capsys, folder):
    arguments = ("--model", folder, "--gpus", "1xCPU", "--memory_gb", "200", "--block_size", "128")
    assert run(monkeypatch, capsys, *arguments)[1].splitlines()[-1] == f"python bitdistill/train.py --model {folder}"


def test_the_command_says_that_nothing_fits(monkeypatch, capsys, folder):
    arguments = ("--model", folder, "--gpus", "1xRTX4090", "--stage", "distill", "--host_memory_gb", "8")
    status, out, _ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    assert "Nothing fits: the smallest needs" in out
    assert "deepspeed --num_gpus" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "model"),
        (("--model", "/nowhere/at/all"), "no such folder"),
        (("--model", "FOLDER", "--tokens", "0"), "above zero"),
        (("--model", "FOLDER", "--gpus", "9xT1"), "as in 8xH200"),
        (("--model", "FOLDER", "--stage", "base"), "pretrain or distill"),
        (("--model", "FOLDER", "--memory_gb", "-1"), "memory_gb"),
        (("--model", "FOLDER", "--block_size", "0"), "block_size"),
        (("--model", "FOLDER", "--tokens_per_second", "0"), "above zero"),
        (("--model", "FOLDER", "--gpus", "8xH200", "--tokens_per_step", "4096"), "one micro-step of 8,192 tokens"),
        (("--model", "FOLDER", "--host_memory_gb", "-3"), "host_memory_gb"),
        (("--model", "FOLDER", "--price_per_hour", "-3"), "price_per_hour"),
        (("--model", "FOLDER", "--teacher_cache", "true", "--hidden_states", "true"), "hidden_states: expected false"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, folder, arguments, said):
    status, _, err = run(monkeypatch, capsys, *(folder if one == "FOLDER" else one for one in arguments))
    assert status == 2
    assert said in err
    assert "Traceback" not in err
