"""Loads full-precision language models and tokenizers from a local folder or the hub. Its errors say what to do."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitdistill.errors import UserError
from bitdistill.files import apply_umask
from bitdistill.names import FROM_DISK
from bitdistill.student.model_folder import SMALL_FILES, local_folder, open_model
from bitdistill.student.model_weights import read_json
from bitdistill.text_tokens import tokenizer_errors, tokenizer_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def load_language_model(name_or_path: str | Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """A causal language model with sdpa attention, every tensor of it from the file; the LM head as the file has it.

    Args:
        name_or_path: a local Hugging Face folder or a hub id.
        dtype: of every parameter; "auto": as they are stored.

    Raises:
        UserError: what `model_folder.read_model` refuses, and weights that are not finite.
    """
    from transformers import AutoModelForCausalLM

    found = open_model(name_or_path)
    model, info = AutoModelForCausalLM.from_pretrained(
        found.path,
        config=found.config,
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
        **FROM_DISK,
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    assert not wrong, f"the headers promised every tensor, and transformers found {wrong}"
    check_finite(model, str(found.path))
    return model


@torch.no_grad()
def check_finite(model: nn.Module, where: str) -> None:
    """Raises UserError that names the first tensor with a NaN or an infinity, and how many there are in it."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float64)):  # one pass, and no copy of the tensor
            bad = parameter.numel() - int(torch.isfinite(parameter).sum())
            got = f"{where}, where {bad} of {parameter.numel()} numbers of {name} are NaN or infinite in {parameter.dtype}"
            do = "Take another copy of the model, or another dtype where these numbers overflow."
            raise UserError("model", expected="finite weights", got=got, do=do)


def load_tokenizer(name_or_path: str | Path):
    """The tokenizer of a model folder or hub id, every token of which the model beside it has a row for.

    A missing pad token becomes the end-of-text token: padding is masked. Added tokens beyond the embedding (Gemma3's
    <image_soft_token>, a [PAD] that nobody resized the embedding for) are taken out, so that no text can become them;
    `tokens_beyond` says which there were.

    Raises:
        UserError: it cannot be read, it has no end-of-text token, or words of its own that the embedding has no row for.
    """
    path, tokenizer = _read_tokenizer(name_or_path)
    rows = _embedding_rows(path)
    if rows is not None:
        tokenizer = _within(tokenizer, rows, str(name_or_path))
    if tokenizer.eos_token_id is None:
        raise UserError(
            "tokenizer",
            expected="an eos_token, which ends answers and separates documents",
            got=f"{name_or_path} without one",
            do="Set eos_token in tokenizer_config.json.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_token_ids(model: PreTrainedModel, *more: int | None) -> list[int]:
    """Every token that ends an answer of a model: those of its generation_config, of its config, and further ones.

    The three places disagree in many published models; whoever trained one to stop used any of them.

    Args:
        model: a causal language model.
        more: the tokenizer's eos_token_id, in which the answers of this project's tasks end.

    Returns: different ids, in this order, that the model's embedding has a row for.
    """
    found: list[int] = []
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        found += [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    found += [index for index in more if index is not None]
    return [index for index in dict.fromkeys(found) if 0 <= index < embedding_rows(model)]


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens a model has: ids from here on are the tokenizer's alone."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]  # the first where ZeRO 3 has divided it


def tokens_beyond(name_or_path: str | Path) -> list[str]:
    """The added tokens of a folder's tokenizer that its model has no row for, which `load_tokenizer` takes out."""
    path, tokenizer = _read_tokenizer(name_or_path)
    rows = _embedding_rows(path)
    ids = tokenizer.get_vocab()
    return sorted(token for token, number in ids.items() if rows is not None and number >= rows)


def _read_tokenizer(name_or_path: str | Path):
    """(local folder, tokenizer as its files say), or a UserError."""
    from transformers import AutoTokenizer

    path = local_folder(name_or_path, "tokenizer", SMALL_FILES)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        # transformers would build an empty tokenizer from the model type alone, without a word
        got, do = f"{path} with none", "Copy it there."
        raise UserError("tokenizer", expected=f"one of {', '.join(TOKENIZER_FILES)}", got=got, do=do)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (path / name).is_file():
            read_json(path / name, "tokenizer")
    if (path / "tokenizer.json").is_file():
        tokenizer_of((path / "tokenizer.json").read_text(encoding="utf-8"), str(path / "tokenizer.json"))
    with tokenizer_errors(str(path)):
        try:
            return path, AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, IndexError) as error:
            got = f"{path} ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
            do = "Copy its files again from the model's repository."
            raise UserError("tokenizer", expected="a tokenizer that can be read", got=got, do=do) from error


def _embedding_rows(path: Path) -> int | None:
    """vocab_size of the config.json beside a tokenizer."""
    rows = read_json(path / "config.json", "model").get("vocab_size") if (path / "config.json").is_file() else None
    return rows if type(rows) is int else None


def _within(tokenizer, rows: int, where: str):
    """The tokenizer without its added tokens from `rows` on."""
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return tokenizer
    added = tokenizer.get_added_vocab()
    needed = {getattr(tokenizer, name) for name in ("bos_token", "eos_token")} & beyond.keys()
    words = sorted(beyond.keys() - added.keys()) or sorted(needed)
    if words or not tokenizer.is_fast:
        first = words[0] if words else min(beyond)
        raise UserError(
            "tokenizer",
            expected=f"tokens for the {rows} rows of the embedding (vocab_size)",
            got=f"{where} with {len(beyond)} beyond, such as {first!r} = {beyond[first]}",
            do="Take the tokenizer that belongs to the model, or enlarge the embedding: model.resize_token_embeddings.",
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["id"] < rows]
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    kept = {name: token for name, token in named.items() if token is not None and token not in beyond}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(json.dumps(content), where),
        chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
        **kept,
    )


