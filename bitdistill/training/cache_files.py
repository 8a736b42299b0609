"""The files of a teacher's cache: its logits for stage 2 (teacher_cache.py), or its outputs for stage 3 (row_cache.py).

A cache is a folder with a header, `cache.json` (format, version, what is held, sizes), and shards, each complete or absent.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bitdistill.errors import UserError
from bitdistill.files import whole_file

HEADER = "cache.json"


def shard_name(shard: int) -> str:
    """The file of a shard."""
    return f"shard-{shard:05d}.safetensors"


def save_shard(path: Path, arrays: dict[str, np.ndarray], about: Mapping[str, object]) -> None:
    """Writes a shard, whole or not at all.

    Args:
        path: its file. arrays: its tensors. about: its metadata.
    """
    with whole_file(path) as temporary:
        save_file(arrays, temporary, metadata={name: str(value) for name, value in about.items()})


def move_finished(unfinished: Path, folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Moves files that all ranks wrote into the result's folder. Returns: {name: bytes}."""
    sizes = {}
    for name in names:
        (unfinished / name).rename(folder / name)
        sizes[name] = (folder / name).stat().st_size
    return sizes


def require_room(folder: Path, total_bytes: int, *, what: str, layout: object, do: str) -> None:
    """Raises UserError when the disk of `folder` has no room for the shards that are not in it yet.

    Args:
        folder: of unfinished work. total_bytes: of all shards.
        what, layout, do: for the message: what the room is for, what is written, and what helps.
    """
    written = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    free, needed = shutil.disk_usage(folder).free, total_bytes - written
    if free < needed:
        raise UserError(
            "output_dir",
            expected=f"{needed / 1e9:.3g} GB free in {folder} for {what}",
            got=f"{free / 1e9:.3g} GB ({layout})",
            do=do,
        )


class CacheFolder:
    """A finished cache, looked at with suspicion.

    Args:
        folder: where it is. format, version: what its header and its shards must say. stage: of the job, which makes it.
    """

    def __init__(self, folder: str | Path, *, format: str, version: int, stage: str):
        self.path, self._about, self._stage = Path(folder), {"format": format, "version": version}, stage

    def require(self, what: str, right: bool, expected: object, got: object) -> None:
        """Raises UserError about `what` unless it is right."""
        if not right:
            do = f"Run --stage {self._stage} again, with the settings of this run."
            raise UserError(f"{self.path}: {what}", expected=str(expected), got=str(got), do=do)

    def header(self) -> dict[str, Any]:
        """What the header says besides format and version."""
        path = self.path / HEADER
        self.require("header", path.is_file(), HEADER, "no such file")
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            self.require("header", False, "JSON", error)
        about = (header.pop("format", None), header.pop("version", None))
        self.require(
            "version", about == tuple(self._about.values()), "{format}, {version}".format(**self._about), about
        )
        return header

    def require_sizes(self, sizes: Mapping[str, int]) -> None:
        """Every file is there and whole. Args: sizes: {name: bytes}."""
        for name, size in sizes.items():
            path = self.path / name
            found = path.stat().st_size if path.is_file() else "no such file"
            self.require(name, found == size, f"{size} bytes", found)

    def opened(self, shard: int, **first: int) -> safe_open:
        """A shard, opened. Args: first: what its metadata say it begins with, by its name there."""
        name = shard_name(shard)
        try:
            file = safe_open(self.path / name, framework="np")
        except SafetensorError as error:
            self.require(name, False, "a whole safetensors file", error)
        known = {key: str(value) for key, value in {**self._about, **first}.items()}
        about = file.metadata() or {}
        self.require(name, about == known, known, about)
        return file
