"""bench/gpu_proof.py without a GPU: its arithmetic, its clock, its table, its handling of tests, and that its set-up runs."""

import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton exists for Linux only")

import gpu_baselines
import gpu_proof
import gpu_timing
from bitdistill.kernels import reference
from bitdistill.training import losses, relations
from gpu_timing import CudaTimer, Deadline, OutOfTime, Target, Timing, judge
from random_models import SHAPES

ROOT = Path(__file__).resolve().parents[1]
TIMING = Timing(2e-3, 1.9e-3, 2.4e-3)


# ---------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("judged", "figure", "met"),
    [
        ({"floor": 1.82e-3, "target": Target("floor", 0.9)}, 0.91, True),
        ({"floor": 1.7e-3, "target": Target("floor", 0.9)}, 0.85, False),
        ({"floor": 1e-3}, 0.5, None),
        ({}, None, None),
        ({"target": Target("seconds", 2e-3)}, 2e-3, True),
        ({"target": Target("seconds", 1.9e-3)}, 2e-3, False),
        ({"target": Target("speedup", 1.5, "torch"), "contender": 3e-3}, 1.5, True),
        ({"target": Target("speedup", 1.6, "torch"), "contender": 3e-3}, 1.5, False),
        ({"target": Target("speedup", 0.0, "torch"), "contender": 3e-3}, 1.5, None),
        ({"target": Target("speedup", 1.6, "torch")}, None, None),
        ({"target": Target("bytes", 64e6), "measured": 63e6}, 63e6, True),
        ({"target": Target("error", 1e-4), "measured": 2e-4}, 2e-4, False),
        ({"target": Target("error", 1e-4), "measured": math.nan}, math.nan, False),
        ({"target": Target("fewer", 500, "torch"), "measured": 2e6, "contender": 1e9}, 500, True),
        ({"target": Target("fewer", 501, "torch"), "measured": 2e6, "contender": 1e9}, 500, False),
    ],
)
def test_judge(judged, figure, met):
    row = judge("section", "what", TIMING, **judged)
    assert row.figure == pytest.approx(figure, nan_ok=True)
    assert row.met is met
    untimed = judge("section", "what", None, **judged)
    assert untimed.met is (met if judged.get("target", Target()).kind in ("bytes", "error", "fewer") else None)


def test_copies_are_more_than_the_cache():
    assert gpu_timing.copies_needed(2**20) == 64
    assert gpu_timing.copies_needed(2**20, most=512) == 256
    assert gpu_timing.copies_needed(100 * 2**20) == 3
    assert gpu_timing.copies_needed(2**40) == 2
    assert gpu_timing.copies_needed(0) == 64


def test_floors_are_those_of_the_targets():
    """At 4.3 TB/s and 790 TFLOP/s: figures that were worked out by hand."""
    from gpu_sections import Bench

    bench = Bench(gpu_timing.DryTimer(), Deadline(1), "cpu", 16_384, {}, copy_bandwidth=4.3e12, matrix_rate=790e12)
    assert bench.moved(3 * 16_384 * 2048) == pytest.approx(23.4e-6, rel=1e-3)
    assert bench.moved(5 * SHAPES["0.6B"].linear_weights()) == pytest.approx(0.512e-3, rel=1e-3)
    assert 4 * 2 * 8192 * 1024 * 151_936 / bench.matrix_rate == pytest.approx(12.9e-3, rel=1e-2)


