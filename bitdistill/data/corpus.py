"""The token stream of stage 2: documents in, blocks of tokens out; endless, shuffled, and resumed without replay.

    documents -> tokens, EOS after each document -> blocks of block_size -> windows of ``window`` blocks, permuted

* Documents: the text column of a hub dataset or of local .jsonl / .json / .parquet files: one row, one document. A
  .txt file is one document, or several where a line reads ``<|endoftext|>`` (as in TinyStories); blank lines and lines
  end nothing, for in WikiText a line is a paragraph and in a book a blank line is one. A long .txt is read in pieces
  that end at a line end, and tokenised piece by piece. BOS stands before a document where the tokenizer puts one there.
* Shuffling: window i is permuted with a generator seeded by (seed, i). Nothing depends on rank, worker or time: every
  rank reads the same stream and accelerate's IterableDatasetShard takes its part.
* Epochs: at the end of the corpus the stream starts again. The last window of an epoch is as short as need be; the last
  tokens that do not fill a block are dropped, the same in every epoch.
* Resuming: documents are tokenised in small batches. A window's state is where in the documents the batch began in
  which the window starts, and how many tokens of that batch were used up before. Going on from there tokenises at most
  one batch and one window again; ``datasets`` finds the document by itself (a file already read is not opened; inside
  a file rows are skipped without being tokenised).
"""

import glob
import hashlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from bitdistill.data.tasks import load_hub
from bitdistill.errors import UserError

SEPARATOR = "<|endoftext|>"  # a line of a .txt file that ends a document
PIECE_CHARACTERS = 1 << 15  # a long .txt is tokenised in pieces of about this size
BATCH_CHARACTERS = 1 << 17  # documents are tokenised together until they have so many characters
BATCH_DOCUMENTS = 256
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "txt"}


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
        window: int = 256,
    ):
        super().__init__()
        if block_size < 2 or window < 1:
            got = f"block_size {block_size}, window {window}"
            raise UserError("block_size", expected="at least 2, and a window of at least 1", got=got, do="Raise it.")
        if tokenizer.eos_token_id is None:
            raise UserError("tokenizer", expected="an EOS token, to end documents", got="none", do="Set eos_token.")
        documents, identity = _open(source, config, split)
        self._column = _text_column(documents, source, text_column)
        self._documents = documents.select_columns([self._column]) if documents.column_names else documents
        self._source, self._tokenizer, self.block_size = source, tokenizer, block_size
        self._seed, self._window = seed, window
        self._bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._settings = {"block_size": block_size, "seed": seed, "window": window, "corpus": identity}
        self._settings["vocabulary"] = len(tokenizer)
        self.epochs = self.empty_documents = 0
        self._start = {"window": 0, "block": 0, "epoch": 0, "documents": None, "skip_tokens": 0, "skip_blocks": 0}
        self._starts: deque[dict] = deque()  # of the windows whose blocks were handed out last
        self._yielded = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """From the beginning, or from where ``load_state`` put it."""
        if get_worker_info() is not None:
            do = "Set it to 0: the stream keeps its place in this process."
            raise UserError("dataloader_num_workers", expected="0", got="a worker process", do=do)
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
            return {**self._start, "settings": self._settings}
        assert self._starts[0]["block"] <= blocks <= self._yielded, (self._starts[0]["block"], blocks, self._yielded)
        start = max((s for s in self._starts if s["block"] <= blocks), key=lambda s: s["block"])
        return {**start, "skip_blocks": blocks - start["block"], "settings": self._settings}

    def load_state(self, state: dict) -> None:
        """Go on after the blocks of a ``state_for``; the next ``iter`` starts there.

        Raises:
            UserError: the state belongs to another corpus, block size, window or seed.
        """
        for key, ours in self._settings.items():
            if (theirs := state["settings"][key]) != ours:
                do = "Resume with the settings and files it began with, or start anew."
                raise UserError(f"resume: {key} of the token stream", expected=str(theirs), got=str(ours), do=do)
        self._start = {key: value for key, value in state.items() if key != "settings"}
        self.epochs = self._start["epoch"]
        self._starts.clear()

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
        self._documents.load_state_dict(position)
        batch, characters, before = [], 0, position
        for row in _readable(self._documents, self._source):
            text = row[self._column]
            if text is not None and not isinstance(text, str):
                do = "Name a column of texts with text_column."
                raise UserError(f"corpus {self._source}: {self._column}", expected="texts", got=repr(text)[:80], do=do)
            if text:
                batch.append(row)
                characters += len(text)
            else:
                self.empty_documents += 1
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
                yield before, self._tokens(batch)
                batch, characters, before = [], 0, self._documents.state_dict()
        if batch:
            yield before, self._tokens(batch)

    def _tokens(self, batch: list[dict]) -> np.ndarray:
        texts = [row[self._column] for row in batch]
        tokenized = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        tokens = []
        for row, ids in zip(batch, tokenized["input_ids"], strict=True):
            if self._bos and row.get("_begins", True):
                tokens.append(self._tokenizer.bos_token_id)
            tokens += ids
            if row.get("_ends", True):
                tokens.append(self._tokenizer.eos_token_id)
        return np.array(tokens, np.int32)


