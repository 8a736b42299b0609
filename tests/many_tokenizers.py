"""Tokenizers of every kind, small, made on the spot, and the real ones of the data folder; for tests."""

import functools
import os
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

DATA = Path(os.environ.get("BITDISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
REAL = ("models/base-6m", "models/stories260K-hf", "models/babyllama-tok361-hf", "tokenizers/qwen2.5")
KINDS = ("byte_level", "sentencepiece_bpe", "prepend_bpe", "unigram", "word_level")
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
TEXTS = [
    "Once upon a time there was a small boat.",
    "it was good, and it was bad: so it goes",
    "a page with words < s > im_end |",
    "</ unk > <| im _ start |>",
] * 3
ALPHABET = sorted(set("".join(TEXTS)))
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


@functools.cache
def model_json(kind: str) -> str:
    """A trained tokenizer without BOS and EOS around texts, as JSON."""
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
    elif kind == "unigram":
        # Special tokens are pieces of the vocabulary with the best score, as in files converted from sentencepiece.
        pieces = [(text, 0.0) for text in SPECIAL] + [
            ("▁", -2.0),
            *((letter, -4.0) for letter in ALPHABET if letter != " "),
        ]
        pieces += [("▁it", -3.0), ("▁was", -3.0), ("good", -3.0), ("im", -3.0)]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
        tokenizer.add_special_tokens(special)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    elif kind == "word_level":
        words = [*SPECIAL, " ", "\n", *(letter for letter in ALPHABET if letter not in " \n")]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.add_special_tokens(special)
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        if kind == "prepend_bpe":  # as Llama 2's file
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        bytes_ = [AddedToken(f"<0x{byte:02X}>", special=False) for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*special, *bytes_], show_progress=False)
        tokenizer.train_from_iterator(TEXTS, trainer)
        tokenizer = _bytes_in_the_vocabulary_alone(tokenizer)
    return tokenizer.to_str()


def _bytes_in_the_vocabulary_alone(tokenizer: Tokenizer) -> Tokenizer:
    import json

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(content))


@functools.cache
def made(kind: str, bos: bool = True, eos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind in KINDS, with BOS before and EOS after its texts or not; with a chat template or not."""
    inner = Tokenizer.from_str(model_json(kind))
    frame = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    ids = [(text, inner.token_to_id(text)) for text in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    if chat:
        inner.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


@st.composite
def generated(draw) -> PreTrainedTokenizerFast:
    """A tokenizer that nobody has: bytes, sentencepiece with byte fallback or characters, with drawn merges, special tokens,
    their flags, BOS before and EOS after a text or not, and no padding token."""
    kind = draw(st.sampled_from(("bytes", "sentencepiece", "characters")))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bytes" else ["▁", *ALPHABET]
    special = draw(st.lists(st.sampled_from(SPECIAL[1:]), min_size=1, unique=True))
    words = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256 * (kind == "sentencepiece"))), *letters]
    merges, pieces = [], [letter for letter in letters if letter != " "]
    for _ in range(draw(st.integers(0, 8)) if kind != "characters" else 0):
        pair = tuple(draw(st.sampled_from(pieces)) for _ in range(2))
        if "".join(pair) not in words:
            merges.append(pair)
            words.append("".join(pair))
            pieces.append("".join(pair))
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    fallback = kind == "sentencepiece"
    inner = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=None if kind == "bytes" else "<unk>", byte_fallback=fallback)
    )
    if kind == "bytes":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=draw(st.booleans()), use_regex=draw(st.booleans())
        )
        inner.decoder = decoders.ByteLevel()
    elif kind == "sentencepiece":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=draw(st.sampled_from(("first", "never", "always")))
        )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        inner.decoder = decoders.Sequence(steps)
    else:
        inner.decoder = decoders.Fuse()
    if draw(st.booleans()):
        inner.normalizer = normalizers.NFKC()
    flags = st.fixed_dictionaries({name: st.booleans() for name in ("lstrip", "rstrip", "normalized", "single_word")})
    inner.add_special_tokens([AddedToken(text, special=True, **draw(flags)) for text in special])
    first, last = special[0], special[-1]
    frame = [first] * draw(st.booleans()) + ["$A"] + [last] * draw(st.booleans())
    ids = [(text, vocabulary[text]) for text in {first, last}]
    inner.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    names = {"bos_token": first} if draw(st.booleans()) else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=last, unk_token="<unk>", **names)


@functools.cache
def real(name: str):
    """A real tokenizer; skips the test where the data folder has none."""
    import pytest

    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} under {DATA}; set BITDISTILL_DATA")
    return AutoTokenizer.from_pretrained(DATA / name)
