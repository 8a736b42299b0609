"""Studies: the statistics by hand and against scipy, the grid, what is shared, what is resumed, and one real run."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import study
import study_report

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted((ROOT / "bench" / "studies").glob("*.yaml"))
RESULTS = sorted((ROOT / "bench" / "results" / "studies").glob("*.json"))


def cell(name, seed, right, **facts):
    right = np.asarray(right, bool)
    bits = base64.b64encode(np.packbits(right).tobytes()).decode()
    facts = {"stages": {}, "scored": "distill", **facts}
    return {
        "cell": name,
        "seed": seed,
        "metric": "accuracy",
        "score": 100 * right.mean(),
        "rows": len(right),
        "right": bits,
        **facts,
    }


def result_of(*cells, **facts):
    return {
        "name": "s",
        "settings": {one["cell"]: {} for one in cells},
        "cells": {f"{one['cell']} | {one['seed']}": one for one in cells},
        "machine": {"processor": "p", "date": "2026-01-01 00:00 UTC", "commit": "c"},
        **facts,
    }


def test_the_table_says_which_cells_ran_on_another_processor():
    cells = [cell(name, 0, np.array([True, False, True])) for name in ("a", "b", "c")]
    cells[1]["processor"] = "q"
    foot = study_report.markdown(result_of(*cells, references=["a"])).splitlines()[-1]
    assert "; p, one thread per run, 2026-01-01;" in foot
    assert foot.endswith(" On q: b.")
    assert " On " not in study_report.markdown(result_of(cells[0], cells[2], references=["a"])).splitlines()[-1]


def test_right_and_wrong_survive_packing():
    right = np.random.default_rng(0).random(37) < 0.5
    np.testing.assert_array_equal(study_report.scores_of(cell("a", 0, right)), right)


def test_interval_of_one_seed_is_the_bootstrap_of_rows():
    rows = (np.random.default_rng(1).random(400) < 0.7).astype(float)
    low, high = study_report.interval(rows[None])
    theirs = scipy.stats.bootstrap(
        (rows,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    )
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.006)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.006)


def test_interval_covers_the_spread_of_seeds():
    rows = np.ones((3, 500)) * np.array([[0.2], [0.5], [0.8]])  # no spread among rows at all
    low, high = study_report.interval(rows)
    assert (low, high) == (pytest.approx(0.2), pytest.approx(0.8))  # 1 of 27 draws is three times the lowest: 3.7 %
    shifted = study_report.interval(rows + 1)
    assert shifted == (pytest.approx(low + 1), pytest.approx(high + 1))


def test_what_is_retained():
    a, b = np.full((2, 50), 0.9), np.full((2, 50), 0.6)
    assert study_report.ratio_interval(a, b) == (pytest.approx(1.5), pytest.approx(1.5))
    rows = (np.random.default_rng(3).random((1, 300)) < 0.7).astype(float)
    assert study_report.ratio_interval(rows, rows) == (1.0, 1.0)  # the same rows are drawn for both
    low, high = study_report.ratio_interval(rows, 1 - rows)
    assert low < rows.mean() / (1 - rows).mean() < high


def test_sign_flip_against_scipy():
    differences = np.array([1.0, 1.0, 0.0, -1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    theirs = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    ).pvalue
    assert study_report.sign_flip_p(differences) == pytest.approx(theirs, abs=0.01)
    assert study_report.sign_flip_p(np.zeros(5)) == 1.0


def test_holm_by_hand():
    assert study_report.holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    assert study_report.holm([]) == []


def test_paired_rows_and_table():
    a, b = [1, 1, 1, 0], [1, 0, 0, 0]
    result = result_of(cell("A", 0, a), cell("A", 1, a), cell("B", 0, b), cell("B", 1, b), references=["B"], task="t")
    rows = {row["cell"]: row for row in study_report.summaries(result)}
    assert rows["A"]["mean"] == 75
    assert rows["B"]["mean"] == 25
    assert rows["A"]["against"]["B"]["difference"] == 50
    assert rows["A"]["against"]["B"]["ratio"][0] == 3
    assert rows["B"]["against"] == {}
    text = study_report.markdown(result)
    assert "| A | 75.0 [" in text
    assert "75.0 75.0" in text
    assert "+50.0 [" in text


def test_differences_for_the_claims():
    teacher, student = [1, 1, 0, 0], [1, 0, 0, 0]
    result = result_of(cell("BitDistill", 0, student), cell("FP16-SFT", 0, teacher), task="sst2")
    found = study_report.differences(result)["difference_to_fp16_sft"]["sst2"]
    assert found["points"] == -25
    assert found["interval"][0] < -25 < found["interval"][1] + 1e-9
    assert study_report.differences(result_of(cell("A", 0, teacher), task="sst2")) == {}


def test_seeds_that_one_of_two_cells_lacks_are_not_compared():
    result = result_of(cell("A", 0, [1, 1]), cell("A", 1, [0, 0]), cell("B", 1, [0, 1]), references=["B"])
    row = next(row for row in study_report.summaries(result) if row["cell"] == "A")
    assert row["against"]["B"]["difference"] == -50


def test_shared_stages_depend_on_what_they_should():
    def key(stage, **settings):
        return study.share_key(stage, {"model": "m", **settings}, 0)

    assert key("teacher", **{"distill.max_steps": 5}) == key("teacher")
    assert key("teacher", **{"teacher.max_steps": 5}) != key("teacher")
    assert key("pretrain", task="sst2") == key("pretrain", task="qnli")
    assert key("pretrain", **{"refine.norms": "all"}) != key("pretrain")
    assert key("distill", **{"teacher.max_steps": 5}) != key("distill")
    assert key("base") != study.share_key("base", {"model": "m"}, 1)


def write(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def test_grid_and_cells(tmp_path):
    text = "{name: s, run: {}, seeds: [0, 1], grid: {a.b: [1, 2], c: [x]}, cells: {plain: {grid: false}, more: {d: 3}}}"
    loaded = study.load_study(write(tmp_path, text), None)
    assert loaded["cells"] == {
        "plain": {},
        "more, b 1, c x": {"d": 3, "a.b": 1, "c": "x"},
        "more, b 2, c x": {"d": 3, "a.b": 2, "c": "x"},
    }
    jobs = study.jobs_of(loaded, tmp_path)
    assert [(job["cell"], job["seed"]) for job in jobs][:2] == [("plain", 0), ("plain", 1)]
    alone = study.load_study(write(tmp_path, "{name: s, run: {}, seeds: [0], grid: {a: [1, 2]}}"), None)
    assert list(alone["cells"]) == ["a 1", "a 2"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{name: s, run: {}, seeds: [0]}", "cells"),
        ("{name: s, run: {}, seeds: [0], cells: {a: {}}, references: [b]}", "b"),
        ("{name: s, run: {}, seeds: [0], cells: {a: {}}, typo: 1}", "typo"),
        ("[1, 2]", "expected name"),
        ("{a: b: c}", "expected YAML"),
        ("{name: s, run: {model: $DATA/m}, seeds: [0], cells: {a: {}}}", "--data"),
    ],
)
def test_bad_studies(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        study.load_study(write(tmp_path, text), None)


def test_the_same_data_elsewhere_is_the_same_study(tmp_path):
    text = "{name: s, about: from $DATA/m, run: {model: $DATA/m}, seeds: [0], cells: {a: {}}}"
    found = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        loaded = study.load_study(write(tmp_path, text), str(tmp_path / name))
        found.add(study.identity(study.jobs_of(loaded, tmp_path)[0], str(tmp_path / name)))
        assert loaded["about"] == "from $DATA/m"  # results name nobody's folder
    assert len(found) == 1


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_project_is_one_and_its_settings_exist(path, tmp_path):
    from bitdistill.command_line import parse_config

    loaded = study.load_study(path, str(tmp_path))
    assert loaded["name"] == path.stem
    assert loaded["about"]
    for job in study.jobs_of(loaded, tmp_path)[:: len(loaded["seeds"])]:
        for stage in study.stages_to_run(job):  # an unknown name or a value that cannot be is a UserError
            parse_config(study.arguments_of(job, stage))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_tables_are_those_of_their_results(path):
    result = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == study_report.markdown(result) + "\n"
    assert path.with_suffix(".png").is_file()
    assert set(result["settings"]) >= {one["cell"] for one in result["cells"].values()}


def test_the_page_shows_what_the_results_hold():
    page = ROOT / "docs" / "results.md"
    assert page.read_text() == study_report.into_page(page.read_text(), ROOT / "bench" / "results" / "studies")


def test_a_page_without_an_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="end of study"):
        study_report.into_page("<!-- study: a -->", tmp_path)
    filled = study_report.into_page("x\n<!-- study: a -->\nold\n<!-- end of study -->\ny", tmp_path)
    assert filled == "x\n<!-- study: a -->\nNot run yet.\n<!-- end of study -->\ny"


def stage_result(folder, stage, name, **inputs):
    (folder / stage).mkdir(parents=True)
    (folder / stage / "done.json").write_text(json.dumps({"id": name, "inputs": inputs}))


def ids(folder):
    return {path.parent.name: json.loads(path.read_text())["id"] for path in folder.glob("*/done.json")}


def test_cells_that_ran_side_by_side_lend_results_that_belong_together(tmp_path):
    """Two cells made `refine` at the same time, each its own; a third one gets the one that its stage 2 was made from."""
    shared = tmp_path / "shared"
    for cell, rate in (("a", 1), ("b", 2)):
        stage_result(tmp_path / cell, "refine", f"refine-{cell}")
        stage_result(tmp_path / cell, "pretrain", f"pretrain-{cell}", refine=f"refine-{cell}")
        study.lend(shared, tmp_path / cell, {"pretrain.learning_rate": rate}, 0)
    for cell, rate in (("a", 1), ("b", 2)):
        third = tmp_path / f"third {cell}"
        third.mkdir()
        study.borrow(shared, third, {"pretrain.learning_rate": rate, "distill.max_steps": 3}, 0)
        assert ids(third) == {"refine": f"refine-{cell}", "pretrain": f"pretrain-{cell}"}
    other = tmp_path / "another seed"
    other.mkdir()
    study.borrow(shared, other, {"pretrain.learning_rate": 1}, 1)
    assert ids(other) == {}
    begun = tmp_path / "begun"  # a cell that goes on keeps what it has, and gets what that was made from
    stage_result(begun, "pretrain", "pretrain-b", refine="refine-b")
    study.borrow(shared, begun, {"pretrain.learning_rate": 1}, 0)
    assert ids(begun) == {"refine": "refine-b", "pretrain": "pretrain-b"}


@pytest.mark.slow
def test_a_study_runs_shares_and_resumes(tmp_path):
    path = write(
        tmp_path,
        "{name: tiny, about: none, seeds: [0], references: [FP16-SFT], run: {recipe: demo, max_steps: 2, report: false, "
        "report_to: [], export.enabled: false, baseline.enabled: false}, cells: {FP16-SFT: {score: teacher}, "
        "BitDistill: {}, broken: {distill.learning_rate: -1}}}",
    )
    code = (
        f"import study, sys; from pathlib import Path; study.RESULTS = Path({str(tmp_path)!r}); "
        f"sys.argv = ['study.py', {str(path)!r}, '--workers', '1', '--folder', {str(tmp_path / 'runs')!r}]; "
        "sys.exit(study.main())"
    )

    def run():
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True, check=False, timeout=500
        )

    first = run()
    assert first.returncode == 1, first.stderr
    assert "broken | 0: FAILED" in first.stdout
    assert "learning_rate" in first.stdout
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert set(result["cells"]) == {"FP16-SFT | 0", "BitDistill | 0"}
    teacher, student = (result["cells"][f"{name} | 0"] for name in ("FP16-SFT", "BitDistill"))
    assert teacher["stages"]["teacher"] == student["stages"]["teacher"]  # one training, shared by hard links
    assert teacher["rows"] == 1000
    assert 0 <= student["score"] <= 100
    assert (tmp_path / "tiny.md").is_file()
    assert (tmp_path / "tiny.png").stat().st_size > 5000
    again = run()
    assert "3 runs, 2 of them done already" in again.stdout


@pytest.mark.parametrize("keep", [False, True])
def test_a_model_without_pretraining(keep):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import without_pretraining

    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, num_attention_heads=2, num_key_value_heads=1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fresh = without_pretraining.forget(model, 1, keep)
    again = without_pretraining.forget(model, 1, keep)
    for key, value in fresh.state_dict().items():
        same = "norm" in key or (keep and ("embed" in key or "lm_head" in key))
        assert bool((value == before[key]).all()) == same, key
        assert bool((value == again.state_dict()[key]).all()), key


def test_a_curve_of_losses_is_drawn_on_to_its_goal(tmp_path):
    def loss(name, value, tokens=0):
        behind = {"pretrain": {"tokens": tokens, "seconds": 1.0}} if tokens else {}
        facts = {"metric": "perplexity", "losses": [value, value], "rows": 2}
        return cell(name, 0, [True], stages=behind, scored="pretrain" if tokens else "base") | facts

    steps = (80, 400, 800)
    cells = [loss(f"max_steps {n}", 3 + 2e3 * (1000 * n) ** -0.5, 1000 * n) for n in steps]
    result = result_of(loss("base", 3.0), *cells, references=["base"], x="pretrain.max_steps", goal=0.5)
    result["settings"] |= {f"max_steps {n}": {"pretrain.max_steps": n} for n in steps}
    found = study_report.reach(result, study_report.summaries(result))
    assert found == {"default": (pytest.approx(2e3), pytest.approx(-0.5), pytest.approx(1.6e7))}
    text = study_report.markdown(result)
    assert "What is missing to base falls with the power -0.50 of stage-2 tokens; going on like this, " in text
    assert "; going on like this, 0.5 are left at about 16,000,000." in text
    study_report.draw(result, tmp_path / "s.png")
    rising = [loss(f"max_steps {n}", 3 + n / 1000, 1000 * n) for n in steps]
    worse = result | {"cells": result_of(loss("base", 3.0), *rising)["cells"]}
    assert study_report.reach(worse, study_report.summaries(worse)) == {}