def check_same_tokenizer(teacher: str | Path, student: str | Path) -> None:
    """Raises UserError, with an example, when two models read a text as different tokens.

    Args:
        teacher, student: model folders or hub ids. The tokens, their ids, and how they are split, merged and framed must be
            equal; padding, truncation and the chat template are no part of it.
    """
    one, other = (_read_tokenizer(folder)[1] for folder in (teacher, student))
    ours, theirs = other.get_vocab(), one.get_vocab()
    do = "Logits are compared token by token: take a teacher with the student's tokenizer, of the same family."
    differing = sorted((t for t in ours.keys() & theirs.keys() if ours[t] != theirs[t]), key=ours.__getitem__)
    alone = sorted(ours.keys() ^ theirs.keys())
    if differing or alone:
        token = differing[0] if differing else alone[0]
        example = f"{token!r} is {theirs.get(token, 'no token')} there and {ours.get(token, 'no token')} here"
        got = f"{teacher}, where {len(differing) + len(alone)} tokens differ: {example}"
        raise UserError("teacher.model", expected="the student's tokenizer", got=got, do=do)
    texts = ("Hello, world! It's 1234.5", "  two  spaces\n\ttab", "naïve Ünïcödé 你好 🙂", "def f(x):\n    return x")
    for text in texts:
        here, there = other(text)["input_ids"], one(text)["input_ids"]
        if here != there:
            got = f"{teacher}, which reads {text!r} as {there[:8]}, not {here[:8]}"
            raise UserError("teacher.model", expected="the student's tokenizer", got=got, do=do)


def check_same_vocabulary(teacher_config, student_config) -> None:
    """Raises UserError when logits of teacher and student cannot be compared word by word."""
    if teacher_config.vocab_size != student_config.vocab_size:
        raise UserError(
            "teacher",
            expected=f"the student's vocabulary of {student_config.vocab_size} words",
            got=f"{teacher_config.vocab_size} words",
            do="Logits distillation needs one tokenizer: take a teacher of the same family.",
        )


def packed_tokenizer(packed):
    """The tokenizer inside a packed file (runtime.packed_file.PackedModel), as a transformers tokenizer.

    Raises:
        UserError: the file has none.
    """
    text = packed.tokenizer_json()
    if text is None:
        raise UserError(
            "RUN_OR_FILE", expected="a packed file with a tokenizer", got=str(packed.path), do="Export it again."
        )
    special = {name: value for name, value in packed.metadata.get("tokenizer", {}).items() if value is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(text, str(packed.path)), **special)


def tokenizer_settings(tokenizer) -> dict[str, str | None]:
    """What `packed_tokenizer` needs besides tokenizer.json: special tokens and the chat template."""
    names = ("bos_token", "eos_token", "pad_token", "chat_template")
    return {name: getattr(tokenizer, name) for name in names}


def tied_keys(model: nn.Module) -> set[str]:
    """State-dict keys that only repeat the input embedding (a tied LM head), never stored."""
    return {"lm_head.weight"} if model.config.tie_word_embeddings else set()


def save_language_model(
    folder: str | Path, model: nn.Module, state_dict: dict[str, Tensor], *, tokenizer, dtype: torch.dtype
) -> None:
    """Writes a full-precision model and its tokenizer as a Hugging Face folder.

    Args:
        folder: for an atomic result give a temporary folder and rename it.
        model: for its configuration; it is left in `dtype`. state_dict: its full tensors.
        tokenizer: a Hugging Face tokenizer. dtype: of the stored tensors.
    """
    kept = state_dict.keys() - tied_keys(model)  # each in a dtype of its own, ties would be stored twice
    model.to(dtype).save_pretrained(folder, state_dict={key: state_dict[key].to(dtype) for key in sorted(kept)})
    tokenizer.save_pretrained(folder)
    apply_umask(*Path(folder).glob("*.safetensors"))
