"""The packed student file, its format and its reader: one safetensors file with everything that CPU inference needs.

Per ternary linear it holds the packed codes (2 bit or base 3), one fp32 scale (or fp16 scales of rows or of groups of columns),
the bias and the SubLN gain where the student has them; the embedding and an untied LM head in fp16, int8, int4 or ternary; norm
gains and RoPE frequencies in fp32; the tokenizer; and a config from which the name, dtype and shape of every tensor follow, so
that a file is either whole or refused.
docs/packed_format.md describes it byte for byte. export/write.py writes it. Reading needs no torch.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from bitdistill.errors import UserError
from bitdistill.kernels import packing as layout
from bitdistill.kernels.packing import INT4_GROUP
from bitdistill.runtime.packed_check import config_problem
from bitdistill.text_files import download_gone_wrong

FORMAT = "bitdistill-packed"
VERSION = 4
READ = ("2", "3", "4")  # 2 had one scale per linear, 2 and 3 one activation scale per token, and did not say so
EMBEDDINGS = layout.TABLE_FORMATS
TOKENIZER = "tokenizer.json"
_DTYPES = {"U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class Linear:
    """One ternary projection: what tensors it has. `subln_eps` is None where there is no SubLN in front; `input_scale` says
    whether its input is divided by a vector before it is rounded."""

    out_features: int
    in_features: int
    bias: bool
    subln_eps: float | None
    input_scale: bool = False


@dataclass(frozen=True)
class Config:
    """All that a runtime must know besides the tensors; stored as JSON in the file's header."""

    model_type: str  # llama | qwen2 | qwen3 | gemma3_text
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    activation: str  # silu | gelu_pytorch_tanh
    attention_scale: float  # multiplies q.k
    embedding_scale: float  # multiplies the rows of the embedding, not the LM head
    tied: bool  # the LM head is the embedding
    rope: list[str]  # per layer: which of the stored RoPE tables it turns by
    window: list[int | None]  # per layer: how many last positions it sees, itself included; None is all
    eos_token_ids: list[int]
    packing: str  # 2bit | base3
    embedding: str  # fp16 | int8 | int4 | ternary
    tokenizer_bytes: int  # 0: the file has no tokenizer
    linears: dict[str, Linear]
    norms: dict[str, int]  # name -> width
    weight_scale: str = "tensor"  # of each linear: one fp32 scale | "row", "group": fp16 scales
    group_size: int | None = None  # columns of a group; the last one of a row may be narrower
    act_scale: str = "token"  # what has an activation scale: a token | "block", 32 columns of it

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Raises ValueError for a text that no runtime could work with."""
        try:
            fields = json.loads(text)
        except RecursionError:
            raise ValueError("a config that is nested too deeply") from None
        if problem := config_problem(fields):
            raise ValueError(problem)
        fields["linears"] = {name: Linear(**linear) for name, linear in fields["linears"].items()}
        return cls(**fields)

    def expected_tensors(self) -> dict[str, tuple[type, tuple[int, ...]]]:
        """Name -> (numpy dtype, shape) of every tensor that a file with this config holds."""
        expected: dict[str, tuple[type, tuple[int, ...]]] = {}
        for name, linear in self.linears.items():
            size = layout.packed_bytes(linear.out_features, linear.in_features, self.packing)
            expected[f"{name}.weight_packed"] = (np.uint8, (size,))
            columns = self.scale_columns(linear)
            groups = None if columns is None else -(-linear.in_features // columns)
            shape = () if groups is None else (layout.row_groups(linear.out_features), groups, layout.BLOCK_ROWS)
            expected[f"{name}.weight_scale"] = (np.float32 if groups is None else np.float16, shape)
            if linear.bias:
                expected[f"{name}.bias"] = (np.float32, (linear.out_features,))
            if linear.subln_eps is not None:
                expected[f"{name}.subln"] = (np.float32, (linear.in_features,))
            if linear.input_scale:
                expected[f"{name}.input_scale"] = (np.float32, (linear.in_features,))
        for name in self.tables():
            rows, columns = self.vocab_size, self.hidden_size
            if self.embedding == "fp16":
                expected[f"{name}.weight"] = (np.float16, (rows, columns))
            elif self.embedding == "int8":
                expected[f"{name}.weight_packed"] = (np.int8, (layout.packed_bytes(rows, columns, "int8"),))
                expected[f"{name}.weight_scale"] = (np.float32, (rows,))
            elif self.embedding == "int4":
                expected[f"{name}.weight_packed"] = (np.uint8, (layout.packed_bytes(rows, columns, "int4"),))
                groups = (layout.row_groups(rows), columns // INT4_GROUP, layout.BLOCK_ROWS)
                expected[f"{name}.weight_scale"] = (np.float16, groups)
            else:
                expected[f"{name}.weight_packed"] = (np.uint8, (layout.packed_bytes(rows, columns, self.packing),))
                expected[f"{name}.weight_scale"] = (np.float32, (rows,))
        for name, width in self.norms.items():
            expected[f"{name}.gain"] = (np.float32, (width,))
        for kind in sorted(set(self.rope)):
            expected[f"rope.{kind}.inv_freq"] = (np.float32, (self.head_dim // 2,))
            expected[f"rope.{kind}.attention_scaling"] = (np.float32, ())
        if self.tokenizer_bytes:
            expected[TOKENIZER] = (np.uint8, (self.tokenizer_bytes,))
        return expected

    def scale_columns(self, linear: Linear) -> int | None:
        """Columns of a row of this linear that share a scale; None where all of it does."""
        return {"tensor": None, "row": linear.in_features, "group": self.group_size}[self.weight_scale]

    def tables(self) -> tuple[str, ...]:
        """The (V, hidden) matrices in the embedding's format."""
        return ("model.embed_tokens",) if self.tied else ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class PackedModel:
    """A packed file, open. `tensors` are read-only views of a memory map: no byte is copied."""

    path: Path
    config: Config
    metadata: dict[str, Any]  # what the writer was given: stage, base model, ...
    tensors: dict[str, np.ndarray]
    file_bytes: int

    def weight_codes(self, name: str) -> np.ndarray:
        """int8 (O, I) in {-1, 0, 1} of a linear."""
        linear = self.config.linears[name]
        packed = self.tensors[f"{name}.weight_packed"]
        return layout.unpack(packed, linear.out_features, linear.in_features, self.config.packing)

    def weight_scales(self, name: str) -> np.ndarray:
        """float32 () of a linear, or (O, G) where groups of `Config.scale_columns` have scales."""
        stored = self.tensors[f"{name}.weight_scale"]
        if stored.ndim == 0:
            return stored
        return layout.unpack_scales(stored, slice(self.config.linears[name].out_features)).astype(np.float32)

    def table(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """float32 (rows, hidden) of an embedding or LM head, dequantized."""
        if self.config.embedding == "fp16":
            return self.tensors[f"{name}.weight"][rows].astype(np.float32)
        codes, scale = self.table_codes(name, rows)
        return (decode_int4 if self.config.embedding == "int4" else decode_rows)(codes, scale)

    def table_codes(self, name: str, rows: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(int8 (rows, hidden), scale) of an int8, int4 or ternary table: float32 (rows,), int4 float16 (rows, hidden / 32)."""
        rows = np.arange(self.config.vocab_size)[rows]
        scale, packed = self.tensors[f"{name}.weight_scale"], self.tensors[f"{name}.weight_packed"]
        kind = self.config.packing if self.config.embedding == "ternary" else self.config.embedding
        codes = layout.unpack_rows(packed, rows, self.config.hidden_size, kind)
        return codes, layout.unpack_scales(scale, rows) if kind == "int4" else scale[rows]

    def tokenizer_json(self) -> str | None:
        return self.tensors[TOKENIZER].tobytes().decode("utf-8") if self.config.tokenizer_bytes else None


def decode_rows(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``codes * scale`` in float32, a scale per row: the tables of `encode_int8` and `encode_ternary`."""
    return codes.astype(np.float32) * scale[:, None]


def decode_int4(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The float32 (V, hidden) table of `encode_int4`'s codes and scales."""
    rows, groups = scale.shape
    return (codes.reshape(rows, groups, INT4_GROUP) * scale.astype(np.float32)[:, :, None]).reshape(rows, -1)


def read_packed(path: str | Path) -> PackedModel:
    """Opens a packed file as a read-only memory map and checks all of it. Imports no torch.

    Args:
        path: a file of `write_packed`.

    Returns: config, metadata and tensors. Reading the checksum touches every byte once (about 1 s a GB).

    Raises:
        UserError: no such file, not a safetensors file or a truncated one, a foreign one, a newer version, missing,
            extra or misshapen tensors, or bytes that changed after writing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            "RUN_OR_FILE", expected="a packed student file", got=f"{path} (no such file)", do="Check the path."
        )
    try:
        with safe_open(path, framework="np") as file:  # validates the header and that the file is as long as it says
            header = file.metadata() or {}
    except SafetensorError as error:
        known = download_gone_wrong(path)
        kind, do = known or (f"another kind of file or truncated ({error})", "Copy or export it again.")
        got = f"{path}, which is {kind}"
        raise UserError("RUN_OR_FILE", expected="a whole safetensors file", got=got, do=do) from error
    if header.get("format") != FORMAT:
        raise UserError(
            "RUN_OR_FILE",
            expected=f"a safetensors file with format {FORMAT}",
            got=f"{path}, format {header.get('format')}: a checkpoint of something else",
            do="Give export/student.safetensors of a run.",
        )
    if header.get("version") not in READ:
        raise UserError(
            "RUN_OR_FILE",
            expected=f"packed format version {', '.join(READ)}",
            got=f"{path}, version {header.get('version')}",
            do="Update bitdistill, or export the student again.",
        )
    damaged = UserError(
        "RUN_OR_FILE",
        expected="the bytes that were written",
        got=f"{path}, which was damaged or edited (a checksum differs)",
        do="Copy or export it again.",
    )
    if config_checksum(header) != header.get("config_sha256"):
        raise damaged
    try:
        config, metadata = Config.from_json(header.get("config", "")), json.loads(header.get("metadata", ""))
        if not isinstance(metadata, dict) or not isinstance(metadata.get("tokenizer", {}), dict):
            raise ValueError("metadata that is no object")
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: fields that a Config does not have
        raise UserError(
            "RUN_OR_FILE",
            expected="a config and metadata that this version writes",
            got=f"{path} with {error}",
            do="Export the student again.",
        ) from error
    tensors = _map(path)
    _check_tensors(path, config.expected_tensors(), tensors)
    if data_checksum(tensors) != header.get("data_sha256"):
        raise damaged
    return PackedModel(path, config, metadata, tensors, path.stat().st_size)


def _map(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a (validated) safetensors file as a read-only view of one memory map.

    The library's own numpy reader copies each tensor; the format is 8 bytes of header length, JSON, then the data.
    """
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    index = json.loads(data[8:start].tobytes())
    index.pop("__metadata__", None)
    tensors = {}
    for name, entry in index.items():
        begin, end = entry["data_offsets"]
        raw = data[start + begin : start + end]
        dtype = _DTYPES.get(entry["dtype"])  # another one is not of this format: left as bytes, refused by its shape
        tensors[name] = raw if dtype is None else raw.view(dtype).reshape(entry["shape"])
    return tensors


def _check_tensors(path: Path, expected: dict, tensors: dict[str, np.ndarray]) -> None:
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    other = [
        f"{name} {tensors[name].dtype.name} {tensors[name].shape}"
        for name in sorted(set(expected) & set(tensors))
        if (tensors[name].dtype.type, tensors[name].shape) != expected[name]
    ]
    for problem, names in (("missing", missing), ("extra", extra), ("of another dtype or shape", other)):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                "RUN_OR_FILE",
                expected=f"the {len(expected)} tensors that its config names",
                got=f"{path} with {len(names)} {problem}: {shown}",
                do="Export the student again.",
            )


def sealed_as(path: str | Path) -> str | None:
    """The checksum over the tensors that a packed file was written with: the same for equal weights. None for another file."""
    try:
        with safe_open(Path(path), framework="np") as file:
            return (file.metadata() or {}).get("data_sha256")
    except SafetensorError:
        return None


def config_checksum(header: dict[str, str]) -> str:
    """sha256 over what the header says, as hexadecimal digits."""
    covered = [header.get(key, "") for key in ("format", "version", "config", "metadata")]
    return hashlib.sha256("\n".join(covered).encode()).hexdigest()


def data_checksum(tensors: dict[str, np.ndarray]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype.name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(np.uint8))
    return digest.hexdigest()
