"""Everything that a run reads besides models: its task, its rows, its corpus, and the tokens that are made of them.

The settings name files or hub datasets; the embedded demo brings its own. Every stage asks here for what it needs, so that
training, calibration and scoring see the same rows.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdistill.data.corpus import TokenStream, check_corpus
from bitdistill.data.tasks import (
    encode,
    encode_prompts,
    load_rows,
    load_task,
    load_validation,
    row_documents,
    show_example,
)
from bitdistill.data.token_shards import ShardedStream, TokenShards, blocks_to_make, write_tokens
from bitdistill.distributed import process_group
from bitdistill.errors import UserError
from bitdistill.files import is_made, make_once, whole_file, write_whole
from bitdistill.prompts import Task, text_tokens

KEPT_TOKENS = 20_000_000  # of encoded rows that stay in memory between the stages: 160 MB


@dataclass(frozen=True)
class Sources:
    """Where a run's texts come from, and how much of them is used.

    Args:
        task: a built-in task's name or a YAML file.
        train_file: local training rows; the hub's when None. validation_file: likewise.
        extra_validation_files: local rows of further validation splits: {split: file}.
        corpus: hub dataset, file, folder or glob; None when no stage needs it. corpus_column: its text column.
        max_length: tokens of a task row. max_train_rows, max_validation_rows: rows used; all when None.
        seed: of the rows that are drawn, and of the order of the corpus.
    """

    task: str
    train_file: str | None = None
    validation_file: str | None = None
    extra_validation_files: dict[str, str] = field(default_factory=dict)
    corpus: str | None = None
    corpus_column: str | None = None
    max_length: int = 512
    max_train_rows: int | None = None
    max_validation_rows: int | None = None
    seed: int = 0

    @cached_property
    def loaded_task(self) -> Task:
        """The task, read once."""
        return load_task(self.task)

    def train_rows(self):
        """The task's training rows, from a local file or the hub."""
        return load_rows(self.loaded_task, "train", self.train_file, self.max_train_rows, self.seed)

    def validation_rows(self) -> dict[str, Any]:
        """Split -> rows of every validation split, "validation" first; a split that is left out is said."""
        task, files = self.loaded_task, self.extra_validation_files
        rows, left_out = load_validation(task, self.validation_file, files, self.max_validation_rows, self.seed)
        for split in left_out:
            process_group.say(f"{task.name}: {split} is not scored; --extra_validation_files.{split} FILE adds it")
        return rows

    @cached_property
    def _kept(self) -> dict[tuple, tuple]:
        """What `encoded_rows` returned last, under what it depends on."""
        return {}

    def encoded_rows(self, tokenizer, vocabulary: int | None) -> tuple[Any, dict[str, int], dict[str, Any]]:
        """The training rows as tokens, kept for the next stage with the same tokenizer while they are few.

        Args:
            tokenizer: of the model. vocabulary: rows of its embedding; None does not check the ids against it.

        Returns: the rows and the counts of `encode`, and the first row as it was read.
        """
        text_tokens(tokenizer)  # switches off what it leaves behind in the tokenizer
        key = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), tokenizer.eos_token, vocabulary)
        if key not in self._kept:
            self._kept.clear()
            rows = self.train_rows()
            found = (*encode(self.loaded_task, rows, tokenizer, self.max_length, vocabulary), rows[0])
            if found[1]["tokens"] > KEPT_TOKENS:
                return found
            self._kept[key] = found
        return self._kept[key]

    def training_tokens(self, tokenizer, vocabulary: int, example_file: Path):
        """The training rows as tokens below `vocabulary`; their counts are said, and one row is shown in `example_file`."""
        task = self.loaded_task
        encoded, counts, first = self.encoded_rows(tokenizer, vocabulary)
        process_group.say(
            f"{task.name}: {counts['rows']:,} training rows, {counts['tokens']:,} tokens, longest "
            f"{counts['longest_tokens']}; {counts['truncated']:,} prompts cut to {self.max_length} tokens"
        )
        if process_group.is_main():
            write_whole(example_file, show_example(task, first, tokenizer, self.max_length) + "\n")
        return encoded

    def training_prompts(self, tokenizer, tokens: int) -> list[list[int]]:
        """Training prompts drawn by the seed, as token lists that hold `tokens` tokens together: to calibrate on."""
        rows = self.train_rows()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        chosen = rows.select(order[: tokens // 8].tolist())
        prompts, _ = encode_prompts(self.loaded_task, chosen, tokenizer, self.max_length)
        ends = np.cumsum([len(ids) for ids in prompts])
        return prompts[: int((ends < tokens).sum()) + 1]

    def validation_prompts(self, tokenizer, rows: int) -> list[list[int]]:
        """The prompts of the first validation rows, as token lists."""
        task = self.loaded_task
        found = load_rows(task, "validation", self.validation_file, self.max_validation_rows, self.seed)
        prompts, _ = encode_prompts(task, found.select(range(min(rows, len(found)))), tokenizer, self.max_length)
        return prompts

    def write_task_corpus(self, file: Path, rows_are: Any) -> None:
        """Writes the training rows as a corpus, a document each (`row_documents`), unless the file has these rows already.

        Every rank calls it and reads the rows, so that all of them meet the same error; rank 0 writes.

        Args:
            file: a .jsonl; beside it stands a .json that says of what it was made. rows_are: an identity of the training file.

        Raises:
            UserError: rows that cannot be read.
        """
        marker, task = file.with_suffix(".json"), self.loaded_task
        made_of = json.dumps([task.to_json(), self.train_file, rows_are, self.max_train_rows, self.seed])
        if not is_made(file, marker, made_of):
            rows = self.train_rows()
            process_group.barrier()  # all have looked before anyone writes
            if process_group.is_main():
                make_once(file, marker, made_of, lambda: _write_documents(file, row_documents(task, rows)))
        process_group.barrier()

    def corpus_stream(self, tokenizer, block_size: int) -> TokenStream:
        """The corpus as an endless stream of blocks.

        Raises:
            UserError: the run names no corpus, or it cannot be read.
        """
        if self.corpus is None:
            do = "Give --corpus, or --refine.gain one."
            raise UserError("corpus", expected="text for this stage", got="none", do=do)
        stream = TokenStream(self.corpus, tokenizer, block_size, text_column=self.corpus_column, seed=self.seed)
        if stream.left_out:
            named = ", ".join(stream.left_out[:3]) + (", ..." if len(stream.left_out) > 3 else "")
            process_group.say(f"corpus: {len(stream.left_out)} files left out, hidden or of another kind: {named}")
        return stream

    def corpus_blocks(
        self, tokenizer, block_size: int, blocks: int, *, folder: Path, content: Any, document_mask: bool
    ) -> ShardedStream:
        """The same blocks from tokens on disk, made by all ranks together where they are not there yet. Every rank calls it.

        Args:
            tokenizer, block_size: as for `corpus_stream`.
            blocks: how many will be read. folder: for the tokens of all corpora and tokenizers of a run.
            content: what tells the corpus from others. document_mask: as in ShardedStream.
        """
        stream = self.corpus_stream(tokenizer, block_size)
        made_of = [stream.settings["corpus"], content, self.corpus_column, tokenizer.backend_tokenizer.to_str()]
        key = hashlib.sha256(json.dumps([*made_of, tokenizer.eos_token_id]).encode()).hexdigest()[:16]
        tokens = blocks_to_make(blocks, stream.settings["window"]) * block_size
        write_tokens(folder / key, stream, tokens)
        return ShardedStream(TokenShards(folder / key), stream, document_mask)

    def check_corpus(self) -> str | None:
        """Reads the corpus without making tokens of it: `corpus.check_corpus`. Rank 0 alone, for every rank sees the same."""
        if self.corpus is None or not process_group.is_main():
            return None
        return check_corpus(self.corpus, self.corpus_column)

    def training_texts(self, tokenizer, blocks: int, block_size: int) -> "TrainingTexts":
        """All that stages 2 and 3 will train on, as texts: the first blocks of the corpus and the training rows.

        Args:
            tokenizer: of the base model. blocks: of the corpus, 0 for none. block_size: tokens of a block.
        """
        return TrainingTexts(self, tokenizer, blocks, block_size)

    def first_blocks(self, tokenizer, block_size: int, count: int) -> Iterator[dict[str, Tensor]]:
        """The first blocks of the corpus, one at a time, as batches of one: to calibrate on."""
        blocks = iter(self.corpus_stream(tokenizer, block_size))
        ids = (next(blocks)["input_ids"].unsqueeze(0) for _ in range(count))
        return ({"input_ids": block, "attention_mask": torch.ones_like(block)} for block in ids)


def _write_documents(file: Path, texts: Iterable[str]) -> None:
    """A corpus of one document a line."""
    with whole_file(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)


@dataclass(frozen=True)
class TrainingTexts:
    """Texts that can be walked through several times without being held: see `Sources.training_texts`."""

    sources: Sources
    tokenizer: Any
    blocks: int
    block_size: int

    def __iter__(self) -> Iterator[str]:
        if self.blocks:
            stream = iter(self.sources.corpus_stream(self.tokenizer, self.block_size))
            for _ in range(self.blocks):
                yield self.tokenizer.decode(next(stream)["input_ids"])
        rows, _ = encode(self.sources.loaded_task, self.sources.train_rows(), self.tokenizer, self.sources.max_length)
        for row in rows:
            yield self.tokenizer.decode(row["input_ids"])
