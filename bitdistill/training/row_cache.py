"""The teacher of stage 3, run once: its outputs for every training row, on disk, so that stage 3 trains without it.

Kept for each row:

* what its logits are computed from, at the positions that are distilled: the final hidden state (2 bytes x hidden size; the
  LM head is kept once, in head.safetensors), from which the loss is the live teacher's to rounding. Or with `top_k` the K
  largest logits, without a head: 4 K + 4 bytes (6 K + 4 above 65,536 words), where all other words count as one;
* what the relations are computed from, for each distilled layer: relation_states.py.

    cache.json                         versioned header: what is held, and the size of every shard
    head.safetensors                   the teacher's LM head
    shard-00000.safetensors            data (bytes,) uint8, one zstd frame for each row (see `_Record`)
                                       offsets (n + 1,) int64, of the rows in data
                                       row_hash (n,) uint64, of a row's tokens and labels
                                       checksum (n,) uint64, of a row's frame

A row that is read is compared with its checksum, and its tokens and labels with those that the teacher saw.

Error. What is kept is rounded once, by at most 2^-12 of itself or 2^-25 of the row's largest number: less than a teacher in
half precision rounds its own activations. How far the losses then are from the live teacher's: tests/test_row_cache.py.
`top_k` is different in kind: a KL in which words were joined is smaller than the KL of all words, and at a temperature
of 5 much smaller.

Rank r of R writes every R-th of the shards that are missing, each whole or not at all; a restart, also on another number of
ranks, writes what is missing then.

Shape suffixes: B rows, P positions, T tokens, G teacher's hidden size, K words, N distilled positions of all rows.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from bitdistill.data.tasks import collate
from bitdistill.distributed import process_group
from bitdistill.distributed.teacher import Teacher
from bitdistill.errors import UserError
from bitdistill.files import whole_file
from bitdistill.kernels.numerics import IGNORED
from bitdistill.kernels.vocabulary import linear_top_k
from bitdistill.training.cache_files import HEADER, CacheFolder, move_finished, save_shard, shard_name
from bitdistill.training.capture import AttentionCapture
from bitdistill.training.head import head_weight, hidden_states, instead_of_logits
from bitdistill.training.losses import next_tokens
from bitdistill.training.relation_states import compressed, doubled, expanded, halved
from bitdistill.training.row_layout import RowLayout
from bitdistill.training.row_order import NO_ROW
from bitdistill.training.teacher_cache import round_top_k
from bitdistill.training.teachers import Said

FORMAT, VERSION, HEAD = "bitdistill teacher rows", 1, "head.safetensors"
OPEN_SHARDS = 256


# ---------------------------------------------------------------------------------------------------- one row


def row_hash(ids: Sequence[int], labels: Sequence[int]) -> int:
    """Eight bytes of BLAKE2 of a row's tokens and labels."""
    both = np.concatenate([np.asarray(ids, "<i4"), np.asarray(labels, "<i4")])
    return _digest(both.tobytes())


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _frame(arrays: list[np.ndarray]) -> bytes:
    """Arrays as one zstd frame: each with its bytes apart, the first of all numbers, then the second, ..."""
    flat = b"".join(np.ascontiguousarray(_bytes(array).T).tobytes() for array in arrays)
    return pyarrow.Codec("zstd", compression_level=1).compress(flat, asbytes=True)


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, 1).view(np.uint8)


def _arrays(frame: bytes, described: list[tuple[str, int]]) -> list[np.ndarray]:
    """The arrays of a frame, given their dtypes and numbers."""
    sizes = [np.dtype(dtype).itemsize * count for dtype, count in described]
    flat = np.frombuffer(pyarrow.Codec("zstd").decompress(frame, sum(sizes), asbytes=True), np.uint8)
    found, begin = [], 0
    for (dtype, count), size in zip(described, sizes, strict=True):
        part = flat[begin : begin + size].reshape(np.dtype(dtype).itemsize, count).T
        found.append(np.ascontiguousarray(part).view(dtype).reshape(count))
        begin += size
    return found


