"""A smaller vocabulary for a student and its teacher: the tokens that the given texts use, and those that their merges
need.

The embedding of a small model is a large part of it: a fifth of SmolLM2-135M, a quarter of Qwen3-0.6B. Most of its
rows are never read by one task. Trimming keeps

    special and added tokens            chat templates and end tokens stay what they are
    the byte alphabet                   so that every text can still be encoded, in more and smaller pieces
    tokens counted more than a threshold in the corpus and the task's rows
    their ancestors                     the two parts of every merge that makes a kept token, down to single characters

and rewrites tokenizer, embedding and LM head accordingly. A text whose tokens are all kept is encoded as before. Byte-pair
encoding applies the merge of lowest rank first. Every merge of the full encoding makes a part of one of its final tokens
and is therefore kept, so the lowest of all merges is also the lowest of the kept ones, step by step. Kept rows keep their
bits, so the logits of kept tokens are those of the full model.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitdistill.errors import UserError
from bitdistill.files import apply_umask
from bitdistill.text_tokens import tokenizer_of

TEXTS_AT_A_TIME = 1000


@dataclass(frozen=True)
class Trimming:
    """What was kept, and what that costs on the texts that were counted."""

    kept: np.ndarray  # int64 (V',) ids in the full vocabulary, ascending; the new id of a token is its place here
    vocabulary_before: int
    vocabulary_after: int
    tokens_before: int  # of the counted texts
    tokens_after: int  # of the same texts, encoded by the trimmed tokenizer
    texts_changed: int  # texts that the trimmed tokenizer cuts into other tokens
    texts: int

    def __str__(self) -> str:
        return (
            f"{self.vocabulary_after:,} of {self.vocabulary_before:,} tokens kept; the {self.texts:,} training texts are "
            f"{self.tokens_after:,} tokens instead of {self.tokens_before:,}, {self.texts_changed:,} of them cut differently"
        )


def count_tokens(tokenizer, texts: Iterable[str]) -> tuple[np.ndarray, int]:
    """How often each token occurs in texts, encoded without special tokens.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        texts: the corpus and the task's rows.

    Returns: (int64 counts by token id, number of texts).
    """
    counts, number = np.zeros(tokenizer.get_vocab_size(), np.int64), 0
    for batch in _batches(texts):
        number += len(batch)
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            counts += np.bincount(encoding.ids, minlength=len(counts))
    return counts, number


def kept_tokens(description: dict[str, Any], counts: np.ndarray, threshold: int = 0) -> np.ndarray:
    """The ids that a trimmed vocabulary keeps.

    Args:
        description: the JSON of a tokenizer.json whose model is BPE.
        counts: int64 (V,) uses of each token.
        threshold: tokens used more often than this are kept.

    Returns: int64, ascending.

    Raises:
        UserError: the tokenizer is not byte-pair encoding, or has no byte alphabet to fall back on.
    """
    model = description["model"]
    if model["type"] != "BPE":
        raise UserError(
            "refine.vocabulary",
            expected="a byte-pair encoding (BPE) tokenizer, whose tokens follow from merges",
            got=f"a {model['type']} tokenizer",
            do="Set --refine.vocabulary full.",
        )
    vocabulary: dict[str, int] = model["vocab"]
    alphabet = _byte_alphabet(description)
    parents: dict[str, list[tuple[str, str]]] = {}
    for left, right in _merges(model):
        parents.setdefault(left + right, []).append((left, right))
    added = {token["content"] for token in description.get("added_tokens", ())}
    used = {token for token, index in vocabulary.items() if index < len(counts) and counts[index] > threshold}
    named = {token for token in (model.get("unk_token"),) if token is not None}
    wanted = list(used | alphabet | ((added | named) & vocabulary.keys()))
    kept: set[str] = set()
    while wanted:
        token = wanted.pop()
        if token not in kept:
            kept.add(token)
            wanted += [part for pair in parents.get(token, ()) for part in pair]
    ids = {vocabulary[token] for token in kept} | {token["id"] for token in description.get("added_tokens", ())}
    return np.array(sorted(ids), np.int64)


def trim_tokenizer(description: dict[str, Any], kept: np.ndarray) -> dict[str, Any]:
    """tokenizer.json with the kept tokens alone, renumbered in their old order.

    Args:
        description: the JSON of the full tokenizer.json.
        kept: ids of `kept_tokens`.

    Returns: a new description; ids in added tokens and the post-processor follow.
    """
    new_id = {int(old): new for new, old in enumerate(kept)}
    trimmed = json.loads(json.dumps(description))
    model = trimmed["model"]
    model["vocab"] = {token: new_id[index] for token, index in model["vocab"].items() if index in new_id}
    model["merges"] = [
        [left, right]
        for left, right in _merges(description["model"])
        if left in model["vocab"] and right in model["vocab"] and left + right in model["vocab"]
    ]
    for token in trimmed.get("added_tokens", ()):
        token["id"] = new_id[token["id"]]
    _renumber_post_processor(trimmed.get("post_processor"), new_id)
    return trimmed


def trim_model(model: nn.Module, kept: np.ndarray) -> None:
    """Keeps the rows `kept` of embedding and LM head, in place, and renumbers the token ids of the configs.

    Args:
        model: a causal language model; a tied head stays tied.
        kept: int64 (V',) ids, ascending.

    Raises:
        UserError: the embedding has fewer rows than the tokenizer has ids.
    """
    embedding = model.get_input_embeddings()
    if len(kept) and int(kept[-1]) >= embedding.weight.shape[0]:
        raise UserError(
            "model",
            expected=f"an embedding row for every token id up to {int(kept[-1])}",
            got=f"{embedding.weight.shape[0]} rows",
            do="Give the tokenizer that belongs to the model.",
        )
    head, rows = model.get_output_embeddings(), torch.from_numpy(kept)
    tied = head is not None and head.weight is embedding.weight
    new_id = {int(old): new for new, old in enumerate(kept)}
    embedding.weight = nn.Parameter(embedding.weight.detach()[rows].clone(), embedding.weight.requires_grad)
    embedding.num_embeddings = len(kept)
    if embedding.padding_idx is not None:
        embedding.padding_idx = new_id.get(embedding.padding_idx)
    if head is not None:
        weight = embedding.weight if tied else nn.Parameter(head.weight.detach()[rows].clone())
        head.weight, head.out_features = weight, len(kept)
        if getattr(head, "bias", None) is not None:
            head.bias = nn.Parameter(head.bias.detach()[rows].clone())
    model.config.vocab_size = len(kept)
    if hasattr(model, "vocab_size"):
        model.vocab_size = len(kept)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
            _renumber_setting(config, name, new_id)


def trim_folder(model: nn.Module, tokenizer, texts: Iterable[str], target: str | Path, threshold: int = 0) -> Trimming:
    """Trims a model and its tokenizer by the texts that they will meet, and saves both as a Hugging Face folder.

    Args:
        model: a full-precision causal language model; changed in place.
        tokenizer: its transformers tokenizer.
        texts: the corpus and the task's rows; walked through twice, so a list or an object with a fresh iterator.
        target: the folder to write; must exist.
        threshold: tokens used more often than this are kept.
    """
    full = tokenizer.backend_tokenizer
    description = json.loads(full.to_str())
    description.pop("truncation", None), description.pop("padding", None)
    counts, number = count_tokens(full, texts)
    kept = kept_tokens(description, counts, threshold)
    trimmed = trim_tokenizer(description, kept)
    small = tokenizer_of(json.dumps(trimmed), "the trimmed tokenizer")
    before = after = changed = 0
    for batch in _batches(texts):
        pairs = zip(
            full.encode_batch_fast(batch, add_special_tokens=False),
            small.encode_batch_fast(batch, add_special_tokens=False),
            strict=True,
        )
        for old, new in pairs:
            before, after = before + len(old.ids), after + len(new.ids)
            changed += not np.array_equal(kept[new.ids] if new.ids else [], old.ids)
    vocabulary_before = model.get_input_embeddings().weight.shape[0]
    trim_model(model, kept)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (Path(target) / "tokenizer.json").write_text(json.dumps(trimmed, ensure_ascii=False), encoding="utf-8")
    _renumber_tokenizer_config(Path(target) / "tokenizer_config.json", kept)
    np.save(Path(target) / "kept_tokens.npy", kept)
    apply_umask(*Path(target).glob("*.safetensors"))
    return Trimming(kept, vocabulary_before, len(kept), before, after, changed, number)


def trim_like(model: nn.Module, tokenizer, full_tokenizer_folder: str | Path, trimmed_folder: str | Path):
    """Trims another model with the same tokenizer, such as a larger teacher, as `trim_folder` trimmed the base model.

    Args:
        model: a causal language model; changed in place.
        tokenizer: its tokenizer, which must be that of the base model.
        full_tokenizer_folder: the base model's tokenizer before it was trimmed.
        trimmed_folder: what `trim_folder` wrote.

    Returns: the trimmed tokenizer.

    Raises:
        UserError: the two models have different tokenizers.
    """
    from bitdistill.student.loading import load_tokenizer

    if tokenizer.get_vocab() != load_tokenizer(full_tokenizer_folder).get_vocab():
        raise UserError(
            "teacher.model",
            expected="a teacher with the tokenizer of the base model",
            got="one with other tokens",
            do="Take a teacher of the same family.",
        )
    trim_model(model, np.load(Path(trimmed_folder) / "kept_tokens.npy"))
    return load_tokenizer(trimmed_folder)


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; older files write a pair as one string with a space between."""
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]


