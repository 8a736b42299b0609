"""Scores by EleutherAI's lm-evaluation-harness (lm_eval): an independent measurement of a student, its teacher or a
baseline.

A task of ours is scored twice on the same rows. First with our prompt, in the tokens of training, as the harness scores it;
this must agree with score.py row by row where no prompt was cut. Then with the harness's own prompt, if it has a task of
that name; this says how well a student that was tuned on one wording handles another. Any other name is a task of the
harness, with its own data from the hub.

A packed file is scored through `PackedLM`, a torch model through the harness's HFLM. Both leave out an EOS that a tokenizer
appends to its texts, because a prompt does not end where its answer begins. Needs the extra `bitdistill[eval]`.
"""

import copy
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests
import yaml
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers.processors import TemplateProcessing
from tqdm.auto import tqdm

from bitdistill.data.tasks import encode_prompts, label_indices
from bitdistill.errors import UserError
from bitdistill.prompts import Task, label_tokens, prompt_texts, text_tokens
from bitdistill.runtime.cpu import Cache, Runtime
from bitdistill.runtime.sampling import log_softmax

ROWS_AT_A_TIME = 64  # logits of so many positions are looked at together


class _OurTask(ConfigurableTask):
    """A task of ours: `pairs` are the tokens of (prompt, answer) for its texts."""

    pairs: dict[tuple[str, str], tuple[list[int], list[int]]]


class _KnownPairs:
    """Takes the tokens of our own prompts and answers from a list, where a model of the harness would make them."""

    pairs: dict[tuple[str, str], tuple[list[int], list[int]]]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        known = self.pairs.get((context, continuation))
        return known or super()._encode_pair(context, continuation)  # type: ignore[misc]


class _TorchLM(_KnownPairs, HFLM):
    """The harness's own model, with our tokens for our prompts."""


