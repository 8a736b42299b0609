"""The demo's world: does it say what its docstring says? The rule of the labels is written here a second time."""

import json
import re
from itertools import chain

import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from bitdistill.data import demo
from bitdistill.data.corpus import SEPARATOR, TokenStream
from bitdistill.data.tasks import encode, load_rows, load_task
from bitdistill.prompts import label_tokens
from bitdistill.student.refine import refine


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return demo.make_demo(tmp_path_factory.mktemp("demo") / "world", seed=3)


@pytest.fixture(scope="module")
def polarity_and_shown():
    return demo.lexicon(seed=3)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def documents_of(paths):
    return paths.corpus.read_text(encoding="utf-8").strip().split(f"\n{SEPARATOR}\n")


def adjectives_in(text, polarity):
    return [word for word in re.findall(r"\w+", text) if word in polarity]


def verdict(text, polarity):
    """By hand: the adjective before the full stop decides, turned round by a "not" in front of it."""
    negation, adjective = re.search(r"was (not |so |really |)(\w+)\.$", text).groups()
    return polarity[adjective] ^ (negation == "not ")


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_same_seed_same_bytes_other_seed_other_bytes(paths, tmp_path):
    again, other = demo.make_demo(tmp_path / "again", seed=3), demo.make_demo(tmp_path / "other", seed=4)
    assert files(again.corpus.parent) == files(paths.corpus.parent)
    for name in ("corpus", "train", "validation"):
        assert getattr(other, name).read_bytes() != getattr(paths, name).read_bytes()


def test_remains_of_a_killed_run_do_not_survive(tmp_path):
    (tmp_path / "world.unfinished").mkdir()
    (tmp_path / "world.unfinished" / "half").write_text("")
    demo.make_demo(tmp_path / "world")
    assert [p.name for p in tmp_path.iterdir()] == ["world"]
    assert sorted(p.name for p in (tmp_path / "world").iterdir()) == [
        "base", "corpus.txt", "task.yaml", "train.jsonl", "validation.jsonl",
    ]  # fmt: skip


def test_lexicon(polarity_and_shown):
    polarity, shown = polarity_and_shown
    assert len(set(demo.PLEASANT + demo.UNPLEASANT)) == len(demo.PLEASANT) + len(demo.UNPLEASANT) == len(polarity)
    others = " ".join([*demo.NAMES, *demo.PLACES, *demo.THINGS, *demo.TIMES, *chain(*demo.OUTCRIES, *demo.REACTIONS)])
    assert not set(re.findall(r"\w+", others)) & set(polarity)
    for words in (demo.PLEASANT, demo.UNPLEASANT):
        assert sum(word in shown for word in words) / len(words) == pytest.approx(demo.TRAIN_SHARE, abs=0.01)


def test_rows_are_distinct_balanced_and_use_their_own_words(paths, polarity_and_shown):
    polarity, shown = polarity_and_shown
    train, validation = rows_of(paths.train), rows_of(paths.validation)
    assert (len(train), len(validation)) == (demo.TRAIN_ROWS, demo.VALIDATION_ROWS)
    texts = [row["text"] for row in train + validation]
    assert len(set(texts)) == len(texts)
    used = [{word for row in rows for word in adjectives_in(row["text"], polarity)} for rows in (train, validation)]
    assert used == [shown, set(polarity) - shown]
    for rows in (train, validation):
        assert {type(row["verdict"]) for row in rows} == {int}
        assert 0.47 < sum(row["verdict"] for row in rows) / len(rows) < 0.53


def test_the_rule_explains_the_labels_up_to_the_stated_noise(paths, polarity_and_shown):
    polarity, _ = polarity_and_shown
    for path in (paths.train, paths.validation):
        rows = rows_of(path)
        wrong = sum(verdict(row["text"], polarity) != row["verdict"] for row in rows) / len(rows)
        assert wrong == pytest.approx(
            demo.LABEL_NOISE, abs=3 * (demo.LABEL_NOISE * (1 - demo.LABEL_NOISE) / len(rows)) ** 0.5
        )  # three sigma
        clean = sum(verdict(row["text"], polarity) for row in rows)
        assert clean == len(rows) / 2  # exact balance before the noise


