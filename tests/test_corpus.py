"""The token stream: content against a hand-written packing, shuffling, and resuming at every block."""

import gzip
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitdistill.data import corpus
from bitdistill.data.corpus import TokenStream, token_blocks
from bitdistill.errors import UserError

DATA = Path(os.environ.get("BITDISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
EOS, BOS = 256, 257


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, in the order of pre_tokenizers.ByteLevel's alphabet: independent of where a text is cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"</s>": EOS, "<s>": BOS}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", **({"bos_token": "<s>"} if bos else {}))


@pytest.fixture
def small_batches(monkeypatch):
    """So that a few documents already make many batches and pieces."""
    monkeypatch.setattr(corpus, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 90)
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 40)


def texts(n: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list("abcdefgh é\n"), generator.integers(1, 70))) for _ in range(n)]


def write(path: Path, kind: str, documents: list[str]) -> Path:
    path = path.with_suffix(f".{kind}")
    if kind == "parquet":
        Dataset.from_dict({"id": list(range(len(documents))), "text": documents}).to_parquet(path)
    elif kind == "txt":
        path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({"id": 1, "text": t, "_begins": False}) + "\n" for t in documents))
    return path


def packed(tokenizer, documents, block_size, bos=False) -> torch.Tensor:
    """The blocks of one epoch, written by hand: no batches, no windows."""
    tokens = []
    for text in documents:
        tokens += ([BOS] if bos else []) + tokenizer(text, add_special_tokens=False)["input_ids"] + [EOS]
    return torch.tensor(tokens[: len(tokens) // block_size * block_size]).view(-1, block_size)


def take(stream, n: int) -> torch.Tensor:
    return torch.stack([block["input_ids"] for block in itertools.islice(iter(stream), n)])


def as_set(blocks) -> set:
    return {tuple(block) for block in blocks.tolist()}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("bos", [False, True])
def test_one_epoch_in_order_is_the_packing_by_hand(tmp_path, small_batches, kind, bos):
    documents, tokenizer = texts(40), byte_tokenizer(bos)
    expected = packed(tokenizer, documents, 16, bos)
    stream = TokenStream(str(write(tmp_path / "c", kind, documents)), tokenizer, 16, window=1)
    blocks = list(itertools.islice(stream, len(expected)))
    assert torch.equal(torch.stack([b["input_ids"] for b in blocks]), expected)
    assert all(torch.equal(b["input_ids"], b["labels"]) and b["input_ids"].dtype == torch.int64 for b in blocks)
    assert torch.equal(token_blocks(str(tmp_path / f"c.{kind}"), tokenizer, 16), expected)
    assert torch.equal(token_blocks(str(tmp_path / f"c.{kind}"), tokenizer, 16, limit=3), expected[:3])


def test_text_files_are_documents_and_separators_cut_them(tmp_path, small_batches):
    (tmp_path / "b.txt").write_text("Second file.\n\n\nOne paragraph.\n = Head = \n" + "long line " * 20 + "\nend\n")
    (tmp_path / "a.txt").write_text(
        "\n<|endoftext|>\nOne story.\n\nIts end.\n<|endoftext|>\nAnother é.\n <|endoftext|> \n"
    )
    (tmp_path / "c.txt").write_text("")
    tokenizer = byte_tokenizer(bos=True)
    expected = ["\n", "One story.\n\nIts end.\n", "Another é.\n", (tmp_path / "b.txt").read_text()]
    blocks = token_blocks(str(tmp_path), tokenizer, 2)
    assert torch.equal(blocks, packed(tokenizer, expected, 2, bos=True))
    text = tokenizer.decode(blocks.flatten().tolist())
    assert text == "".join(f"<s>{document}</s>" for document in expected)[: len(text)]


def test_files_folder_and_glob_are_read_in_order_of_names(tmp_path):
    tokenizer = byte_tokenizer()
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b", "jsonl", ["bbbb"])
    write(tmp_path / "a", "jsonl", ["aaaa"])
    write(tmp_path / "sub" / "c", "jsonl", ["cccc"])
    expected = packed(tokenizer, ["aaaa", "bbbb", "cccc"], 5)
    assert torch.equal(token_blocks(str(tmp_path), tokenizer, 5), expected)
    assert torch.equal(token_blocks(str(tmp_path / "*.jsonl"), tokenizer, 5), expected[:2])
    assert torch.equal(token_blocks(str(tmp_path / "sub/c.jsonl"), tokenizer, 5), expected[2:])


def test_windows_are_permutations_of_consecutive_blocks(tmp_path, small_batches):
    documents, tokenizer = texts(60), byte_tokenizer()
    path = str(write(tmp_path / "c", "jsonl", documents))
    ordered = packed(tokenizer, documents, 16)
    n, window = len(ordered), 8
    assert n % window, "the last window is to be a short one"
    shuffled = take(TokenStream(path, tokenizer, 16, window=window, seed=3), 2 * n)
    for begin in range(0, n, window):
        part, whole = shuffled[:n][begin : begin + window], ordered[begin : begin + window]
        assert sorted(part.tolist()) == sorted(whole.tolist())
    assert not torch.equal(shuffled[:n], ordered)
    assert not torch.equal(shuffled[:n], shuffled[n:]), "each epoch has its own order"
    assert as_set(shuffled[n:]) == as_set(ordered)
    again = take(TokenStream(path, tokenizer, 16, window=window, seed=3), n)
    other = take(TokenStream(path, tokenizer, 16, window=window, seed=4), n)
    assert torch.equal(again, shuffled[:n])
    assert not torch.equal(other, shuffled[:n])
    # windows of equal length are permuted differently
    first, second = (shuffled[i : i + window].tolist() for i in (0, window))
    orders = [[ordered[i : i + window].tolist().index(b) for b in part] for i, part in ((0, first), (window, second))]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
@pytest.mark.parametrize("window", [1, 7, 64])
def test_resuming_at_every_block_of_three_epochs(tmp_path, small_batches, kind, window):
    """Two files; one window is shorter than an epoch, one longer; states go through JSON."""
    tokenizer = byte_tokenizer(bos=True)
    for i in (0, 1):
        write(tmp_path / str(i), kind, texts(12, seed=i))
    stream = TokenStream(str(tmp_path), tokenizer, 16, window=window)
    n = 3 * len(token_blocks(str(tmp_path), tokenizer, 16)) + 5
    states, iterator, blocks = [stream.state_for(0)], iter(stream), []
    for i in range(1, n + 1):
        blocks.append(next(iterator)["input_ids"])
        states.append(stream.state_for(i))
    expected = torch.stack(blocks)
    assert stream.epochs == 3
    resumed = TokenStream(str(tmp_path), tokenizer, 16, window=window)
    for i in range(0, n - 4):
        resumed.load_state(json.loads(json.dumps(states[i])))
        assert resumed.state_for(i) == states[i], "before the first block"
        assert torch.equal(take(resumed, 4), expected[i : i + 4]), i
        state = resumed.state_for(i + 2)  # at a border: the end of one window or the beginning of the next
        assert state["block"] + state["skip_blocks"] == i + 2, "counting goes on"
        resumed.load_state(state)
        assert torch.equal(take(resumed, 2), expected[i + 2 : i + 4]), "a state of a resumed stream"


def test_states_lag_behind_a_prefetching_reader(tmp_path, small_batches):
    """Any n within the last two windows' blocks, although later blocks were handed out."""
    tokenizer = byte_tokenizer()
    path = str(write(tmp_path / "c", "jsonl", texts(200)))
    stream = TokenStream(path, tokenizer, 16, window=8)
    iterator = iter(stream)
    ahead = [next(iterator)["input_ids"] for _ in range(100)]
    for n in range(100 - 16, 101):
        resumed = TokenStream(path, tokenizer, 16, window=8)
        resumed.load_state(stream.state_for(n))
        following = next(iter(resumed))["input_ids"]
        assert n == 100 or torch.equal(following, ahead[n])
    assert len(stream._starts) <= 5, "old states are let go"
    with pytest.raises(AssertionError):
        stream.state_for(101)
    with pytest.raises(AssertionError):
        stream.state_for(20)


def test_short_corpora_keep_states_of_many_windows(tmp_path):
    """Three blocks per epoch: the windows are short, and a lag of many blocks spans many of them."""
    path = str(write(tmp_path / "c", "jsonl", ["x" * 50]))
    stream = TokenStream(path, byte_tokenizer(), 16, window=64)
    iterator = iter(stream)
    ahead = [next(iterator) for _ in range(90)]
    resumed = TokenStream(path, byte_tokenizer(), 16, window=64)
    resumed.load_state(stream.state_for(50))
    for block, theirs in zip(resumed, ahead[50:], strict=False):
        assert torch.equal(block["input_ids"], theirs["input_ids"])


def test_state_is_small_and_replay_is_bounded(tmp_path, monkeypatch):
    """Resuming late in the corpus tokenizes a batch and a window again, not all that went before."""
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(corpus, "BATCH_DOCUMENTS", 4)
    path = str(write(tmp_path / "c", "jsonl", texts(400)))
    stream = TokenStream(path, tokenizer, 16, window=4)
    take(stream, 700)
    state = stream.state_for(699)
    assert len(json.dumps(state)) < 1500
    resumed = TokenStream(path, tokenizer, 16, window=4)
    resumed.load_state(state)
    tokenized = []
    original = TokenStream.tokens_of
    monkeypatch.setattr(
        TokenStream, "tokens_of", lambda self, batch: tokenized.append(len(batch)) or original(self, batch)
    )
    next(iter(resumed))
    assert sum(tokenized) <= 12


def test_state_of_other_settings_is_refused(tmp_path):
    path = str(write(tmp_path / "c", "jsonl", texts(20)))
    stream = TokenStream(path, byte_tokenizer(), 16)
    next(iter(stream))
    state = stream.state_for(1)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "c.jsonl").write_bytes(Path(path).read_bytes())
    TokenStream(str(moved), byte_tokenizer(), 16).load_state(state)  # the same files elsewhere: fine
    for name, other in {
        "block_size": TokenStream(path, byte_tokenizer(), 8),
        "seed": TokenStream(path, byte_tokenizer(), 16, seed=1),
        "window": TokenStream(path, byte_tokenizer(), 16, window=2),
        "corpus": TokenStream(str(write(tmp_path / "d", "jsonl", texts(20))), byte_tokenizer(), 16),
    }.items():
        with pytest.raises(UserError, match=name):
            other.load_state(state)


def test_ranks_take_disjoint_shares_of_one_stream(tmp_path):
    path = str(write(tmp_path / "c", "jsonl", texts(60)))
    make = lambda: TokenStream(path, byte_tokenizer(), 16, window=8)  # noqa: E731
    whole = take(make(), 24)
    shares = [take(IterableDatasetShard(make(), 3, num_processes=2, process_index=rank), 12) for rank in (0, 1)]
    merged = [share[i : i + 3] for i in range(0, 12, 3) for share in shares]
    assert torch.equal(torch.cat(merged), whole)


def test_accelerate_reads_ahead_and_state_for_what_was_used_is_there(tmp_path):
    path = str(write(tmp_path / "c", "jsonl", texts(60)))
    stream = TokenStream(path, byte_tokenizer(), 16, window=4)
    loader = iter(prepare_data_loader(DataLoader(stream, batch_size=2)))
    used = [next(loader)["input_ids"] for _ in range(5)]
    resumed = TokenStream(path, byte_tokenizer(), 16, window=4)
    resumed.load_state(stream.state_for(6))
    assert torch.equal(take(resumed, 4), torch.cat(used[3:]))


def test_worker_processes_are_refused(tmp_path):
    path = str(write(tmp_path / "c", "jsonl", texts(60)))
    with pytest.raises(ValueError, match="dataloader_num_workers 0"):  # torch wraps what a worker says
        next(iter(DataLoader(TokenStream(path, byte_tokenizer(), 16), num_workers=1)))


def test_empty_documents_are_skipped_and_counted(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["abcd", "", None, "efgh"]))
    stream = TokenStream(str(path), byte_tokenizer(), 5)
    assert as_set(take(stream, 2)) == as_set(packed(byte_tokenizer(), ["abcd", "efgh"], 5))
    assert stream.empty_documents == 2


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("c.jsonl", "", "empty files"),
        ("c.jsonl", "\n", "no row"),
        ("c.jsonl", '{"text": ""}\n', "no text"),
        ("c.jsonl", '{"text": "short"}\n', "at least 16 tokens; got 6 tokens"),
        (
            "c.jsonl",
            '{"body": "x", "id": 1}\n',
            "column: expected text; got columns body, id. Name one of them: --corpus_column",
        ),
        ("c.jsonl", '{"text": 5}\n', "expected texts; got 5"),
        ("c.jsonl", '{"text": \n', "read as json; got .* in row 1"),
        ("c.txt", "", "empty files"),
        ("c.txt", "<|endoftext|>\n", "no row"),
        ("c.txt", b"\xff\xfe\xff", "UTF-16"),
        ("c.parquet", "x", "read as parquet"),
        ("c.pdf", "x", r"one kind"),
    ],
)
def test_bad_corpora(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=match):
        next(iter(TokenStream(str(path), byte_tokenizer(), 16)))


