"""The tokenizer of a packed file with its chat template, as transformers applies it, without transformers.

A template is a program out of a file that somebody else wrote: it runs in Jinja's sandbox and sees nothing but the messages.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from bitdistill.errors import UserError


class PackedTokenizer:
    """What `bitdistill.prompts` needs of a tokenizer.

    Args:
        tokenizer: of the file.
        settings: special tokens and the chat template, from the file's header.

    Attributes:
        is_fast: always true. backend_tokenizer: the `tokenizers.Tokenizer`.
        chat_template: Jinja text, templates by name, or None.
    """

    is_fast = True

    def __init__(self, tokenizer: Tokenizer, settings: Mapping[str, Any]):
        self.backend_tokenizer = tokenizer
        self.chat_template = settings.get("chat_template")
        self._special = {name: text for name, text in settings.items() if name.endswith("_token") and text is not None}

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], tokenize: bool = False, **options: Any
    ) -> str:
        """The text of a conversation.

        Args:
            conversation: messages of "role" and "content".
            tokenize: False; the ids are `TextTokens.encode_chat`'s.
            options: for the template, such as add_generation_prompt.

        Raises:
            jinja2.TemplateError: the template refuses these messages, or is none.
            UserError: Jinja is not installed.
        """
        assert not tokenize, "texts become tokens in text_tokens.py"
        given = {"messages": list(conversation), "tools": None, "documents": None}
        return self._compiled.render(**given, **self._special, **options)

    @cached_property
    def _compiled(self):
        template = self.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        return compile_template(str(template or ""))


def compile_template(text: str):
    """A chat template as transformers compiles it: its filters, functions and blocks, in the sandbox.

    Args:
        text: Jinja.

    Raises:
        jinja2.TemplateError: no Jinja.
        UserError: Jinja is not installed.
    """
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox, utils
    except ModuleNotFoundError as error:
        do = "Install it: pip install jinja2."
        raise UserError("tokenizer", expected="the library jinja2", got="none installed", do=do) from error

    class Generation(ext.Extension):
        """{% generation %} marks what the model wrote, for training; here it is what stands inside."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes HTML.
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    class SafeDict:
        """`dict` without the attributes that lead out of the sandbox."""

        def __call__(self, *values, **named):
            return dict(*values, **named)

        def fromkeys(self, *values):
            return dict.fromkeys(*values)

    class SafeNamespace(utils.Namespace):
        """`namespace` without names that Python's own machinery uses."""

        def __init__(*values, **named):
            self, *rest = values  # so that a template may name a value "self"
            values = dict(*rest, **named)
            for name in values:
                SafeNamespace._check(name)
            utils.Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            SafeNamespace._check(name)
            utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace with the name {name!r}")

    extensions = [Generation, ext.loopcontrols]
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["dict"], environment.globals["namespace"] = SafeDict(), SafeNamespace
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(text)