def test_words_alone_are_not_enough(paths):
    """A bag of words and pairs learns its training rows and stays near chance where the adjectives are new."""
    train, validation = rows_of(paths.train), rows_of(paths.validation)
    bag = CountVectorizer(ngram_range=(1, 2))
    model = LogisticRegression(max_iter=2000).fit(
        bag.fit_transform([row["text"] for row in train]), [row["verdict"] for row in train]
    )
    scores = [
        model.score(bag.transform([row["text"] for row in rows]), [row["verdict"] for row in rows])
        for rows in (train, validation)
    ]
    assert scores[0] > 0.8
    assert scores[1] < 0.6


def test_the_corpus_knows_every_word_and_never_shows_the_task(paths, polarity_and_shown):
    polarity, _ = polarity_and_shown
    text = paths.corpus.read_text(encoding="utf-8")
    found = adjectives_in(text, polarity)
    assert min(found.count(word) for word in polarity) > 50
    assert "Verdict" not in text
    assert "Review" not in text
    assert not re.search(r"\b[Aa] [aeiou]", text)  # an apple


def test_what_follows_in_the_corpus_follows_from_the_words(paths, polarity_and_shown):
    polarity, _ = polarity_and_shown
    documents = documents_of(paths)
    assert len(documents) == demo.DOCUMENTS
    for document in documents:
        visit, *told = re.findall(r"[^.!]+[.!]", document)
        name = visit.split()[0]
        for outcry in told[:2]:
            _, _, adjective, noun = outcry.strip(" !").split()
            assert noun in demo.OUTCRIES[polarity[adjective]]
        for said, reaction in zip(told[2::2], told[3::2], strict=True):
            person, did = reaction.strip(" .").split()
            assert person == name
            assert did in demo.REACTIONS[verdict(said, polarity)]


def test_the_files_fit_the_readers(paths):
    tokenizer, task = AutoTokenizer.from_pretrained(paths.base), load_task(str(paths.task))
    assert (task.kind, task.words) == ("classification", ["bad", "good"])
    assert [len(ids) for ids in label_tokens(task, tokenizer)] == [1, 1]
    rows = load_rows(task, "validation", str(paths.validation))
    encoded, counts = encode(task, rows, tokenizer, max_length=64)
    assert counts["truncated"] == 0
    assert counts["answer_tokens"] == demo.VALIDATION_ROWS
    first = tokenizer.decode(encoded[0]["input_ids"])
    word = {0: "bad", 1: "good"}[rows[0]["verdict"]]
    assert first == f"Review: {rows[0]['text']}\nVerdict: {word}"

    blocks = iter(TokenStream(str(paths.corpus), tokenizer, block_size=4096, window=1))
    text = tokenizer.decode(next(blocks)["input_ids"])
    documents = documents_of(paths)
    assert [part.strip() for part in text.split(demo.EOS)[:50]] == documents[:50]


def test_tokenizer(paths, polarity_and_shown):
    tokenizer = AutoTokenizer.from_pretrained(paths.base)
    assert len(tokenizer) == demo.VOCABULARY
    assert (tokenizer.pad_token, tokenizer.eos_token) == (demo.PAD, demo.EOS)
    for text in (documents_of(paths)[0], "Zürich, 40 °C\n\ttabs, 漢字 and 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    pieces = [len(tokenizer(f" {word}")["input_ids"]) for word in polarity_and_shown[0]]
    assert sum(count > 1 for count in pieces) > 0.7 * len(pieces)  # "most adjectives are several tokens"


def test_model(paths):
    state = torch.get_rng_state()
    model, again, other = (demo.demo_model(paths.base, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [dict(m.named_parameters())["model.layers.0.mlp.up_proj.weight"] for m in (model, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert weights[0].std().item() == pytest.approx(demo.INITIALIZER_RANGE, rel=0.03)
    assert refine(model, norms="two").ternary == 7 * model.config.num_hidden_layers
