"""`bitdistill trim`: a smaller file for a task, whose kept tokens keep their logits and whose known rows their answers."""

import json

import numpy as np
import pytest
from test_predict import letters_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import bitdistill
from bitdistill.commands.trim import trim, trim_options
from bitdistill.errors import UserError
from bitdistill.prompts import Task
from bitdistill.runtime.packed_file import read_packed
from bitdistill.runtime.trimming import trim_packed
from bitdistill.student.refine import refine
from tiny_students import CONFIGS, of_config, randomize, student

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a charming film and the dog was there",
    "thesis of the theatre",
]
ROWS = ["the film was charming", "the dog jumps", "there the fox was"]
REVIEWS = Task(
    "reviews", "classification", "{text}\nIt was", "text", label_column="label", labels={0: "bad", 1: "fine"}
)
SUMMARY = Task("summary", "generation", "{text}:", "text", target_column="short", max_new_tokens=5)


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<pad>", "<s>", "<end>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<s>", pad_token="<pad>")


def written(folder, task=REVIEWS, embedding="int8", family="qwen3"):
    """A packed file of a random student whose tokenizer has merges."""
    tokenizer, config = byte_level(), CONFIGS[family]
    config.vocab_size = len(tokenizer) + 5  # rows that no token has
    model = of_config(config)
    refine(model, norms="two")
    path = folder / "s.safetensors"
    bitdistill.write(path, randomize(model).eval(), tokenizer, task=task, max_length=48, embedding=embedding)
    return path


def rows_file(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("family", ["qwen3", "llama"])  # tied, untied
@pytest.mark.parametrize("embedding", ["fp16", "int8", "int4", "ternary"])
def test_kept_rows_and_their_logits_are_the_larger_files(embedding, family, tmp_path, capsys):
    path, output = written(tmp_path, embedding=embedding, family=family), tmp_path / "small.safetensors"
    trim(str(path), [rows_file(tmp_path, [{"text": text} for text in ROWS])], str(output), threads=1)
    said = capsys.readouterr().out
    assert "equal bit for bit" in said
    larger, smaller = bitdistill.load(path, threads=1), bitdistill.load(output, threads=1)
    assert smaller.model.config.vocab_size < 300 < larger.model.config.vocab_size
    assert smaller.model.file_bytes < larger.model.file_bytes
    assert smaller.header == larger.header
    for text in ROWS:
        old, new = larger.encode(f"{text}\nIt was"), smaller.encode(f"{text}\nIt was")
        assert len(old) == len(new)
        assert [larger.tokenizer.decode([i]) for i in old] == [smaller.tokenizer.decode([i]) for i in new]
        for name in larger.model.config.tables():
            assert np.array_equal(larger.model.table(name, np.array(old)), smaller.model.table(name, np.array(new)))
    unknown = "quick theatre 你好"
    assert smaller.tokenizer.decode(smaller.encode(unknown)) == unknown
    assert len(smaller.encode(unknown)) > len(larger.encode(unknown))


def test_known_rows_are_answered_alike(tmp_path):
    path, output = written(tmp_path), tmp_path / "small.safetensors"
    trim(str(path), [rows_file(tmp_path, [{"text": text} for text in ROWS])], str(output), threads=1)
    ours, theirs = (bitdistill.load(file, threads=1).predict(ROWS) for file in (output, path))
    assert [answer.label for answer in ours] == [answer.label for answer in theirs]


def test_answers_and_end_tokens_stay(tmp_path):
    path, output = written(tmp_path, task=SUMMARY), tmp_path / "small.safetensors"
    rows = [{"text": "the dog", "short": "lazy theatre"}]
    trim(str(path), [rows_file(tmp_path, rows)], str(output), threads=1)
    larger, smaller = bitdistill.load(path), bitdistill.load(output)
    assert len(smaller.encode("lazy theatre")) == len(larger.encode("lazy theatre"))
    ends = [smaller.tokenizer.token_to_id("<end>")]
    assert smaller.model.config.eos_token_ids == ends
    with pytest.raises(UserError, match="short"):
        trim(str(path), [rows_file(tmp_path, [{"text": "the dog"}])], str(tmp_path / "other.safetensors"))


def test_a_number_of_tokens_can_be_asked_for(tmp_path):
    packed = read_packed(written(tmp_path))
    counts = np.zeros(packed.config.vocab_size, np.int64)
    least = trim_packed(packed, counts, tmp_path / "a.safetensors")
    counts[-15:-5] = 3  # late merges
    few = trim_packed(packed, counts, tmp_path / "b.safetensors")
    more = trim_packed(packed, counts, tmp_path / "c.safetensors", vocabulary=len(few) + 10)
    assert len(least) < len(few) < len(few) + 10 <= len(more) < packed.config.vocab_size
    assert set(least) < set(few) < set(more)
    assert np.array_equal(trim_packed(packed, counts, tmp_path / "d.safetensors", threshold=3), least)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"output": "there.safetensors"}, "output"),
        ({"output": "nowhere/x.safetensors"}, "output"),
        ({"threshold": -1}, "threshold"),
        ({"vocabulary": -1}, "vocabulary"),
        ({"input": ["none.jsonl"]}, "input"),
        ({"input": ["empty.jsonl"]}, "input"),
    ],
)
def test_impossible_wishes_are_refused(change, field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path)
    (tmp_path / "there.safetensors").write_bytes(b"kept")
    (tmp_path / "empty.jsonl").write_text("")
    given = {"input": [rows_file(tmp_path, [{"text": "the dog"}])], "output": "new.safetensors", "threads": 1} | change
    with pytest.raises(UserError, match=rf"^{field}"):
        trim(str(path), **given)
    assert (tmp_path / "there.safetensors").read_bytes() == b"kept"
    assert not (tmp_path / "new.safetensors").exists()


def test_files_without_a_task_or_without_merges_are_refused(tmp_path):
    rows = [rows_file(tmp_path, [{"text": "the dog"}])]
    bitdistill.write(tmp_path / "plain.safetensors", student("qwen3"), letters_tokenizer())
    with pytest.raises(UserError, match="knows its task"):
        trim(str(tmp_path / "plain.safetensors"), rows, str(tmp_path / "x.safetensors"))
    bitdistill.write(tmp_path / "ids.safetensors", student("qwen3"))
    with pytest.raises(UserError, match="with a tokenizer"):
        trim_packed(read_packed(tmp_path / "ids.safetensors"), np.zeros(97, np.int64), tmp_path / "x.safetensors")


def test_options():
    options = trim_options(["RUN", "--input", "a.csv", "b.csv", "--output", "c"])
    assert options["input"] == ["a.csv", "b.csv"]
    assert (options["threshold"], options["vocabulary"], options["threads"]) == (0, 0, None)