def test_other_mistakes(tmp_path):
    write(tmp_path / "c", "jsonl", texts(20))
    for source in ("no_such.txt", "./no_such", str(tmp_path / "*.parquet")):
        with pytest.raises(UserError, match="file, folder or glob"):
            TokenStream(source, byte_tokenizer(), 16)
    with pytest.raises(UserError, match="block_size"):
        TokenStream(str(tmp_path), byte_tokenizer(), 1)
    with pytest.raises(UserError, match="EOS"):
        TokenStream(str(tmp_path), PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer), 16)
    write(tmp_path / "d", "txt", texts(20))
    with pytest.raises(UserError, match=r"one kind.*json txt"):
        TokenStream(str(tmp_path), byte_tokenizer(), 16)


def test_named_text_column(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"body": "abcd", "text": "no"}\n')
    blocks = token_blocks(str(tmp_path), byte_tokenizer(), 5, text_column="body")
    assert torch.equal(blocks, packed(byte_tokenizer(), ["abcd"], 5))


@pytest.mark.parametrize("name", ["c4_sample.jsonl", "tinystories.txt", "wikitext2_test.txt"])
def test_real_corpora(name):
    path = DATA / "corpus" / name
    if not path.is_file() or not (DATA / "models/base-6m").is_dir():
        pytest.skip(f"no corpus/{name} or models/base-6m under {DATA}; set BITDISTILL_DATA")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "models/base-6m")
    text = tokenizer.decode(token_blocks(str(path), tokenizer, 256, limit=40).flatten().tolist()).rstrip("\ufffd")
    content = path.read_text(encoding="utf-8")
    if name.endswith("jsonl"):
        content = "".join(json.loads(line)["text"] + "<|endoftext|>" for line in content.splitlines())
    assert len(text) > 10_000
    assert content.startswith(text)
    stream = TokenStream(str(path), tokenizer, 256, window=8)
    expected = take(stream, 30)
    resumed = TokenStream(str(path), tokenizer, 256, window=8)
    resumed.load_state(stream.state_for(20))
    assert torch.equal(take(resumed, 10), expected[20:])


