"""The token stream of stage 2 turns documents into blocks of tokens. It is endless, shuffled, and can be resumed.

    documents -> tokens, EOS after each document -> blocks of block_size -> windows of ``window`` blocks, permuted

* Documents: the text column of a hub dataset or of local .jsonl / .json / .parquet files (`rows.py`): one row, one
  document. Files may be compressed. A folder's hidden files and those of other kinds are left out and counted. A
  .txt file is one document, or several where a line reads ``<|endoftext|>`` (as in TinyStories); line ends and
  blank lines do not end a document, because a line of WikiText is a paragraph, and a blank line in a book ends only
  a paragraph. A long .txt is read in pieces that end at a line end, and tokenized piece by piece. BOS stands before
  a document where the tokenizer puts one there. A document that spells a special token has its characters, not the
  token (`text_tokens.py`).
* Shuffling: window i is permuted with a generator seeded by (seed, i). Nothing depends on rank, worker or time: every
  rank reads the same stream and accelerate's IterableDatasetShard takes its part.
* Epochs: at the end of the corpus the stream starts again. The last window of an epoch may be shorter than the others.
  The last tokens, which do not fill a block, are dropped; they are the same in every epoch.
* Resuming: documents are tokenized in small batches. For each window the stream remembers two things: the document with
  which the batch began that contains the window's first token, and how many tokens of that batch came before the
  window. To continue from there, at most one batch and one window are tokenized again. ``datasets`` finds the document
  without reading what comes before (it does not open earlier files, and skips rows without tokenizing them).
"""

import glob
import hashlib
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm.auto import tqdm

from bitdistill.data.rows import Literal, RowFile
from bitdistill.data.tasks import load_hub
from bitdistill.errors import UserError
from bitdistill.prompts import text_tokens
from bitdistill.text_files import COMPRESSED, kind_of, read_lines, user_path
from bitdistill.text_tokens import check_unicode

SEPARATOR = "<|endoftext|>"  # a line of a .txt file that ends a document
WINDOW = 256  # blocks that are shuffled together
PIECE_CHARACTERS = 1 << 15  # a long .txt is tokenized in pieces of about this size
BATCH_CHARACTERS = 1 << 17  # documents are tokenized together until they have so many characters
BATCH_DOCUMENTS = 256
READERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".txt": "txt"}
OPTION = ": --corpus_column, or text_column of a TokenStream"  # where a column is named
CHECK_SECONDS = 60.0  # some gigabytes of text
IDENTITY_BYTES = 1 << 16  # of the beginning and the end of each file, by which one corpus is told from another


