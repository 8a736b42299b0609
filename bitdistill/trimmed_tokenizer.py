"""A tokenizer with fewer tokens: those that the given texts use, and those that their merges need. Needs no torch.

Kept are

    special and added tokens            chat templates and end tokens stay what they are
    the byte alphabet                   so that every text can still be encoded, in more and smaller pieces
    tokens counted more than a threshold
    their ancestors                     the two parts of every merge that makes a kept token, down to single characters

A text whose tokens are all kept is encoded as before. Byte-pair encoding applies the merge of lowest rank first. Every merge of
the full encoding makes a part of one of its final tokens and is therefore kept, so the lowest of all merges is also the lowest of
the kept ones, step by step.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from bitdistill.errors import UserError

TEXTS_AT_A_TIME = 1000


def count_tokens(tokenizer, texts: Iterable[str]) -> tuple[np.ndarray, int]:
    """How often each token occurs in texts, encoded without special tokens.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        texts: the corpus and the task's rows.

    Returns: (int64 counts by token id, number of texts).
    """
    counts, number = np.zeros(tokenizer.get_vocab_size(), np.int64), 0
    for batch in batches_of(texts):
        number += len(batch)
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            counts += np.bincount(encoding.ids, minlength=len(counts))
    return counts, number


def kept_tokens(
    description: dict[str, Any],
    counts: np.ndarray,
    threshold: int = 0,
    field: str = "refine.vocabulary",
    do: str = "Set --refine.vocabulary full.",
) -> np.ndarray:
    """The ids that a trimmed vocabulary keeps.

    Args:
        description: the JSON of a tokenizer.json whose model is BPE.
        counts: int64 (V,) uses of each token.
        threshold: tokens used more often than this are kept.
        field, do: of the error: what was asked for, and what to do instead.

    Returns: int64, ascending.

    Raises:
        UserError: the tokenizer is not byte-pair encoding, or has no byte alphabet to fall back on.
    """
    model = description["model"]
    if model["type"] != "BPE":
        raise UserError(
            field,
            expected="a byte-pair encoding (BPE) tokenizer, whose tokens follow from merges",
            got=f"a {model['type']} tokenizer",
            do=do,
        )
    vocabulary: dict[str, int] = model["vocab"]
    alphabet = _byte_alphabet(description, field, do)
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


def batches_of(texts: Iterable[str]) -> Iterable[list[str]]:
    """TEXTS_AT_A_TIME texts at a time."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == TEXTS_AT_A_TIME:
            yield batch
            batch = []
    if batch:
        yield batch


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; older files write a pair as one string with a space between."""
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]


def _byte_alphabet(description: dict[str, Any], field: str, do: str) -> set[str]:
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
        field,
        expected="a byte-level tokenizer or one with byte fallback, so that every text can still be encoded",
        got="a tokenizer with neither",
        do=do,
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
