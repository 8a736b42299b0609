"""A conversation with a student: messages, their tokens through the base's chat template, and what fits into the context."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bitdistill.errors import UserError
from bitdistill.prompts import TEMPLATE_ERRORS

if TYPE_CHECKING:
    from bitdistill.runtime.base import BaseRuntime


def require_chat(runtime: "BaseRuntime") -> None:
    """Raises UserError where the file has no chat template: its base never saw a conversation."""
    if not runtime.header.tokenizer.get("chat_template"):
        raise UserError(
            "RUN_OR_FILE",
            expected="a packed file whose base has a chat template",
            got=f"{runtime.model.path} without one",
            do="Use `bitdistill generate`, or `bitdistill predict` for its task.",
        )


def conversation_ids(runtime: "BaseRuntime", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of a conversation, up to where the assistant starts. Control tokens in a message stay plain text.

    Args:
        runtime: a student whose file has a chat template.
        messages: "role" and "content" of each.

    Raises:
        UserError: no chat template, or one that refuses these messages.
    """
    require_chat(runtime)
    from jinja2 import TemplateError

    tokens = runtime.text_tokens
    turns = [{"role": one["role"], "content": tokens.shield(one["content"])} for one in messages]
    try:
        text = runtime.packed_tokenizer.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False)
    except (TemplateError, *TEMPLATE_ERRORS) as error:
        do = "Change the order of the roles: one system message first, then user and assistant in turn."
        expected = "messages that the chat template takes"
        raise UserError("messages", expected=expected, got=str(error)[:160], do=do) from error
    return tokens.encode_chat([text])[0]


def fitting(
    runtime: "BaseRuntime", messages: list[dict[str, str]], room: int
) -> tuple[list[dict[str, str]], list[int]]:
    """The messages that leave room for an answer, and their tokens: the oldest turns are left out first.

    Args:
        runtime: a student whose file has a chat template.
        messages: the last is the user's; a system message at the beginning always stays.
        room: tokens for the answer.

    Raises:
        UserError: the last message alone is too long.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while True:
        kept = [*system, *turns]
        ids = conversation_ids(runtime, kept)
        if len(ids) + room <= runtime.context:
            return kept, ids
        following = next((i for i in range(1, len(turns)) if turns[i]["role"] == "user"), None)
        if following is None:
            got = f"{len(ids)} tokens, and {room} for the answer"
            expected = f"at most {runtime.context} tokens"
            raise UserError("messages", expected=expected, got=got, do="Shorten the message, or lower max_new_tokens.")
        turns = turns[following:]
