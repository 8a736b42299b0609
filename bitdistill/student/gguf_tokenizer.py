"""The tokenizer that a GGUF file describes, as a transformers tokenizer.

GGUF stores tokens, merges (or scores) and special ids, but of the rule that splits a text before merging it stores only the
*name* (`tokenizer.ggml.pre`). What each name means is written here, for the families that can be a base. Another name is
refused: if a text is split by another rule, it becomes other tokens than the model was trained on, and nothing would fail.

Source of the rules: llama.cpp, src/llama-vocab.cpp, and the tokenizer.json of the models themselves.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from bitdistill.errors import UserError
from bitdistill.prompts import TEMPLATE_ERRORS
from bitdistill.text_tokens import tokenizer_errors

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
METASPACE = "▁"

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN, _LLAMA3 = rf"{_WORD}|\p{{N}}{_REST}", rf"{_WORD}|\p{{N}}{{1,3}}{_REST}"
SPLITS = {"qwen2": _QWEN, "deepseek-r1-qwen": _QWEN, "llama-bpe": _LLAMA3, "falcon3": _LLAMA3, "tekken": _TEKKEN}
WITH_BOS = ("llama-bpe", "tekken")  # llama.cpp begins a text with BOS where the file does not say otherwise
WHOLE_WORDS_FIRST = (
    "llama-bpe",
    "tekken",
)  # a word that is a token is taken as it is, whatever the merges would make of it
DIGITS_FIRST = ("smollm", "codeshell", "starcoder", "refact", "command-r")
GPT2 = ("gpt-2",)


def gguf_tokenizer(metadata: dict[str, Any], architecture: str, file: str):
    """A fast tokenizer with its special tokens and chat template.

    Args:
        metadata: key -> value of the file. architecture: its general.architecture. file: for messages.

    Returns: a transformers.PreTrainedTokenizerFast whose ids are the file's.

    Raises:
        UserError: an unknown kind of tokenizer or splitting rule, or ids that do not fit the tokens.
    """
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if not tokens or len(set(tokens)) != len(tokens):
        got = f"{file} with {len(tokens) - len(set(tokens))} repeated" if tokens else f"{file} without any"
        raise UserError("model", expected="a GGUF file with a tokenizer's tokens", got=got, do="Take another file.")
    if kind == "gpt2":
        with tokenizer_errors(file):
            backend = _byte_level(tokens, _merges(metadata, file), rule, file)
        begins = rule in WITH_BOS
    elif kind == "llama":
        with tokenizer_errors(file):
            backend = _sentencepiece(metadata, tokens, gemma=architecture == "gemma3")
        begins = True
    else:
        raise UserError(
            "model",
            expected="a GGUF file whose tokenizer.ggml.model is gpt2 or llama",
            got=f"{file} with {kind!r}",
            do="Take the safetensors repository of the model.",
        )
    special = _special_tokens(metadata, tokens, file)
    _mark_special(backend, metadata, tokens, special.values())
    begins = bool(metadata.get("tokenizer.ggml.add_bos_token", begins)) and "bos_token" in special
    ends = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in special
    _frame(backend, special.get("bos_token") if begins else None, special.get("eos_token") if ends else None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    own = tokenizer.get_vocab()
    strangers = [token for i, token in enumerate(tokens) if own.get(token) != i]
    if strangers or len(own) != len(tokens):
        got = f"{file} with {len(own)} of {len(tokens)} in their places, not {strangers[:3]}"
        raise UserError("model", expected="tokens that keep their ids", got=got, do="Take the safetensors repository.")
    return tokenizer


def check_chat_template(tokenizer) -> str | None:
    """What is wrong with the chat template of a tokenizer: None when there is none, or when it renders a conversation."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, *TEMPLATE_ERRORS) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None if all(turn["content"] in text for turn in chat) else "it leaves out what was said"


def _merges(metadata: dict[str, Any], file: str) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges") or []]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        got = f"{file} with {sum(len(pair) != 2 for pair in pairs)} that are no pair" if pairs else f"{file} without"
        raise UserError("model", expected="a GGUF file with the merges of its BPE", got=got, do="Take another file.")
    return pairs


def _byte_level(tokens: list[str], merges: list[tuple[str, str]], rule: str | None, file: str) -> Tokenizer:
    """Byte-level BPE, as GPT-2's, Llama 3's, Qwen's and SmolLM's."""
    known = set(tokens)
    merges = [pair for pair in merges if pair[0] in known and pair[1] in known and "".join(pair) in known]
    backend = Tokenizer(
        BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=rule in WHOLE_WORDS_FIRST)
    )
    if rule in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[rule]), behavior="isolated")
        before = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif rule in DIGITS_FIRST:
        before = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif rule in GPT2:
        before = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        rules = ", ".join(sorted({*SPLITS, *DIGITS_FIRST, *GPT2}))
        raise UserError(
            "model",
            expected=f"a GGUF file whose tokenizer.ggml.pre is one of {rules}",
            got=f"{file} with {rule!r}",
            do="Take the safetensors repository of the model, which has tokenizer.json.",
        )
    backend.pre_tokenizer = pre_tokenizers.Sequence(before)
    backend.decoder = decoders.ByteLevel()
    if SPLITS.get(rule) is _QWEN:
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], gemma: bool) -> Tokenizer:
    """Sentencepiece's BPE with byte fallback, as Llama 1 and 2's, and Gemma's.

    The merges are recovered from the tokens: each way to cut a token into two tokens is a merge, the best token first. Best
    is the highest score; in Gemma, whose scores say nothing, the lowest id. Gemma puts no space before a text.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    if gemma:
        scores = [-i for i in range(len(tokens))]
    found = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind not in (UNKNOWN, CONTROL) or gemma:
            cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
            found += [(score, *cut) for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
    found.sort(key=lambda merge: (-merge[0], -len(merge[1]), vocabulary[merge[1]]))
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=[(left, right) for _, left, right in found],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    after = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = not gemma and bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    if gemma:
        backend.normalizer = normalizers.Replace(" ", METASPACE)
    else:
        scheme = "first" if prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=METASPACE, prepend_scheme=scheme, split=False)
    if prefix:
        after.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(after)
    return backend


def _special_tokens(metadata: dict[str, Any], tokens: list[str], file: str) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {}
    for name, short in names.items():
        key = f"tokenizer.ggml.{short}_token_id"
        number = metadata.get(key)
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            got = f"{file} with {number}, where there are {len(tokens)} tokens"
            raise UserError("model", expected=f"a GGUF file whose {key} is a token", got=got, do="Take another file.")
        special[name] = tokens[number]
    return special


def _mark_special(backend: Tokenizer, metadata: dict[str, Any], tokens: list[str], named) -> None:
    """Control tokens are special; user-defined ones are matched whole in any text, and are text themselves."""
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    special = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (UNKNOWN, CONTROL)} | set(named)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in tokens if token in special])
    whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED and token not in special]
    backend.add_tokens([AddedToken(token, normalized=False) for token in whole])


def _frame(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    """BOS before and EOS after a text, where there is one."""
    if not (bos or eos):
        return
    single = [token for token in (bos, "$A", eos) if token]
    second = [token.replace("$A", "$B") + ":1" for token in single]
    pairs = [(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=single + second, special_tokens=pairs)
