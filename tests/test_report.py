"""The report: the numbers of the input files arrive on the page, ratios are right, missing parts are named, hostile
strings stay text. `synthetic_run` writes an invented run directory; nothing in it was measured."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from bitdistill.errors import UserError
from bitdistill.names import SETTINGS
from bitdistill.reporting import drawing, plots
from bitdistill.reporting.report import write_report
from bitdistill.reporting.run_files import read_run
from bitdistill.reporting.summary import summary
from bitdistill.reporting.table import comparison_table, headline, table_text
from bitdistill.reporting.texts import MISSING, duration_text, size_text

LAYERS = 6
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in KINDS]
SCORES = {
    "task": "synthetic-sentiment",
    "metric": "accuracy",
    "majority": 50.9,
    "rows": [
        {"setting": "FP16-SFT", "score": 90.0, "interval": [88.1, 91.7], "examples": 872, "extra": {"f1": 90.25}},
        {"setting": "BitNet-SFT", "score": 76.5, "interval": [73.6, 79.2], "examples": 872, "extra": {"f1": 77.125}},
        {"setting": "BitDistill", "score": 88.2, "interval": [86.0, 90.2], "examples": 872, "extra": {"f1": 88.375}},
    ],
    "paired": [
        {"a": "BitDistill", "b": "FP16-SFT", "difference": -1.8, "interval": [-3.7, 0.1]},
        {"a": "BitNet-SFT", "b": "BitDistill", "difference": -11.7, "interval": [-14.6, -8.9]},
    ],
    "notes": ["Invented numbers: this run is synthetic."],
}
SPEED = {
    "machine": "2 synthetic cores",
    "rows": [
        {"setting": "FP16-SFT", "runner": "torch fp32", "tokens_per_second": 15.5, "spread": [14.9, 15.8],
         "linear_bytes": 880_000_000, "model_bytes": 1_192_000_000, "bits_per_weight": 16.0,
         "model_bits_per_parameter": 16.0},
        {"setting": "BitNet-SFT", "runner": "base-3", "tokens_per_second": 40.75, "spread": [40.1, 41.5],
         "linear_bytes": 88_100_000, "model_bytes": 244_000_000, "bits_per_weight": 1.6016,
         "model_bits_per_parameter": 3.275},
        {"setting": "BitDistill", "runner": "base-3", "tokens_per_second": 41.25, "spread": [40.5, 41.9],
         "linear_bytes": 88_000_000, "model_bytes": 244_000_000, "bits_per_weight": 1.6,
         "model_bits_per_parameter": 3.27},
        {"setting": "BitDistill", "runner": "2 bit", "tokens_per_second": 46.5, "spread": [45.0, 47.1],
         "linear_bytes": 110_000_000, "model_bytes": 266_000_000, "bits_per_weight": 2.0,
         "model_bits_per_parameter": 3.57},
    ],
}  # fmt: skip
PROOF = {"codes_equal": True, "max_logit_difference": 0.00123, "mean_kl": 4.2e-7, "same_top1": 0.998}


def _json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _weights(rng, sharpness):
    """Histograms of a hump (sharpness 0) that gathers at the three codes as sharpness rises to 1."""
    edges = np.linspace(-4, 4, 161)
    layers = {}
    for index, name in enumerate(NAMES):
        hump = rng.normal(0, 1.2533, 20_000)
        codes = np.clip(np.rint(hump), -1, 1) * (1 + 0.1 * (index % 7))
        values = hump * (1 - sharpness) + (codes + rng.normal(0, 0.22, hump.size)) * sharpness
        counts = np.histogram(np.clip(values, -4, 4), edges)[0]
        layers[name] = {"counts": counts.tolist(), "weight_scale": 0.02 + 0.001 * index}
    return {"edges": edges.tolist(), "layers": layers}


def _metrics(rng):
    """Lines of metrics.jsonl for five stages, with the terms that each stage has."""
    stages = (("base", 600, 6.2, 2.4), ("teacher", 150, 1.1, 0.05), ("pretrain", 900, 7.5, 2.9),
              ("distill", 300, 1.4, 0.08), ("baseline", 300, 1.9, 0.4))  # fmt: skip
    now = 1_000_000.0
    for stage, steps, first, last in stages:
        for step in range(1, steps + 1):
            share = step / steps
            ce = (last + (first - last) * math.exp(-5 * share)) * math.exp(rng.normal(0, 0.07))
            rate = 2e-4 * min(1, 20 * share) * (1 + math.cos(math.pi * share)) / 2
            now += 0.4
            line = {"stage": stage, "step": step, "loss": ce, "loss_ce": ce, "learning_rate": rate,
                    "grad_norm": 3 * math.exp(-2 * share + rng.normal(0, 0.3)),
                    "tokens_per_second": 5000 + rng.normal(0, 200), "time": now}  # fmt: skip
            if stage == "distill":
                logits, relations = ce * 0.4 + 0.02, 2e-3 * math.exp(-3 * share + rng.normal(0, 0.2))
                gamma = 40 * (1 - math.exp(-8 * share)) + 10 + rng.normal(0, 1)
                line |= {
                    "loss_logits": logits,
                    "loss_attention": relations,
                    "gamma_attention": gamma,
                    "grad_norm_task": 1.0,
                    "grad_norm_attention": math.exp(rng.normal(0, 0.2)) / gamma,
                }
                line["loss"] = ce + 10 * logits + gamma * relations
            yield line


def _health(rng, stages):
    for stage, steps in stages:
        for step in range(10, steps + 1, 10):
            share = step / steps
            yield {"stage": stage, "step": step, "learning_rate": 1e-4, "layers": {
                name: {"minus": 0.33, "zeros": 0.31 + 0.01 * (index // 7) * share, "plus": 0.36 - 0.01 * (index // 7) * share,
                       "flips": (index != 3) * 2e-3 / (1 + index % 7) * math.exp(-3 * share + rng.normal(0, 0.1)),
                       "weight_scale": 0.02, "scale_drift": 1 + 0.1 * share, "peak_to_rms": 5.0 + index % 7,
                       "peak_to_rms_max": 20.0, "zero_activations": 0.02, "output_rms": 1.0,
                       "grad_norm": math.exp(-share)} for index, name in enumerate(NAMES)}}  # fmt: skip


def _attention(rng, tokens, heads=4):
    """Causal maps with a bright first token and a diagonal; the student's last heads stray from the teacher's."""
    count = len(tokens)
    scores = rng.normal(0, 1, (heads, count, count)) + 2.5 * np.eye(count)
    scores[:, :, 0] += 3
    strayed = scores + rng.normal(0, 1, scores.shape) * np.linspace(0.1, 1.5, heads)[:, None, None]

    def rows(logits):
        weights = np.exp(logits) * np.tri(count)
        return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)

    return {"teacher": rows(scores), "student": rows(strayed)}


def synthetic_run(path, seed=0, health=(("distill", 300),)):
    """An invented run directory with every file that the report reads."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text("# synthetic\nmodel:\n  model_name_or_path: synthetic/tiny\nseed: 0\n")
    _json(path / "versions.json", {"bitdistill": "0.1.0", "torch": "2.13.0", "machine": "2 synthetic cores"})
    for name, lines in (("metrics.jsonl", _metrics(rng)), ("health.jsonl", _health(rng, health))):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for stage, sharpness in (("refine", 0.0), ("pretrain", 0.55), ("distill", 0.6)):
        _json(path / stage / "weights.json", _weights(rng, sharpness))
    for stage, steps in (
        ("base", 600),
        ("teacher", 150),
        ("refine", 0),
        ("pretrain", 900),
        ("distill", 300),
        ("baseline", 300),
    ):
        _json(path / stage / "done.json", {"seconds": 1.5 + 0.71 * steps, "steps": steps})
    _json(path / "evaluate/scores.json", SCORES)
    tokens = [
        "<s>",
        "Review",
        ":",
        "Ġa",
        "Ġgor",
        "geous",
        ",",
        "Ġwit",
        "ty",
        ",",
        "Ġsed",
        "uctive",
        "Ġmovie",
        ".",
        "\n",
        "Sentiment",
        ":",
    ]
    maps = _attention(rng, tokens)
    np.savez(path / "evaluate/attention.npz", **maps, tokens=np.array(tokens), layer=np.int64(4))
    _json(path / "export/speed.json", SPEED)
    _json(path / "export/proof.json", PROOF)
    return path


