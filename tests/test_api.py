"""`import bitdistill` as a user's script would use it: what it offers, that it is lazy, a model converted in a dozen lines."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from test_runtime import byte_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import bitdistill
from bitdistill.config import DistillConfig, TrainingConfig
from bitdistill.dependencies import OF_TEACHER_CACHE
from tiny_students import CONFIGS

INIT = Path(bitdistill.__file__)


def test_everything_offered_is_there_and_known_to_type_checkers():
    for name in bitdistill._HOMES:
        assert getattr(bitdistill, name).__name__ == name
        assert getattr(bitdistill, name).__doc__
    assert set(bitdistill._HOMES) <= set(dir(bitdistill))
    [block] = [node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == {name: f"bitdistill.{home}" for name, home in bitdistill._HOMES.items()}
    assert (INIT.parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="nonsense"):
        _ = bitdistill.nonsense


def test_no_name_is_also_a_module():
    """`import bitdistill.train` would put the module in the place of a function of that name."""
    modules = {path.stem for path in INIT.parent.iterdir()}
    assert not modules & bitdistill._HOMES.keys()


def test_import_and_load_are_free_of_torch():
    code = (
        "import sys, bitdistill; assert not {'torch', 'numpy'} & set(sys.modules); "
        "bitdistill.load, bitdistill.Sampling, bitdistill.UserError; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_of_distillation_are_those_of_the_settings():
    ours = {name: p.default for name, p in inspect.signature(bitdistill.Distillation).parameters.items()}
    own = {field.name for field in dataclasses.fields(DistillConfig)} - {
        f.name for f in dataclasses.fields(TrainingConfig)
    }
    settings, own = DistillConfig(), own - set(OF_TEACHER_CACHE)  # of a stage before it
    assert own == ours.keys() - {"student", "teacher"}
    for name in own:
        setting = getattr(settings, name)
        assert ours[name] == (tuple(setting) if isinstance(setting, list) else setting), name


def save_base(folder, vocabulary=258):
    """A tiny random base model over bytes and <eos>, as a Hugging Face folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"], dtype=torch.float32)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


TASK = """
name: verdict
kind: classification
prompt: "{text}:"
truncate_column: text
label_column: label
labels: {0: bad, 1: good}
"""