def test_the_table():
    rows = [
        judge("one", "first", TIMING, floor=1.9e-3, target=Target("floor", 0.9), note="note"),
        judge("one", "second", Timing(12.3e-6, 12e-6, 150e-6, True), target=Target("seconds", 10e-6)),
        judge("two", "third", None, target=Target("bytes", 2.6e9), measured=6.4e7),
        judge("two", "fourth", TIMING, target=Target("speedup", 2, "torch"), contender=5e-3),
    ]
    text = gpu_timing.show(rows).splitlines()
    assert text[0].split() == ["what", "floor", "target", "median", "[min,", "max]", "ratio", "note"]
    assert [line for line in text if line.endswith(":")] == ["one:", "two:"]
    first, second, third, fourth = (
        next(line for line in text if name in line) for name in ("first", "second", "third", "fourth")
    )
    assert " ".join(first.split()) == "first 1.9 ms >= 90 % of it 2 ms [1.9 ms, 2.4 ms] 95 % of floor met note"
    assert " ".join(second.split()) == "second - <= 10 us 12.3 us [12 us, 150 us] * - NOT MET"
    assert " ".join(third.split()) == "third - <= 2.6 GB - 64 MB met"
    assert " ".join(fourth.split()) == "fourth - >= 2 x torch 2 ms [1.9 ms, 2.4 ms] 2.5 x met"
    assert text[-1].startswith("* waits")
    assert json.loads(json.dumps([row.json() for row in rows]))[0]["timing"]["median"] == 2e-3


# ---------------------------------------------------------------------------------------------------- time


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_deadline():
    clock = Clock()
    deadline = Deadline(100, clock)
    deadline.begin(30)
    clock.now = 29.9
    deadline.check()
    clock.now = 30
    with pytest.raises(OutOfTime):
        deadline.check()
    deadline.begin(90)  # only 70 are left, and that is enough to try
    clock.now = 99
    deadline.check()
    with pytest.raises(OutOfTime, match="1 s were left of the 30 s"):
        deadline.begin(30)
    clock.now = 100
    with pytest.raises(OutOfTime):
        deadline.check()


def test_sections_that_break_or_have_no_time_are_named():
    clock = Clock()
    deadline = Deadline(10, clock)
    bench = SimpleNamespace(deadline=deadline, skipped=[])
    done = []

    def good(bench):
        done.append("good")
        clock.now += 3

    def slow(bench):
        while True:
            bench.deadline.check()
            clock.now += 1

    def wrong(bench):
        raise ValueError("no such kernel\nwith details")

    def late(bench):
        clock.now = 10

    problems = gpu_proof.run_sections(
        bench, [(good, 5), (slow, 2), (wrong, 1), (late, 1), (good, 5)], (ValueError,), lambda line: None
    )
    assert done == ["good"]
    assert problems == ["wrong: ValueError: no such kernel"]
    assert [line.partition(":")[0] for line in bench.skipped] == ["slow", "good"]

    def mistaken(bench):
        raise KeyError("of the bench itself")

    with pytest.raises(KeyError):
        gpu_proof.run_sections(
            SimpleNamespace(deadline=Deadline(1, Clock()), skipped=[]), [(mistaken, 1)], (ValueError,), print
        )


class Device:
    """A GPU and a CPU on one clock: launches take the CPU's time, work is queued behind work."""

    cycle = 1e-9

    def __init__(self, monkeypatch):
        self.host = self.gpu = 0.0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                device.gpu = self.at = max(device.gpu, device.host)

            def query(self):
                return self.at <= device.host

            def synchronize(self):
                device.host = max(device.host, self.at)

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        def sleep(cycles):
            device.gpu = max(device.gpu, device.host) + cycles * self.cycle

        def synchronize():
            device.host = max(device.host, device.gpu)

        for name, value in (("Event", Event), ("_sleep", sleep), ("synchronize", synchronize)):
            monkeypatch.setattr(torch.cuda, name, value)

    def launch(self, host, gpu, wait=False):
        def call():
            self.host += host
            self.gpu = max(self.gpu, self.host) + gpu
            if wait:
                self.host = max(self.host, self.gpu)

        return call


def test_the_timer_measures_the_gpu_and_not_the_launches(monkeypatch):
    device = Device(monkeypatch)
    works = {
        "short": [device.launch(300e-6, 20e-6)] * 8,  # launching takes fifteen times as long as the work
        "long": [device.launch(10e-6, 5e-3)] * 2,
        "waiting": [device.launch(30e-6, 50e-6, wait=True)] * 4,
    }
    timings = CudaTimer(rounds=3).compare(works)
    assert timings["short"].median == pytest.approx(20e-6)
    assert timings["long"].median == pytest.approx(5e-3)
    assert timings["waiting"].median == pytest.approx(80e-6)
    assert [timings[name].waits for name in works] == [False, False, True]


