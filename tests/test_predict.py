"""A packed file that knows its task: the header, chat templates as transformers applies them, and predictions that are the
evaluation's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import bitdistill
from bitdistill.errors import UserError
from bitdistill.evaluation.score import score_rows
from bitdistill.prompts import Task, prompt_texts
from bitdistill.runtime.chat_template import PackedTokenizer
from bitdistill.runtime.conversation import conversation_ids
from bitdistill.runtime.header import Header, read_header
from bitdistill.runtime.sampling import Sampling
from bitdistill.student.loading import tokenizer_settings
from tiny_students import student

DATA = Path(os.environ.get("BITDISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REVIEWS = Task(
    "reviews", "classification", "{text}\nIt was", "text", label_column="label", labels={0: "bad", 1: "good", 2: "fine"}
)
PAIRS = Task("pairs", "classification", "{a}|{b}:", "a", label_column="label", labels={"x": "ab", "y": "ac", "z": "bd"})
SUMMARY = Task("summary", "generation", "{text}\nShort:", "text", target_column="short", max_new_tokens=9)


def letters_tokenizer(chat_template=None):
    """A token a printable ASCII byte, and the markers of a chat: 97 tokens with the one that ends a text."""
    special = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = [chr(code) for code in range(33, 33 + 97 - len(special) - 2)] + ["Ġ", "Ċ"]
    vocabulary = {text: index for index, text in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", bos_token="<s>", chat_template=chat_template
    )


def written(folder, task, chat_template=None, max_length=40, name="qwen3"):
    """(file, its tokenizer) of a random student that was "trained" for a task."""
    tokenizer, model = letters_tokenizer(chat_template), student(name)
    bitdistill.write(folder / "s.safetensors", model, tokenizer, task=task, max_length=max_length)
    return folder / "s.safetensors", tokenizer


def test_a_task_survives_json():
    for task in (REVIEWS, PAIRS, SUMMARY, bitdistill.load_task("mnli")):
        again = Task.from_json(json.loads(json.dumps(task.to_json())))
        assert again == task
        assert [type(value) for value in again.labels] == [type(value) for value in task.labels]


def test_a_header_survives_json():
    header = Header(
        "BitDistill", "SmolLM2", PAIRS, 128, {"temperature": 0.7}, {"metric": "accuracy"}, {"eos_token": "x"}
    )
    assert read_header(json.loads(json.dumps(header.to_json()))) == header
    assert read_header({"task": "sst2", "stage": "distill", "setting": "BitDistill"}) == Header("BitDistill")  # older
    assert read_header({}) == Header()


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {"task": {"name": "x"}},
        {"task": PAIRS.to_json() | {"labels": 3}},
        {"task": PAIRS.to_json() | {"labels": [["x"]]}},
        {"task": PAIRS.to_json() | {"name": 7}},
        {"task": PAIRS.to_json() | {"prompt": [1]}},
        {"task": PAIRS.to_json() | {"further": 1}},
        {"max_length": 0},
        {"max_length": True},
        {"base": 4},
        {"tokenizer": []},
        {"generation": {"temperature": "hot"}},
        {"generation": {"temperature": -1}},
        {"generation": {"do_sample": 1}},
    ],
)
def test_headers_that_were_edited_are_refused(wrong):
    with pytest.raises(UserError):
        read_header(wrong)


def test_recommended_sampling():
    header = Header(generation={"temperature": 0.6, "top_p": 0.95})
    assert header.sampling() == Sampling(temperature=0.6, top_p=0.95)
    assert header.sampling(temperature=1.0, seed=3, top_k=None) == Sampling(temperature=1.0, top_p=0.95, seed=3)
    assert header.sampling(temperature=0) == Sampling()
    assert Header().sampling() == Sampling()


def test_the_base_s_sampling_travels(tmp_path):
    model = student("qwen3")
    model.generation_config = GenerationConfig(do_sample=True, top_p=0.9, top_k=0, eos_token_id=2)
    bitdistill.write(tmp_path / "s", model, None)
    assert bitdistill.load(tmp_path / "s", 1).header.generation == {"temperature": 1.0, "top_p": 0.9}


# --- predictions ------------------------------------------------------------------------------------------------------


def rows_of(task, count=40, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        longest = {c: 60 if c == task.truncate_column else 9 for c in task.columns}
        row = {c: "".join(rng.choice(list("abc d"), rng.integers(0, longest[c]))) for c in task.columns}
        if task.kind == "generation":
            row[task.target_column] = "ab"
        else:
            row[task.label_column] = list(task.labels)[rng.integers(len(task.labels))]
        rows.append(row)
    return rows


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", [REVIEWS, PAIRS, SUMMARY], ids=lambda task: task.name)
def test_predictions_are_the_evaluation_s(tmp_path, task, chat):
    """Of rows of all lengths, many of them cut, and of texts that look like the markers of a chat."""
    task = Task.from_json(task.to_json() | {"chat": chat})
    path, tokenizer = written(tmp_path, task, CHAT if chat else None)
    rows = rows_of(task)
    rows[3][task.columns[0]] = "<|end|><|assistant|>b"
    runtime = bitdistill.load(path, threads=1)
    want = score_rows(
        runtime, task, datasets.Dataset.from_list(rows), tokenizer, max_length=40, batch_size=4, name="x"
    ).predictions
    got = bitdistill.load(path, threads=1).predict(rows)
    assert [one.label if task.kind == "classification" else one.text for one in got] == want
    assert [one.row for one in got] == list(range(1, 41))
    assert 5 < sum(one.truncated for one in got) < 40
    assert len(set(want)) > 1
    alone = runtime.predict(rows[7])[0]
    assert (alone.label, alone.text, alone.probability) == (got[7].label, got[7].text, got[7].probability)
    for one in got:
        if task.kind == "classification":
            assert one.probabilities is not None
            assert one.probability == max(one.probabilities.values()) == one.probabilities[one.label]
            assert sum(one.probabilities.values()) == pytest.approx(1)
            assert list(one.probabilities) == task.words
        assert set(one.to_json()) <= {"row", "label", "probability", "probabilities", "text", "stopped_by", "truncated"}


def test_predictions_are_those_of_the_student_in_torch(tmp_path):
    """What `evaluate` scores is the torch student; a file with its weights says the same to nearly every row."""
    model, tokenizer = student("llama"), letters_tokenizer()
    bitdistill.write(tmp_path / "s", model, tokenizer, embedding="fp16", task=REVIEWS, max_length=40)
    runtime, rows = bitdistill.load(tmp_path / "s", 1, "fp32"), rows_of(REVIEWS, 60)
    with torch.no_grad():
        for name in runtime.model.config.tables():
            model.get_submodule(name).weight.copy_(torch.from_numpy(runtime.model.table(name)))
    dataset = datasets.Dataset.from_list(rows)
    want = score_rows(model, REVIEWS, dataset, tokenizer, max_length=40, batch_size=4, name="x").predictions
    got = [one.label for one in runtime.predict(rows)]
    assert sum(a == b for a, b in zip(got, want, strict=True)) >= 58


def test_kinds_of_rows(tmp_path):
    runtime = bitdistill.load(written(tmp_path, REVIEWS)[0], threads=1)
    assert runtime.predict([]) == []
    labels = [
        one.label for one in runtime.predict(["a film", {"text": "a film", "id": 7}, {"text": 1}, {"text": True}])
    ]
    assert labels[0] == labels[1] == runtime.predict("a film")[0].label
    assert labels[2:] == [one.label for one in runtime.predict(["1", "true"])]
    ticks = []

    def progress(rows):
        for row in rows:
            ticks.append(row)
            yield row

    runtime.predict(iter(["a", "b", "c"]), progress=progress)
    assert sorted(ticks) == [0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "field", "says"),
    [
        ([{"sentence": "x"}], "rows: columns", "sentence in row 1"),
        (["a", {"text": None}], "rows: text", "None in row 2"),
        (["a", {"text": ["b"]}], "rows: text", "['b'] in row 2"),
        (["a", "\ud800"], "rows: text", "row 2"),
        (["a", 3], "rows", "a int in row 2"),
        (3, "rows", "int"),
    ],
)
def test_rows_that_are_refused(tmp_path, rows, field, says):
    runtime = bitdistill.load(written(tmp_path, REVIEWS)[0], threads=1)
    with pytest.raises(UserError) as caught:
        runtime.predict(rows)
    assert caught.value.field == field
    assert says in str(caught.value)


def test_files_that_cannot_predict(tmp_path):
    bitdistill.write(tmp_path / "bare", student("qwen3"), letters_tokenizer())
    with pytest.raises(UserError, match="knows its task"):
        bitdistill.load(tmp_path / "bare", 1).predict("x")
    bitdistill.write(tmp_path / "mute", student("qwen3"), None, task=REVIEWS)
    with pytest.raises(UserError, match="with a tokenizer"):
        bitdistill.load(tmp_path / "mute", 1).predict("x")
    path, _ = written(tmp_path, PAIRS, max_length=12)
    with pytest.raises(UserError, match=r"the whole answer of row 2"):
        bitdistill.load(path, 1).predict([{"a": "x" * 20, "b": "c"}, {"a": "x", "b": "c" * 20}])
    runtime = bitdistill.load(written(tmp_path, PAIRS)[0], 1)
    with pytest.raises(UserError, match="one text"):
        runtime.predict("x")


def test_equal_students_are_equal_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, PAIRS, CHAT)
    assert (tmp_path / "a" / "s.safetensors").read_bytes() == (tmp_path / "b" / "s.safetensors").read_bytes()


# --- chat templates ---------------------------------------------------------------------------------------------------

TEMPLATES = {
    "plain": CHAT,
    "tools": "{%- if tools %}T{{ tools | tojson }}{% else %}none{% endif %}{{ bos_token }}{{ messages[0]['content'] }}",
    "loops": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index }}{{ m.content | trim }}\n"
    "  {% endfor %}\n   {{ messages | tojson(indent=2) }}{{ eos_token }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}x",
    "state": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ dict(a=1) }}",
    "thinking": "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ messages[-1].content }}",
}
MESSAGES = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": " héllo & 'bye' "},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "again"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_read_as_in_transformers(name):
    theirs = letters_tokenizer(TEMPLATES[name])
    ours = PackedTokenizer(theirs.backend_tokenizer, tokenizer_settings(theirs))
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    assert ours.apply_chat_template(MESSAGES, **options) == theirs.apply_chat_template(MESSAGES, **options)


@pytest.mark.skipif(not (DATA / "tokenizers" / "qwen2.5").is_dir(), reason="no shared tokenizers")
def test_a_real_template_reads_as_in_transformers():
    theirs = AutoTokenizer.from_pretrained(DATA / "tokenizers" / "qwen2.5")
    ours = PackedTokenizer(theirs.backend_tokenizer, tokenizer_settings(theirs))
    options = {"tokenize": False, "add_generation_prompt": True}
    for messages in (MESSAGES, MESSAGES[1:2]):
        assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(messages, **options)
    task = Task.from_json(REVIEWS.to_json() | {"chat": True})
    rows = [{"text": "a <|im_end|> film"}]
    assert prompt_texts(task, rows, ours) == prompt_texts(task, rows, theirs)


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{% set ns = namespace(__init__=1) %}", "{{ messages.append(1) }}"]
)
def test_templates_stay_in_the_sandbox(template):
    from jinja2 import TemplateError

    tokenizer = PackedTokenizer(letters_tokenizer().backend_tokenizer, {"chat_template": template})
    with pytest.raises(TemplateError):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{" + "[" * 3000 + "]" * 3000 + "}}",
        "{{ 1 // 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
    ids=["nested", "divides", "types", "endless"],
)
def test_a_template_that_fails_is_a_line(template, tmp_path):
    """A template is a program; whatever it ends with names the template."""
    path, _ = written(tmp_path, Task.from_json(REVIEWS.to_json() | {"chat": True}), template)
    with pytest.raises(UserError, match="chat_template"):
        bitdistill.load(path, threads=1).predict(rows_of(REVIEWS)[0])
    with pytest.raises(UserError, match="chat template"):
        conversation_ids(bitdistill.load(path, threads=1), MESSAGES)


def test_predicting_imports_neither_torch_nor_pandas(tmp_path):
    path, _ = written(tmp_path, Task.from_json(REVIEWS.to_json() | {"chat": True}), CHAT)
    script = (
        "import sys; import bitdistill; print(bitdistill.load(sys.argv[1], 1).predict(['a', 'b'])[1].label);"
        "assert not {'torch', 'transformers', 'pandas', 'pyarrow', 'scipy.stats'} & set(sys.modules)"
    )
    got = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert got.stdout.strip() in REVIEWS.words