class TokenStream(IterableDataset):
    """Endless blocks ``{"input_ids", "labels", "block"}``: twice the same int64 tensor (block_size,), for models shift by
    themselves, and the block's number since the very first, which resuming does not change.

    Args:
        source: a hub dataset's id, or a local file, a folder (searched below) or a glob, files of one kind.
        tokenizer: a fast tokenizer with an EOS token.
        block_size: tokens in a block.
        text_column: the documents' column; ``text`` when there is one of that name.
        config, split: of a hub dataset.
        seed: of the shuffling. window: blocks that are shuffled together; 1 keeps the order.

    Attributes:
        epochs: how often the end of the corpus was reached. Counts what was read: a few blocks ahead of the trainer.
        empty_documents: documents without text that were skipped, since the stream was made.
        left_out: names of the folder's files that are hidden or of another kind.
        settings: what the blocks depend on: block size, seed, window, corpus and vocabulary.

    Raises:
        UserError: nothing found, unreadable, no text column, an empty corpus, or less than one block of tokens.
    """

    def __init__(
        self,
        source: str,
        tokenizer,
        block_size: int,
        *,
        text_column: str | None = None,
        config: str | None = None,
        split: str = "train",
        seed: int = 0,
        window: int = WINDOW,
    ):
        super().__init__()
        if block_size < 2 or window < 1:
            got = f"block_size {block_size}, window {window}"
            raise UserError(
                "block_size", expected="at least 2, and a window of at least 1", got=got, do="Give 2 or more."
            )
        if tokenizer.eos_token_id is None:
            raise UserError("tokenizer", expected="an EOS token, to end documents", got="none", do="Set eos_token.")
        documents, identity, self.left_out = _open(source, config, split, text_column or "text")
        self._column = _text_column(documents, source, text_column)
        self._documents = documents.select_columns([self._column]) if documents.column_names else documents
        self._source, self._tokenizer, self.block_size = source, tokenizer, block_size
        self._seed, self._window = seed, window
        self._text_tokens = text_tokens(tokenizer)
        self.settings = {"block_size": block_size, "seed": seed, "window": window, "corpus": identity}
        self.settings["vocabulary"] = self.vocabulary = len(tokenizer)
        self.epochs = self.empty_documents = 0
        self._start = {"window": 0, "block": 0, "epoch": 0, "documents": None, "skip_tokens": 0, "skip_blocks": 0}
        self._starts: deque[dict] = deque()  # of the windows whose blocks were handed out last
        self._yielded = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """From the beginning, or from where ``load_state`` put it."""
        if get_worker_info() is not None:
            raise ValueError("TokenStream keeps its place in this process: use dataloader_num_workers 0")
        self._starts.clear()
        skip, self.epochs = self._start["skip_blocks"], self._start["epoch"]
        self._yielded = self._start["block"] + skip
        for start, blocks in self._windows({**self._start, "skip_blocks": 0}):
            self._starts.append(start)
            while len(self._starts) > 2 and self._starts[1]["block"] <= start["block"] - 2 * self._window:
                self._starts.popleft()
            order = np.random.default_rng([self._seed, start["window"]]).permutation(len(blocks))
            for i in order[skip:]:
                self._yielded += 1
                block = torch.from_numpy(blocks[i].astype(np.int64))
                yield {"input_ids": block, "labels": block.clone(), "block": self._yielded - 1}
            skip = 0

    def state_for(self, blocks: int) -> dict:
        """Where the stream stands after ``blocks`` blocks, counted from the very first (also after ``load_state``).

        Args:
            blocks: at most those yielded, at least those of a window before: a trainer that fetches ahead asks for what
                it has used up.

        Returns: a small dict for JSON.
        """
        if not self._starts:
            assert blocks == self._start["block"] + self._start["skip_blocks"], "nothing was read yet"
            return {**self._start, "settings": self.settings}
        assert self._starts[0]["block"] <= blocks <= self._yielded, (self._starts[0]["block"], blocks, self._yielded)
        start = max((s for s in self._starts if s["block"] <= blocks), key=lambda s: s["block"])
        return {**start, "skip_blocks": blocks - start["block"], "settings": self.settings}

    def load_state(self, state: dict) -> None:
        """Go on after the blocks of a ``state_for``; the next ``iter`` starts there.

        Raises:
            UserError: the state belongs to another corpus, block size, window or seed.
        """
        self.require_same(self.settings, state["settings"])
        self._start = {key: value for key, value in state.items() if key != "settings"}
        self.epochs = self._start["epoch"]
        self._starts.clear()

    @staticmethod
    def require_same(ours: dict, theirs: dict) -> None:
        """Raises UserError where the settings of a stream are not those that a state was saved with."""
        for key, here in ours.items():
            if theirs[key] != here:
                do = "Resume with the settings and files that it began with, or start again."
                raise UserError(f"resume: {key} of the token stream", expected=str(theirs[key]), got=str(here), do=do)

    def _windows(self, start: dict) -> Iterator[tuple[dict, np.ndarray]]:
        """(state at its start, int32 tokens (up to window, block_size)) of each window, epoch after epoch."""
        size = self._window * self.block_size
        while True:
            whole_epoch = start["documents"] is None and not start["skip_tokens"]
            tokens, used, full = np.empty(0, np.int32), start["skip_tokens"], 0
            for before, batch in self._batches(start["documents"]):
                while len(tokens) + len(batch) - used >= size:
                    end = used + size - len(tokens)
                    yield start, np.concatenate([tokens, batch[used:end]]).reshape(-1, self.block_size)
                    tokens, used, full = tokens[:0], end, full + 1
                    start = _after(start, self._window, documents=before, skip_tokens=used)
                tokens, used = np.concatenate([tokens, batch[used:]]), 0
            blocks = len(tokens) // self.block_size
            if whole_epoch and not full and not blocks:
                got = f"{len(tokens)} tokens" if len(tokens) else "no text"
                do = "Give a larger corpus or a smaller block_size."
                raise UserError(f"corpus {self._source}", expected=f"at least {self.block_size} tokens", got=got, do=do)
            if blocks:
                yield start, tokens[: blocks * self.block_size].reshape(-1, self.block_size)
                start = _after(start, blocks)
            self.epochs = start["epoch"] + 1
            start = {**start, "epoch": self.epochs, "documents": None, "skip_tokens": 0}

    def _batches(self, position: dict | None) -> Iterator[tuple[dict | None, np.ndarray]]:
        """(where the documents stood before it, int32 tokens) of each batch of documents, from there to the end."""
        for before, batch in self.batches_of_documents(position):
            yield before, self.tokens_of(batch)[0]

    def batches_of_documents(self, position: dict | None) -> Iterator[tuple[dict | None, list[dict]]]:
        """(where the documents stood before it, its rows) of each batch of documents, from there to the end.

        Args:
            position: None for the beginning, or what stood before a batch.
        """
        self._documents.load_state_dict(position)
        batch, characters, before = [], 0, position
        for row in _readable(self._documents, self._source):
            text = _text_of(row, self._column, self._source)
            if text:
                batch.append(row)
                characters += len(text)
            else:
                self.empty_documents += 1
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
                yield before, batch
                batch, characters, before = [], 0, self._documents.state_dict()
        if batch:
            yield before, batch

    def tokens_of(self, batch: list[dict]) -> tuple[np.ndarray, list[int]]:
        """The rows of a batch as int32 tokens, and where documents begin among them."""
        tokens, starts, encoded = [], [], self._text_tokens.encode([row[self._column] for row in batch])
        for row, ids in zip(batch, encoded, strict=True):
            if row.get("_begins", True):
                starts.append(len(tokens))
                tokens += self._text_tokens.prefix
            tokens += ids
            if row.get("_ends", True):
                tokens.append(self._tokenizer.eos_token_id)
        return np.array(tokens, np.int32), starts