def _described(layout: RowLayout, length: int, positions: int) -> list[tuple[str, int]]:
    """dtypes and numbers of a row's arrays, in their order: exponents, logits, relations."""
    states = [] if layout.states is None else [int(n) for n in layout.states.numbers(length)] * len(layout.layers)
    exponents = len(states) + (1 if layout.hidden else 0)
    logits = [(dtype, positions * numbers) for dtype, numbers in layout.logits()]
    return [("<i2", exponents), *logits, *[("<f2", numbers) for numbers in states]]


# ---------------------------------------------------------------------------------------------------- writing


def write_rows(folder: Path, teacher: Teacher, rows, layout: RowLayout, *, batch_size: int, pad_token_id: int) -> None:
    """Runs the teacher over this rank's share of the rows, but for shards that are in `folder` already. Every rank calls it.

    Args:
        folder: of unfinished work, the same for all ranks.
        teacher: as it would run beside the student; where it is offloaded, the ranks run it together.
        rows: a data set from tasks.encode. layout: from row_layout.
        batch_size: rows at a time. pad_token_id: fills rows up to one length, as in training.
    """
    missing = [shard for shard in range(layout.shards) if not (folder / shard_name(shard)).is_file()]
    process_group.barrier()  # all have looked before anyone writes
    mine = missing[process_group.rank() :: process_group.world_size()]
    capture = AttentionCapture(teacher.module, layout.layers) if layout.layers else None
    say = lambda features: _said(teacher, capture, features, layout, pad_token_id)  # noqa: E731
    done = 0
    with tqdm(total=layout.rows, desc="teacher  ", unit="row", disable=not process_group.is_main()) as bar:
        bar.update(layout.rows - sum(len(_rows_of(shard, layout)) for shard in missing))
        for shard in mine:
            numbers = _rows_of(shard, layout)
            features = [rows[number] for number in numbers]
            by_length = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
            frames: dict[int, bytes] = {}
            for begin in range(0, len(by_length), batch_size):
                batch = by_length[begin : begin + batch_size]
                frames |= dict(zip(batch, say([features[i] for i in batch]), strict=True))
                done += 1
                bar.update(len(batch) * process_group.world_size())
            _save(folder / shard_name(shard), [frames[i] for i in range(len(features))], features, numbers.start)
        bar.update(layout.rows - bar.n)
    if teacher.forward is not teacher.module:  # gathering a layer is collective: ranks with less to do go on
        for _ in range(int(max(process_group.gather(done))) - done):
            say([rows[0]])
    if layout.hidden:
        _save_head(folder / HEAD, teacher)


def _rows_of(shard: int, layout: RowLayout) -> range:
    first = shard * layout.rows_per_shard
    return range(first, min(first + layout.rows_per_shard, layout.rows))


def _said(
    teacher: Teacher, capture: AttentionCapture | None, features: list[dict], layout: RowLayout, pad_token_id: int
) -> list[bytes]:
    """What is kept of each of some rows."""
    batch = {name: x.to(teacher.device) for name, x in collate(features, pad_token_id).items()}
    if layout.padded:
        more = layout.longest - batch["input_ids"].shape[1]
        fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
        batch = {name: F.pad(x, (0, more), value=fill[name]) for name, x in batch.items()}
    with torch.no_grad(), capture or nullcontext(), instead_of_logits(teacher.module, hidden_states):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden_BTG = teacher(**inputs, use_cache=False).logits
    frames = []
    with head_weight(teacher.module) if layout.top_k else nullcontext() as weight:
        for i, feature in enumerate(features):
            length = len(feature["input_ids"])
            rows_T = batch["attention_mask"][i].bool()
            if layout.distilled != "all":
                rows_T = next_tokens(batch["labels"][i : i + 1])[0] != IGNORED
            exponents, arrays = [], []
            if layout.hidden:
                numbers, exponent = halved(_finite(hidden_BTG[i, rows_T]))
                exponents.append(exponent)
                arrays.append(numbers)
            elif layout.top_k:
                indices, values, rest = linear_top_k(
                    hidden_BTG[i, rows_T], weight, layout.top_k, temperature=layout.temperature
                )
                values, rest = round_top_k(values, rest, layout.temperature)
                arrays += [indices.cpu().numpy(), values.cpu().numpy(), rest.cpu().numpy()]
            for layer in layout.layers:
                kept = layout.longest if layout.padded else length
                for vector in compressed([x[i, :, :kept] for x in capture.qkv[layer]], layout.states):
                    numbers, exponent = halved(_finite(vector))
                    exponents.append(exponent)
                    arrays.append(numbers)
            described = _described(layout, layout.longest if layout.padded else length, int(rows_T.sum()))
            arrays = [np.array(exponents), *arrays]
            assert [array.size for array in arrays] == [count for _, count in described]
            frames.append(_frame([array.astype(dtype) for array, (dtype, _) in zip(arrays, described, strict=True)]))
    return frames


