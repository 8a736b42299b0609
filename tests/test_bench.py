"""The measuring tools: arithmetic, files and tables; speeds themselves are never asserted."""

import argparse
import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import claims
import cpu_training
import history
import measure
import random_models
import ratios
import regressions
import resident
import roofline
import scaling
import slurm
from bitdistill.kernels import packing
from bitdistill.runtime.packed_file import read_packed
from suite import side_by_side

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("embedding", ["fp16", "int8", "int4", "ternary"])
@pytest.mark.parametrize("kind", packing.PACKINGS)
def test_random_packed_models_are_whole_files(tmp_path, kind, embedding):
    shape = random_models.SHAPES["tiny"]
    random_models.write_packed_model(tmp_path / "s", shape, kind, embedding)
    model = read_packed(tmp_path / "s")  # checks every tensor, the config and the checksums
    codes = model.weight_codes("model.layers.1.mlp.up_proj")
    np.testing.assert_array_equal(codes, random_models.random_codes(512, 256, 5))
    table = random_models.random_embedding(shape)
    error = np.abs(model.table("model.embed_tokens") - table).mean() / np.abs(table).mean()
    assert error < {"fp16": 1e-3, "int8": 0.02, "int4": 0.15, "ternary": 0.6}[embedding]


def test_gguf_holds_the_same_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    shape = random_models.SHAPES["tiny"]
    for linear, head in (("F16", "F16"), ("TQ2_0", "Q4_0")):
        path = tmp_path / f"{linear}.gguf"
        random_models.write_gguf(path, shape, linear, head)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert len(tensors) == 2 + shape.layers * 11
        want = random_models.random_codes(512, 256, 5) * np.float32(random_models.WEIGHT_SCALE)
        up = tensors["blk.1.ffn_up.weight"]
        got = gguf.quants.dequantize(up.data, up.tensor_type)
        np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize("path", sorted((ROOT / "bench").rglob("*.py")), ids=lambda path: path.name)
