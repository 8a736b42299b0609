"""Tasks: tokens, masks, truncation, and what a user can get wrong. Real tokenizers where the data folder is present."""

import csv
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitdistill.data import tasks
from bitdistill.errors import UserError
from bitdistill.prompts import Task, _render, label_tokens

DATA = Path(os.environ.get("BITDISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
REVIEW = {
    "name": "review",
    "kind": "classification",
    "prompt": "{sentence}\nIt was",
    "truncate_column": "sentence",
    "label_column": "label",
    "labels": {0: "bad", 1: "good"},
}
SUMMARY = {
    "name": "sum",
    "kind": "generation",
    "prompt": "{article}\nSummary:",
    "truncate_column": "article",
    "target_column": "highlights",
    "max_new_tokens": 6,
}


def word_tokenizer(bos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token per letter run, digit run, space run or sign: easy to count by hand."""
    vocabulary = {
        t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "<pad>", ":", "\n", " ", "bad", "good", "It", "was"])
    }
    vocabulary |= {f"w{i}": len(vocabulary) + i for i in range(40)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\s|:|\w+"), "isolated")
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    extra = {"bos_token": "<s>"} if bos else {}
    extra |= {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", **extra)


@functools.cache
def real_tokenizer(name: str):
    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} under {DATA}; set BITDISTILL_DATA")
    return AutoTokenizer.from_pretrained(DATA / name)


@pytest.fixture(params=["models/base-6m", "models/stories260K-hf", "tokenizers/qwen2.5"])
def tokenizer(request):
    return real_tokenizer(request.param)


def rows_of(**columns) -> Dataset:
    return Dataset.from_dict(columns)


def test_tokens_labels_and_mask_by_hand():
    tokenizer = word_tokenizer(bos=True)
    task = Task(**REVIEW)
    encoded, counts = tasks.encode(task, rows_of(sentence=["w1 w2", "w3"], label=[1, 0]), tokenizer, 32)
    w1, w2, w3 = (tokenizer.convert_tokens_to_ids(w) for w in ("w1", "w2", "w3"))
    space, newline, it, was, bad, good = 6, 5, 9, 10, 7, 8
    assert encoded[0]["input_ids"] == [1, w1, space, w2, newline, it, space, was, space, good]
    assert encoded[0]["labels"] == [-100] * 8 + [space, good]  # the answer brings its own space, and no EOS
    assert encoded[1]["input_ids"] == [1, w3, newline, it, space, was, space, bad]
    assert counts == {"rows": 2, "truncated": 0, "longest_tokens": 10, "tokens": 18, "answer_tokens": 4}


def test_generation_ends_with_eos_and_has_no_bos_where_the_tokenizer_has_none():
    tokenizer = word_tokenizer()
    encoded, _ = tasks.encode(Task(**SUMMARY), rows_of(article=["w1"], highlights=[" w2\n"]), tokenizer, 32)
    w1, w2 = tokenizer.convert_tokens_to_ids(["w1", "w2"])
    assert encoded[0]["input_ids"] == [w1, 5, 0, 4, 6, w2, 2]
    assert encoded[0]["labels"] == [-100] * 4 + [6, w2, 2]


def test_rows_as_documents():
    task = Task(**REVIEW | {"chat": True})  # a document has no turns
    assert list(tasks.row_documents(task, rows_of(sentence=["{a} film", ""], label=[1, 0]))) == [
        "{a} film\nIt was good",
        "\nIt was bad",
    ]
    assert list(tasks.row_documents(Task(**SUMMARY), rows_of(article=["w1"], highlights=[" w2\n"]))) == [
        "w1\nSummary: w2"
    ]


def test_truncation_cuts_only_the_column_and_keeps_template_and_answer():
    tokenizer = word_tokenizer(bos=True)
    task = Task(**REVIEW)
    text = " ".join(f"w{i}" for i in range(20))
    encoded, counts = tasks.encode(task, rows_of(sentence=[text, "w1"], label=[1, 0]), tokenizer, 12)
    assert counts["truncated"] == 1
    # 12 = BOS + 5 of "w0 w1 w2" + 4 of the template + 2 of the answer
    assert tokenizer.decode(encoded[0]["input_ids"][1:]).split() == ["w0", "w1", "w2", "It", "was", "good"]
    assert encoded[0]["labels"][-2:] == [6, 8]
    assert encoded[1]["input_ids"][1] == tokenizer.convert_tokens_to_ids("w1")


@pytest.mark.parametrize("length", [6, 7])
def test_exact_fit_and_one_too_few(length):
    """7 tokens: the template (4), the answer (2) and BOS fit only without any text."""
    tokenizer = word_tokenizer(bos=True)
    rows = rows_of(sentence=["w1 w2"], label=[0])
    if length == 7:
        encoded, counts = tasks.encode(Task(**REVIEW), rows, tokenizer, length)
        assert len(encoded[0]["input_ids"]) == 7
        assert counts["truncated"] == 1
    else:
        with pytest.raises(UserError, match=r"row 1.*at least 7"):
            tasks.encode(Task(**REVIEW), rows, tokenizer, length)


def test_long_answer_is_an_error_naming_its_row():
    rows = rows_of(article=["w1"] * 3, highlights=["w2", "w2", "w2 " * 30])
    with pytest.raises(UserError, match=r"max_length.*row 3"):
        tasks.encode(Task(**SUMMARY), rows, word_tokenizer(), 20)


@pytest.mark.parametrize("max_length", [24, 40, 512])
def test_scoring_and_training_see_the_same_tokens(tokenizer, max_length):
    task = Task(**REVIEW)
    sentences = [
        "it 's a charming journey .",
        "naïve 😀🤦🏽‍♀️ emoji " * 10,
        "",
        "  spaces  ",
        "a\n\nb:",
        "日本語の文章" * 9,
    ]
    rows = rows_of(sentence=sentences, label=[0, 1, 0, 1, 0, 1])
    encoded, counts = tasks.encode(task, rows, tokenizer, max_length)
    prompts, truncated = tasks.encode_prompts(task, rows, tokenizer, max_length)
    words = label_tokens(task, tokenizer)
    for row, prompt, gold in zip(encoded, prompts, tasks.label_indices(task, rows), strict=True):
        assert row["input_ids"] == prompt + words[gold]
        assert row["labels"] == [-100] * len(prompt) + words[gold]
        assert len(row["input_ids"]) <= max_length
        assert tokenizer.decode(row["input_ids"]).endswith(f"It was {task.words[gold]}")
    assert truncated == counts["truncated"]
    assert (truncated > 0) == (max_length < 512)


def test_the_cut_does_not_depend_on_the_label():
    """Answers of different length: a prompt that is cut must be the same for both labels."""
    task = Task(**REVIEW | {"labels": {0: "bad", 1: "w1 w2 w3"}})
    text = " ".join(f"w{i}" for i in range(20))
    tokenizer = word_tokenizer()
    encoded, _ = tasks.encode(task, rows_of(sentence=[text, text], label=[0, 1]), tokenizer, 16)
    prompts = [[t for t, l in zip(r["input_ids"], r["labels"], strict=True) if l == -100] for r in encoded]
    assert prompts[0] == prompts[1]


def test_answer_tokens_are_those_of_running_text(tokenizer):
    """Joined text and joined tokens agree: what a sentencepiece tokenizer would break with a second space."""
    prompt, text = "Review: fine\nVerdict:", "Review: fine\nVerdict: good"
    task = Task(**REVIEW | {"prompt": "Review: {sentence}\nVerdict:"})
    encoded, _ = tasks.encode(task, rows_of(sentence=["fine"], label=[1]), tokenizer, 64)
    assert encoded[0]["input_ids"] == tokenizer(text)["input_ids"]
    assert encoded[0]["labels"][: len(tokenizer(prompt)["input_ids"])] == [-100] * len(tokenizer(prompt)["input_ids"])


def test_generation_answer_of_running_text(tokenizer):
    task = Task(**SUMMARY)
    encoded, _ = tasks.encode(task, rows_of(article=["A b."], highlights=["One.\nTwo ."]), tokenizer, 64)
    joined = tokenizer("A b.\nSummary: One.\nTwo .")["input_ids"]
    assert encoded[0]["input_ids"] == [*joined, tokenizer.eos_token_id]


def test_chat_template():
    tokenizer = real_tokenizer("tokenizers/qwen2.5")
    task = Task(**REVIEW | {"chat": True})
    encoded, counts = tasks.encode(task, rows_of(sentence=["fine " * 50], label=[1]), tokenizer, 48)
    text = tokenizer.decode(encoded[0]["input_ids"])
    assert text.endswith("\nIt was<|im_end|>\n<|im_start|>assistant\ngood")
    assert "<|im_start|>user\nfine fine" in text
    assert len(encoded[0]["input_ids"]) <= 48
    assert counts["truncated"] == 1
    plain = word_tokenizer()  # no chat template: the plain prompt
    chat, _ = tasks.encode(task, rows_of(sentence=["w1"], label=[1]), plain, 48)
    assert chat[0] == tasks.encode(Task(**REVIEW), rows_of(sentence=["w1"], label=[1]), plain, 48)[0][0]


def test_collate_pads_on_the_right():
    rows = [{"input_ids": [5, 6], "labels": [-100, 6], "extra": 1}, {"input_ids": [7], "labels": [7]}]
    batch = tasks.collate(rows, 3)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[5, 6], [7, 3]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [[-100, 6], [7, -100]],
    }
    assert all(str(v.dtype) == "torch.int64" for v in batch.values())


def test_padding_without_pad_token():
    assert tasks.pad_token(word_tokenizer()) == 3
    assert tasks.pad_token(word_tokenizer(pad=False)) == 2


def test_show_example_names_every_token():
    text = tasks.show_example(Task(**REVIEW), {"sentence": "w1", "label": 1}, word_tokenizer(bos=True), 32)
    lines = text.splitlines()
    assert lines[0] == "task review: 8 tokens, 2 of them learned"
    assert len(lines) == 2 + 8
    assert lines[2].split() == ["0", "1", "masked", "'<s>'"]
    assert lines[-1].split() == ["7", "8", "8", "'good'"]
    assert "was cut" in tasks.show_example(Task(**REVIEW), {"sentence": "w1 " * 9, "label": 1}, word_tokenizer(), 9)


@pytest.mark.parametrize("name", ["sst2", "qnli", "mnli", "cnndm"])
def test_built_in_tasks(name, tokenizer):
    task = tasks.load_task(name)
    assert task.name == name
    if task.kind == "classification":
        words = label_tokens(task, tokenizer)
        if len(tokenizer) > 4000:
            assert [len(word) for word in words] == [1] * len(words)
    assert task.splits["train"] == "train"
    if name == "mnli":
        assert task.splits["validation_mismatched"] == "validation_mismatched"
        assert task.splits["validation"] == "validation_matched"


@pytest.mark.parametrize("name", ["sst2", "qnli", "cnndm"])
def test_built_in_tasks_on_real_rows(name):
    task, tokenizer = tasks.load_task(name), real_tokenizer("models/base-6m")
    rows = tasks.load_rows(task, "validation", file=DATA / name / "validation.jsonl", limit=50)
    encoded, counts = tasks.encode(task, rows, tokenizer, 256)
    assert counts["rows"] == len(rows) == 50
    assert max(len(ids) for ids in encoded["input_ids"]) == counts["longest_tokens"] <= 256
    if name == "cnndm":
        for ids, labels, row in zip(encoded["input_ids"], encoded["labels"], rows, strict=True):
            answer = [i for i in labels if i != -100]
            assert tokenizer.decode(answer).strip() == row["highlights"].strip() + "<|endoftext|>"
            assert tokenizer.decode(ids[: -len(answer)]).endswith("\nSummary:")


def write(path: Path, kind: str, rows: list[dict]) -> Path:
    path = path / f"rows.{kind}"
    if kind in ("jsonl", "json"):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            quoting = {"quoting": csv.QUOTE_NONE, "quotechar": None, "delimiter": "\t"} if kind == "tsv" else {}
            writer = csv.DictWriter(file, rows[0], **quoting)
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_local_files(tmp_path, kind):
    rows = [
        {"sentence": 'a "quoted, text', "label": 1},
        {"sentence": "n/a", "label": 0},
        {"sentence": "null", "label": 0},
    ]
    loaded = tasks.load_rows(Task(**REVIEW), "train", file=str(write(tmp_path, kind, rows)))
    assert loaded.to_list() == rows


def test_limit_is_a_seeded_choice_in_file_order(tmp_path):
    path = write(tmp_path, "jsonl", [{"sentence": f"{i:03}", "label": 0} for i in range(100)])
    task = Task(**REVIEW)
    first = tasks.load_rows(task, file=path, limit=10, seed=1)["sentence"][:]
    assert first == tasks.load_rows(task, file=path, limit=10, seed=1)["sentence"][:] == sorted(first)
    assert len(set(first)) == 10
    assert first != tasks.load_rows(task, file=path, limit=10, seed=2)["sentence"][:]
    assert len(tasks.load_rows(task, file=path, limit=1000)) == 100


def test_text_labels(tmp_path):
    path = write(tmp_path, "jsonl", [{"sentence": "x", "label": "neg"}, {"sentence": "y", "label": "pos"}])
    task = Task(**REVIEW | {"labels": {"pos": "good", "neg": "bad", "positive": " good"}})
    assert task.words == ["good", "bad"]
    assert tasks.label_indices(task, tasks.load_rows(task, file=path)) == [1, 0]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            '{"sentence": "a", "label": 0}\n{"sentence": "b", "label": -1}',
            r"label: expected one of \[0, 1\]; got -1 in row 2",
        ),
        ('{"sentence": "a", "label": null}', "got None in row 1"),
        ('{"sentence": "a", "label": "0"}', "got '0' in row 1"),
        ('{"text": "a", "label": 0}', "expected sentence, label; got text, label.*sentence"),
        ("", "at least one row"),
        ('{"sentence": "a", "label": 0}\n{"sentence": \n', "read as json"),
    ],
)
def test_bad_files(tmp_path, content, match):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=match):
        tasks.load_rows(Task(**REVIEW), file=path)


def test_more_bad_files(tmp_path):
    task = Task(**REVIEW)
    (tmp_path / "only_header.csv").write_text("sentence,label\n")
    (tmp_path / "rows.xlsx").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    for name, match in [
        ("only_header.csv", "no data"),
        ("rows.xlsx", "rows.xlsx"),
        ("broken.parquet", "parquet"),
        ("no.csv", "a file"),
    ]:
        with pytest.raises(UserError, match=match):
            tasks.load_rows(task, file=tmp_path / name)
    with pytest.raises(UserError, match="--validation_file"):
        tasks.load_rows(task, "validation")
    with pytest.raises(UserError, match="validation_mismatched"):
        tasks.load_rows(tasks.load_task("mnli"), "dev")


def test_missing_texts_are_named(tmp_path):
    rows = rows_of(article=["w1", None], highlights=["w2", "w3"])
    with pytest.raises(UserError, match=r"article.*row 2"):
        tasks.encode(Task(**SUMMARY), rows, word_tokenizer(), 30)
    with pytest.raises(UserError, match=r"highlights.*row 1"):
        tasks.encode(Task(**SUMMARY), rows_of(article=["w1"], highlights=[" "]), word_tokenizer(), 30)


def test_hub_out_of_reach(tmp_path):
    """In its own process: HF_HUB_OFFLINE is read at import. The message says what to do instead."""
    code = "from bitdistill.data import tasks\ntasks.load_rows(tasks.load_task('sst2'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "bitdistill.errors.UserError: dataset nyu-mll/glue" in done.stderr
    assert "--train_file" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "regression"}, "kind"),
        ({"prompt": "no column"}, "prompt"),
        ({"prompt": "{sentence"}, "prompt"),
        ({"prompt": "{sentence.x} {sentence}"}, "prompt"),
        ({"prompt": "{} {sentence}"}, "prompt"),
        ({"prompt": "{sentence!r}"}, "prompt"),
        ({"prompt": "{sentence} "}, "white space"),
        ({"truncate_column": "text"}, "truncate_column"),
        ({"label_column": None}, "label_column"),
        ({"labels": {0: True, 1: False}}, "Quote words"),
        ({"labels": {0: "bad", True: "good"}}, "values that are"),
        ({"labels": {0: "bad", 1: " bad"}}, "two different words"),
        ({"labels": ["bad", "good"]}, "labels"),
        ({"kind": "generation"}, "target_column"),
        ({"kind": "generation", "target_column": "x", "max_new_tokens": 0}, "max_new_tokens"),
        ({"splits": "train"}, "splits"),
    ],
)
def test_bad_tasks(change, match):
    with pytest.raises(UserError, match=match):
        Task(**REVIEW | change)


def test_literal_braces_stay():
    task = Task(**REVIEW | {"prompt": "{{w1}} {sentence}"})
    assert task.columns == ["sentence"]
    assert _render(task, [{"sentence": "{w2}"}], word_tokenizer()) == word_tokenizer()(["{w1} {w2}"])["input_ids"]


def test_task_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in REVIEW.items() if k != "name"}))
    assert tasks.load_task(str(path)).name == "mine"
    path.write_text(yaml.safe_dump(REVIEW | {"lables": {}, "promt": ""}))
    with pytest.raises(UserError, match="got lables, promt"):
        tasks.load_task(str(path))
    path.write_text(yaml.safe_dump({k: v for k, v in REVIEW.items() if k != "prompt"}))
    with pytest.raises(UserError, match="no prompt"):
        tasks.load_task(str(path))
    path.write_text("- a\n")
    with pytest.raises(UserError, match="keys and values"):
        tasks.load_task(str(path))
    for damaged in ("a: [", "[" * 3000 + "]" * 3000, "- " * 600 + "1"):  # the last two are nested too deeply
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"YAML|keys and values"):
            tasks.load_task(str(path))
    with pytest.raises(UserError, match="cnndm, mnli, qnli, sst2"):
        tasks.load_task("sst3")


def test_words_that_begin_each_other_are_refused():
    task = Task(**REVIEW | {"labels": {0: "w1", 1: "w1 w2"}})
    with pytest.raises(UserError, match="begins another"):
        label_tokens(task, word_tokenizer())
    task = Task(**REVIEW | {"labels": {0: "unheard", 1: "unseen"}})  # both <unk>
    with pytest.raises(UserError, match="begins another"):
        label_tokens(task, word_tokenizer())


MNLI = [
    {"premise": "All boats float .", "hypothesis": "A boat floats .", "label": 0},
    {"premise": "A boat floats .", "hypothesis": "It is red .", "label": 1},
    {"premise": "A boat floats .", "hypothesis": "No boat floats .", "label": 2},
]


def test_mnli_has_two_validation_splits(tmp_path):
    """Matched and mismatched, three labels, each from its own file; one without a file is left out, not sought on the hub."""
    task = tasks.load_task("mnli")
    assert task.extra_validation == ["validation_mismatched"]
    (tmp_path / "other").mkdir()
    matched, mismatched = write(tmp_path, "jsonl", MNLI), write(tmp_path / "other", "csv", MNLI[:2] * 2)
    splits, left_out = tasks.load_validation(task, str(matched), {"validation_mismatched": str(mismatched)})
    assert {name: len(rows) for name, rows in splits.items()} == {"validation": 3, "validation_mismatched": 4}
    assert next(iter(splits)) == "validation"
    assert left_out == []
    assert tasks.label_indices(task, splits["validation"]) == [0, 1, 2]
    splits, left_out = tasks.load_validation(task, str(matched), {}, limit=2)
    assert ({name: len(rows) for name, rows in splits.items()}, left_out) == (
        {"validation": 2},
        ["validation_mismatched"],
    )
    with pytest.raises(UserError, match="validation_mismatched; got mismatched"):
        tasks.load_validation(task, str(matched), {"mismatched": str(mismatched)})
    with pytest.raises(UserError, match="none for this task"):
        tasks.load_validation(tasks.load_task("sst2"), str(matched), {"test": str(matched)})
    with pytest.raises(UserError, match=r"--extra_validation_files\.validation_mismatched"):
        tasks.load_validation(task, str(matched), {"validation_mismatched": str(tmp_path / "no.csv")})


def test_both_splits_of_mnli_are_scored(tmp_path):
    """Each with its own interval, majority and paired differences; the main one stands where it always stood."""
    from bitdistill.evaluation.score import score_splits, scores_json

    task, tokenizer = tasks.load_task("mnli"), real_tokenizer("models/base-6m")
    (tmp_path / "other").mkdir()
    files = {"validation_mismatched": str(write(tmp_path / "other", "jsonl", MNLI[:2]))}
    splits, _ = tasks.load_validation(task, str(write(tmp_path, "jsonl", MNLI)), files)
    models_ = {name: tiny_model(len(tokenizer), seed) for name, seed in (("a", 0), ("b", 1))}
    options = {"max_length": 64, "batch_size": 2}
    scores = {n: score_splits(m, task, splits, tokenizer, name=n, **options) for n, m in models_.items()}
    result = scores_json(task, splits, scores, [])
    assert result["majority"] == pytest.approx(100 / 3)
    assert result["majorities"] == {"validation_mismatched": 50.0}
    for row in result["rows"]:
        score = scores[row["setting"]]
        assert row["score"] == pytest.approx(100 * score["validation"].values.mean())
        assert row["examples"] == 3
        mismatched = row["splits"]["validation_mismatched"]
        assert mismatched["score"] == pytest.approx(100 * score["validation_mismatched"].values.mean())
        assert mismatched["examples"] == 2
    assert [(row["a"], row["b"], row.get("split")) for row in result["paired"]] == [
        ("b", "a", None),
        ("b", "a", "validation_mismatched"),
    ]


def tiny_model(vocabulary: int, seed: int):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.5, eos_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def test_any_labels_of_a_users_yaml(tmp_path):
    """Three text labels, of one, two and three words: likelihoods are sums over all tokens of a label."""
    import torch

    from bitdistill.evaluation.score import score_rows

    labels = {"up": "better", "level": "the same", "down": "worse by far"}
    settings = REVIEW | {"labels": labels, "prompt": "{sentence}\nTrend:"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    task, tokenizer = tasks.load_task(str(tmp_path / "mine.yaml")), real_tokenizer("models/base-6m")
    words = label_tokens(task, tokenizer)
    assert sorted(map(len, words))[-1] >= 3
    path = write(tmp_path, "jsonl", [{"sentence": f"Sales of {i} boats", "label": l} for i, l in enumerate(labels)])
    rows, model = tasks.load_rows(task, "validation", str(path)), tiny_model(len(tokenizer), 2)
    score = score_rows(model, task, rows, tokenizer, max_length=64, batch_size=2, name="mine")
    prompts, _ = tasks.encode_prompts(task, rows, tokenizer, 64)
    for prompt, said in zip(prompts, score.predictions, strict=True):
        sums = []
        for word in words:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + word])).logits[0, len(prompt) - 1 : -1].double()
            sums.append(logits.log_softmax(-1)[range(len(word)), word].sum().item())
        assert said == task.words[sums.index(max(sums))]
    assert score.values.tolist() == [
        said == word for said, word in zip(score.predictions, labels.values(), strict=True)
    ]


def test_articles_lose_their_end_and_highlights_nothing():
    """Real articles longer than the context."""
    task, tokenizer = tasks.load_task("cnndm"), real_tokenizer("models/base-6m")
    rows = tasks.load_rows(task, "validation", file=DATA / "cnndm" / "validation.jsonl", limit=20, seed=1)
    encoded, counts = tasks.encode(task, rows, tokenizer, 256)
    prompts, cut = tasks.encode_prompts(task, rows, tokenizer, 256)
    assert counts["truncated"] > 10
    assert cut > 10
    for ids, labels, prompt, row in zip(encoded["input_ids"], encoded["labels"], prompts, rows, strict=True):
        answer = [label for label in labels if label != tasks.IGNORED]
        assert tokenizer.decode(answer[:-1]).strip() == row["highlights"].strip()
        assert answer[-1] == tokenizer.eos_token_id
        for tokens in (ids[: -len(answer)], prompt):
            kept = tokenizer.decode(tokens).removesuffix("\nSummary:")
            assert row["article"].startswith(kept.strip())
        assert len(prompt) <= 256 - task.max_new_tokens
