"""From text to token ids, in the one way that training, evaluation, the harness and the runtimes share. Needs no torch.

* What a tokenizer writes *before* a text (BOS, or nothing) is the prefix of a prompt. What it writes *after* one (EOS,
  with some) is never part of a prompt: the answer would begin after the end.
* Text stays text. The characters ``<|im_end|>`` in a row, a document or a prompt become the tokens of these characters,
  never the control token of that name. So no row can end a document or open and close a turn.
* In a chat the template writes control tokens and the row's text stands between them. `shield` marks the row's text
  before the template is applied, and `encode_chat` takes for control tokens only what is not marked.
* Settings that other programs left in tokenizer.json and that change ids from call to call are switched off: truncation,
  padding, BPE dropout.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer

from bitdistill.errors import UserError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of a tokenizer with byte fallback
_PROBES = ("a", "A", "1", ".", "的")


@contextlib.contextmanager
def tokenizer_errors(where: str) -> Iterator[None]:
    """Inside, an error of the tokenizers library is a UserError about the tokenizer.

    The library raises the bare class Exception. Where its Rust code panics, it raises a PanicException, which is a
    BaseException, cannot be imported, and has been announced on stderr by Rust itself.

    Args:
        where: the file, for the message.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        got, do = f"{where} ({error})", "Copy it again from the model's repository."
        raise UserError("tokenizer", expected="a tokenizer.json that describes one", got=got, do=do) from error


