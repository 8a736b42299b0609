"""The packed student file: one safetensors file with everything that CPU inference needs. docs/packed_format.md.

Per ternary linear the packed codes (2 bit or base 3), one fp32 scale, the bias and the SubLN gain where the student has
them; the embedding and an untied LM head in fp16, int8 or int4; norm gains and RoPE frequencies in fp32; the tokenizer;
and a config from which the name, dtype and shape of every tensor follow, so that a file is either whole or refused.

Tensor names are the student's state-dict names. What stock configs leave implicit is resolved when the file is
written: gains are multipliers (Gemma's ``1 + w`` is stored as such) and RoPE frequencies are those of the model's own
buffers, so that a reader needs no knowledge of RoPE scaling. Writing needs torch (imported where it is used), reading
does not.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bitdistill.errors import UserError
from bitdistill.kernels import packing as layout
from bitdistill.kernels.numerics import EPSILON
from bitdistill.kernels.packing import INT4_GROUP

FORMAT = "bitdistill-packed"
VERSION = 2
EMBEDDINGS = layout.TABLE_FORMATS
TOKENIZER = "tokenizer.json"
_DTYPES = {"U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32}
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_LAYER_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)


@dataclass(frozen=True)
class Linear:
    """One ternary projection: what tensors it has. `subln_eps` is None where there is no SubLN in front."""

    out_features: int
    in_features: int
    bias: bool
    subln_eps: float | None


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

    @classmethod
    def from_json(cls, text: str) -> "Config":
        fields = json.loads(text)
        fields["linears"] = {name: Linear(**linear) for name, linear in fields["linears"].items()}
        return cls(**fields)

    def expected_tensors(self) -> dict[str, tuple[type, tuple[int, ...]]]:
        """Name -> (numpy dtype, shape) of every tensor that a file with this config holds."""
        expected: dict[str, tuple[type, tuple[int, ...]]] = {}
        for name, linear in self.linears.items():
            size = layout.packed_bytes(linear.out_features, linear.in_features, self.packing)
            expected[f"{name}.weight_packed"] = (np.uint8, (size,))
            expected[f"{name}.weight_scale"] = (np.float32, ())
            if linear.bias:
                expected[f"{name}.bias"] = (np.float32, (linear.out_features,))
            if linear.subln_eps is not None:
                expected[f"{name}.subln"] = (np.float32, (linear.in_features,))
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

    def table(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """float32 (rows, hidden) of an embedding or LM head, dequantised."""
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
        return codes, layout.unpack_int4_scale(scale, rows) if kind == "int4" else scale[rows]

    def tokenizer_json(self) -> str | None:
        return self.tensors[TOKENIZER].tobytes().decode("utf-8") if self.config.tokenizer_bytes else None


# --- formats of the embedding -----------------------------------------------------------------------------------------


def encode_int8(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``scale = max|row| / 127``, ``codes = round(table / scale)``, half to even; a zero row has scale 0.

    Args:
        table: float32 (V, hidden).

    Returns: (codes int8 (V, hidden), scale float32 (V,)).
    """
    scale = np.abs(table).max(axis=1) / np.float32(127)
    codes = np.rint(table / np.where(scale == 0, np.float32(1), scale)[:, None])
    return np.clip(codes, -127, 127).astype(np.int8), scale


