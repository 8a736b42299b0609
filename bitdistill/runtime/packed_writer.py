"""Writes a packed file from its config and tensors; the reader is packed_file.py. Needs no torch."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bitdistill.files import whole_file
from bitdistill.runtime.packed_file import FORMAT, VERSION, Config, config_checksum, data_checksum


def write_tensors(
    path: Path, config: Config, tensors: dict[str, np.ndarray], metadata: dict[str, Any] | None = None
) -> None:
    """Writes the tensors that `config.expected_tensors()` names, atomically, with checksums.

    Args:
        path: the file. config, tensors, metadata: what `read_packed` gives back.
    """
    expected = config.expected_tensors()
    assert {name: (tensor.dtype.type, tensor.shape) for name, tensor in tensors.items()} == expected
    header = {"format": FORMAT, "version": str(VERSION)}
    header["config"] = json.dumps(asdict(config))
    header["metadata"] = json.dumps(metadata or {})
    header["config_sha256"] = config_checksum(header)
    header["data_sha256"] = data_checksum(tensors)
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=header)
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Puts the header's metadata in the order of its keys, in place.

    The library writes them in an order that differs from one process to the next; equal students shall be equal files.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length, "the header must keep its length, because the data follows it"
        file.seek(8)
        file.write(text)