def token_blocks(source: str, tokenizer, block_size: int, limit: int | None = None, **options) -> Tensor:
    """One pass in order, for evaluation: int64 (N, block_size), N at most ``limit``; the rest as in TokenStream."""
    stream = TokenStream(source, tokenizer, block_size, window=1, **options)
    blocks = []
    for block in stream:
        if stream.epochs or (limit is not None and len(blocks) == limit):
            break
        blocks.append(block["input_ids"])
    return torch.stack(blocks)


def check_corpus(source: str, text_column: str | None = None, seconds: float = CHECK_SECONDS) -> str | None:
    """Reads the local files of a corpus as `TokenStream` will, without making tokens of them.

    Args:
        source: a file, a folder or a glob; anything else is a data set of the hub. text_column: as for `TokenStream`.
        seconds: after so many it ends; what comes later is checked when it is read.

    Returns: how much was read, in words; None for a data set of the hub, which is not looked at.

    Raises:
        UserError: a file that is no text in UTF-8, a NUL character in a text file, a row that is none or has no text, with
            file and line.
    """
    files, _ = corpus_files(user_path(source, "corpus"))
    column, until, documents, characters = text_column or "text", time.monotonic() + seconds, 0, 0
    with tqdm(desc="corpus: checked", unit=" characters", unit_scale=True, delay=3, leave=False) as bar:
        for file in (str(file) for file in files if file.stat().st_size):
            is_text = READERS[kind_of(Path(file))] == "txt"
            for row in _pieces([file]) if is_text else _rows([file], [column]):
                size = len(_text_of(row, "text" if is_text else column, source) or "")
                documents, characters = documents + row.get("_ends", True), characters + size
                bar.update(size)
                if time.monotonic() > until:
                    return f"the first {characters:,} characters checked; the rest is when it is read"
    return f"all {characters:,} characters of {documents:,} documents checked" if files else None


def _text_of(row: dict, column: str, source: str) -> str | None:
    """The text of a document, None where it is null."""
    where = f" in {row['_place']}" if "_place" in row else ""
    if column not in row:
        do = f"Name a column that all files have{OPTION}, or choose files with a glob."
        got = f"columns {_columns(row)}{where}"
        raise UserError(f"corpus {source}: column", expected=column, got=got, do=do)
    text = row[column]
    if text is not None and (not isinstance(text, str) or isinstance(text, Literal)):
        do = f"Name a column of texts{OPTION}."
        got = f"{text!r}"[:80] + where
        raise UserError(f"corpus {source}: {column}", expected="texts", got=got, do=do)
    return text


def _after(start: dict, blocks: int, **changes) -> dict:
    return {**start, "window": start["window"] + 1, "block": start["block"] + blocks, **changes}


def _open(
    source: str, config: str | None, split: str, column: str
) -> tuple[datasets.IterableDataset, str, tuple[str, ...]]:
    """The documents; a text that tells this corpus from others (not by where it lies); names of files left out."""
    path = user_path(source, "corpus")
    files, left_out = corpus_files(path)
    if not files:
        if kind_of(path) in READERS or path.is_dir() or source.startswith((".", "/", "~")) or glob.has_magic(source):
            kinds = f"{' '.join(READERS)}, compressed ({' '.join(COMPRESSED)}) or not"
            raise UserError("corpus", expected=f"a file, folder or glob of {kinds}", got=source, do="Check the path.")
        do = "Or give local files: a .txt, .jsonl or .parquet file, a folder or a glob."
        return load_hub(source, config, split, streaming=True, do=do), f"{source} {config} {split}", ()
    kinds = {READERS.get(kind_of(file), kind_of(file)) for file in files}
    if len(kinds) > 1 or not kinds <= set(READERS.values()):
        expected = f"files of one kind ({' '.join(READERS)})"
        raise UserError(f"corpus {source}", expected=expected, got=" ".join(sorted(kinds)), do="Choose with a glob.")
    paths = [str(file) for file in files if file.stat().st_size]
    if not paths:
        raise UserError(f"corpus {source}", expected="some text", got="empty files", do="Give files with text.")
    identity = f"{len(files)} files, {_identity(files)}"
    if kinds == {"txt"}:
        return datasets.IterableDataset.from_generator(_pieces, gen_kwargs={"files": paths}), identity, left_out
    options = {"files": paths, "column": [column] * len(paths)}  # each file is a shard, with its share of every list
    return datasets.IterableDataset.from_generator(_rows, gen_kwargs=options), identity, left_out