def encode_ternary(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``scale = max(mean|row|, EPSILON)``, ``codes = clip(round(table / scale), -1, 1)``: absmean, a scale a row.

    Args:
        table: float32 (V, hidden).

    Returns: (codes int8 (V, hidden), scale float32 (V,)).
    """
    mean = np.abs(table).mean(axis=1, dtype=np.float64).astype(np.float32)
    scale = np.maximum(mean, np.float32(EPSILON))
    return np.clip(np.rint(table / scale[:, None]), -1, 1).astype(np.int8), scale


def decode_rows(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``codes * scale`` in float32, a scale a row: the tables of `encode_int8` and `encode_ternary`."""
    return codes.astype(np.float32) * scale[:, None]


def encode_int4(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``codes = clip(round(table / scale), -8, 7)``, half to even, a scale for 32 neighbouring columns.

    ``scale = fp16(v / -8)`` with v the entry of largest magnitude: the sign puts it on -8, the one code without a
    counterpart, for 11 % less error than seven codes to each side.

    Args:
        table: float32 (V, hidden), hidden a multiple of 32.

    Returns: (codes int8 (V, hidden), scale float16 (V, hidden / 32)). A zero group has scale 0.
    """
    rows, columns = table.shape
    groups = table.reshape(rows, columns // INT4_GROUP, INT4_GROUP)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2)
    scale = (extreme / np.float32(-8)).astype(np.float16)
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    codes = np.clip(np.rint(groups / divisor), -8, 7).astype(np.int8)
    return codes.reshape(rows, columns), scale[:, :, 0]


def decode_int4(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The float32 (V, hidden) table of `encode_int4`'s codes and scales."""
    rows, groups = scale.shape
    return (codes.reshape(rows, groups, INT4_GROUP) * scale.astype(np.float32)[:, :, None]).reshape(rows, -1)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_packed(
    path: str | Path,
    model,
    *,
    packing: str = "base3",
    embedding: str | None = None,
    tokenizer_json: bytes | None = None,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a refined student to one file, atomically.

    Args:
        path: the file; its folder must exist. An existing file is replaced once the new one is whole and on disk.
        model: a refined causal language model (torch) with fp32 master weights.
        packing: "base3" (1.6 bits a weight) or "2bit".
        embedding: "fp16", "int8" (a scale a row), "int4" (a scale for 32 columns) or "ternary" (a scale a row); an untied
            LM head likewise. None is as trained: the codes that training multiplied with, or fp16. Another one than was
            trained only rounds what was trained in full precision: the proof of parity shows what that costs.
        tokenizer_json: the bytes of tokenizer.json, or None for a file that only takes token ids.
        metadata: JSON values kept in the header for the reader's information.

    Returns: packing, embedding, linear_weights, linear_bytes (codes with padding, and scales), bits_per_weight (of
        these), embedding_bytes (with an untied LM head), other_bytes (norms, biases, tokenizer, header), file_bytes,
        parameters (ties counted once), model_bits_per_parameter. The three parts sum to file_bytes.

    Raises:
        UserError: not a refined student, weights that are not fp32 or not finite, another embedding than the quantized one
            that was trained, a RoPE scaling that depends on the length of the text, or another property that the runtime
            does not have.
    """
    path = Path(path)
    if packing not in layout.PACKINGS:
        raise UserError("packing", expected=f"one of {', '.join(layout.PACKINGS)}", got=repr(packing), do="Correct it.")
    if embedding is not None and embedding not in EMBEDDINGS:
        raise UserError("embedding", expected=f"one of {', '.join(EMBEDDINGS)}", got=repr(embedding), do="Correct it.")
    embedding = _embedding_to_store(model, embedding)
    if not path.parent.is_dir():
        raise UserError("path", expected="a file in an existing folder", got=str(path), do="Create the folder first.")
    config, tensors = _collect(model, packing, embedding, tokenizer_json)
    write_tensors(path, config, tensors, metadata)
    file_bytes = path.stat().st_size
    linear_bytes = sum(
        tensors[f"{name}.weight_packed"].nbytes + tensors[f"{name}.weight_scale"].nbytes for name in config.linears
    )
    embedding_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(config.tables()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    linear_weights = sum(linear.out_features * linear.in_features for linear in config.linears.values())
    return {
        "packing": packing,
        "embedding": embedding,
        "linear_weights": linear_weights,
        "linear_bytes": linear_bytes,
        "bits_per_weight": 8 * linear_bytes / linear_weights,
        "embedding_bytes": embedding_bytes,
        "other_bytes": file_bytes - linear_bytes - embedding_bytes,
        "file_bytes": file_bytes,
        "parameters": parameters,
        "model_bits_per_parameter": 8 * file_bytes / parameters,
    }


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
    header["config_sha256"] = _config_checksum(header)
    header["data_sha256"] = _data_checksum(tensors)
    with _atomic(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def _collect(model, packing: str, embedding: str, tokenizer_json: bytes | None) -> tuple[Config, dict[str, np.ndarray]]:
    """The config and the tensors of a student, ready to be written."""
    from bitdistill.layers import bit_linears

    layers = bit_linears(model)
    if not layers:
        raise UserError("model", expected="a refined student", got=type(model).__name__, do="Run --stage refine first.")
    _refuse_unsupported(model)
    tensors: dict[str, np.ndarray] = {}
    used = []  # parameters that went into the file, to be sure that none is left out

    linears = {}
    for name, layer in layers.items():
        _check_master(name, layer.weight)
        codes, scale = layer.ternary()
        tensors[f"{name}.weight_packed"] = layout.pack(codes.cpu().numpy(), packing)
        tensors[f"{name}.weight_scale"] = scale.cpu().numpy()
        bias = layer.ternary_bias()
        if bias is not None:
            tensors[f"{name}.bias"] = _float32(f"{name}.bias", bias)
        used += layer.parameters(recurse=False)  # weight, bias, learned scale
        if layer.subln is not None:
            tensors[f"{name}.subln"] = _float32(f"{name}.subln", layer.subln.weight)
            used.append(layer.subln.weight)
        rows, columns = layer.weight.shape
        eps = None if layer.subln is None else layer.subln.eps
        linears[name] = Linear(rows, columns, bias is not None, eps)

    hf, decoder = model.config, model.model
    head_dim = decoder.layers[0].self_attn.head_dim
    tied = model.lm_head.weight is decoder.embed_tokens.weight
    tables = {"model.embed_tokens": decoder.embed_tokens.weight}
    if not tied:
        tables["lm_head"] = model.lm_head.weight
    for name, weight in tables.items():
        tensors.update(_encode_table(name, _float32(name, weight), embedding, packing))
        used.append(weight)

    norms = {"model.norm": decoder.norm}
    for index, layer in enumerate(decoder.layers):
        for path in _LAYER_NORMS:
            owner, _, last = path.rpartition(".")
            norm = getattr(layer.get_submodule(owner), last, None)
            if norm is not None:
                norms[f"model.layers.{index}.{path}"] = norm
    for name, norm in norms.items():
        gain = _float32(name, norm.weight)
        tensors[f"{name}.gain"] = gain + np.float32(1) if hf.model_type == "gemma3_text" else gain
        used.append(norm.weight)

    rope, window = _attention_kinds(model)
    for kind in sorted(set(rope)):
        prefix = f"{kind}_" if isinstance(decoder.rotary_emb.rope_type, dict) else ""
        inv_freq = getattr(decoder.rotary_emb, f"{prefix}inv_freq")
        scaling = getattr(decoder.rotary_emb, f"{prefix}attention_scaling")
        if str(inv_freq.dtype) != "torch.float32" or 2 * len(inv_freq) != head_dim:
            raise UserError(
                "model",
                expected=f"{head_dim // 2} RoPE frequencies in float32",
                got=f"{len(inv_freq)} in {inv_freq.dtype}",
                do="Load the student in float32; RoPE over a part of the head is not supported.",
            )
        tensors[f"rope.{kind}.inv_freq"] = _float32("rope", inv_freq)
        tensors[f"rope.{kind}.attention_scaling"] = np.array(scaling, np.float32)
    if tokenizer_json:
        tensors[TOKENIZER] = np.frombuffer(tokenizer_json, np.uint8)

    left_out = {id(p): name for name, p in model.named_parameters()}
    for parameter in used:
        left_out.pop(id(parameter), None)
    assert not left_out, f"parameters that the format has no place for: {sorted(left_out.values())}"

    eos = model.generation_config.eos_token_id if model.generation_config else None
    eos = hf.eos_token_id if eos is None else eos
    config = Config(
        model_type=hf.model_type,
        vocab_size=decoder.embed_tokens.weight.shape[0],
        hidden_size=hf.hidden_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=hf.max_position_embeddings,
        rms_norm_eps=hf.rms_norm_eps,
        activation=_activation(hf),
        attention_scale=float(decoder.layers[0].self_attn.scaling),
        embedding_scale=float(getattr(decoder.embed_tokens, "embed_scale", 1.0)),
        tied=tied,
        rope=rope,
        window=window,
        eos_token_ids=[] if eos is None else [eos] if isinstance(eos, int) else list(eos),
        packing=packing,
        embedding=embedding,
        tokenizer_bytes=len(tokenizer_json or b""),
        linears=linears,
        norms={name: norm.weight.shape[0] for name, norm in norms.items()},
    )
    return config, tensors


def _embedding_to_store(model, wanted: str | None) -> str:
    """The format of the embedding: as trained, or as wanted where it was trained in full precision."""
    from bitdistill.embeddings import FULL_PRECISION, embedding_format

    trained = embedding_format(model)
    if wanted not in (None, trained) and trained != FULL_PRECISION:
        raise UserError(
            "embedding",
            expected=f"{trained}, in which the student's embedding was trained",
            got=wanted,
            do="Leave it out: only an embedding trained in full precision can be stored in another format.",
        )
    return wanted or trained


def _activation(hf) -> str:
    return getattr(hf, "hidden_activation", None) or hf.hidden_act


def _attention_kinds(model) -> tuple[list[str], list[int | None]]:
    """Per layer the name of its RoPE table and its sliding window."""
    hf = model.config
    kinds = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    one_rope = not isinstance(model.model.rotary_emb.rope_type, dict)
    window = [hf.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    return ["full_attention" if one_rope else kind for kind in kinds], window


def _refuse_unsupported(model) -> None:
    """Raises UserError for what the runtime would get wrong."""
    hf = model.config
    types = model.model.rotary_emb.rope_type
    for rope_type in types.values() if isinstance(types, dict) else [types]:
        if rope_type in ("dynamic", "longrope"):
            raise UserError(
                "rope_parameters",
                expected="a RoPE scaling whose frequencies do not depend on the length of the text",
                got=rope_type,
                do="Set rope_parameters of the base model to a fixed type before training.",
            )
    if _activation(hf) not in _ACTIVATIONS:
        raise UserError(
            "hidden_act",
            expected=f"one of {', '.join(_ACTIVATIONS)}",
            got=_activation(hf),
            do="Use another base model.",
        )
    for field in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(hf, field, None):
            raise UserError(
                field, expected="none (the runtime has no such step)", got=str(getattr(hf, field)), do="Clear it."
            )


def _check_master(name: str, weight) -> None:
    if str(weight.dtype) != "torch.float32":
        raise UserError(
            f"{name}.weight",
            expected="the float32 master weight (its bf16 copy has other codes)",
            got=str(weight.dtype),
            do="Load the student with bitdistill.refine.load_student.",
        )
    if not weight.isfinite().all():
        raise UserError(
            f"{name}.weight",
            expected="finite numbers",
            got="NaN or infinity",
            do="The training diverged: lower the learning rate.",
        )


def _float32(name: str, tensor) -> np.ndarray:
    array = tensor.detach().float().cpu().contiguous().numpy()
    if not np.isfinite(array).all():
        raise UserError(name, expected="finite numbers", got="NaN or infinity", do="The training diverged.")
    return array


def _encode_table(name: str, table: np.ndarray, embedding: str, packing: str) -> dict[str, np.ndarray]:
    if embedding == "int4" and table.shape[1] % INT4_GROUP:
        raise UserError(
            "embedding",
            expected=f"a hidden size that {INT4_GROUP} divides, for int4",
            got=str(table.shape[1]),
            do="Use int8 or fp16.",
        )
    peak = np.abs(table).max()
    if embedding in ("fp16", "int4") and peak > np.finfo(np.float16).max:
        raise UserError(
            "embedding", expected="entries up to 65504, for fp16", got=f"{peak:g} in {name}", do="Use int8."
        )
    if embedding == "fp16":
        return {f"{name}.weight": table.astype(np.float16)}
    if embedding == "int8":
        codes, scale = encode_int8(table)
        packed = layout.pack_int8(codes)
    elif embedding == "int4":
        codes, scale = encode_int4(table)
        packed, scale = layout.pack_int4(codes), layout.pack_int4_scale(scale)
    else:
        codes, scale = encode_ternary(table)
        packed = layout.pack(codes, packing)
    return {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale}


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; renamed onto it, and on disk, when the block ends well, removed otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _config_checksum(header: dict[str, str]) -> str:
    covered = [header.get(key, "") for key in ("format", "version", "config", "metadata")]
    return hashlib.sha256("\n".join(covered).encode()).hexdigest()


def _data_checksum(tensors: dict[str, np.ndarray]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype.name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(np.uint8))
    return digest.hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


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
        raise UserError("file", expected="a packed student file", got=f"{path} (no such file)", do="Check the path.")
    try:
        with safe_open(path, framework="np") as file:  # validates the header and that the file is as long as it says
            header = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(
            "file",
            expected="a whole safetensors file",
            got=f"{path}, which is another kind of file or truncated ({error})",
            do="Copy or export it again.",
        ) from error
    if header.get("format") != FORMAT:
        raise UserError(
            "file",
            expected=f"a safetensors file with format {FORMAT}",
            got=f"{path}, format {header.get('format')}: a checkpoint of something else",
            do="Give export/student.safetensors of a run.",
        )
    if header.get("version") != str(VERSION):
        raise UserError(
            "file",
            expected=f"packed format version {VERSION}",
            got=f"{path}, version {header.get('version')}",
            do="Update bitdistill, or export the student again.",
        )
    damaged = UserError(
        "file",
        expected="the bytes that were written",
        got=f"{path}, which was damaged or edited (a checksum differs)",
        do="Copy or export it again.",
    )
    if _config_checksum(header) != header.get("config_sha256"):
        raise damaged
    config = Config.from_json(header["config"])
    tensors = _map(path)
    _check_tensors(path, config.expected_tensors(), tensors)
    if _data_checksum(tensors) != header.get("data_sha256"):
        raise damaged
    return PackedModel(path, config, json.loads(header["metadata"]), tensors, path.stat().st_size)


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
                "file",
                expected=f"the {len(expected)} tensors that its config names",
                got=f"{path} with {len(names)} {problem}: {shown}",
                do="Export the student again.",
            )