def test_median_and_spread():
    assert gpu_timing.summarize([3.0, 1.0, 2.0, 9.0]) == Timing(2.5, 1.0, 9.0)


# ---------------------------------------------------------------------------------------------------- tests on the device


def test_counts_of_pytest():
    assert gpu_proof.read_counts("...\n2 failed, 10 passed, 1 skipped, 3 warnings in 4.05s\n") == {
        "failed": 2,
        "passed": 10,
        "skipped": 1,
    }
    assert gpu_proof.read_counts("1 passed in 61.02s (0:01:01)") == {"passed": 1}
    assert gpu_proof.read_counts("no tests ran in 0.01s") == {}
    assert gpu_proof.read_counts("Segmentation fault") == {}


def test_tests_are_run_and_judged(tmp_path, monkeypatch):
    """Passing, failing, hanging, in need of hypothesis where there is none, in need of another library."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "hypothesis" else find_spec(name))
    (tmp_path / "links").mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    environment = gpu_proof.make_importable(tmp_path / "links") | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    files = {
        "test_gpu_good.py": "import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_n(n): assert n < 4\n",
        "test_gpu_stand_in.py": (
            "from hypothesis import HealthCheck, given, settings\nfrom hypothesis import strategies as st\n"
            "@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])\n"
            "@given(st.integers(1, 9), st.lists(st.floats()).map(len))\ndef test_any(n, m): assert False\n"
            "def test_one(): pass\n"
        ),
        "test_gpu_other.py": "import not_a_library_of_anybody\ndef test_it(): pass\n",
        "test_gpu_bad.py": "def test_bad(): assert 1 == 2\n",
        "test_gpu_wrong.py": "import bitdistill.kernels.not_there\n",
        "test_gpu_hangs.py": "import time\ndef test_hangs(): time.sleep(60)\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def run(*names, seconds=60.0):
        paths = [tmp_path / f"test_gpu_{name}.py" for name in names]
        return gpu_proof.run_tests(tmp_path, paths, environment, seconds, 2)

    tested = run("good", "stand_in", "other")
    assert tested.problems == ()
    assert tested.counts == {"passed": 5, "skipped": 1}
    assert any("hypothesis is not installed" in line for line in tested.skipped)
    assert any("not_a_library_of_anybody is not installed" in line for line in tested.skipped)
    tested = run("good", "bad")
    assert tested.counts == {"passed": 4, "failed": 1}
    assert any("assert 1 == 2" in line for line in tested.problems)
    assert any("bitdistill.kernels.not_there" in line for line in run("wrong").problems)
    assert any("not finished after 3 s" in line for line in run("hangs", seconds=3.0).problems)


def test_the_project_need_not_be_installed(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("bitdistill") else find_spec(name)
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    environment = gpu_proof.make_importable(tmp_path)
    command = [sys.executable, "-S", "-P", "-c", "import bitdistill.kernels.numerics as n; print(n.ACT_MAX)"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "127\n"


# ---------------------------------------------------------------------------------------------------- contenders


def test_the_plain_decoder_is_a_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = SHAPES["tiny"]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=1e6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    state = {name: tensor for name, tensor in model.state_dict().items()}
    weights = gpu_baselines.plain_weights(shape, "cpu", torch.float32)
    weights["embedding"] = state["model.embed_tokens.weight"]
    for layer in range(shape.layers):
        parts = {name: state[f"model.layers.{layer}.{name}.weight"] for name in shape.linears()}
        weights["qkv"][layer] = torch.cat([parts[f"self_attn.{name}_proj"] for name in "qkv"])
        weights["o"][layer] = parts["self_attn.o_proj"]
        weights["gate_up"][layer] = torch.cat([parts["mlp.gate_proj"], parts["mlp.up_proj"]])
        weights["down"][layer] = parts["mlp.down_proj"]
    decoder = gpu_baselines.PlainDecoder(shape, 8, weights, compiled=False)
    tokens = torch.tensor([[3, 99, 7, 512, 1]])
    with torch.no_grad():
        expected = model(tokens).logits[0]
    for place, token in enumerate(tokens[0]):
        decoder.ids.fill_(token)
        decoder.step()
        assert decoder.positions.item() == place + 1
        torch.testing.assert_close(decoder.logits[0], expected[place], rtol=1e-4, atol=1e-5)
        assert decoder.ids.item() == expected[place].argmax()


def test_fake_quantization_is_a_bit_linear():
    linear = torch.nn.Linear(48, 32, bias=False)
    x = torch.randn(5, 48, requires_grad=True)
    grad = torch.randn(5, 32)
    layer = gpu_baselines.FakeQuantLinear(linear)
    ours = torch.autograd.grad(layer(x), [x, linear.weight], grad)
    theirs = torch.autograd.grad(reference.bit_linear(x, linear.weight), [x, linear.weight], grad)
    torch.testing.assert_close(layer(x), reference.bit_linear(x, linear.weight), rtol=1e-4, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_eager_losses_are_those_of_the_project():
    teacher = torch.randn(2, 3, 8, 16)
    student = teacher + 0.3 * torch.randn_like(teacher)
    kl = gpu_baselines.eager_relation_kl(teacher, student)
    expected = relations.relation_loss([teacher] * 3, [student] * 3, None, convention="eq12", weights=(1.0, 0.0, 0.0))
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-6)
    x, weight, other = torch.randn(6, 8), torch.randn(20, 8), torch.randn(6, 8)
    targets = torch.randint(0, 20, (6,))
    loss = gpu_baselines.eager_vocabulary_loss(x, weight, targets, other, weight, 5.0)
    logits, teacher_logits = (x @ weight.T)[None], (other @ weight.T)[None]
    rows = torch.ones(1, 6, dtype=torch.bool)
    expected = losses.cross_entropy(logits, targets[None]) + losses.logits_distillation(logits, teacher_logits, rows)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- the command


def command(*arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, ROOT / "bench/gpu_proof.py", *arguments]
    return subprocess.run(script, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_or_written(tmp_path):
    result = command("--json", "out.json", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "gpu_proof: no NVIDIA GPU is usable by torch here; nothing was measured.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_dry_run(tmp_path):
    """The set-up of the quicker sections; `--dry_run` alone runs them all, in two minutes."""
    sections = ("quantizers", "vocabulary")
    result = command("--dry_run", "--only", *sections, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("absmax 256", "SwiGLU + SubLN backward 512", "chunks of 64 MB", "eager"):
        assert f"works: {name}" in result.stdout
    assert not list(tmp_path.iterdir())
    assert command("--dry_run", "--only", "speed", cwd=tmp_path).returncode == 1


def test_the_result_can_be_written(tmp_path):
    from gpu_sections import Bench
    from measure import write_json

    bench = Bench(gpu_timing.DryTimer(), Deadline(1), "cpu", 32, {})
    bench.row("one", "first", TIMING, floor=1e-3, target=Target("floor", 0.9))
    tested = gpu_proof.Tested({"passed": 3}, ("a: b",), ())
    write_json(tmp_path / "gpu/x.json", gpu_proof.result(bench, tested, ["weights: broke"], 12.5))
    read = json.loads((tmp_path / "gpu/x.json").read_text())
    assert read["rows"][0]["figure"] == 0.5
    assert read["tests"]["counts"] == {"passed": 3}
    assert {"date", "commit", "versions", "broke", "not_run", "copy_gigabytes_per_second"} <= set(read)
    assert read["versions"]["torch"] == importlib.metadata.version("torch")