def _byte_alphabet(description: dict[str, Any]) -> set[str]:
    """The tokens into which any text can be cut: the characters of byte-level BPE, or <0x00> to <0xFF>.

    Some byte-level vocabularies lack bytes that do not occur in UTF-8; those which are there are kept.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = description["model"]["vocab"]
    fallback = {f"<0x{byte:02X}>" for byte in range(256)}
    if description["model"].get("byte_fallback") and fallback <= vocabulary.keys():
        return fallback
    if _has_byte_level(description.get("pre_tokenizer")):
        return set(ByteLevel.alphabet()) & vocabulary.keys()
    raise UserError(
        "refine.vocabulary",
        expected="a byte-level tokenizer or one with byte fallback, so that every text can still be encoded",
        got="a tokenizer with neither",
        do="Set --refine.vocabulary full.",
    )


def _has_byte_level(node: Any) -> bool:
    """Is there a ByteLevel step anywhere in a pre-tokenizer's description?"""
    if isinstance(node, dict):
        return node.get("type") == "ByteLevel" or any(_has_byte_level(value) for value in node.values())
    return isinstance(node, list) and any(_has_byte_level(value) for value in node)


def _renumber_post_processor(node: Any, new_id: dict[int, int]) -> None:
    """Rewrites, in place, the ids that a post-processor (TemplateProcessing, Bert, Roberta, a sequence) puts in."""
    if isinstance(node, list):
        for value in node:
            _renumber_post_processor(value, new_id)
    elif isinstance(node, dict):
        if isinstance(node.get("ids"), list):
            node["ids"] = [new_id[index] for index in node["ids"]]
        for name in ("sep", "cls"):
            if isinstance(node.get(name), list):
                node[name] = [node[name][0], new_id[node[name][1]]]
        for value in node.values():
            _renumber_post_processor(value, new_id)


def _renumber_setting(config, name: str, new_id: dict[int, int]) -> None:
    """A config's token id, or list of them, in the new numbering; an id that no token has is dropped."""
    value = getattr(config, name, None) if config is not None else None
    if isinstance(value, int):
        setattr(config, name, new_id.get(value))
    elif isinstance(value, list):
        setattr(config, name, [new_id[index] for index in value if index in new_id])


def _renumber_tokenizer_config(path: Path, kept: np.ndarray) -> None:
    """added_tokens_decoder of tokenizer_config.json is keyed by id."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in settings:
        new_id = {str(old): str(new) for new, old in enumerate(kept)}
        settings["added_tokens_decoder"] = {
            new_id[index]: token for index, token in settings["added_tokens_decoder"].items()
        }
        path.write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == TEXTS_AT_A_TIME:
            yield batch
            batch = []
    if batch:
        yield batch
