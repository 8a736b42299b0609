"""Checks the weights of a model folder by their headers: whether all are there, whole, and under the names and in the
shapes of the architecture.

The weights themselves are not read, except where either of two tables could be the LM head.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitdistill.errors import UserError
from bitdistill.text_files import download_gone_wrong

FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names; any other type is somebody's codes
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, tuple[Path, tuple[int, ...], str]]  # name -> (file, shape, safetensors' name of the type)


def read_json(file: Path, setting: str) -> dict[str, Any]:
    """The keys and values of a JSON file; a UserError where it has none."""
    try:
        data = file.read_bytes()
        if data.startswith(BYTE_ORDER_MARKS):  # JSON has none, and transformers does not read it
            raise ValueError("a byte order mark at its beginning: save it as UTF-8 without one")
        content = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        got, do = _unreadable(file, error, "Copy the model again.")
        raise UserError(setting, expected=f"a {file.name} in JSON", got=got, do=do) from error
    if not isinstance(content, dict):
        got = f"{file} with a {type(content).__name__}"
        raise UserError(setting, expected=f"a {file.name} with keys and values", got=got, do="Copy the model again.")
    return content


def _unreadable(file: Path, error: Exception, do: str) -> tuple[str, str]:
    """What a file of a model is in place of what its name says, and what to do about it."""
    kind, do = (file.is_file() and download_gone_wrong(file)) or (" ".join(str(error).split())[:160], do)
    return f"{file} ({kind})", do


def tensors_of(path: Path, setting: str) -> Tensors:
    """Every tensor of model.safetensors, or of the shards that the index names, each of them whole."""
    expected = f"{WEIGHTS}, or shards with {INDEX}"
    if (path / WEIGHTS).is_file():
        return _header(path / WEIGHTS, setting)
    if not (path / INDEX).is_file():
        shards = sorted(file.name for file in path.glob("*.safetensors"))
        pickled = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in path.glob(suffix))
        if shards:
            got, do = f"{path} with {', '.join(shards[:3])} and no index", "Copy the model again, index included."
        elif pickled:
            got = f"{path} with pickled weights ({', '.join(pickled[:2])}), which are never read"
            do = "Convert it: load it in a place you trust, and save_pretrained(folder) writes safetensors."
        else:
            got, do = f"{path} without weights", "Copy the model again."
        raise UserError(setting, expected=expected, got=got, do=do)
    index = read_json(path / INDEX, setting)
    weight_map = index.get("weight_map")
    mapped = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    if not mapped or not isinstance(index.get("metadata"), dict):  # transformers asks for both
        expected = f"metadata and a weight_map in {INDEX}"
        raise UserError(setting, expected=expected, got=str(path), do="Copy the model again.")
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if Path(name).name != name or not (path / name).is_file()]
    if absent:
        got = f"{path} without {len(absent)} of {len(names)} shards ({', '.join(absent[:3])})"
        raise UserError(setting, expected="every shard that the index names", got=got, do="Copy the missing files.")
    tensors = {}
    for name in names:
        header = _header(path / name, setting)
        listed = {tensor for tensor, shard in weight_map.items() if shard == name}
        if listed - header.keys():
            got = f"{path / name} without {len(listed - header.keys())} of them, such as {min(listed - header.keys())}"
            raise UserError(setting, expected=f"the tensors that {INDEX} names", got=got, do="Copy the model again.")
        tensors |= header
    return tensors


def _header(file: Path, setting: str) -> Tensors:
    try:
        with safe_open(file, framework="pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
            return {name: (file, tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        got, do = _unreadable(file, error, "Copy the file again.")
        raise UserError(setting, expected="whole safetensors files", got=got, do=do) from error


def quantized_tensors(path: Path, tensors: dict, setting: str) -> Iterator[UserError]:
    """Weights that are codes: of types that no full-precision model has."""
    codes = {name: kind for name, (_, _, kind) in tensors.items() if kind not in FLOATS}
    if codes:
        name = min(codes)
        yield quantized_model(f"{path}, where {len(codes)} tensors are codes ({name} is {codes[name]})", setting)


def quantized_model(got: str, setting: str) -> UserError:
    """What is said of a model that somebody quantized already."""
    do = "Take the unquantized repository of the same model: its quantization is made by training."
    return UserError(setting, expected="full-precision weights (float32, bfloat16 or float16)", got=got, do=do)


def layer_count(path: Path, written: dict[str, Any], tensors: dict, setting: str) -> Iterator[UserError]:
    """The layers that the config announces against those of the file: before a model of so many is built."""
    layers = {part for name in tensors for before, part in _pairs(name.split(".")) if before == "layers"}
    announced = written.get("num_hidden_layers")
    if layers and isinstance(announced, int) and announced != len(layers):
        got = f"{path} with tensors of {len(layers)} layers, and {announced} in config.json"
        expected = "as many layers in the file as num_hidden_layers says"
        yield UserError(setting, expected=expected, got=got, do="Copy the model again, or correct num_hidden_layers.")


def _pairs(parts: list[str]) -> Iterator[tuple[str, str]]:
    return ((a, b) for a, b in pairwise(parts) if b.isdigit())


def with_prefix(tensors: Tensors) -> Tensors:
    """The names as a language model has them. A model that was saved without its head has them without ``model.``."""
    if not any(name.startswith(("layers.", "embed_tokens.")) for name in tensors):
        return tensors
    return {name if name == HEAD else f"model.{name}": value for name, value in tensors.items()}


def names_and_shapes(
    path: Path, tensors: Tensors, expected: dict[str, tuple[int, ...]], tied: bool, setting: str
) -> Iterator[UserError]:
    """Missing, surplus and misshapen tensors.

    Args:
        path: of the folder. tensors: those of the file, from `with_prefix`. expected: name -> shape in the model.
        tied: the config says that the head is the embedding. setting: what messages call the folder.
    """
    wanted, got = dict(expected), set(tensors)
    if tied:  # one of the two is enough
        absent = {HEAD, EMBEDDING} - got
        repeated = absent if len(absent) == 1 else absent & {HEAD}
        wanted = {name: shape for name, shape in wanted.items() if name not in repeated}
    missing = sorted(wanted.keys() - got)
    surplus = sorted(name for name in got - wanted.keys() if not name.endswith(".rotary_emb.inv_freq"))
    all_of_them, do = f"the {len(wanted)} tensors of the model", "Take the folder as save_pretrained wrote it."
    if missing == [HEAD]:
        do = "If its head is its embedding, set tie_word_embeddings to true in config.json; else copy the head."
        expected_head = f"{HEAD} in the file where it is false"
        yield UserError("config.json: tie_word_embeddings", expected=expected_head, got=f"{path} without", do=do)
    elif missing:
        example = f"{len(missing)} of {len(wanted)} tensors are missing, such as {missing[0]}"
        prefix = _prefix(surplus[0], missing) if surplus else None
        if prefix:
            example += f"; names in the file begin with {prefix}"
            do = f"Rename the tensors: take {prefix} off."
        elif surplus:
            example += f"; {surplus[0]} is there instead"
        yield UserError(setting, expected=all_of_them, got=f"{path}, where {example}", do=do)
    elif surplus:
        got_more = f"{path} with {len(surplus)} more, such as {surplus[0]}"
        yield UserError(setting, expected=all_of_them, got=got_more, do=do)
    for name in sorted(wanted.keys() & got):
        shape = tensors[name][1]
        if shape != wanted[name]:
            yield _misshapen(path, name, shape, wanted[name], setting)
            return  # the others follow from the same number


def _prefix(surplus: str, missing: list[str]) -> str | None:
    """What stands before a known name in a surplus one."""
    known = (name for full in missing for name in (full, full.removeprefix("model.")))
    return next((surplus.removesuffix(name) for name in known if surplus.endswith(f".{name}")), None)


def _misshapen(path: Path, name: str, shape: tuple, wanted: tuple, setting: str) -> UserError:
    if name in (EMBEDDING, HEAD) and shape[1:] == wanted[1:]:
        got = f"{path}, where {name.split('.')[-2]} has {shape[0]} rows"
        do = f"Set vocab_size to {shape[0]} in config.json, if the tokenizer fits that."
        return UserError(
            "config.json: vocab_size", expected=f"{wanted[0]} rows, as config.vocab_size says", got=got, do=do
        )
    expected = f"{name} of shape {list(wanted)}, as config.json says"
    return UserError(setting, expected=expected, got=f"{list(shape)} in {path}", do="Copy config.json again.")


def not_finite(tensors: Tensors, dtype: torch.dtype, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the first tensor that has a NaN or an infinity; reads every number once.

    Args:
        tensors: from `tensors_of` or `with_prefix`. dtype: that the model will be loaded in, in which large numbers may overflow.
        part, parts: which share of the tensors is read, so that several ranks can divide the work.
    """
    by_file: dict[Path, list[str]] = {}
    for name in sorted(tensors)[part::parts]:
        by_file.setdefault(tensors[name][0], []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as stored:
            there = set(stored.keys())
            for name in names:
                values = stored.get_tensor(name if name in there else name.removeprefix("model.")).to(dtype)
                if not torch.isfinite(values.sum(dtype=torch.float64)):
                    bad = values.numel() - int(torch.isfinite(values).sum())
                    return f"{bad:,} of {values.numel():,} numbers of {name} are NaN or infinite in {dtype}"
    return None


def has_own_head(tensors: Tensors) -> bool:
    """Whether the file has an LM head that differs from its embedding, which are then two tables whatever the config says."""
    if not {HEAD, EMBEDDING} <= tensors.keys():
        return False
    tables = []
    for name in (HEAD, EMBEDDING):
        with safe_open(tensors[name][0], framework="pt") as stored:
            found = name in stored.keys()  # noqa: SIM118 - not a mapping
            tables.append(stored.get_slice(name if found else name.removeprefix("model.")))
    head, embedding = tables
    rows = tensors[HEAD][1][0]
    return any(not torch.equal(head[i : i + 4096], embedding[i : i + 4096]) for i in range(0, rows, 4096))