def tokenizer_of(text: str, where: str) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes.

    Args:
        text: the content of the file. where: the file, for the message.

    Raises:
        UserError: it describes none.
    """
    with tokenizer_errors(where):
        return Tokenizer.from_str(text)


class TextTokens:
    """The ids of texts under one tokenizer.

    Args:
        tokenizer: of the model.
        chat_template: Jinja text or None; added tokens that it writes are control tokens in a turn, whether they are
            declared special or not.

    Attributes:
        prefix, suffix: ids that the tokenizer puts before and after a text by itself; only the prefix belongs to a prompt.
        special: {text: id} of its special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None = None):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = {token.content: index for index, token in added.items() if token.special}
        if getattr(tokenizer.model, "byte_fallback", False):  # some files declare the bytes special, too: they are text
            self.special = {text: index for text, index in self.special.items() if not BYTE_TOKEN.fullmatch(text)}
        written = {token.content: index for index, token in added.items() if token.content in (chat_template or "")}
        written = {text: index for text, index in written.items() if self._is_found(text, index)}
        self._ordinary = [text for text in written if text not in self.special]  # control tokens in a turn alone
        self._control = self.special | written
        self._special_ids = set(self.special.values())
        # The unknown token also stands for characters that no token has.
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._unknown = unknown if unknown in self.special else None
        self._special_ids.discard(self.special.get(unknown))
        self._marked = {text for text, index in self._control.items() if self._is_found(text, index)}
        nonce = secrets.token_hex(8)  # nobody can write into a row what he cannot know
        self._shield = f"\U0010fff0{nonce}\U0010fff1"
        self._names = {text: f"\U0010fff2{nonce}:{index}\U0010fff3" for text, index in self._control.items()}
        self._find_control, self._find_ordinary = _any_of(self._control), _any_of(self._ordinary)
        self._find_marked = _any_of(self._marked)
        self._renamed: Tokenizer | None = None
        self.prefix, self.suffix = _frame(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts in which nothing is a special token, without what the tokenizer adds around a text.

        Raises:
            UserError: a text that is no Unicode: a lone surrogate, as bytes that are not UTF-8 become on a command line.
        """
        encoded = self._encode(self._tokenizer, texts)
        wrong = [i for i, ids in enumerate(encoded) if self._has_special(texts[i], ids)]
        if wrong:
            marked = [self._find_ordinary.sub(self._name, texts[i]) for i in wrong]
            for i, ids in zip(wrong, self._encode(self._with_other_names(), marked), strict=True):
                encoded[i] = ids
        return encoded

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode`, with the prefix before each."""
        return [self.prefix + ids for ids in self.encode(texts)]

    def encode_prompt(self, prompt: str, special_tokens: bool = False) -> list[int]:
        """The tokens of a prompt that somebody typed, with the prefix before them.

        Args:
            prompt: text.
            special_tokens: the text spells special tokens, such as <|im_start|>, and means them: a chat written by hand.
                Otherwise text is text, as the rows were in training.

        Raises:
            UserError: the text is no Unicode.
        """
        if not special_tokens:
            return self.encode_prompts([prompt])[0]
        [ids] = self.encode_chat([prompt])
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def shield(self, text: str) -> str:
        """The text of a turn, marked for a chat template: equal to the text where it names no control token."""
        return self._find_control.sub(lambda found: found[0][:1] + self._shield + found[0][1:], text)

    def unshield(self, rendered: str) -> str:
        """What a reader should see of a rendered chat."""
        return rendered.replace(self._shield, "")

    def encode_chat(self, rendered: Sequence[str]) -> list[list[int]]:
        """The ids of rendered chats: what the template wrote is control tokens, what was shielded is text.

        Args:
            rendered: chats whose turns went through `shield`; the template writes BOS itself.
        """
        if all(self._shield not in text for text in rendered):
            encoded = self._encode(self._tokenizer, rendered)
            if all(map(self._is_as_written, rendered, encoded)):
                return encoded
        named = [self.unshield(self._find_marked.sub(self._name, text)) for text in rendered]
        return self._encode(self._with_other_names(), named)

    def _is_as_written(self, text: str, ids: list[int]) -> bool:
        """Whether the control tokens among the ids are those that the text names, and no other became one."""
        control = {self._control[name] for name in self._marked if name != self._unknown}
        named = self._find_marked.findall(text)
        return self._unknown not in named and sum(token in control for token in ids) == len(named)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(first, end) characters of each token of `encode`."""
        [ids] = self.encode([text])
        plain = self._tokenizer.encode(text, add_special_tokens=False)
        if plain.ids == ids:
            return plain.offsets
        return self._with_other_names().encode(text, add_special_tokens=False).offsets

    def _is_found(self, text: str, index: int) -> bool:
        """Whether the tokenizer finds an added token in the middle of a text: with some normalizers it does not."""
        return index in self._tokenizer.encode(f"a{text}a", add_special_tokens=False).ids

    def _name(self, found: re.Match) -> str:
        return self._names[found[0]]

    def _has_special(self, text: str, ids: list[int]) -> bool:
        if self._unknown and self._unknown in text:
            return True
        return not self._special_ids.isdisjoint(ids)

    def _encode(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        try:
            with tokenizer_errors("one that cannot encode a text"):
                return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            for number, text in enumerate(texts, start=1):
                check_unicode(text, f"text {number}" if len(texts) > 1 else "text")
            raise

    def _with_other_names(self) -> Tokenizer:
        """The same tokenizer, its control tokens under names that no text has. Made when first needed: seconds for a
        large vocabulary."""
        if self._renamed is None:
            self._renamed = _rename(self._tokenizer, self._names)
            for text, name in self._names.items():
                assert self._renamed.token_to_id(name) == self._control[text], text
        return self._renamed


def check_unicode(text: str, field: str) -> None:
    """Raises UserError where a text holds a lone surrogate, which no encoding has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start])
        what = f"the byte {byte - 0xDC00:#04x}" if 0xDC80 <= byte <= 0xDCFF else f"the lone surrogate \\u{byte:04x}"
        raise UserError(
            field, expected="text in UTF-8", got=f"{what} after {error.start} characters", do="Convert it to UTF-8."
        ) from None


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """Finds any of the texts, the longest first; nothing where there is none."""
    longest_first = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer's post-processor writes before and after a text, found by the ids of a short one."""
    for probe in _PROBES:
        alone = tokenizer.encode(probe, add_special_tokens=False).ids
        whole = tokenizer.encode(probe).ids
        for first in range(len(whole) - len(alone) + 1 if alone else 0):
            if whole[first : first + len(alone)] == alone:
                return whole[:first], whole[first + len(alone) :]
    return [], []


def _rename(tokenizer: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """A copy with other names for some tokens, in the list of added tokens and in the model's vocabulary; ids stay."""
    content = json.loads(tokenizer.to_str())
    content |= {"post_processor": None, "truncation": None, "padding": None}
    for token in content["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = content["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    elif "vocab" in model:  # Unigram: pairs of token and score
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:  # text shall not merge into a control token
        pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    return Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
