"""In which order the rows of a task are trained on: the same for every number of ranks and micro-steps.

A step takes the next rows in the epoch's order, whichever rank gets them. When the last rows of an epoch do not fill a
micro-batch on each rank, accelerate would hand out rows of its beginning once more, and how many would depend on the number
of ranks. Here the batches are filled up with empty rows instead: one padding token without a label, which no mean counts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from bitdistill.kernels.numerics import IGNORED

NO_ROW = -1  # the number of a row that fills a batch up


class FilledRows(Dataset):
    """Rows with their numbers; the one after the last is none.

    Args:
        rows: from tasks.encode. pad_token_id: what a row that is none consists of.
    """

    def __init__(self, rows, pad_token_id: int):
        self.rows = rows
        self._none = {"input_ids": [pad_token_id], "labels": [IGNORED], "row": NO_ROW}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._none if number == len(self.rows) else {**self.rows[number], "row": number}


class RowOrder(Sampler):
    """Numbers of rows for an epoch, filled up with `len(rows)`, which stands for none.

    Args:
        rows: how many. multiple: what their number is filled up to a multiple of: a micro-batch on each rank.
        seed: of the first epoch's order. lengths: of the rows, in tokens, to put rows of like length together; None does not.
        step_rows: rows of an optimizer step over all ranks, among which like lengths are sought.
    """

    def __init__(self, rows: int, multiple: int, seed: int, lengths: Sequence[int] | None = None, step_rows: int = 1):
        self.rows, self.multiple, self.seed = rows, multiple, seed
        self.lengths, self.step_rows, self.epoch = lengths, step_rows, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch + self.seed)
        if self.lengths is None:
            order = torch.randperm(self.rows, generator=generator).tolist()
        else:
            order = get_length_grouped_indices(self.lengths, self.step_rows, generator=generator)
        yield from order
        yield from [self.rows] * (len(self) - self.rows)