def test_everything_that_a_benchmark_imports_from_the_project_exists(path):
    """Also what it imports inside a function, for a device that is not here."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitdistill"):
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")


def test_shapes_are_those_of_the_models():
    """Parameters of the published models: linears and embedding."""
    for name, linears, embedding in (("0.6B", 440_401_920, 155_582_464), ("1.7B", 1_409_286_144, 311_164_928)):
        shape = random_models.SHAPES[name]
        assert (shape.linear_weights(), shape.vocabulary * shape.hidden) == (linears, embedding)


def test_ratio_of_two_pieces_of_work(monkeypatch):
    """By a clock that only the work itself moves on."""
    now, calls = [0.0], []

    def work(seconds):
        def run():
            calls.append(seconds)
            now[0] += seconds

        return run

    monkeypatch.setattr(side_by_side.time, "perf_counter", lambda: now[0])
    assert side_by_side.ratio(work(0.02), work(0.2), rounds=5) == pytest.approx(10)
    assert side_by_side.ratio(work(0.2), work(0.02), rounds=5) == pytest.approx(0.1)
    calls.clear()
    assert side_by_side.ratio(work(0.002), work(0.002), rounds=3) == pytest.approx(1)
    assert len(calls) == 2 * 2 + 3 * 2 * 10  # two calls to know how many of each fill 0.02 s


def test_a_quick_ratio_runs_each_once(monkeypatch):
    monkeypatch.setenv("ASV_QUICK_RATIOS", "1")
    calls = []
    side_by_side.ratio(lambda: calls.append("ours"), lambda: calls.append("theirs"), rounds=5)
    assert sorted(calls) == ["ours", "theirs"]


def test_a_ratio_is_worse_only_beyond_the_noise():
    worse = regressions.judge([2.0, 2.02], [1.0, 1.01])
    assert worse["worse"]
    assert worse["change"] == pytest.approx(1.005 / 2.01 - 1)
    assert not regressions.judge([2.0, 1.0], [1.4, 1.3])["worse"]  # the machine was that noisy
    assert not regressions.judge([2.0, 2.0], [1.96, 1.96])["worse"]  # below 5 %
    assert not regressions.judge([1.0, 1.0], [3.0, 3.0])["worse"]
    assert regressions.judge([2.0, 2.0], [1.88, 1.88])["worse"]


def test_counts_are_worse_when_they_rise_and_mismatches_when_there_is_one():
    assert regressions.judge([100, 100], [110, 110], "bytes")["worse"]
    assert not regressions.judge([100, 100], [90, 90], "bytes")["worse"]
    assert not regressions.judge([100, 100], [103, 103], "bytes")["worse"]
    assert regressions.judge([0, 0], [1, 1], "mismatches")["worse"]
    assert regressions.judge([1, 1], [1, 1], "mismatches")["worse"]
    assert not regressions.judge([1, 1], [0, 0], "mismatches")["worse"]


def test_peak_bytes_are_those_alive_at_once():
    torch = pytest.importorskip("torch")

    def one_by_one(size):
        for _ in range(3):
            torch.zeros(size, dtype=torch.uint8)

    def together(size):
        return [torch.zeros(size, dtype=torch.uint8) for _ in range(3)]

    assert side_by_side.peak_bytes(lambda: one_by_one(100_000)) == 100_000
    assert side_by_side.peak_bytes(lambda: together(100_000)) == 300_000
    assert side_by_side.memory_ratio(lambda: one_by_one(100_000), lambda: together(100_000)) == 3


def test_every_benchmark_has_a_name_a_unit_and_its_own_inputs():
    found = ratios.benchmarks([])
    assert {"cpu_kernels.Product", "runtime.Decode", "training.Step", "gpu.BitLinear"} <= set(found)
    names = {}
    for name, benchmark in found.items():
        methods = [method for method in dir(benchmark) if method.startswith(("time_", "track_"))]
        assert methods, f"{name} measures nothing"
        for method in methods:
            function = getattr(benchmark, method)
            assert function.pretty_name, f"{name}.{method}"
            assert names.setdefault(function.pretty_name, name) == name, "two benchmarks are shown under one name"
            if method.startswith("track_"):
                assert function.unit.startswith("x ") or function.unit in ("bytes", "bits", "mismatches"), method
                assert function.unit.startswith("x ") == ("ratio" in method), f"{name}.{method}: {function.unit}"


def test_a_benchmark_runs_and_what_a_commit_lacks_is_not_applicable(monkeypatch):
    one = ratios.figures(["packing"])
    assert one["packing.Pack(base3).track_mismatches"] == {"value": 0, "unit": "mismatches"}
    assert one["packing.Size(base3).track_bits_per_weight"]["value"] == pytest.approx(1.6, abs=2e-4)
    monkeypatch.setitem(sys.modules, "bitdistill.kernels.packing", None)
    assert ratios.figures(["packing"]) == {}


def test_resident_memory_of_the_weights(tmp_path):
    shape = random_models.SHAPES["tiny"]
    random_models.write_packed_model(tmp_path / "s", shape, "base3", "int8")
    found = resident.growth("ours", shape, tmp_path / "s", context=8)
    size = (tmp_path / "s").stat().st_size
    assert 0.9 * size < found["weights"] <= size + 4096  # whole pages of the map
    assert found["kv_cache"] == 2 * 2 * 2 * 64 * 2 * 8
    assert found["growth"] < 64 * 2**20


def test_only_what_every_round_of_both_sides_has_is_judged(monkeypatch):
    rounds = {"before": [{"a.B().c": 2.0}, {"a.B().c": 2.1}], "after": [{"a.B().c": 1.0, "new": 1}, {"a.B().c": 1.1}]}
    left = {side: list(found) for side, found in rounds.items()}

    def measure(side, only):
        assert only == ["a"]
        return {name: {"value": value, "unit": "x"} for name, value in left[side].pop(0).items()}

    monkeypatch.setattr(regressions, "measure", measure)
    figures = regressions.measured({"before": "before", "after": "after"}, 2, ["a"])
    assert figures["after"] == {"a.B().c": {"values": [1.0, 1.1], "unit": "x"}}
    assert regressions.judged(figures)["a.B().c"]["worse"]


def test_regressions_runs_another_checkouts_code(tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "bitdistill").mkdir(parents=True)
    (checkout / "bitdistill" / "__init__.py").write_text("MARK = 'the other one'")
    for name in ("kernels", "distributed"):
        (checkout / name).mkdir()
        (checkout / name / "__init__.py").write_text(f"NAME = '{name}'")
    path = regressions.importable(checkout, tmp_path / "path")
    code = "import bitdistill as b, bitdistill.kernels as k, bitdistill.distributed as d; print(b.MARK, k.NAME, d.NAME)"
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert output.stdout.strip() == "the other one kernels distributed"


def test_labels_of_a_roofline_keep_their_order_and_do_not_overlap():
    assert roofline.apart([1.0, 3.0, 2.95, 2.0], 0.5) == [1.0, 3.0, 2.5, 2.0]
    assert roofline.apart([], 0.5) == []
    places = roofline.apart([0.0, 0.0, 0.0, 5.0], 0.25)
    assert sorted(places) == [-0.5, -0.25, 0.0, 5.0]


def test_gpu_roofline_has_the_points_that_were_measured_and_no_others(tmp_path, monkeypatch):
    rows = [
        {
            "section": "decoding product, 2 bits, one row",
            "what": "0.6B q, k, v: 4096 x 1024",
            "timing": {"median": 2e-6},
        },
        {"section": "int8 product (M x I -> O)", "what": "1024 -> 2048", "timing": {"median": 1e-4}, "floor": 5e-5},
        {"section": "int8 product (M x I -> O)", "what": "1024 -> 4096", "timing": None, "floor": 5e-5},
        {"section": "absmean + ternary codes", "what": "28 linears of 0.6B, fp32", "timing": {"median": 1e-4}},
    ]
    report = {"rows": rows, "bf16_teraflops": 800.0, "copy_gigabytes_per_second": 4000.0}
    (_, low, slow), (_, high, fast) = roofline.gpu_points(report)
    assert (low, slow) == (8.0, pytest.approx(2 * 4096 * 1024 / 2e-6))
    assert fast == pytest.approx(8e14)  # half of twice the bf16 rate: the floor was half of its time
    assert 500 < high < 4096
    roofline.draw_gpu(report, str(tmp_path / "measured.png"))
    monkeypatch.setattr(roofline, "gpu_points", None)  # without a run nothing may ask for points
    roofline.draw_gpu(None, str(tmp_path / "model.png"))
    assert (tmp_path / "model.png").stat().st_size > 10_000


def test_exponents():
    sizes = [1, 2, 4, 8, 16]
    assert scaling.exponent(sizes, [3 * size for size in sizes]) == pytest.approx(1)
    assert scaling.exponent(sizes, [5 * size**2 for size in sizes]) == pytest.approx(2)
    assert scaling.exponent(sizes, [7.0] * 5) == pytest.approx(0)


def test_memory_and_energy_are_read_from_the_system():
    before = sum(measure.resident_bytes().values())
    block = np.ones(32 * 2**20, np.uint8)
    assert sum(measure.resident_bytes().values()) - before > 0.9 * block.nbytes
    code = "import time; block = bytearray(64 * 2**20); time.sleep(0.3); print('done')"
    output, peak = measure.peak_resident([sys.executable, "-c", code])
    assert output.strip() == "done"
    assert 64 * 2**20 < peak < 256 * 2**20
    for size in (32, 48, 32):  # what an earlier call freed does not hide what a later one takes
        grown = measure.peak_growth(lambda size=size: np.ones(size * 2**20, np.uint8))
        assert 0.95 * size * 2**20 < grown < (size + 8) * 2**20
    joules = measure.Energy().joules()
    assert joules is None or joules >= 0


def test_summary_and_table():
    assert measure.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    lines = measure.table([["a", "b"], ["xx", "1"], ["y", "22"]], "<>").splitlines()
    assert lines == ["a    b", "------", "xx   1", "y   22"]


def report(**changes):
    rows = [
        claims.row("small", "paper", "cmd", 9.99, 9.9993),
        claims.row("fast", "paper", "cmd", 2.65, 2.5, [2.4, 2.6]),
        claims.row("on a GPU", "aims", "cmd", 1.0, why="no run on a GPU yet"),
        claims.row("accurate", "paper", "cmd", -1.0, -0.4, [-1.2, 0.4], "points"),
    ]
    return {
        "machine": {"date": "2026-01-02 03:04 UTC", "processor": "a processor", "commit": "abc"},
        "threads": 2,
        "rows": rows,
    } | changes


def test_claims_say_what_holds():
    verdicts = ["holds", "does not hold", "not measured", "holds, within the noise"]
    assert [row["holds"] for row in report()["rows"]] == verdicts
    assert claims.row("sure", "paper", "cmd", -1.0, -0.4, [-0.9, 0.1])["holds"] == "holds"
    text = claims.markdown(report())
    assert "| small | 10.00x | exact | holds | `cmd` |" in text
    assert "| fast | 2.50x | 2.40 to 2.60 | does not hold | `cmd` |" in text
    assert "| on a GPU | not measured (no run on a GPU yet) |  | not measured | `cmd` |" in text
    assert "| accurate | -0.40 points | -1.20 to 0.40 | holds, within the noise | `cmd` |" in text


def test_claims_read_the_latest_study_of_a_task(tmp_path):
    for name, date, points in (("b", "2026-01-01", -3.0), ("a", "2026-02-01", -0.5), ("c", "2026-03-01", None)):
        study = {"name": name, "machine": {"date": date}}
        if points is not None:
            study["difference_to_fp16_sft"] = {"sst2": {"points": points, "interval": [points - 0.2, points + 0.2]}}
        (tmp_path / f"{name}.json").write_text(json.dumps(study))
    sst2, qnli, mnli = claims.accuracy_rows(tmp_path)
    assert (sst2["measured"], sst2["holds"]) == (-0.5, "holds")
    assert sst2["command"] == "bench/study.py bench/studies/a.yaml"
    assert qnli["holds"] == mnli["holds"] == "not measured"


def test_claims_about_memory():
    sizes = {"fp16": 400, "int8": 245, "int4": 176, "ternary": 121, "linears": 88, "transformers, linears": 880}
    found = {name: {"weights": size, "growth": size + 20, "kv_cache": 7e6} for name, size in sizes.items()}
    found["transformers"] = {"weights": 1192, "growth": 1210, "kv_cache": 7e6}
    rows = claims.memory_rows(Path(), {"resident": found, "context": 64})
    assert [round(row["measured"], 2) for row in rows] == [10.0, 2.98, 4.87, 6.77, 9.85, 6.17]
    assert "KV cache of 7.0 MB in both" in rows[-1]["claim"]


def test_claims_exit_status_and_page(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "claims.py"), "--from", str(tmp_path / "c.json")]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{claims.BEGIN}\nold\n{claims.END}\nafter\n")
    for rows, status in ((report()["rows"], 1), ([r for r in report()["rows"] if r["claim"] != "fast"], 0)):
        (tmp_path / "c.json").write_text(json.dumps(report(rows=rows)))
        result = subprocess.run([*command, "--page", str(readme)], capture_output=True, text=True, check=False)
        assert result.returncode == status, result.stderr
        assert readme.read_text() == f"before\n{claims.markdown(report(rows=rows))}\nafter\n"
    with pytest.raises(ValueError, match="expected the lines"):
        claims.into_page("no markers", report())


def test_the_pages_have_the_table_of_the_committed_run():
    report = json.loads((ROOT / "bench" / "results" / "claims.json").read_text())
    do = "run bench/claims.py --from bench/results/claims.json --page docs/claims.md --readme README.md"
    assert claims.markdown(report) in (ROOT / "docs/claims.md").read_text(), do
    main = claims.markdown(report, headlines=True)
    assert main in (ROOT / "README.md").read_text(), do
    assert len(claims.HEADLINES) <= 8
    assert main.count("\n| ") == 1 + len(claims.HEADLINES), "a headline matches no claim, or several"


def test_history_reads_asv(tmp_path):
    folder = tmp_path / "machine"
    folder.mkdir()
    (folder / "machine.json").write_text("{}")
    for commit, date, value in (("b" * 40, 2, 3.0), ("a" * 40, 1, 2.0)):
        content = {
            "commit_hash": commit,
            "date": date,
            "result_columns": ["result", "params"],
            "results": {
                "packing.Size.track_bits": [[1.6, value], [["'base3'", "'2bit'"]]],
                "gpu.X.track_ratio": [[None], []],
                "failed.Y.time_it": [None, []],
                "one.Z.track_ratio": [[value]],
            },
        }
        (folder / f"{commit[:8]}-env.json").write_text(json.dumps(content))
    found = history.read(tmp_path)
    assert [one["commit"] for one in found] == ["a" * 40, "b" * 40]
    assert found[0]["values"] == {
        "packing.Size.track_bits(base3)": 1.6,
        "packing.Size.track_bits(2bit)": 2.0,
        "one.Z.track_ratio": 2.0,
    }
    about = {
        "packing.Size.track_bits": {"pretty_name": "bits of a weight", "unit": "bits", "param_names": ["packing"]},
        "one.Z.track_ratio": {"pretty_name": "a against b", "unit": "x b"},
    }
    text = history.page(found, about)
    for address in ("src=", "href='http", 'href="http', "@import", "<script", "<link"):
        assert address not in text, "the page opens without a network"
    assert "bits of a weight" in text
    assert "<svg" in text
    assert "+50 %" in text


def test_a_change_is_better_or_worse_by_its_unit():
    assert history.change("x torch", [2.0, None, 3.0]) == ("+50 %", "better")
    assert history.change("x torch", [2.0, 1.0]) == ("-50 %", "worse")
    assert history.change("x torch", [2.0, 2.1]) == ("+5 %", "none")
    assert history.change("bytes", [100, 99]) == ("-1 %", "better")
    assert history.change("mismatches", [0, 2]) == ("+2", "worse")
    assert history.change("bits", [1.6, 1.6]) == ("same", "none")
    assert history.change("bits", [None, 1.6]) == ("", "none")


def test_parameters_are_shown_with_their_names_where_they_are_numbers():
    about = {"a.B.track_c": {"param_names": ["packing", "tokens"]}}
    assert history.setting_of("a.B.track_c(2bit, 64)", about) == "2bit, 64 tokens"
    assert history.setting_of("a.B.track_d", about) == ""


def test_figures_in_tables():
    assert [measure.figure(x) for x in (1234567, 0.0, 1.60011, 1234.5)] == ["1,234,567", "0", "1.6", "1,234"]


class Said:
    """cpu_training.Measured with figures that were written down."""

    figure, ratio = cpu_training.Measured.figure, cpu_training.Measured.ratio

    arguments = argparse.Namespace(clock="wall")

    def __init__(self, found):
        self.found = found


def test_targets_of_cpu_training():
    def step(*seconds, peak):
        return {"seconds": list(seconds), "peak_bytes": peak}

    vnni = {"before": [step(8.0, 9.0, peak=4), step(10.0, peak=4)], "fast": [step(2.0, 2.0, peak=3), step(3.0, peak=3)]}
    vnni |= {"full fp32": [step(4.0, peak=2)], "layer": [{"linear fp32": [3.0], "fast": [1.0], "exact": [2.0]}]}
    rows = cpu_training.target_rows(Said({cpu_training.VNNI: vnni, cpu_training.NATIVE: {"fast": [step(1.0, peak=1)]}}))
    ratios = {row["what"]: row["ratio"] for row in rows if row["isa"] == cpu_training.VNNI}
    assert ratios["stage-2 step, fast, against before"] == 4.5  # medians 9 and 2
    assert ratios["stage-2 step, exact, against before"] is None
    assert ratios["stage-2 step, fast, against full precision fp32"] == 2.0
    assert ratios["BitLinear, fast, against nn.Linear fp32"] == 3.0
    assert ratios["peak memory of a stage-2 step, below full precision fp32"] == pytest.approx(2 / 3)
    lines = cpu_training.show(rows).splitlines()
    assert [line.split()[-2] for line in lines if "fast, against before" in line] == ["holds", "measured"]
    assert sum("missed" in line for line in lines) == 2


def test_claims_of_cpu_training(tmp_path):
    isa, what, *_, target = cpu_training.TARGETS[0]
    for name, ratio, native in (
        ("training_a", target - 0.5, None),
        ("training_b", None, target + 1),
        ("other", 99, 99),
    ):
        written = {"targets": [{"isa": isa, "what": what, "ratio": ratio, "native": native}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(written))
    masked, native, *rest = claims.cpu_training_rows(tmp_path)
    assert (masked["holds"], native["holds"]) == ("does not hold", "holds")
    assert native["claim"] == f"CPU training (the processor as it is): {what}"
    both = sum(one[0] == cpu_training.VNNI for one in cpu_training.TARGETS)
    assert len(rest) == len(cpu_training.TARGETS) + both - 2
    assert (
        {one["holds"] for one in rest}
        == {"not measured"}
        == {one["holds"] for one in claims.cpu_training_rows(tmp_path / "absent")}
    )


def test_slurm_submits_the_script_of_the_page():
    """What bench/slurm.py hands to sbatch is the page's script but for the size of the job, and what is trained."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    shown, given = slurm.batch_script(), slurm.submitted(Path("/a/run"))
    assert shown in page
    assert "--gpus-per-node" not in given
    assert "--nproc_per_node 1 " in given
    assert "bitdistill/train.py --output_dir /a/run --stage base " in given
    kept = [line for line in shown.splitlines() if " 8" not in line and "..." not in line]
    assert kept == [line for line in given.splitlines() if line in kept]
    assert subprocess.run(["bash", "-n"], input=given, text=True, check=False).returncode == 0