def test_a_model_is_converted_and_generates(base, tmp_path):
    (tmp_path / "corpus.txt").write_text("A film that is good, and one that is bad. " * 60)
    (tmp_path / "task.yaml").write_text(TASK)
    rows = datasets.Dataset.from_list([{"text": f"film {i}", "label": i % 2} for i in range(8)])

    model, tokenizer = bitdistill.load_language_model(base), bitdistill.load_tokenizer(base)
    task = bitdistill.load_task(str(tmp_path / "task.yaml"))
    encoded, counts = bitdistill.encode(task, rows, tokenizer, max_length=40)
    teacher = bitdistill.load_language_model(base)
    taught = bitdistill.fit(teacher, encoded, tokenizer=tokenizer, max_steps=2)

    before = model.model.layers[0].mlp.up_proj.weight.clone()
    refined = bitdistill.refine(model)
    stream = bitdistill.TokenStream(str(tmp_path / "corpus.txt"), tokenizer, block_size=32)
    bitdistill.fit(model, stream, max_steps=2, learning_rate=1e-2, output_dir=tmp_path / "stage2", logging_steps=1)
    objective = bitdistill.Distillation(model, bitdistill.freeze(teacher), relation="eq12")
    facts = bitdistill.fit(model, encoded, objective, tokenizer=tokenizer, max_steps=3, output_dir=tmp_path / "stage3")

    sizes = bitdistill.write(tmp_path / "student.safetensors", model, tokenizer, task=task, max_length=40)
    proof = bitdistill.prove(tmp_path / "student.safetensors", model, tokenizer, ["film 3:", "a film"])
    runtime = bitdistill.load(tmp_path / "student.safetensors", threads=1)
    text = "".join(runtime.generate("film 3:", 6, bitdistill.Sampling(temperature=1.0, seed=1)))

    assert counts["rows"] == 8
    assert taught["steps"] == 2
    assert facts["steps"] == 3
    assert refined.ternary == 7 * 3
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight.cpu())
    lines = [json.loads(line) for line in (tmp_path / "stage2/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0].keys() >= {"loss_ce", "learning_rate"}
    assert proof["linears"] == 21
    assert sizes["file_bytes"] == (tmp_path / "student.safetensors").stat().st_size
    assert sizes["embedding"] == "int8"
    assert (runtime.task, runtime.header.max_length) == (task, 40)
    assert text


TYPED = ("__init__.py", "api.py", "errors.py", "runtime/loading.py", "runtime/predict.py", "runtime/sampling.py")
SCRIPT = """
import bitdistill

runtime = bitdistill.load("runs/demo", threads=1)
for piece in runtime.generate("x", 5, bitdistill.Sampling(temperature=1.0), stop="y"):
    print(piece.upper())
predictions: list[bitdistill.Prediction] = runtime.predict(["x", {"text": "y"}])
print([(one.label or one.text or "").upper() for one in predictions])
model, tokenizer = bitdistill.load_language_model("x"), bitdistill.load_tokenizer("x")
bitdistill.refine(model)
stream = bitdistill.TokenStream("corpus.txt", tokenizer, block_size=32)
facts = bitdistill.fit(model, stream, max_steps=2, warmup_steps=1)
teacher = bitdistill.freeze(bitdistill.load_language_model("x"))
task: bitdistill.Task = bitdistill.load_task("sst2")
rows, counts = bitdistill.encode(task, bitdistill.load_rows(task, "train", None), tokenizer, 40)
bitdistill.fit(model, rows, bitdistill.Distillation(model, teacher), tokenizer=tokenizer)
bitdistill.write("x.safetensors", model, tokenizer)
print(bitdistill.prove("x.safetensors", model, tokenizer, ["a"])["mean_kl"])
try:
    bitdistill.save_student("x", bitdistill.load_student("x"), tokenizer)
except bitdistill.UserError as error:
    print(error.field)
bitdistill.load("runs/demo", threads="two")
"""


def test_refusals(base, tmp_path):
    model, tokenizer = bitdistill.load_language_model(base), bitdistill.load_tokenizer(base)
    (tmp_path / "corpus.txt").write_text("text " * 100)
    stream = bitdistill.TokenStream(str(tmp_path / "corpus.txt"), tokenizer, block_size=16)
    with pytest.raises(bitdistill.UserError, match="max_steps"):
        bitdistill.fit(model, stream)
    with pytest.raises(bitdistill.UserError, match="tokenizer"):
        bitdistill.fit(model, datasets.Dataset.from_list([{"input_ids": [1], "labels": [1]}]), max_steps=1)
    with pytest.raises(bitdistill.UserError, match="refined"):
        bitdistill.write(tmp_path / "x.safetensors", model, tokenizer)
    with pytest.raises(bitdistill.UserError, match="export stage"):
        bitdistill.load(tmp_path)
    small = bitdistill.load_language_model(save_base(tmp_path / "small", vocabulary=200))
    with pytest.raises(bitdistill.UserError, match="200"):
        bitdistill.fit(small, datasets.Dataset.from_list([{"input_ids": [1], "labels": [1]}]), tokenizer=tokenizer)


@pytest.mark.slow
def test_a_script_and_what_it_uses_are_clean_for_a_type_checker(tmp_path):
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed (pip install pyright)")
    package = tmp_path / "lib" / "bitdistill"  # as it is installed: kernels and distributed inside
    package.mkdir(parents=True)
    for path in INIT.parent.iterdir():
        (package / path.name).symlink_to(path)
    for name in ("kernels", "distributed"):
        (package / name).symlink_to(INIT.parent.parent / name)
    (tmp_path / "script.py").write_text(SCRIPT)
    settings = {"include": ["script.py", *(f"lib/bitdistill/{path}" for path in TYPED)], "extraPaths": ["lib"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--pythonpath",
        sys.executable,
        "--outputjson",
        "--project",
        str(tmp_path),
    ]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    assert result["summary"]["filesAnalyzed"] == 1 + len(TYPED)
    errors = [d for d in result["generalDiagnostics"] if d["severity"] == "error"]
    mistake = SCRIPT.splitlines().index('bitdistill.load("runs/demo", threads="two")')
    assert [(d["file"], d["range"]["start"]["line"]) for d in errors] == [(str(tmp_path / "script.py"), mistake)], (
        errors
    )
