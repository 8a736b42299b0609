"""What argparse and jsonargparse say about a command line, in the words of a UserError: the setting's own name, what it takes,
what came, and the setting that was meant where a name is mistyped."""

import difflib
import re
from collections.abc import Collection, Sequence

from bitdistill.errors import UserError

KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'list'>": "a list, such as [1, 2]",
    "<class 'dict'>": "keys and values",
    "<class 'NoneType'>": "null",
}
_VALUE = re.compile(r'Parser key "(?P<name>[\w.]+)": (?P<rest>.*)')
_KIND = re.compile(r"Expected an? (?P<kind><class '\w+'>|typing\.Literal\[(?P<choices>[^\]]*)\])")
_GOT = re.compile(r"G(?:ot|iven) value: (?P<got>.*)$")
_UNKNOWN = re.compile(
    r"unrecognized arguments: -*(?P<a>[^\s=]+)|'(?P<group>[\w.]+)' does not accept option '(?P<b>[\w.]+)'"
    r"|Option '(?P<c>[\w.]+)' is not accepted"
)
_ARGPARSE = re.compile(r"argument (?:-\w, )?-*(?P<name>[\w.]+): (?P<rest>.*)")


def refuse_long_numbers(arguments: Sequence[str]) -> None:
    """Raises UserError for a whole number that is too large for a float: the parsers fail at it."""
    for argument in arguments:
        if found := re.search(r"(?<![\w.])\d[\d_]{299,}", argument):
            got = f"{found[0][:20]}... of {len(found[0])} digits"
            raise UserError("command line", expected="numbers below 1e300", got=got, do="Give a smaller number.")


def similar(name: str, names: Collection[str]) -> list[str]:
    """Those of `names` that somebody may have meant: alike as a whole, or in a part of it; at most five."""
    section, dot, rest = name.partition(".")
    if dot and section not in names:  # the section is mistyped
        sections = difflib.get_close_matches(section, names, n=1, cutoff=0.75)
        found = [one for one in names if one.startswith(f"{sections[0]}.") and one.endswith(rest)] if sections else []
        return found[:5] or sections
    last = {one: one.rpartition(".")[2] for one in names}
    like = set(difflib.get_close_matches(name.rpartition(".")[2], set(last.values()), n=2, cutoff=0.7))
    found = difflib.get_close_matches(name, names, n=2, cutoff=0.75) + [one for one in names if last[one] in like]
    return list(dict.fromkeys(found))[:5]


def did_you_mean(name: str, names: Collection[str]) -> str:
    """The beginning of an advice: a question, or nothing where no name is alike."""
    found = similar(name, names)
    return f"Did you mean {' or '.join(found)}? " if found else ""


def refused(text: str, names: Collection[str], command: str) -> UserError:
    """A mistake on a command line.

    Args:
        text: what the library says, on one line. names: of all settings or options, and of their sections.
        command: whose --help lists them.
    """
    value, unknown = _VALUE.search(text), _UNKNOWN.search(text)
    if value:
        return _wrong_value(value["name"], value["rest"], command)
    if unknown:
        name = unknown["a"] or unknown["c"] or f"{unknown['group']}.{unknown['b']}"
        do = did_you_mean(name, names) + f"All are in {command} --help."
        return UserError(
            "command line", expected=f"options of {command}", got=f"{name}, which is not one of them", do=do
        )
    option = _ARGPARSE.search(text)
    if option and "expected one argument" in option["rest"]:
        do = f"Write it behind {option['name']}, or leave that out."
        return UserError(option["name"], expected="a value", got="none", do=do)
    if option and (wrong := re.match(r"invalid (\w+) value: (.*)", option["rest"])):
        kind = KINDS.get(f"<class '{wrong[1]}'>", wrong[1])
        return UserError(option["name"], expected=kind, got=wrong[2], do=f"See {command} --help.")
    return UserError("command line", expected=f"options of {command}", got=text, do=f"See {command} --help.")


def _wrong_value(name: str, said: str, command: str) -> UserError:
    kinds, choices = [], []
    for found in _KIND.finditer(said):
        if found["choices"] is not None:
            choices = [choice.strip().strip("'") for choice in found["choices"].split(",")]
            kinds.append(f"one of {', '.join(choices)}")
        else:
            kinds.append(KINDS.get(found["kind"], found["kind"]))
    got = _GOT.search(said)
    value = got["got"] if got else said
    do = did_you_mean(value, choices) + f"See {command} --help."
    return UserError(name, expected=" or ".join(dict.fromkeys(kinds)) or "a value of its kind", got=value, do=do)
