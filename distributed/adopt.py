"""Going on from a checkpoint that other ranks, another ZeRO stage, or PyTorch alone have written.

In a Trainer's `checkpoint-N`, everything but the optimizer's tensors is the same for all layouts: the steps done and what
was logged (trainer_state.json), the learning rates (scheduler.pt). The state of the random numbers is one file per rank.
`adopt` puts these beside the checkpoints in the form that a Trainer on the present ranks reads; `Adopted.state` gives the
tensors (saved_state.py).
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bitdistill.distributed import process_group
from bitdistill.distributed.checkpoint import ranks_of
from bitdistill.distributed.saved_state import FORM_OF_STAGE, SavedState, form_of, read_state
from bitdistill.files import write_whole

FOLDER = ".adopted"  # beside the checkpoints
SCHEDULE, TRAINER = "scheduler.pt", "trainer_state.json"


@dataclass(frozen=True)
class Adopted:
    """A checkpoint from elsewhere.

    Attributes:
        checkpoint: its folder. folder: what the Trainer is given in its place. step: the steps done.
        before, now: who wrote it and who goes on, in words.
    """

    checkpoint: Path
    folder: Path
    step: int
    before: str
    now: str

    def __str__(self) -> str:
        return f"written on {self.before}, now on {self.now}"

    def state(self, order: Sequence[str]) -> SavedState:
        """Its tensors. Args: order: as in `read_state`."""
        return read_state(self.checkpoint, order)

    def load_schedule(self, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
        """Puts a fresh schedule, and the learning rates of its optimizer, where they were."""
        scheduler.load_state_dict(torch.load(self.folder / SCHEDULE, weights_only=True))
        groups = scheduler.optimizer.param_groups
        for group, rate in zip(groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


def adopt(checkpoint: Path, *, zero: int | None, micro_batch: int) -> Adopted | None:
    """Prepares to go on from a complete checkpoint, where it was written in another form. Every rank calls it.

    Args:
        checkpoint: from `latest_checkpoint`. zero: the present ZeRO stage, None for PyTorch alone.
        micro_batch: rows of a rank's micro-batch, for trainer_state.json.

    Returns: the checkpoint from elsewhere; None where the present ranks read it themselves.
    """
    before, now = (ranks_of(checkpoint), form_of(checkpoint)), (process_group.world_size(), FORM_OF_STAGE[zero])
    if before == now:
        return None
    folder = checkpoint.with_name(FOLDER)
    state = json.loads((checkpoint / TRAINER).read_text(encoding="utf-8"))
    if process_group.is_main():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_whole(folder / TRAINER, json.dumps(state | {"train_batch_size": micro_batch}))
        shutil.copyfile(checkpoint / SCHEDULE, folder / SCHEDULE)
        _copy_random_states(checkpoint, folder, process_group.world_size())
    process_group.barrier()
    step = int(state["global_step"])
    exactly = f"at ZeRO {zero}" if zero is not None else now[1]
    return Adopted(checkpoint, folder, step, _in_words(*before), _in_words(now[0], exactly))


def _copy_random_states(checkpoint: Path, folder: Path, ranks: int) -> None:
    """Each rank goes on with the state of the rank of its number; one that is new, with that of rank 0."""
    alone = checkpoint / "rng_state.pth"
    for rank in range(ranks):
        own, first = (checkpoint / f"rng_state_{number}.pth" for number in (rank, 0))
        source = next(file for file in (own, first, alone) if file.is_file())
        shutil.copyfile(source, folder / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"))


def _in_words(ranks: int, form: str) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''} {form}"
