"""YAML files that people write: settings of a run, tasks. Text in UTF-8, plain data alone, each key once."""

from pathlib import Path
from typing import Any

import yaml

from bitdistill.errors import UserError
from bitdistill.text_files import read_text


class _Loader(yaml.SafeLoader):
    """SafeLoader, which takes the last of two equal keys, with a refusal in its place."""

    def construct_yaml_int(self, node):
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**64:  # no setting has such a value, and it may be too large for a float
            raise yaml.constructor.ConstructorError(None, None, "a whole number too large", node.start_mark)
        return value

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen and name is not None:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: Path, field: str) -> dict[Any, Any]:
    """The keys and values of a file.

    Args:
        path: of the file. field: what the user gave it as, for messages.

    Raises:
        UserError: no such file, no text in UTF-8, no YAML, a key that comes twice, objects of Python, or no keys and values.
    """
    if not path.is_file():
        got = f"{path}, a folder" if path.is_dir() else f"{path} (no such file)"
        raise UserError(field, expected="a YAML file", got=got, do="Check the path.")
    place = f"{field} {path}"
    try:
        content = yaml.load(read_text(path, field), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        raise UserError(place, expected="YAML", got=f"{error.problem}{line}", do="Mend the file.") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        got = " ".join(str(error).split())[:200]
        raise UserError(place, expected="YAML", got=got, do="Mend the file.") from None
    if not isinstance(content, dict):
        got = f"{content!r:.60}"
        raise UserError(place, expected="keys and values", got=got, do="Write `name: value`, a line each.")
    return content
