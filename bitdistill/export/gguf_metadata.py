"""A tokenizer.json as the metadata that llama.cpp tokenizes by.

llama.cpp does not read pre-tokenizer rules from the file: it knows them by name (`tokenizer.ggml.pre`). A file without the
right name loads, and cuts text at other places than the student was trained on. So a tokenizer whose rules are not
recognized is refused.
"""

import json
from typing import Any

from bitdistill.errors import UserError
from bitdistill.student.gguf_tokenizer import CONTROL, SPLITS, UNKNOWN, USER_DEFINED

NORMAL, UNUSED, BYTE = 1, 5, 6  # llama.cpp's token types, besides those that are imported

# The regular expression of a pre-tokenizer's Split step -> llama.cpp's name of it, the first of several.
NAMES = {pattern: name for name, pattern in reversed(SPLITS.items())}


def tokenizer_metadata(tokenizer, vocabulary: int) -> dict[str, Any]:
    """What a GGUF file says about its tokenizer, under the names of gguf.GGUFWriter's keys.

    Args:
        tokenizer: a transformers tokenizer with a tokenizer.json of its own.
        vocabulary: rows of the embedding; ids beyond the tokenizer's become unused tokens.

    Returns: model ("gpt2" or "llama"), pre, tokens, types, merges or scores, add_bos, add_space_prefix, and the ids of
        bos, eos, pad and unk where the tokenizer has them.

    Raises:
        UserError: not byte-pair encoding, or rules that llama.cpp has no name for.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise _refusal(f"a {model['type']} model")
    tokens, types = _tokens(description, vocabulary)
    found: dict[str, Any] = {"tokens": tokens, "types": types}
    if model.get("byte_fallback"):
        found |= {"model": "llama", "pre": "default", "scores": _scores(description, tokens)}
        found["types"] = [
            BYTE if token.startswith("<0x") and len(token) == 6 else kind
            for token, kind in zip(tokens, types, strict=True)
        ]
        found["add_space_prefix"] = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0] != "a"
    else:
        found |= {"model": "gpt2", "pre": _pre_tokenizer(description)}
        found["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        found["add_space_prefix"] = False
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    found["add_bos"] = bos is not None and bool(ids) and ids[0] == bos
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            found[f"{name}_id"] = index
    return found


def _tokens(description: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every id's text and type; ids that the tokenizer does not have are unused."""
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [UNUSED] * vocabulary
    for token, index in description["model"]["vocab"].items():
        if index < vocabulary:
            tokens[index], types[index] = token, NORMAL
    for token in description.get("added_tokens", ()):
        if token["id"] < vocabulary:
            tokens[token["id"]] = token["content"]
            types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    unknown = description["model"].get("unk_token")
    if unknown is not None and unknown in description["model"]["vocab"]:
        types[description["model"]["vocab"][unknown]] = UNKNOWN
    return tokens, types


def _scores(description: dict[str, Any], tokens: list[str]) -> list[float]:
    """Sentencepiece's scores, from the merges: the earlier a merge, the higher the score of the token that it makes."""
    rank: dict[str, int] = {}
    for order, merge in enumerate(description["model"]["merges"]):
        rank.setdefault("".join(merge.split(" ", 1)) if isinstance(merge, str) else "".join(merge), order)
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _pre_tokenizer(description: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer."""
    pre = description.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if kinds == ["Split", "ByteLevel"]:
        name = NAMES.get(steps[0].get("pattern", {}).get("Regex"))
        if name is not None and not steps[1].get("use_regex"):
            return name
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    raise _refusal(f"the pre-tokenizer {json.dumps(pre)[:200]}")


def _refusal(got: str) -> UserError:
    return UserError(
        "tokenizer.json",
        expected="the rules of a GPT-2, SmolLM, Llama 3 or Qwen2 tokenizer, or of sentencepiece with byte fallback: llama.cpp "
        "knows rules by name only",
        got=got,
        do="Export the packed format instead: such a file would load and cut texts at other places.",
    )
