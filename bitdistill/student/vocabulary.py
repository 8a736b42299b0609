"""A smaller vocabulary for a student and its teacher: the tokens that the given texts use, and those that their merges
need (trimmed_tokenizer.py).

The embedding of a small model is a large part of it: a fifth of SmolLM2-135M, a quarter of Qwen3-0.6B. Most of its rows are
never read by one task. Kept rows keep their bits, so the logits of kept tokens are those of the full model.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bitdistill.errors import UserError
from bitdistill.files import apply_umask
from bitdistill.text_tokens import tokenizer_of
from bitdistill.trimmed_tokenizer import batches_of, count_tokens, kept_tokens, trim_tokenizer


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
    for batch in batches_of(texts):
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