class Page(HTMLParser):
    """Text of the elements with an id, table rows by table id, the tags and the attributes of a page."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.rows, self.tags, self.attributes = [], {}, {}, [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in self.VOID:
            return
        self.open.append((tag, dict(attrs).get("id")))
        table = self._table()
        if tag == "tr" and table:
            self.rows.setdefault(table, []).append([])
        if tag in ("td", "th") and table:
            self.rows[table][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, name in self.open:
            if name:
                self.texts[name] = self.texts.get(name, "") + data
        self.texts["all"] = self.texts.get("all", "") + data
        if self._table() and any(tag in ("td", "th") for tag, _ in self.open):
            self.rows[self._table()][-1][-1] += data

    def _table(self):
        return next((name for tag, name in reversed(self.open) if tag == "table" and name), None)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    run_dir = synthetic_run(tmp_path_factory.mktemp("run") / "synthetic")
    return run_dir, Page(write_report(run_dir))


def test_table_holds_the_numbers_of_the_files(full):
    _, page = full
    assert page.rows["table"][1:] == [
        ["FP16-SFT", "90.0 [88.1, 91.7]", "100.0 %", "880 MB (1.0x)", "1.19 GB (1.0x)", "16.00", "16.00", "torch fp32",
         "15.5 [14.9, 15.8] (1.00x)"],
        ["BitNet-SFT", "76.5 [73.6, 79.2]", "85.0 %", "88.1 MB (10.0x)", "244 MB (4.9x)", "1.60", "3.27", "base-3",
         "40.75 [40.1, 41.5] (2.63x)"],
        ["BitDistill", "88.2 [86.0, 90.2]", "98.0 %", "88.0 MB (10.0x)", "244 MB (4.9x)", "1.60", "3.27", "base-3",
         "41.25 [40.5, 41.9] (2.66x)"],
        ["", "", "", "110 MB (8.0x)", "266 MB (4.5x)", "2.00", "3.57", "2 bit", "46.5 [45, 47.1] (3.00x)"],
    ]  # fmt: skip
    assert page.rows["paired"][1] == [
        "BitDistill \N{MINUS SIGN} FP16-SFT",
        "-1.80",
        "-3.70 to +0.10",
        "not significant",
    ]
    assert page.rows["paired"][2][3] == "significant"
    assert page.rows["extra"] == [["Further metrics", "f1"], ["FP16-SFT", "90.25"], ["BitNet-SFT", "77.125"],
                                  ["BitDistill", "88.375"]]  # fmt: skip
    proof = {row[0]: row[1] for row in page.rows["proof"]}
    assert (proof["codes_equal"], proof["mean_kl"], proof["same_top1"]) == ("yes", "4.2e-07", "0.998")


def test_headline_ratios(full):
    run_dir, page = full
    numbers = headline(read_run(run_dir))
    assert numbers["retention"] == pytest.approx(100 * 88.2 / 90.0, rel=1e-12)
    assert numbers["gain"] == pytest.approx(11.7, rel=1e-12)
    assert numbers["linear_ratio"] == 10.0
    assert numbers["model_ratio"] == pytest.approx(1192 / 244, rel=1e-12)
    assert numbers["speed_ratio"] == pytest.approx(41.25 / 15.5, rel=1e-12)
    said = page.texts["summary"]
    assert "scores 88.2 (accuracy)" in said
    assert "keeps 98.0 % of it (paired difference -1.8 points, 95 % interval -3.7 to +0.1: not significant)" in said
    # the file holds BitNet-SFT - BitDistill: sign and bounds turn with the order
    assert "11.7 points above BitNet-SFT" in said
    assert "paired difference +11.7 points, 95 % interval +8.9 to +14.6: significant" in said
    assert "88.0 MB, 10.0 times less" in said
    assert "244 MB, 4.9 times less" in said
    assert "2.66 times the speed" in said
    assert "Caution" not in said
    assert "Warning" not in said


def test_page_is_self_contained(full):
    run_dir, page = full
    assert not {"script", "iframe", "link", "object", "img"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:")), (name, value)
    pictures = {path.stem for path in (run_dir / "figures").iterdir()}
    assert pictures == {"overview", "losses", "balance", "weights", "health-distill", "attention"}
    assert page.tags.count("svg") == len(pictures)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run_dir / "figures").iterdir())
    assert "not run" not in page.texts["all"]
    assert "Read with care" not in page.texts["all"]


def test_stage_table_and_settings(full):
    _, page = full
    rows = {row[0]: row[2:] for row in page.rows["stage-table"][1:]}
    assert list(rows) == ["base", "teacher", "refine", "pretrain", "distill", "baseline", "evaluate", "export"]
    assert rows["pretrain"][:3] == ["done", "900", "11 min"]
    assert rows["refine"][:3] == ["done", "0", "1.5 s"]
    assert "model_name_or_path: synthetic/tiny" in page.texts["all"]
    assert "2.13.0" in page.texts["all"]


def test_table_text_is_saved_and_printed(full):
    run_dir, _ = full
    text = table_text(run_dir)
    assert (run_dir / "table.txt").read_text(encoding="utf-8") == text
    rows = [[cell.strip() for cell in re.split(r"\s{2,}", line.strip())] for line in text.splitlines()]
    for row in (
        ["FP16-SFT", "BitNet-SFT", "BitDistill", "BitDistill"],
        ["Accuracy [95 %]", "90.0 [88.1, 91.7]", "76.5 [73.6, 79.2]", "88.2 [86.0, 90.2]"],
        ["of FP16", "100.0 %", "85.0 %", "98.0 %"],
        ["Linears", "880 MB (1.0x)", "88.1 MB (10.0x)", "88.0 MB (10.0x)", "110 MB (8.0x)"],
        ["Whole model", "1.19 GB (1.0x)", "244 MB (4.9x)", "244 MB (4.9x)", "266 MB (4.5x)"],
        ["Bits/weight", "16.00", "1.60", "1.60", "2.00"],
        ["Runner", "torch fp32", "base-3", "base-3", "2 bit"],
    ):
        assert row in rows
    assert "872 examples scored; speed on 2 synthetic cores" in text
    assert [column.header.plain for column in comparison_table(run_dir).columns[1:]] == [
        *SETTINGS,
        "BitDistill",
    ]


def test_an_empty_run_is_named_not_run(tmp_path):
    page = Page(write_report(tmp_path))
    assert [row[:2] for row in page.rows["table"][1:]] == [[setting, "not run"] for setting in SETTINGS]
    assert {row[2] for row in page.rows["stage-table"][1:]} == {"not run"}
    assert "BitDistill has not been evaluated yet." in page.texts["summary"]
    assert "svg" not in page.tags
    assert page.texts["all"].count("not run") >= 3 * 3 + 8 + 5 + 4
    assert "BitDistill" in table_text(tmp_path)
    assert not (tmp_path / "figures").exists()


PARTS = ("config.yaml", "versions.json", "metrics.jsonl", "health.jsonl", "refine/weights.json",
         "pretrain/weights.json", "pretrain/done.json", "evaluate/scores.json", "evaluate/attention.npz",
         "export/speed.json", "export/proof.json")  # fmt: skip


def test_each_part_may_be_missing_or_cut_off(tmp_path, monkeypatch):
    # drawing is slow and tested elsewhere
    monkeypatch.setattr(drawing, "draw", lambda plot, *args: ("<svg></svg>", b""))
    run_dir = synthetic_run(tmp_path / "run")
    for part in PARTS:
        whole = (run_dir / part).read_bytes()
        (run_dir / part).unlink()
        Page(write_report(run_dir))
        assert read_run(run_dir).remarks == []
        (run_dir / part).write_bytes(whole[: len(whole) // 2 - 3])
        page = Page(write_report(run_dir))
        if part != "config.yaml":  # shown as text, whatever it holds
            assert part in page.texts["remarks"]
        (run_dir / part).write_bytes(whole)
    (run_dir / "export/proof.json").write_text("[1]")
    assert read_run(run_dir).remarks == ["export/proof.json holds no JSON object and is left out."]


def test_one_setting_alone(tmp_path):
    _json(tmp_path / "evaluate/scores.json", {**SCORES, "rows": SCORES["rows"][2:], "paired": []})
    page = Page(write_report(tmp_path))
    assert [row[1:3] for row in page.rows["table"][1:]] == [
        ["not run", MISSING],
        ["not run", MISSING],
        ["88.2 [86.0, 90.2]", MISSING],
    ]
    assert headline(read_run(tmp_path)) == dict.fromkeys(
        ("retention", "gain", "linear_ratio", "model_ratio", "speed_ratio")
    )


def test_generation_scores_bring_further_metrics(tmp_path):
    extra = {"rouge1": {"score": 40.625, "interval": [40.0, 41.25]}, "bleu": 14.5}
    rows = [{"setting": "BitDistill", "score": 37.5, "interval": [37.0, 38.0], "examples": 9, "extra": extra}]
    _json(tmp_path / "evaluate/scores.json", {"task": "t", "metric": "ROUGE-Lsum", "majority": None, "rows": rows})
    page = Page(write_report(tmp_path))
    assert page.rows["table"][0][1] == "ROUGE-Lsum [95 %]"
    assert page.rows["extra"] == [["Further metrics", "rouge1", "bleu"],
                                  ["BitDistill", "40.62 [40.00, 41.25]", "14.5"]]  # fmt: skip


def test_four_bits_and_further_splits(tmp_path):
    """The 4-bit settings come after FP16-SFT; a further validation split has its own column and paired differences."""
    further = {"validation_mismatched": {"score": 71.25, "interval": [70.0, 72.5], "examples": 40}}
    rounded = [{"setting": name, "score": 89.5, "interval": [88.0, 91.0], "examples": 872, "extra": {}}
               for name in ("int4 RTN", "int4 GPTQ")]  # fmt: skip
    rows = [row | {"splits": further} for row in [*SCORES["rows"], *rounded]]
    paired = [*SCORES["paired"], {"a": "BitDistill", "b": "int4 GPTQ", "difference": -1.3, "interval": [-3.0, 0.4]}]
    paired.append(paired[-1] | {"split": "validation_mismatched", "difference": 5.5})
    _json(tmp_path / "evaluate/scores.json", {**SCORES, "rows": rows, "paired": paired})
    sizes = {"runner": "not measured", "linear_bytes": 220_000_000, "model_bytes": 376_000_000,
             "bits_per_weight": 4.125, "model_bits_per_parameter": 5.05}  # fmt: skip
    speeds = [*SPEED["rows"][:3], *({"setting": name, **sizes} for name in ("int4 RTN", "int4 GPTQ"))]
    _json(tmp_path / "export/speed.json", {**SPEED, "rows": speeds})
    page = Page(write_report(tmp_path))
    head, *lines = page.rows["table"]
    assert head[1:4] == ["Accuracy [95 %]", "of FP16", "mismatched [95 %]"]
    assert [line[0] for line in lines] == ["FP16-SFT", "int4 RTN", "int4 GPTQ", "BitNet-SFT", "BitDistill"]
    assert {line[3] for line in lines} == {"71.2 [70.0, 72.5]"}
    assert lines[2][4:6] == ["220 MB (4.0x)", "376 MB (3.2x)"]
    pairs = [[row[0].replace("\N{MINUS SIGN}", "-"), row[1]] for row in page.rows["paired"]]
    assert ["BitDistill - int4 GPTQ, validation_mismatched", "+5.50"] in pairs
    said = " ".join(summary(read_run(tmp_path)))
    assert "4 bits (int4 GPTQ, no training) scores 89.5" in said
    assert "its linear layers take 220 MB, 2.5 times as much as the student's" in said
    assert "paired difference -1.3 points" in said
    text = table_text(tmp_path)
    assert max(map(len, text.splitlines())) <= 90
    assert "[88.0, 91.0]" in text


def test_zero_scores_divide_nothing(tmp_path):
    rows = [{**row, "score": 0.0, "interval": [0.0, 0.4]} for row in SCORES["rows"]]
    _json(tmp_path / "evaluate/scores.json", {**SCORES, "rows": rows, "paired": [], "majority": None})
    assert headline(read_run(tmp_path))["retention"] is None
    assert headline(read_run(tmp_path))["gain"] == 0.0
    assert "0.0 [0.0, 0.4]" in table_text(tmp_path)


def test_corrupted_lines_are_counted(tmp_path):
    good = {"stage": "base", "step": 1, "loss": 2.0, "loss_ce": 2.0}
    lines = [json.dumps(good), "", "{cut", "7", '{"step": 3}', json.dumps({**good, "step": 2, "loss": math.nan})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": "base", "st')
    run = read_run(tmp_path)
    assert [line["step"] for line in run.metrics["base"]] == [1, 2]
    page = Page(write_report(tmp_path))
    assert "metrics.jsonl: 4 corrupted lines left out." in page.texts["remarks"]
    assert "base: the loss was not finite at 1 of 2 logged steps." in page.texts["remarks"]


def test_a_resumed_stage_replaces_what_it_gave_up(tmp_path):
    steps = [("base", step, 0) for step in (1, 2, 3, 4, 5)] + [("teacher", 1, 0), ("base", 3, 1), ("base", 4, 1)]
    lines = [json.dumps({"stage": stage, "step": step, "loss": loss}) for stage, step, loss in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(tmp_path)
    assert [(line["step"], line["loss"]) for line in run.metrics["base"]] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert len(run.metrics["teacher"]) == 1
    assert run.remarks == ["metrics.jsonl: 3 lines replaced by a resumed or repeated stage."]


def test_odd_values_in_metrics_are_passed_over(tmp_path):
    lines = [{"step": "1", "loss": None}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": 2, "loss_ce": math.inf}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps({"stage": "base", **line}) for line in lines))
    page = Page(write_report(tmp_path))
    assert (tmp_path / "figures/losses.png").is_file()
    assert next(row for row in page.rows["stage-table"] if row[0] == "base")[2:] == [
        "unfinished", "3", MISSING, MISSING, "2"]  # fmt: skip


def test_unfinished_stage(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"stage": "pretrain", "step": 1200, "loss": 3.25}))
    page = Page(write_report(tmp_path))
    assert next(row for row in page.rows["stage-table"] if row[0] == "pretrain")[2:] == [
        "unfinished", "1,200", MISSING, MISSING, "3.25"]  # fmt: skip


WARNINGS = [
    {"stage": "distill", "step": 40, "kind": "thrash", "seen": "codes thrash in 2 of 42 layers", "do": "Lower it.",
     "layers": NAMES[:2]},
    {"stage": "pretrain", "step": 1250, "kind": "frozen", "seen": "not one code flips in 42 of 42 layers",
     "do": "Raise learning_rate.", "layers": NAMES},
]  # fmt: skip


def test_verdict_on_the_health(full, tmp_path, monkeypatch):
    run_dir, page = full
    assert page.texts["verdict"] == (
        "Healthy: no warning in 30 measurements (distill). At the end of the stages, 31% to 36% of a layer's codes are zero."
    )
    assert "warnings" not in page.rows
    assert "health: no warning" in table_text(run_dir)

    monkeypatch.setattr(drawing, "draw", lambda plot, *args: ("<svg></svg>", b""))
    sick = synthetic_run(tmp_path / "sick")
    (sick / "warnings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in WARNINGS) + '{"stage": "dis')
    page = Page(write_report(sick))
    assert page.texts["verdict"].startswith(
        "There were 2 warnings during training (pretrain: frozen; distill: thrash)."
    )
    assert [row[:4] for row in page.rows["warnings"][1:]] == [
        ["frozen", "pretrain", "1,250", "not one code flips in 42 of 42 layers"],
        ["thrash", "distill", "40", "codes thrash in 2 of 42 layers"],
    ]
    assert page.rows["warnings"][1][4] == "Raise learning_rate."
    assert "Caution: there were 2 warnings during training; see Health." in page.texts["summary"]
    assert "health: 2 warnings" in table_text(sick)
    assert "warnings.jsonl: 1 corrupted line left out." in page.texts["remarks"]


def test_health_of_an_older_run_is_drawn_but_not_judged(tmp_path):
    lines = [{"stage": "distill", "step": step, "layers": {name: {"zeros": 0.3, "flips": 0.0, "weight_scale": 1.0}
                                                           for name in NAMES[:8]}} for step in (5, 10)]  # fmt: skip
    (tmp_path / "health.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(tmp_path))
    assert page.texts["verdict"].startswith("Measured 2 times in distill, but by a version")
    assert "Healthy" not in page.texts["all"]
    assert "health:" not in table_text(tmp_path)
    assert (tmp_path / "figures/health-distill.png").is_file()
    assert page.texts["all"].count("not logged") == 5  # shares, drift, peaks, int8 codes, gradient


HOSTILE = "<script>alert(1)</script>\"'&$x_{$[red]\\frac{"


def test_hostile_strings_stay_text(tmp_path):
    run_dir = synthetic_run(tmp_path / "<b>run")
    (run_dir / "health.jsonl").unlink()  # nothing hostile in it, and slow to draw
    scores = [*SCORES["rows"], {"setting": HOSTILE, "score": 1.0, "interval": [0.0, 2.0], "examples": 3}]
    texts = {"task": HOSTILE, "metric": HOSTILE, "notes": [HOSTILE]}
    _json(run_dir / "evaluate/scores.json", {**SCORES, **texts, "rows": scores})
    speeds = [{**SPEED["rows"][0], "runner": HOSTILE}]
    _json(run_dir / "export/speed.json", {"machine": HOSTILE, "rows": speeds})
    _json(run_dir / "export/proof.json", {HOSTILE: HOSTILE, "codes_equal": False})
    _json(run_dir / "versions.json", {"bitdistill": HOSTILE, HOSTILE: [HOSTILE]})
    _json(run_dir / "pretrain/weights.json", {"edges": [-4, 0, 4], "layers": {HOSTILE: {"counts": [1, 2]}}})
    (run_dir / "config.yaml").write_text("</pre>" + HOSTILE)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": HOSTILE, "step": 1, "loss": 1.0}) + "\n")
        file.write(json.dumps({"stage": "../../escape", "step": 1, "loss": 1.0}) + "\n")
    tokens = np.array([HOSTILE[:9], "$a_{$", "\x00\x1b", "中文", "]]>"])
    maps = _attention(np.random.default_rng(0), tokens)
    np.savez(run_dir / "evaluate/attention.npz", **maps, tokens=tokens, layer=HOSTILE)
    _json(
        run_dir / "warnings.jsonl", {**WARNINGS[0], "stage": HOSTILE, "kind": HOSTILE, "seen": HOSTILE, "do": HOSTILE}
    )
    page = Page(write_report(run_dir))
    assert "script" not in page.tags
    assert page.tags.count("pre") == 1
    for place in ("all", "table", "proof", "warnings"):
        assert HOSTILE in page.texts[place]
    assert "does NOT hold the ternary codes" in page.texts["summary"]
    assert HOSTILE in table_text(run_dir)
    assert {path.name for path in tmp_path.iterdir()} == {"<b>run"}


def test_caution_when_a_score_is_chance(tmp_path):
    rows = [{**row, "interval": [45.0, 55.0], "score": 50.0} if row["setting"] == "BitNet-SFT" else row
            for row in SCORES["rows"]]  # fmt: skip
    _json(tmp_path / "evaluate/scores.json", {**SCORES, "rows": rows})
    said = " ".join(summary(read_run(tmp_path)))
    assert said.count("Caution") == 1
    assert "the interval of BitNet-SFT contains 50.9" in said


def test_missing_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="existing folder"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (266e6, "266 MB"), (1.192e9, "1.19 GB"),
     (311_000_000_000, "311 GB"), (None, MISSING)],
)  # fmt: skip
def test_bytes(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (119.9, "119.9 s"), (600, "10 min"), (7260, "2 h 01 min"), (None, MISSING)],
)
def test_duration(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize("count", [1, 2, 59, 60, 240, 1001])
def test_smooth_is_a_centered_mean(count):
    values = np.random.default_rng(count).normal(size=count)
    reach = count // 60
    expected = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(count)]
    np.testing.assert_allclose(drawing.smooth(values), expected, rtol=1e-12, atol=1e-12)


def test_thin_keeps_order_ends_of_range_and_spikes():
    values = np.random.default_rng(0).normal(size=50_000)
    values[31_337] = 40
    steps, kept = drawing.thin(np.arange(values.size), values)
    assert len(kept) <= 2 * drawing.MAX_POINTS
    assert (np.diff(steps) > 0).all()
    assert kept.max() == 40
    assert kept.min() == values.min()
    np.testing.assert_array_equal(values[steps], kept)


def test_kind_and_depth():
    assert plots.kind_and_depth("model.layers.17.mlp.down_proj") == ("down_proj", 17)
    assert plots.kind_and_depth("lm_head") == ("lm_head", 0)


def test_heads_are_chosen_by_distance():
    rng = np.random.default_rng(1)
    teacher = rng.random((5, 4, 4))
    student = teacher + np.array([0.3, 0.0, 0.5, 0.1, 0.2])[:, None, None]
    titles = [title for title, _, _ in plots.pick_heads(teacher, student)]
    assert titles == ["head 1 (closest)", "head 4 (middling)", "head 2 (farthest)"]
    assert len(plots.pick_heads(teacher[:1], student[:1])) == 1
    ((title, a, b),) = plots.pick_heads(teacher, student[:2])
    assert title == "mean of all heads"
    np.testing.assert_allclose(a, teacher.mean(0))
    np.testing.assert_allclose(b, student[:2].mean(0))


def test_svg_is_well_formed_and_follows_the_page():
    histogram = {"edges": [-4, -0.5, 0.5, 4], "layers": {"model.layers.0.mlp.up_proj": {"counts": [1, 2, 1]}}}
    svg, png = drawing.draw(plots.weights, {"refine": histogram})
    root = ElementTree.fromstring(svg)
    assert "width" not in root.attrib
    assert root.attrib["viewBox"]
    assert "currentColor" in svg
    assert drawing.INK not in svg
    assert png.startswith(b"\x89PNG")


def test_tokens_become_short_labels():
    tokens = ["Ġmovie", " movie", "▁movie", "\n", "Ċ", "\x1b", "中文", "antidisestablishment"]
    want = ["·movie", "·movie", "·movie", "\\n", "\\n", "\\x1b", "中文", "antidisesta…"]
    assert [plots._visible(token) for token in tokens] == want


def test_long_example_shows_its_last_tokens():
    rng = np.random.default_rng(0)
    tokens = [f"t{index}" for index in range(plots.MAX_TOKENS + 30)]
    svg, _ = drawing.draw(plots.attention, *_attention(rng, tokens, heads=1).values(), tokens)
    assert ">t30<" in svg
    assert ">t29<" not in svg
