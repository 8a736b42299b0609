"""`bitdistill trim`: a packed file made smaller for its task, after training: the words of the given rows stay."""

import itertools
from typing import Any

import numpy as np

from bitdistill.commands.options import Parser, require_at_least
from bitdistill.commands.row_files import readable, task_rows
from bitdistill.errors import UserError
from bitdistill.text_files import user_path

ROWS_TOGETHER = 1000  # read and encoded at a time
PROVED = 8  # prompts on which both files must give the same logits


def trim(
    run_or_file: str,
    input: list[str],
    output: str,
    threshold: int = 0,
    vocabulary: int = 0,
    threads: int | None = None,
) -> None:
    """Writes a packed file whose vocabulary has the tokens that its task needs, and proves it.

    Args:
        run_or_file: a run directory, or a packed file that knows its task.
        input: files with rows of the task, such as its training rows: .csv, .tsv, .jsonl, .json, .parquet or .txt. The tokens of
            their prompts stay, and those of the labels; of a task that writes text, those of the answers in the rows.
        output: the smaller file to write.
        threshold: tokens that the rows use more often than this stay. Rarer ones are cut into pieces.
        vocabulary: so many tokens stay at least. Where the rows use fewer, those follow that come first in the tokenizer: the
            most frequent ones of the texts that it was made from.
        threads: CPU threads of the proof; all by default.
    """
    require_at_least("threshold", threshold, 0)
    require_at_least("vocabulary", vocabulary, 0)
    require_at_least("threads", threads, 1)
    from bitdistill.runtime.loading import load
    from bitdistill.runtime.trimming import trim_packed

    target = user_path(output, "output")
    if target.exists() or not target.parent.is_dir():
        got = f"{output}, {'which is there' if target.exists() else 'whose folder is missing'}"
        raise UserError("output", expected="a new file in an existing folder", got=got, do="Name another file.")
    runtime = load(run_or_file, threads)
    counts, prompts, rows = _uses(runtime, input)
    kept = trim_packed(runtime.model, counts, target, threshold, vocabulary)
    try:
        smaller = load(target, threads)
        proved = _prove(runtime, smaller, kept, prompts)
    except BaseException:
        target.unlink()
        raise
    before, after = runtime.model, smaller.model
    print(f"{target}: {after.file_bytes:,} bytes; {before.path} has {before.file_bytes:,}")
    print(
        f"{len(kept):,} of {before.config.vocab_size:,} tokens stay: those of {rows:,} rows, the special ones, single bytes, "
        f"those that merges need{', and the most frequent others' if vocabulary else ''}"
    )
    print(f"proved: the logits of these tokens are equal bit for bit on {proved:,} tokens of {len(prompts)} prompts")
    print(f"Texts with other words are cut into smaller pieces. See what that costs: bitdistill eval {target}")


def _uses(runtime, files: list[str]) -> tuple[np.ndarray, list[list[int]], int]:
    """How often the rows use each token, prompts for the proof, and the number of rows."""
    from bitdistill.prompts import answer_tokens, label_tokens
    from bitdistill.runtime.predict import needed_task, task_prompts

    task, tokenizer = needed_task(runtime), runtime.packed_tokenizer
    counts, prompts, number = np.zeros(runtime.model.config.vocab_size, np.int64), [], 0
    answers = [] if task.target_column is None else [task.target_column]
    for given in files:
        with readable(given, None) as path:
            rows = task_rows(path, f"input {given}", task, answers)
            while chunk := list(itertools.islice(rows, ROWS_TOGETHER)):
                texts, places, columns, _ = zip(*chunk, strict=True)
                encoded, _ = task_prompts(runtime, texts, places, None)
                prompts += encoded[: max(PROVED - len(prompts), 0)]
                number += len(encoded)
                for column in answers:
                    encoded += answer_tokens(task, tokenizer, [str(values[column]) for values in columns])
                counts += np.bincount(list(itertools.chain(*encoded)), minlength=len(counts))
    if not number:
        raise UserError("input", expected="at least one row", got="none", do="Give a file with rows of the task.")
    if task.kind == "classification":
        for ids in label_tokens(task, tokenizer):
            counts[ids] = np.iinfo(np.int64).max
    return counts, prompts, number


def _prove(larger, smaller, kept: np.ndarray, prompts: list[list[int]]) -> int:
    """Compares the logits of both files on prompts whose tokens are all kept; the number of tokens that were compared."""
    tokens = 0
    for ids in prompts:
        places = np.searchsorted(kept, ids).clip(max=len(kept) - 1)
        if not np.array_equal(kept[places], ids):  # a rare token that the threshold has left out
            continue
        want, got = larger.logits(ids)[:, kept], smaller.logits(places.tolist())
        if not np.array_equal(want, got):
            wrong = int((want != got).sum())
            raise RuntimeError(
                f"{wrong:,} of {want.size:,} logits of the trimmed file differ: a defect, please report it"
            )
        tokens += len(ids)
    return tokens


def trim_options(arguments: list[str]) -> dict[str, Any]:
    """The options of `trim`. Args: arguments: of the command line, after the command."""
    parser = Parser(
        prog="bitdistill trim",
        description="Makes a packed file smaller for its task: the vocabulary keeps the tokens that the given rows use.",
    )
    parser.add_argument("run_or_file", help="a run directory, or a packed file")
    parser.add_argument(
        "--input", nargs="+", required=True, help="files with rows of the task, such as its training rows"
    )
    parser.add_argument("--output", required=True, help="the smaller file")
    parser.add_argument("--threshold", type=int, default=0, help="tokens used more often than this stay (default: 0)")
    parser.add_argument(
        "--vocabulary", type=int, default=0, help="keep at least so many tokens, the most frequent ones next"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of the proof (default: all cores)")
    return vars(parser.parse_args(arguments))
