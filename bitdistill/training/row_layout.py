"""What the cache of stage 3 holds of each training row, and how many bytes that is, before anything is written (row_cache.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitdistill.errors import UserError
from bitdistill.kernels.numerics import IGNORED
from bitdistill.training.cache_files import require_room
from bitdistill.training.relation_states import StateShape, state_shape
from bitdistill.training.teacher_cache import LEAST_SHARDS, SHARD_BYTES

OVERHEAD_BYTES = 24 + 20  # of a row: offset, hash and checksum, and a zstd frame around what cannot be made smaller
LABEL_FREE = "none"  # kd_tokens of a stage without logits distillation


@dataclass(frozen=True)
class RowLayout:
    """What a cache holds. Sizes follow from it and from the rows, before anything is written.

    Args:
        rows: how many. row_bytes: of all rows together, before compression. longest: tokens of the longest row.
        distilled: "response", "all" (every token) or "none": where logits are distilled.
        hidden: the teacher's hidden size where final hidden states are kept, else 0.
        top_k: words whose logits are kept, else 0. vocabulary: rows of the LM head. temperature: for which the rest holds.
        layers: decoder layers whose relations are kept. states: what is kept of each, None for none.
        padded: whether the states of padding count, too (pr382): each row is kept as long as the longest.
    """

    rows: int
    row_bytes: int
    longest: int
    distilled: str
    hidden: int
    top_k: int
    vocabulary: int
    temperature: float
    layers: tuple[int, ...]
    states: StateShape | None
    padded: bool

    def bytes_of(self, lengths: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Bytes of rows before compression: int64 (n,).

        Args:
            lengths, positions: int64 (n,), tokens, and positions that logits are distilled on.
        """
        size = OVERHEAD_BYTES + positions * sum(np.dtype(d).itemsize * w for d, w in self.logits())
        if self.states is not None:
            lengths = np.full_like(lengths, self.longest) if self.padded else lengths
            size = size + len(self.layers) * sum(2 * numbers + 2 for numbers in self.states.numbers(lengths))
        return size + (2 if self.hidden else 0)

    def logits(self) -> list[tuple[str, int]]:
        """(dtype, numbers) of the arrays that are kept of each distilled position."""
        if self.distilled == LABEL_FREE:
            return []
        if self.hidden:
            return [("<f2", self.hidden)]
        return [("<u2" if self.vocabulary <= 2**16 else "<u4", self.top_k), ("<f2", self.top_k), ("<f4", 1)]

    @property
    def head_bytes(self) -> int:
        """The most that the LM head takes: a teacher on a CPU multiplies with it in fp32."""
        return 4 * self.hidden * self.vocabulary

    @property
    def total_bytes(self) -> int:
        """Of the whole cache, before compression."""
        return self.row_bytes + self.head_bytes

    @property
    def rows_per_shard(self) -> int:
        fitting = max(1, SHARD_BYTES // max(1, self.row_bytes // max(1, self.rows)))
        return max(1, min(fitting, -(-self.rows // LEAST_SHARDS)))

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def __str__(self) -> str:
        kept = {"final hidden states": self.hidden, f"the {self.top_k} largest logits": self.top_k}
        parts = [name for name, there in kept.items() if there and self.distilled != LABEL_FREE]
        if self.states is not None:
            parts.append(f"relations of layer{'s' * (len(self.layers) > 1)} {', '.join(map(str, self.layers))}")
        return (
            f"{self.rows:,} rows, {' and '.join(parts) or 'nothing'}: {self.row_bytes / max(1, self.rows):,.0f} bytes per row, "
            f"{self.total_bytes / 1e9:.3g} GB at most, before compression"
        )


@dataclass(frozen=True)
class TeacherNeeds:
    """The settings of stage 3 that say which outputs of the teacher it needs.

    Args:
        lambda_logits, kd_tokens, kd_temperature, relation, split_heads: as in distill.Distillation.
        top_k: words kept of each position; None keeps final hidden states. layers: of the teacher.
    """

    lambda_logits: float
    kd_tokens: str
    kd_temperature: float
    top_k: int | None
    relation: str
    layers: Sequence[int]
    split_heads: int | None

    @property
    def distilled(self) -> str:
        """Where logits are distilled, as in RowLayout."""
        return self.kd_tokens if self.lambda_logits > 0 else LABEL_FREE

    @property
    def words(self) -> int | None:
        """Words kept of each distilled position; None for final hidden states, or nothing."""
        return None if self.distilled == LABEL_FREE else self.top_k

    def what_is_kept(self) -> dict[str, Any]:
        """What a cache depends on, besides teacher and rows: equal for settings that can share one."""
        forms = {"none": "none", "pr382": "padded states", "attention_maps": "queries and keys"}
        related = self.relation != "none"
        return {
            "distilled": self.distilled,
            "top_k": self.words,
            "temperature": None if self.words is None else self.kd_temperature,
            "relations": forms.get(self.relation, "states"),
            "layers": list(self.layers) if related else [],
            "split_heads": self.split_heads if related else None,
        }


def row_sizes(rows, distilled: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, positions that logits are distilled on) of each training row, int64 (n,).

    Args:
        rows: a data set from tasks.encode. distilled: as in RowLayout.
    """
    table = rows.with_format("arrow")[:]
    labels = table["labels"].combine_chunks()
    ends = labels.offsets.to_numpy().astype(np.int64)
    lengths = np.diff(ends)
    answers = np.concatenate([[0], np.cumsum(labels.values.to_numpy(zero_copy_only=False) != IGNORED)])
    first = (labels.values.to_numpy(zero_copy_only=False)[ends[:-1]] != IGNORED).astype(np.int64)
    counted = answers[ends[1:]] - answers[ends[:-1]] - first  # labels are shifted: nothing predicts the first
    return lengths, {"response": counted, "all": lengths, LABEL_FREE: np.zeros_like(lengths)}[distilled]


def row_layout(teacher, rows, needs: TeacherNeeds) -> RowLayout:
    """What a cache of this teacher holds of these rows.

    Args:
        teacher: its configuration. rows: a data set from tasks.encode. needs: of stage 3.

    Raises:
        UserError: top_k above the vocabulary.
    """
    if needs.words is not None and needs.words > teacher.vocab_size:
        raise UserError(
            "distill.cache_top_k",
            expected=f"1 to {teacher.vocab_size}, the model's words",
            got=str(needs.words),
            do="Set it to a number in this range, or leave it out to keep final hidden states.",
        )
    lengths, positions = row_sizes(rows, needs.distilled)
    heads, groups = teacher.num_attention_heads, teacher.num_key_value_heads
    width = getattr(teacher, "head_dim", None) or teacher.hidden_size // heads
    states = state_shape(needs.relation, heads, groups, width, needs.split_heads)
    kept = {
        "rows": len(lengths),
        "longest": int(lengths.max(initial=0)),
        "distilled": needs.distilled,
        "hidden": teacher.hidden_size if needs.distilled != LABEL_FREE and needs.top_k is None else 0,
        "top_k": needs.words or 0,
        "vocabulary": teacher.vocab_size,
        "temperature": float(needs.kd_temperature) if needs.top_k is not None else 1.0,
        "layers": tuple(needs.layers) if states is not None else (),
        "states": states,
        "padded": needs.relation == "pr382",
    }
    size = int(RowLayout(**kept, row_bytes=0).bytes_of(lengths, positions).sum())
    return RowLayout(**kept, row_bytes=size)


def check_room(folder: Path, layout: RowLayout) -> None:
    """Raises UserError when the disk of `folder` has no room for the shards that are not in it yet."""
    do = (
        "Lower max_train_rows, max_length or the number of distill.relation_layers, move output_dir, or give "
        "--distill.teacher_cache false, which runs the teacher beside the student."
    )
    require_room(folder, layout.total_bytes, what="what the teacher says", layout=layout, do=do)