def corpus_files(path: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The files of a corpus, sorted, and the names of those in its folder that are left out: hidden, or of another kind.

    Args:
        path: a file, a folder (searched below), or a glob. A name that exists means itself: brackets in it are no set.
    """
    if path.is_file():
        return [path], ()
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file())
        files = [file for file in below if kind_of(file) in READERS and not _hidden(file.relative_to(path))]
        return files, tuple(str(file.relative_to(path)) for file in below if file not in set(files))
    literal, rest = Path(path.anchor), list(path.parts[1:] if path.anchor else path.parts)
    while rest and (literal / rest[0]).exists():
        literal /= rest.pop(0)
    pattern = str(Path(glob.escape(str(literal)), *rest))
    return sorted(file for file in map(Path, glob.glob(pattern, recursive=True)) if file.is_file()), ()


def _hidden(path: Path) -> bool:
    """Whether a file or one of its folders is of the kind that editors, notebooks and archives create by themselves."""
    return any(part.startswith((".", "~$")) or part == "__MACOSX" for part in path.parts)


def _identity(files: list[Path]) -> str:
    """Names, sizes, and the bytes at the beginning and end of each file, hashed."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(IDENTITY_BYTES))
            file.seek(max(size - IDENTITY_BYTES, 0))
            digest.update(file.read(IDENTITY_BYTES))
    return digest.hexdigest()[:16]


def _rows(files: list[str], column: list[str]) -> Iterator[dict]:
    """The rows of .jsonl, .json and .parquet files: the text's column, and where it stands."""
    for file, name in zip(files, column, strict=True):
        rows = RowFile(Path(file), "corpus", [name])
        for row in rows:
            if name not in rows.names:  # what other columns there are is for the message
                yield dict.fromkeys(rows.names) | {"_place": f"{row.place} of {file}"}
                continue
            text = row.values.get(name)
            if isinstance(text, str) and not isinstance(text, Literal):
                check_unicode(text, f"corpus {file}: {name} in {row.place}")
            yield {name: text, "_place": f"{row.place} of {file}"}


def _pieces(files: list[str]) -> Iterator[dict]:
    """The documents of .txt files, in pieces: text, and whether it begins and ends its document."""
    for file in files:
        piece, size, begins = [], 0, True
        for number, line in enumerate(read_lines(Path(file), "corpus"), start=1):
            if "\0" in line:
                do = "Leave the file out, or mend it: it is no text, or a disk or a copy damaged it."
                raise UserError(f"corpus {file}", expected="text", got=f"a NUL character in line {number}", do=do)
            ends = line.strip() == SEPARATOR
            if piece and (ends or size >= PIECE_CHARACTERS):
                yield {"text": "".join(piece), "_begins": begins, "_ends": ends}
                piece, size, begins = [], 0, ends
            if not ends:
                piece.append(line)
                size += len(line)
        if piece:
            yield {"text": "".join(piece), "_begins": begins, "_ends": True}


def _readable(documents: datasets.IterableDataset, source: str) -> Iterator[dict]:
    try:
        yield from documents
    except UserError:
        raise
    except ValueError as error:  # pyarrow's and the decoder's errors are ValueErrors
        raise UserError(
            f"corpus {source}", expected="readable rows", got=str(error), do="Write the file again, or leave it out."
        ) from error


def _text_column(documents: datasets.IterableDataset, source: str, wanted: str | None) -> str:
    """``wanted``, or ``text``; checked against the first row."""
    row = next(_readable(documents, source), None)
    if row is None:
        raise UserError(f"corpus {source}", expected="some text", got="no row", do="Give files with text.")
    column = wanted or "text"
    if column not in row:
        got, do = f"columns {_columns(row)}", f"Name one of them{OPTION}."
        raise UserError(f"corpus {source}: column", expected=column, got=got, do=do)
    return column


def _columns(row: dict) -> str:
    return ", ".join(name for name in row if name not in ("_place", "_begins", "_ends"))
