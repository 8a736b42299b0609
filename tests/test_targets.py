"""`bitdistill check` and --deploy_target: what opens where, by hand for the four families; contradictions are refused first."""

import copy

import pytest
import yaml
from test_gguf_file import byte_level

import tiny_students
from bitdistill import preflight
from bitdistill.command_line import parse_config
from bitdistill.commands.check import check
from bitdistill.errors import UserError
from bitdistill.export.gguf_file import write_gguf
from bitdistill.export.hugging_face import FORMATS, write_hugging_face
from bitdistill.export.targets import TARGETS, Choice, matrix_sizes, matrix_types, obstacles, settings_for, verdicts
from bitdistill.names import DEPLOY_TARGETS
from bitdistill.problems import Report
from bitdistill.student.layers import bit_linears
from bitdistill.student.refine import refine

PAPER = Choice()


def test_every_target_has_a_name_in_the_settings():
    assert tuple(TARGETS) == DEPLOY_TARGETS


def config(name, hidden=256, middle=512, **changes):
    """A configuration whose students every tool can open."""
    found = copy.deepcopy(tiny_students.CONFIGS[name])
    found.hidden_size, found.intermediate_size, found.head_dim, found.vocab_size = hidden, middle, 64, 320
    found.rope_parameters = {"rope_theta": 10000.0, "rope_type": "default"}
    if name == "qwen2":
        found.use_sliding_window = False
    if name == "gemma3":
        found.layer_types = ["sliding_attention"] * 5 + ["full_attention"]
        found.num_hidden_layers, found.query_pre_attn_scalar = 6, 64
        sliding = {"rope_type": "default", "rope_theta": 10000.0}
        full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
        found.rope_parameters = {"sliding_attention": sliding, "full_attention": full}
    for key, value in changes.items():
        setattr(found, key, value)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_each_target_opens_what_is_trained_for_it(family):
    base = config(family)
    for name in TARGETS:
        rows = {row["target"]: row for row in verdicts(base, Choice(**settings_for(name, base)))}
        assert rows[name]["possible"] == (TARGETS[name].format is not None), rows[name]["why"]
        assert rows["bitdistill"]["possible"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_the_paper_s_students_open_in_our_runtime_and_llama_s_in_bitnet(family):
    base = config(family, tie_word_embeddings=True)
    opens = [row["target"] for row in verdicts(base, PAPER) if row["possible"]]
    assert opens == (["bitdistill", "llama.cpp"] if family == "llama" else ["bitdistill"])
    why = {row["target"]: row["why"] for row in verdicts(base, PAPER)}["llama.cpp"]
    kind = (
        "" if family == "llama" else f"no llama.cpp architecture has SubLN for {base.model_type}; use refine.norms none"
    )
    assert why == kind  # and nothing of what `bitnet` lacks, which is Llama's affair


def test_settings_by_hand():
    fits = settings_for("llama.cpp", config("qwen3"))
    assert fits == {"norms": "none", "act_scale": "block", "weight_scale": "group", "group_size": 256}
    assert settings_for("llama.cpp", config("qwen3", hidden=576))["group_size"] == 64
    assert settings_for("mlx", config("qwen3"))["group_size"] == 128
    assert settings_for("transformers", config("qwen3"))["weight_scale"] == "row"
    assert settings_for("ollama", config("qwen3", middle=1000))["weight_scale"] == "row"
    assert settings_for("bitdistill", config("qwen3")) == {}


def test_file_types_and_sizes_by_hand():
    """256 columns (q, k, v, o, gate, up) and 512 (down); four heads and two of width 64, three layers."""
    base = config("qwen3")
    assert matrix_sizes(base) == {256: 3 * (256 * (256 + 128 + 128 + 256) + 2 * 512 * 256), 512: 3 * 256 * 512}
    llama, ollama = TARGETS["llama.cpp"], TARGETS["ollama"]
    assert matrix_types(llama, base, Choice("none")) == {256: ("tq2_0", 2.0625), 512: ("tq2_0", 2.0625)}
    assert matrix_types(ollama, base, Choice("none")) == {256: ("q2_k", 2.625), 512: ("q2_k", 2.625)}
    assert matrix_types(llama, base, Choice("none", "group", 64))[256] == ("q4_0", 4.5)
    assert matrix_types(llama, config("qwen3", middle=576), Choice("none"))[576] == ("q4_0", 4.5)
    assert matrix_types(TARGETS["mlx"], base, Choice("none", "group", 64))[512] == ("2 bits affine", 2.5)
    assert matrix_types(TARGETS["bitdistill"], base, Choice("two", "group", 128))[512] == ("base3", 1.6 + 0.125)
    rows = {row["target"]: row for row in verdicts(base, Choice("none"))}
    weights = sum(matrix_sizes(base).values())
    assert rows["llama.cpp"]["file_bytes"] == int((weights * 2.0625 + 320 * 256 * 8.5) / 8)
    assert rows["llama.cpp"]["bits_per_weight"] == pytest.approx(2.0625)
    assert rows["llama.cpp"]["tokens_per_second"] is None  # it stays in the cache
    large = verdicts(config("qwen3", vocab_size=200_000), Choice("none"))
    rows = {row["target"]: row for row in large}
    read = rows["llama.cpp"]["file_bytes"]  # tied: all of it, at 19.6 GB/s
    assert rows["llama.cpp"]["tokens_per_second"] == pytest.approx(19.6e9 / read, rel=1e-3)
    assert rows["mlx"]["tokens_per_second"] is None


@pytest.mark.parametrize("weight_scale", ["tensor", "row", "group"])
@pytest.mark.parametrize("group_size", [64, 256])
@pytest.mark.parametrize("middle", [512, 160])
def test_the_matrix_says_what_the_writers_do(weight_scale, group_size, middle, tmp_path):
    """Where it says yes a file is written, of the type and size that it says; where it says no the writer refuses."""
    base = config("llama", middle=middle, num_hidden_layers=1, tie_word_embeddings=True)
    choice = Choice("none", weight_scale, group_size)
    model = tiny_students.of_config(base)
    refine(model, norms="none", weight_scale=weight_scale, group_size=group_size)
    for name, format in (("llama.cpp", "gguf"), *zip(("transformers", "vllm", "mlx"), FORMATS, strict=True)):
        against, path = obstacles(TARGETS[name], base, choice), tmp_path / name
        write = write_gguf if format == "gguf" else write_hugging_face
        options = (byte_level(),) if format == "gguf" else (byte_level(), format)
        if against:
            with pytest.raises(UserError):
                write(path, model, *options)
            continue
        sizes = write(path, model, *options)
        row = next(row for row in verdicts(base, choice) if row["target"] == name)
        assert sizes["bits_per_weight"] == pytest.approx(row["bits_per_weight"])
        if format == "gguf":
            assert set(sizes["types"]) == set(row["file_type"].split("/"))
    assert len(bit_linears(model)) == 7


# --- the run ------------------------------------------------------------------------------------------------------------


def fitted(*arguments, base=None):
    settings = parse_config(list(arguments))[0]
    report = Report()
    explicit = {argument[2:] for argument in arguments if argument.startswith("--")}
    preflight.fit_to_target(settings, base or config("qwen3"), explicit, report)
    return settings, report


def test_a_target_sets_what_was_not_given_and_says_what_is_given_up():
    settings, report = fitted("--deploy_target", "ollama")
    assert (settings.refine.norms, settings.refine.weight_scale, settings.refine.group_size) == ("none", "group", 256)
    assert settings.refine.act_scale == "block"
    said = report.rows[0][2]
    assert "given up: SubLN" in said
    assert "will open in this project's runtime, llama.cpp, Ollama" in said
    settings, report = fitted("--deploy_target", "ollama", "--refine.weight_scale", "row")
    assert settings.refine.weight_scale == "row"
    assert not report.problems
    settings, report = fitted()
    assert settings.refine.norms == "two"
    assert report.rows[0][2] == "the student will open in this project's runtime"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("mlx", "--refine.norms", "two"), "a student that MLX opens; got mlx has no place for SubLN"),
        (("transformers", "--refine.weight_scale", "group"), "not of groups"),
        (("onnx-genai",), "writes no file for it"),
        (("llama.cpp", "--pretrain.annealing", "softmax"), "softmax"),
    ],
)
def test_contradictions_are_refused_before_training(arguments, match):
    _, report = fitted("--deploy_target", *arguments)
    with pytest.raises(UserError, match=match):
        report.require()


def test_the_commands(tmp_path, capsys):
    config("qwen3").save_pretrained(tmp_path)
    check(str(tmp_path), deploy_target="ollama")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())  # the last column is folded
    for text in ("refine.norms none", "given up", "llama.cpp", "vLLM", "q2_k", "ONNX Runtime GenAI"):
        assert text in shown
    check(str(tmp_path))
    assert "no place for SubLN" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_run_s_config_keeps_what_the_target_set(tmp_path):
    from bitdistill.job import Job
    from bitdistill.train import STAGES

    arguments = ["--output_dir", str(tmp_path / "run"), "--deploy_target", "llama.cpp", "--stage", "check"]
    settings, text = parse_config(arguments)
    Job(settings, text, STAGES, {"output_dir", "deploy_target", "stage"})
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["deploy_target"] == "llama.cpp"
    assert (kept["refine"]["norms"], kept["refine"]["act_scale"]) == ("none", "block")
