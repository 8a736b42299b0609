"""Teacher forcing by layer: each layer of the student begins by reading what the teacher's layer reads.

    x_l = (1 - f) s_(l-1) + f h_(l-1)          f = max(0, 1 - t / (share * T))          t: optimizer steps done, of T

s_(l-1) and h_(l-1) are the states after the layer below, of student and teacher. With f = 1 every layer learns alone to do
what the teacher's does, from inputs that make sense; its gradient reaches no other layer. As f falls, a layer has to bear what
the layers below make wrong, and the gradient reaches them, too. From share * T on, the student is by itself. Why: the first
thing that surgery does to a deep model is to fill its upper layers with noise, from which they cannot learn what they were
for. Only the losses between states (hidden.py) teach a layer whose input is the teacher's.

Source: this project's own (docs/results.md). Teacher forcing of sequences: Williams and Zipser 1989; its end by degrees,
scheduled sampling: arXiv 1506.03099; layers that learn from the full-precision model's inputs: BRECQ, arXiv 2102.05426.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel


def forcing_at(progress: float, share: float) -> float:
    """f of the equation above.

    Args:
        progress: t / T, optimizer steps done before this one over those of the stage. share: of the steps, 0 to 1; 0 for none.

    Returns: 1 at the first step, 0 from `share` on.
    """
    return 1 - progress / share if progress < share else 0.0


class TeacherForcing:
    """Gives the layers of a student its teacher's states, in part.

    The states stay until the next batch or `release`, for a backward pass that computes checkpointed layers again reads the same.

    Args:
        student: a Hugging Face causal language model, inside whatever DeepSpeed wraps around it.
        share: of the stage's steps, above 0.

    Attributes:
        value: f of the step that runs.
    """

    def __init__(self, student: PreTrainedModel, share: float):
        assert share > 0, share
        self.share, self.value = share, 0.0
        self._states: Sequence[Tensor] = ()
        for below, layer in enumerate(student.get_decoder().layers[1:]):
            layer.register_forward_pre_hook(self._mixer(below), with_kwargs=True)

    def use(self, states: Sequence[Tensor], progress: float) -> None:
        """Before the student runs on a batch.

        Args:
            states: the teacher's for this batch, (B, T, H) after each layer, as in `hidden.hidden_state_loss`.
            progress: as in `forcing_at`.
        """
        self.value = forcing_at(progress, self.share)
        self._states = states if self.value > 0 else ()

    def release(self) -> None:
        """The student reads its own states again."""
        self._states, self.value = (), 0.0

    def _mixer(self, below: int):
        def mix(_module, arguments, options):
            if not self._states:
                return None
            teacher_BTH = self._states[below]
            if arguments:
                return (self._mixed(arguments[0], teacher_BTH), *arguments[1:]), options
            return arguments, options | {"hidden_states": self._mixed(options["hidden_states"], teacher_BTH)}

        return mix

    def _mixed(self, student_BTH: Tensor, teacher_BTH: Tensor) -> Tensor:
        assert student_BTH.shape == teacher_BTH.shape, "states of one width, for the same tokens"
        return student_BTH.lerp(teacher_BTH.to(student_BTH.dtype), self.value)