def _finite(x: Tensor) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise UserError(
            "teacher.dtype",
            expected="a teacher whose activations are finite",
            got=f"NaN or infinity in its outputs, in {str(x.dtype).removeprefix('torch.')}",
            do="Give --teacher.dtype bfloat16, or float32.",
        )
    return x


def _save(path: Path, frames: list[bytes], features: list[dict], first: int) -> None:
    arrays = {
        "data": np.frombuffer(b"".join(frames), np.uint8),
        "offsets": np.cumsum([0, *map(len, frames)]),
        "row_hash": np.array([row_hash(one["input_ids"], one["labels"]) for one in features], np.uint64),
        "checksum": np.array([_digest(frame) for frame in frames], np.uint64),
    }
    save_shard(path, arrays, {"format": FORMAT, "version": VERSION, "first_row": first})


def _save_head(path: Path, teacher: Teacher) -> None:
    """The LM head as the teacher multiplies with it; where it is partitioned, every rank comes here."""
    with head_weight(teacher.module) as weight:
        if process_group.is_main():
            with whole_file(path) as temporary:
                save_tensors({"weight": weight.detach().cpu().contiguous()}, temporary)


def finish_rows(unfinished: Path, folder: Path, layout: RowLayout) -> int:
    """Moves what all ranks wrote to `folder` and writes the header. Rank 0, after a barrier.

    Returns: bytes of the shards and the head.
    """
    names = [shard_name(shard) for shard in range(layout.shards)] + ([HEAD] if layout.hidden else [])
    sizes = move_finished(unfinished, folder, names)
    header = {"format": FORMAT, "version": VERSION, "layout": asdict(layout), "bytes": sizes}
    (folder / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
    return sum(sizes.values())


# ---------------------------------------------------------------------------------------------------- reading


class CachedTeacher:
    """What a teacher said, read from disk: in the place of the teacher in distill.Distillation.

    Args:
        folder: RUN/teacher_cache. layout: what stage 3 needs, from row_layout. device: of the training.
        dtype: in which the teacher would compute; what is read is given in it.

    Raises:
        UserError: absent, of another version, cut short, or made for something else.
    """

    module = None  # there is no model

    def __init__(self, folder: str | Path, layout: RowLayout, *, dtype: torch.dtype, device: str | torch.device):
        self._files = CacheFolder(folder, format=FORMAT, version=VERSION, stage="teacher_cache")
        self.layout, self.dtype, self.device = layout, dtype, device
        header = self._files.header()
        wanted, held = json.loads(json.dumps(asdict(layout))), header["layout"]
        for name in sorted(wanted, key="row_bytes".__eq__):  # the settings first, which say more than a sum
            self._files.require(name, wanted[name] == held.get(name), wanted[name], held.get(name))
        self._files.require_sizes(header["bytes"])
        self._open: dict[int, tuple[Any, dict[str, np.ndarray]]] = {}
        self._weight = None
        if layout.hidden:
            self._weight = load_file(self._files.path / HEAD)["weight"].to(device)

    @property
    def vocab_size(self) -> int:
        """Words of the teacher."""
        return self.layout.vocabulary

    @contextmanager
    def head(self) -> Iterator[Tensor]:
        """What the teacher's head multiplies with (V, G)."""
        yield self._weight

    def look(self, batch: dict[str, Tensor], rows_BP: Tensor, inputs: dict[str, Any]) -> Said:
        """What the teacher said to a batch, as teachers.LiveTeacher.look.

        Raises: UserError: the teacher saw other rows, or a shard is damaged.
        """
        size, layout = batch["input_ids"].shape, self.layout
        tokens, labels = batch["input_ids"].cpu().numpy(), batch["labels"].cpu().numpy()
        lengths, positions = batch["attention_mask"].sum(1).tolist(), rows_BP.sum(1).tolist()
        hidden_BPG = torch.zeros(*rows_BP.shape, layout.hidden) if layout.hidden else None
        top_k: list[list[np.ndarray]] = []
        shapes = layout.states and list(zip(layout.states.heads, layout.states.widths, strict=True))
        qkv = {
            layer: [torch.zeros(size[0], heads, size[1], width) for heads, width in shapes] for layer in layout.layers
        }
        for i, row in enumerate(batch["row"].tolist()):
            if row == NO_ROW:
                continue
            length = lengths[i]
            frame = self._frame(row, row_hash(tokens[i, :length], labels[i, :length]))
            kept = layout.longest if layout.padded else length
            exponents, *arrays = _arrays(frame, _described(layout, kept, positions[i]))
            exponents = list(exponents)
            logits, states = arrays[: len(layout.logits())], arrays[len(layout.logits()) :]
            if layout.hidden:
                hidden = doubled(logits[0], exponents.pop(0)).view(-1, layout.hidden)
                hidden_BPG[i, rows_BP[i].cpu()] = hidden
            elif logits:
                top_k.append(logits)
            vectors = [doubled(*pair) for pair in zip(states, exponents, strict=True)]
            for layer in layout.layers:
                of_layer, vectors = vectors[: len(shapes)], vectors[len(shapes) :]
                for tensor, x_HTD in zip(qkv[layer], expanded(of_layer, kept, layout.states), strict=True):
                    tensor[i, :, : min(kept, size[1])] = x_HTD[:, : size[1]]
        here = {"device": self.device, "dtype": self.dtype}
        return Said(
            hidden=None if hidden_BPG is None else hidden_BPG.to(**here),
            top_k=self._joined(top_k) if layout.top_k else None,
            qkv={layer: tuple(x.to(**here) for x in tensors) for layer, tensors in qkv.items()},
        )

    def _joined(self, rows: list[list[np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
        """Indices (N, K), values (N, K) and the rest (N,) of all rows together."""
        empty = [np.empty(0, dtype) for dtype, _ in self.layout.logits()]
        indices, values, rest = (np.concatenate(parts) for parts in zip(empty, *rows, strict=True))
        found = (indices.astype(np.int32).reshape(-1, self.layout.top_k), values.reshape(-1, self.layout.top_k), rest)
        return tuple(torch.from_numpy(np.ascontiguousarray(part)).to(self.device) for part in found)

    def _frame(self, row: int, ours: int) -> bytes:
        self._files.require("rows", row < self.layout.rows, f"more than {row}", self.layout.rows)
        shard, place = divmod(row, self.layout.rows_per_shard)
        file, index = self._shard(shard)
        theirs = int(index["row_hash"][place])
        self._files.require(f"tokens of row {row}", ours == theirs, f"hash {ours:016x}", f"hash {theirs:016x}")
        begin, end = index["offsets"][place : place + 2].tolist()
        frame = file.get_slice("data")[begin:end].tobytes()
        found, checksum = _digest(frame), int(index["checksum"][place])
        self._files.require(
            f"{shard_name(shard)}, row {row}", found == checksum, f"checksum {checksum:016x}", f"{found:016x}"
        )
        return frame

    def _shard(self, shard: int) -> tuple[Any, dict[str, np.ndarray]]:
        if shard not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            file = self._files.opened(shard, first_row=_rows_of(shard, self.layout).start)
            try:
                index = {name: file.get_tensor(name) for name in ("offsets", "row_hash", "checksum")}
            except SafetensorError as error:
                self._files.require(shard_name(shard), False, "a whole safetensors file", error)
            self._open[shard] = file, index
        return self._open[shard]