# --- files as people have them ----------------------------------------------------------------------------------------


def same(source, tokenizer, documents, block_size=5) -> bool:
    return torch.equal(token_blocks(str(source), tokenizer, block_size), packed(tokenizer, documents, block_size))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("Été one.\r\nTwo.\r\n", encoding=encoding, newline="")
    (tmp_path / "b.jsonl").write_text('{"text": "Été"}\r\n', encoding=encoding, newline="")
    assert same(tmp_path / "a.txt", byte_tokenizer(), ["Été one.\nTwo.\n"])
    assert same(tmp_path / "b.jsonl", byte_tokenizer(), ["Été"])


def test_compressed_corpora_and_arrays(tmp_path):
    for name, content in (("a.txt.gz", "One. Two."), ("b.jsonl.gz", '{"text": "One. Two."}\n')):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert same(tmp_path / name, byte_tokenizer(), ["One. Two."])
    (tmp_path / "c.json").write_text('[\n {"text": "One."},\n {"text": "2024-05-01"}]')
    assert same(tmp_path / "c.json", byte_tokenizer(), ["One.", "2024-05-01"])


def test_hidden_and_foreign_files_of_a_folder_are_left_out_and_named(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a", "jsonl", ["aaaaaaaa"])
    for name in (
        ".a.jsonl",
        "._a.jsonl",
        ".cache/x.txt",
        ".ipynb_checkpoints/y.txt",
        "__MACOSX/z.txt",
        "LICENSE",
        "n.pdf",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no text of the corpus")
    stream = TokenStream(str(tmp_path), byte_tokenizer(), 5)
    assert len(stream.left_out) == 7
    assert "n.pdf" in stream.left_out
    assert same(tmp_path, byte_tokenizer(), ["aaaaaaaa"])


@pytest.mark.parametrize("name", ["[v2] data", "a*b", "with space", "ünï", "~tilde"])
def test_any_folder_is_a_folder(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    write(folder / "[1] a", "jsonl", ["aaaa"])
    for source in (folder, folder / "[1] a.jsonl", folder / "*.jsonl", tmp_path / "**" / "*.jsonl"):
        assert same(source, byte_tokenizer(), ["aaaa"])


def test_a_name_that_exists_is_no_pattern(tmp_path):
    """`[ab].jsonl` is the file of that name, not a.jsonl."""
    write(tmp_path / "a", "jsonl", ["wrong"])
    write(tmp_path / "[ab]", "jsonl", ["right"])
    assert same(tmp_path / "[ab].jsonl", byte_tokenizer(), ["right"])


def test_documents_that_spell_special_tokens_have_their_letters(tmp_path):
    tokenizer = byte_tokenizer(bos=True)
    write(tmp_path / "a", "jsonl", ["x</s><s>y", "z"])
    blocks = token_blocks(str(tmp_path), tokenizer, 2).flatten().tolist()
    assert (blocks.count(BOS), blocks.count(EOS)) == (2, 2)
    assert tokenizer.decode(blocks[:11]) == "<s>x</s><s>y</s>"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("c.txt", "fine\ncaf\xe9\n".encode("latin-1"), r"c\.txt: expected text in UTF-8; got the byte 0xe9 in line 2"),
        ("c.jsonl", b'{"text": "fine fine fine fine"}\n{"text": 7}\n', r"expected texts; got 7 in row 2 of .*c\.jsonl"),
        ("c.jsonl", b'{"text": "fine"}\n{"text": "x\\ud83d"}\n', r"c\.jsonl: text in row 2: .*surrogate \\ud83d"),
        (
            "c.jsonl",
            b'{"text": "fine"}\n{"text": "fi',
            r"c\.jsonl: expected rows that can be read as json; .* in row 2",
        ),
        ("c.txt", b"PK\x03\x04", "a zip archive"),
    ],
)
def test_file_and_row_of_bad_text_are_named(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match):
        next(iter(TokenStream(str(tmp_path), byte_tokenizer(), 16)))


def test_a_file_without_the_column_is_named(tmp_path):
    write(tmp_path / "a", "jsonl", ["aaaa"])
    (tmp_path / "b.jsonl").write_text('{"body": "bbbb"}\n')
    with pytest.raises(UserError, match=r"column: expected text; got columns body in row 1 of .*b\.jsonl"):
        next(iter(TokenStream(str(tmp_path), byte_tokenizer(), 16)))


def test_files_are_checked_to_their_ends_without_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo é\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("")
    assert corpus.check_corpus(str(tmp_path)) == "all 10 characters of 2 documents checked"
    assert corpus.check_corpus("somebody/a-dataset") is None
    (tmp_path / "c.txt").write_text("fine\n" * 100_000 + "x\0y\n")
    with pytest.raises(UserError, match=r"c\.txt: expected text; got a NUL character in line 100001"):
        corpus.check_corpus(str(tmp_path))
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "a", "jsonl", ["text"] * 3)
    (tmp_path / "rows" / "b.jsonl").write_text('{"text": null}\n{"text": "last"}\n')
    assert corpus.check_corpus(str(tmp_path / "rows")) == "all 16 characters of 5 documents checked"


def test_a_huge_corpus_is_checked_for_a_time(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    assert (
        corpus.check_corpus(str(tmp_path), seconds=0) == "the first 4 characters checked; the rest is when it is read"
    )
    with pytest.raises(UserError, match="7 in row 2"):
        corpus.check_corpus(str(tmp_path))


def test_a_replaced_file_is_another_corpus(tmp_path):
    """Of the same name, size and time."""
    path = tmp_path / "a.jsonl"
    states = []
    for text in ("old text and more of it", "new text and more of it"):
        path.write_text(json.dumps({"text": text}) + "\n")
        os.utime(path, (1_700_000_000, 1_700_000_000))
        stream = TokenStream(str(path), byte_tokenizer(), 5)
        next(iter(stream))
        states.append(stream.state_for(1))
    with pytest.raises(UserError, match="corpus"):
        TokenStream(str(path), byte_tokenizer(), 5).load_state(states[0])
