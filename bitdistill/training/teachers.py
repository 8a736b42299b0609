"""The teacher's outputs for a training step: from a teacher in memory or, in stage 3, from its cache on disk (row_cache.py)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitdistill.distributed.teacher import Teacher
from bitdistill.student.norms import fuse_norms
from bitdistill.training.capture import AttentionCapture
from bitdistill.training.head import head_weight, hidden_states, instead_of_logits
from bitdistill.training.hidden import HiddenStates, check_hidden_sizes, teacher_layers


@dataclass(frozen=True)
class Said:
    """What a teacher said to one batch.

    Args:
        hidden: (B, P, G), its final hidden states at the positions asked for; None where nothing is distilled there, or where
            its largest logits are known.
        top_k: (indices (N, K), values (N, K), log_rest (N,)) of the rows distilled on, in their order, as in
            head.head_distillation_top_k; or None.
        qkv: {layer: (q_BHTD, k_BGTD, v_BGTD)} of the layers whose relations are distilled, or tensors with the same relations.
        states: hidden states after the layers, for hidden.hidden_state_loss; None where they are not distilled.
    """

    hidden: Tensor | None
    top_k: tuple[Tensor, Tensor, Tensor] | None
    qkv: dict[int, tuple[Tensor, ...]]
    states: Any = None


class LiveTeacher:
    """A teacher that runs beside the student.

    Args:
        teacher: frozen. layers: whose Q, K and V are asked for; none for no layer.
        states_for: configuration of a student whose hidden states are compared with the teacher's; None for none.
    """

    def __init__(self, teacher: Teacher, layers: Sequence[int], states_for: Any = None):
        self.teacher = teacher
        if teacher.device.type == "cpu":
            fuse_norms(teacher.module)
        self.capture = AttentionCapture(teacher.module, layers) if layers else None
        self.states = None
        if states_for is not None:
            config = teacher.module.config
            check_hidden_sizes(config, states_for)
            of_teacher = teacher_layers(states_for.num_hidden_layers, config.num_hidden_layers)
            self.states = HiddenStates(teacher.module, of_teacher)

    @property
    def vocab_size(self) -> int:
        """Words of the teacher."""
        return self.teacher.module.config.vocab_size

    def head(self) -> AbstractContextManager[Tensor]:
        """What its head multiplies with (V, G), inside a with block."""
        return head_weight(self.teacher.module)

    def look(self, batch: dict[str, Tensor], rows_BP: Tensor, inputs: dict[str, Any]) -> Said:
        """Runs the teacher on a batch.

        Args:
            batch: the rows. rows_BP: bool, the positions that are distilled on. inputs: what the student is called with.
        """
        watched = self.capture or nullcontext(), self.states or nullcontext()
        with watched[0], watched[1], instead_of_logits(self.teacher.module, hidden_states):
            hidden = self.teacher(**inputs).logits
        return Said(hidden, None, self.capture.qkv if self.capture else {}, self.states and self.states.states)
