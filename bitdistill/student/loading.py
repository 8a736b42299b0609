"""Loading full-precision language models and tokenizers, from a local folder or the hub, with errors a user can act on."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistill.errors import UserError

# The text decoders whose blocks share the seven projection names, checked by tests/test_refine.py.
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def check_family(config) -> None:
    """Raises UserError when the model type is not one that stage 1 knows how to convert."""
    if config.model_type not in FAMILIES:
        hint = "Take the text model of the family (for Gemma3: a gemma3_text checkpoint)."
        raise UserError(
            "model", expected=f"a model_type among {', '.join(FAMILIES)}", got=repr(config.model_type), do=hint
        )


def _from_hub(what: str, name: str, load):
    """Runs ``load()`` and turns what the Hugging Face libraries raise for an absent model into a UserError."""
    if "/" in str(name) and str(name).startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise UserError(what, expected="an existing folder or a hub id", got=f"{name} (no such folder)", do="Check it.")
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            what,
            expected="a local folder with config.json, model.safetensors and a tokenizer, or a reachable hub id",
            got=f"{name} ({first_line})",
            do="Without a network give a local folder: --model /path/to/folder.",
        ) from error


def load_language_model(name_or_path: str | Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """A causal language model with sdpa attention, of one of FAMILIES.

    Args:
        name_or_path: a local Hugging Face folder or a hub id.
        dtype: of every parameter; "auto": as they are stored.

    Raises:
        UserError: the folder or hub id cannot be read, the family is unknown, or the folder holds a ternary student.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _from_hub("model", name_or_path, lambda: AutoConfig.from_pretrained(name_or_path))
    check_family(config)
    if getattr(config, "bitdistill", None):
        raise UserError(
            "model",
            expected="a full-precision model",
            got=f"{name_or_path}, a ternary student of this project",
            do="Give the base model, or --student to start stage 3 from this student.",
        )
    return _from_hub(
        "model",
        name_or_path,
        lambda: AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, attn_implementation="sdpa"),
    )


def load_tokenizer(name_or_path: str | Path):
    """The tokenizer of a model folder or hub id; a missing pad token becomes the end-of-text token.

    Raises:
        UserError: it cannot be read, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    folder = Path(name_or_path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # transformers would build an empty tokenizer from the model type alone, without a word
        raise UserError(
            "tokenizer", expected=f"one of {', '.join(TOKENIZER_FILES)}", got=f"{folder} with none", do="Copy it there."
        )
    tokenizer = _from_hub("tokenizer", name_or_path, lambda: AutoTokenizer.from_pretrained(name_or_path))
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
    return model.get_input_embeddings().weight.shape[0]


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
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = packed.tokenizer_json()
    if text is None:
        raise UserError("file", expected="a packed file with a tokenizer", got=str(packed.path), do="Export it again.")
    special = {name: value for name, value in packed.metadata.get("tokenizer", {}).items() if value is not None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **special)


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
