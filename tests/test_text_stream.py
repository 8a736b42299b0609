"""Text of token streams: whole characters as they come, U+FFFD for broken bytes, and never an exception."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from many_tokenizers import ALPHABET, KINDS, REAL, generated, made, real
from tokenizers import Tokenizer

from bitdistill.runtime.text_stream import TextStream
from bitdistill.text_tokens import TextTokens


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    stream = TextStream(tokenizer, prompt)
    return "".join([*map(stream.feed, ids), stream.finish()])


def continuation(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """What the library makes of the whole."""
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


def check_streams(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    tokens = TextTokens(tokenizer)
    before, ids = tokens.encode_prompt(prompt), tokens.encode([text])[0]
    assert streamed(tokenizer, before, ids) == continuation(tokenizer, before, ids)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.text([*ALPHABET, "é", "😀"], max_size=8),
    st.text([*ALPHABET, "é", "€", "😀"], max_size=12),
)
def test_a_stream_of_real_text_is_what_the_tokenizer_decodes(kind, prompt, text):
    check_streams(made(kind).backend_tokenizer, prompt, text)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("prompt", ["", "Once upon", "é", "€ ", "\n"])
def test_streams_of_real_tokenizers(name, prompt):
    for text in ("Once upon a time", " naïve 😀🤦🏽‍♀️ €", "  two  spaces", "日本語の文章", "\n\n", "a\ufffdb"):
        check_streams(real(name).backend_tokenizer, prompt, text)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.data())
def test_any_ids_give_text(kind, data):
    """Ids as a sampler at a high temperature gives them, some of which no tokenizer would write."""
    tokenizer = made(kind).backend_tokenizer
    any_id = st.integers(0, tokenizer.get_vocab_size() + 2)
    prompt, ids = data.draw(st.lists(any_id, max_size=3)), data.draw(st.lists(any_id, max_size=12))
    text = streamed(tokenizer, prompt, ids)
    text.encode("utf-8")
    if kind == "byte_level":
        assert text == tokenizer.decode(ids), "bytes that are broken, as the library reads them"


@settings(max_examples=100, deadline=None)
@given(generated(), st.data())
def test_any_ids_of_tokenizers_that_nobody_has(tokenizer, data):
    """Broken bytes among them: never an exception, and never half a character."""
    inner = tokenizer.backend_tokenizer
    ids = data.draw(st.lists(st.integers(0, inner.get_vocab_size() + 1), max_size=14))
    streamed(inner, ids[:2], ids[2:]).encode("utf-8")


@pytest.mark.parametrize("name", REAL)
def test_any_ids_of_real_tokenizers(name):
    tokenizer, draw = real(name).backend_tokenizer, random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(tokenizer.get_vocab_size()) for _ in range(30)]
        streamed(tokenizer, ids[:2], ids[2:]).encode("utf-8")


def byte(tokenizer: Tokenizer, value: int) -> int:
    return tokenizer.token_to_id(f"<0x{value:02X}>")


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "prepend_bpe"])
@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0x41, 0xE2], "A\ufffd it"),
        ([0xE2, 0x41], "\ufffdA it"),
        ([0xE2, 0x82, 0xAC, 0xE2], "€\ufffd it"),
        ([0xE2, 0x82, 0xAC], "€ it"),
        ([0xFF, 0xFE], "\ufffd\ufffd it"),
        ([0xE2, 0x82], "\ufffd it"),
        ([0xF0, 0x9F, 0x98, 0xE2, 0x82, 0xAC], "\ufffd€ it"),
    ],
)
def test_broken_bytes_cost_only_themselves(kind, values, text):
    """What came before stays; each ill-formed sequence reads as one U+FFFD; the word after it keeps its space."""
    tokenizer = made(kind).backend_tokenizer
    prompt, word = TextTokens(tokenizer).encode_prompt("was"), TextTokens(tokenizer).encode(["it"])[0]
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.feed(byte(tokenizer, value)) for value in values]
    assert "".join([*pieces, *map(stream.feed, word), stream.finish()]) == text
    assert pieces[0] == ("A" if values[0] == 0x41 else "\ufffd" if values[0] == 0xFF else "")


def test_bytes_that_never_became_a_character():
    tokenizer = made("prepend_bpe").backend_tokenizer
    stream = TextStream(tokenizer, [1])
    assert stream.feed(byte(tokenizer, 0xE2)) == ""
    assert stream.finish() == "\ufffd"


def test_a_stop_string_may_end_in_what_is_held_back():
    tokenizer = made("prepend_bpe").backend_tokenizer
    stream = TextStream(tokenizer, [1], ["A\ufffd"])
    pieces = [stream.feed(byte(tokenizer, value)) for value in (0x42, 0x41, 0xE2)]
    assert pieces == ["B", "", ""]
    assert stream.finish() == ""
    assert stream.stopped


def test_special_tokens_and_rows_without_a_token_have_no_text():
    tokenizer = made("byte_level").backend_tokenizer
    ids = tokenizer.encode("it was").ids
    assert streamed(tokenizer, [], [1, *ids, 2, tokenizer.get_vocab_size() + 5]) == "it was"