class PackedLM(_KnownPairs, TemplateLM):
    """A packed student as the harness wants a model: log-likelihoods and greedy text, by the CPU runtime.

    Args:
        runtime: on a packed file.
        tokenizer: `student.loading.packed_tokenizer` of it.
        pairs: tokens of prompts and answers that are known: {(prompt, answer): (its ids, its ids)}.
    """

    def __init__(self, runtime: Runtime, tokenizer, pairs: dict | None = None):
        super().__init__()
        self.runtime, self.tokenizer, self.pairs = runtime, tokenizer, pairs or {}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        tokens = text_tokens(self.tokenizer)
        if add_special_tokens is None and self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token):
            return tokens.encode_prompt(string, special_tokens=True)
        return tokens.encode([string])[0] if add_special_tokens is False else tokens.encode_prompt(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """(sum of log p, whether greedy decoding would say it). Contexts are fed once for all their continuations."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        fed, cache, after = None, None, None
        for index in tqdm(order, desc="packed", disable=disable_tqdm):
            _, context, continuation = requests[index]
            context = context[
                -max(1, self.runtime.context + 1 - len(continuation)) :
            ]  # the left end is lost, as in HFLM
            if context != fed:
                cache = self.runtime.new_cache(self.runtime.context)
                fed, after = context, self.runtime.logits(context, last_only=True, cache=cache)
            cache.length = len(context)  # what an earlier continuation left there is overwritten
            results[index] = self._of_continuation(after, continuation, cache)
        return results

    def _of_continuation(self, after: np.ndarray, continuation: list[int], cache: Cache) -> tuple[float, bool]:
        total, greedy = 0.0, True
        for begin in range(0, len(continuation), ROWS_AT_A_TIME):
            words = continuation[begin : begin + ROWS_AT_A_TIME]
            rows = [after[-1:]]
            if len(words) > 1:
                rows.append(self.runtime.logits(words[:-1], cache=cache))
            logits = np.concatenate(rows)
            total += float(log_softmax(logits)[np.arange(len(words)), words].sum())
            greedy &= bool((logits.argmax(axis=-1) == words).all())
            if begin + len(words) < len(continuation):
                after = self.runtime.logits(words[-1:], cache=cache)
        return total, greedy

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of the context."""
        totals = []
        for (text,) in tqdm([request.args for request in requests], desc="packed", disable=disable_tqdm):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.runtime.context, context_len=1
            )
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to a stop string; sampling is refused."""
        texts = []
        for context, settings in tqdm([request.args for request in requests], desc="packed", disable=disable_tqdm):
            if settings.get("do_sample") or settings.get("temperature"):
                got = f"temperature {settings.get('temperature')}"
                raise UserError("lm_eval", expected="greedy generation", got=got, do="Choose another task.")
            count, stop = settings.get("max_gen_toks", 256), settings.get("until", ())
            ids = self.tok_encode(context)[-max(1, self.runtime.context - count) :]
            texts.append("".join(self.runtime.generate(ids, count, stop=stop)))
        return texts


def harness_model(model, tokenizer, batch_size: int = 32, pairs: dict | None = None):
    """A Runtime as a PackedLM, a torch model as the harness's HFLM, on the device where it is.

    Args:
        model: a Runtime or a torch model. tokenizer: of the model.
        batch_size: of a torch model.
        pairs: as of `PackedLM`.
    """
    if isinstance(model, Runtime):
        return PackedLM(model, tokenizer, pairs)
    device = next(model.parameters()).device
    result = _TorchLM(pretrained=model, tokenizer=_ending_nothing(tokenizer), batch_size=batch_size, device=str(device))
    result.pairs = pairs or {}
    return result


def _ending_nothing(tokenizer):
    """The tokenizer, or a copy that appends nothing to its texts."""
    tokens = text_tokens(tokenizer)
    if not tokens.suffix:
        return tokenizer
    names = tokenizer.convert_ids_to_tokens(tokens.prefix)
    result = copy.deepcopy(tokenizer)
    result.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(zip(names, tokens.prefix, strict=True))
    )
    return result


def harness_task(task: Task, rows: Dataset, tokenizer) -> ConfigurableTask:
    """A task of ours as one of the harness: our prompt, our label words, these rows; the metric is its `acc`.

    Raises:
        UserError: a generation task.
    """
    if task.kind != "classification":
        do = "Score generation with `bitdistill eval --task`."
        raise UserError("lm_eval", expected="a classification task", got=task.name, do=do)
    gold = label_indices(task, rows)
    rows = rows.select_columns(task.columns).add_column("_gold", gold)
    chat = task.chat and bool(tokenizer.chat_template)
    texts, answers = prompt_texts(task, list(rows), tokenizer), [("" if chat else " ") + word for word in task.words]
    ids, words = encode_prompts(task, rows, tokenizer, sys.maxsize)[0], label_tokens(task, tokenizer)
    result = _OurTask(
        config={
            "task": f"{task.name} (our prompt)",
            "custom_dataset": lambda **_: {"validation": rows},
            "validation_split": "validation",
            "output_type": "multiple_choice",
            "doc_to_text": lambda row: prompt_texts(task, [row], tokenizer)[0],
            "doc_to_choice": lambda _: task.words,
            "doc_to_target": lambda row: row["_gold"],
            "target_delimiter": "" if chat else " ",
            "metric_list": [{"metric": "acc"}],
        }
    )
    result.pairs = {
        (text, answer): (prompt, word)
        for text, prompt in zip(texts, ids, strict=True)
        for answer, word in zip(answers, words, strict=True)
    }
    return result


def stock_task(name: str, rows: Dataset | None = None):
    """A task of the harness, on its own data or on these rows; None where it has none of that name.

    Raises:
        UserError: its data cannot be had, for want of a network.
    """
    manager = _stock_tasks()
    if name not in manager.all_tasks:
        return None
    try:
        if rows is None:
            return list(manager.load([name])["tasks"].values())
        with (
            tempfile.TemporaryDirectory() as folder
        ):  # the harness takes local rows by a YAML file that changes its own
            rows.to_json(f"{folder}/rows.jsonl")
            changed = {"include": str(manager.task_index[name].yaml_path), "task": name, "dataset_path": "json"}
            changed |= {"dataset_name": None, "dataset_kwargs": {"data_files": {"validation": f"{folder}/rows.jsonl"}}}
            changed |= {"validation_split": "validation", "training_split": None, "test_split": None}
            Path(folder, "task.yaml").write_text(yaml.safe_dump(changed | {"fewshot_split": None}), encoding="utf-8")
            return list(manager.load([f"{folder}/task.yaml"])["tasks"].values())
    except (ConnectionError, FileNotFoundError, DatasetNotFoundError, requests.ConnectionError) as error:
        raise UserError(
            "lm_eval",
            expected=f"the data of {name} from the hub",
            got=str(error).strip().splitlines()[0],
            do="Connect to the network; for sst2, mnli, qnli or a YAML file of yours give local rows: --validation_file FILE.",
        ) from error


@functools.cache
def _stock_tasks() -> TaskManager:
    """The index of the harness's tasks: seconds to make, of some ten thousand files."""
    return TaskManager()


def run_harness(model, tokenizer, tasks: Sequence[Any], limit: int | None = None) -> list[dict[str, Any]]:
    """Asks the harness.

    Args:
        model: a Runtime or a torch model. tasks: from `harness_task` and `stock_task`.
        limit: so many rows of each task.
        tokenizer: the model's, a Hugging Face tokenizer.

    Returns: a dict for each task and metric: {"task", "metric", "value", "stderr" (or None), "rows"}.
    """
    # The standard error of a mean, such as acc, is a formula; other metrics are resampled.
    pairs = {text: ids for task in tasks for text, ids in getattr(task, "pairs", {}).items()}
    output = simple_evaluate(
        harness_model(model, tokenizer, pairs=pairs),
        tasks=list(tasks),
        limit=limit,
        bootstrap_iters=100,
        task_manager=TaskManager(include_defaults=False),
    )
    lines = []
    for name, found in output["results"].items():
        rows = output["n-samples"].get(name, {}).get("effective")
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = found.get(f"{metric}_stderr,{filtered}")
            stderr = float(stderr) if isinstance(stderr, int | float) else None
            lines.append({"task": name, "metric": metric, "value": float(value), "stderr": stderr, "rows": rows})
    return lines