def token_blocks(source: str, tokenizer, block_size: int, limit: int | None = None, **options) -> Tensor:
    """One pass in order, for evaluation: int64 (N, block_size), N at most ``limit``; the rest as in TokenStream."""
    stream = TokenStream(source, tokenizer, block_size, window=1, **options)
    blocks = []
    for block in stream:
        if stream.epochs or (limit is not None and len(blocks) == limit):
            break
        blocks.append(block["input_ids"])
    return torch.stack(blocks)


def _after(start: dict, blocks: int, **changes) -> dict:
    return {**start, "window": start["window"] + 1, "block": start["block"] + blocks, **changes}


def _open(source: str, config: str | None, split: str) -> tuple[datasets.IterableDataset, str]:
    """The documents, and a text that tells this corpus from others (file names and sizes; not where they lie)."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in READERS)
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
    if not files:
        if path.suffix in READERS or path.is_dir() or source.startswith((".", "/", "~")) or glob.has_magic(source):
            kinds = " ".join(READERS)
            raise UserError("corpus", expected=f"a file, folder or glob of {kinds}", got=source, do="Check the path.")
        do = "Or give local files: a .txt, .jsonl or .parquet file, a folder or a glob."
        return load_hub(source, config, split, streaming=True, do=do), f"{source} {config} {split}"
    kinds = {READERS.get(p.suffix, p.suffix) for p in files}
    if len(kinds) > 1 or not kinds <= set(READERS.values()):
        expected = f"files of one kind ({' '.join(READERS)})"
        raise UserError(f"corpus {source}", expected=expected, got=" ".join(sorted(kinds)), do="Choose with a glob.")
    names = "\n".join(f"{p.name} {p.stat().st_size}" for p in files)
    identity = f"{len(files)} files, {hashlib.sha256(names.encode()).hexdigest()[:16]}"
    paths = [str(p) for p in files if p.stat().st_size]
    if not paths:
        raise UserError(f"corpus {source}", expected="some text", got="empty files", do="Give files with text.")
    if kinds == {"txt"}:
        return datasets.IterableDataset.from_generator(_pieces, gen_kwargs={"files": paths}), identity
    try:
        return datasets.load_dataset(*kinds, data_files=paths, split="train", streaming=True), identity
    except StopIteration:  # what datasets makes of a JSON file without a row
        raise UserError(f"corpus {source}", expected="some text", got="no row", do="Give files with text.") from None
    except ValueError as error:
        raise UserError(f"corpus {source}", expected="readable rows", got=str(error), do="Mend the file.") from error


def _pieces(files: list[str]) -> Iterator[dict]:
    """The documents of .txt files, in pieces: text, and whether it begins and ends its document."""
    for file in files:
        with open(file, encoding="utf-8") as lines:
            piece, size, begins = [], 0, True
            for line in lines:
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
    except ValueError as error:  # pyarrow's and the decoder's errors are ValueErrors
        raise UserError(f"corpus {source}", expected="readable rows", got=str(error), do="Mend the file.") from error


def _text_column(documents: datasets.IterableDataset, source: str, wanted: str | None) -> str:
    """``wanted``, or ``text``; checked against the first row."""
    row = next(_readable(documents, source), None)
    if row is None:
        raise UserError(f"corpus {source}", expected="some text", got="no row", do="Give files with text.")
    column = wanted or "text"
    if column not in row:
        do = "Name one of them with text_column."
        raise UserError(f"corpus {source}: text_column", expected=column, got=f"columns {', '.join(row)}", do=do)
    return column
