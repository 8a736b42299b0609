"""The weight gamma of the relation loss, chosen such that its gradient is in proportion to that of the other terms."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitdistill.errors import UserError


class BalancedGamma:
    """``gamma = rho * |grad task| / |grad L_AD|``, as a running mean: one rho for every convention and model.

    Both gradients are those that arrive at the student's Q, K and V of the highest distilled layer, where capture.py
    forks the graph: from the relations on one side, and on the other from the rest of the loss, ``L_CE + lambda *
    L_LD``. The second is read off the ordinary backward pass as it goes by. A backward pass of its own would be plainer,
    but DeepSpeed allows one per forward: its hooks reduce or release what the next one needs, at every ZeRO stage.

    A step:  gamma.watch(...) for each micro-batch -> backward with ``gamma.gamma`` -> gamma.finish_step(all_reduce).

    The mean is exponential with ``decay``, corrected for its start at zero. A step where a norm is zero or not finite
    (teacher and student still equal, no labels, an overflow) leaves it as it is and is counted in ``skipped``. Before
    the first good step gamma is 0.
    """

    def __init__(self, rho: float, decay: float = 0.99):
        if not rho > 0:
            raise UserError(
                "distill.gamma_rho", expected="a number above 0", got=str(rho), do="Set it to 1, which balances them."
            )
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected 0 <= decay < 1; got {decay}")
        self.rho, self.decay = rho, decay
        self.mean, self.updates, self.skipped = 0.0, 0, 0
        self.task_norm = self.attention_norm = 0.0  # of the step that was finished last, for the log
        self._squares: Tensor | None = None  # what was watched since: |grad task|^2 and |grad L_AD|^2, fp64

    @property
    def gamma(self) -> float:
        return self.rho * self.mean / (1 - self.decay**self.updates) if self.updates else 0.0

    def watch(self, ce: Tensor, attention: Tensor, relations: Sequence[Tensor], downstream: Sequence[Tensor]) -> None:
        """Looks at one micro-batch, before its backward pass.

        Args:
            ce: the cross-entropy, which must enter the loss with weight 1: whatever the loss is multiplied with after
                that (ranks, accumulation, loss scale) is read off it and divided out.
            attention: the relation loss, unweighted.
            relations, downstream: ``AttentionCapture.qkv`` and ``.downstream`` of the highest distilled layer.
        """
        assert all(x.requires_grad for x in (*relations, *downstream)), "Q, K and V of the student have no gradient"
        gradients = torch.autograd.grad(
            attention, list(relations), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        if self._squares is None:
            self._squares = torch.zeros(2, dtype=torch.float64, device=ce.device)
        squares, scale = self._squares, []
        squares[1] += sum(gradient.double().square().sum() for gradient in gradients)

        def read_scale(gradient: Tensor) -> None:
            scale[:] = [gradient.double()]

        def add_square(gradient: Tensor) -> None:
            squares[0] += (gradient.double() / scale[0]).square().sum()

        ce.register_hook(read_scale)
        for x in downstream:
            x.register_hook(add_square)

    def finish_step(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> float:
        """Takes what was watched into the mean, after the step's last backward pass; nothing watched, nothing done.

        Args:
            all_reduce: returns the sum of a tensor over all ranks. All ranks then hold the same gamma, and all must call.

        Returns: the new gamma.
        """
        if self._squares is not None:
            if all_reduce is not None:
                self._squares = all_reduce(self._squares)
            self.task_norm, self.attention_norm = self._squares.sqrt().tolist()
            self._squares = None
            if all(0 < norm < math.inf for norm in (self.task_norm, self.attention_norm)):
                self.mean = self.decay * self.mean + (1 - self.decay) * self.task_norm / self.attention_norm
                self.updates += 1
            else:
                self.skipped += 1
        return self.gamma

    def state_dict(self) -> dict:
        """What a resumed run needs to go on exactly; rho and decay are settings and come from the config."""
        assert self._squares is None, "finish the step before saving it"
        norms = {"task_norm": self.task_norm, "attention_norm": self.attention_norm}
        return {"mean": self.mean, "updates": self.updates, "skipped": self.skipped, **norms}

    def load_state_dict(self, state: dict) -> None:
        self.mean, self.updates, self.skipped = state["mean"], state["updates"], state["skipped"]
        self.task_norm, self.attention_norm = state["task_norm"], state["attention_norm"]
