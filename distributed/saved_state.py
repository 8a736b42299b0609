"""The fp32 masters and Adam's moments in a checkpoint, by the names of the parameters, whatever wrote it and on how many ranks.

    no ZeRO      model.safetensors, optimizer.pt                         PyTorch alone
    ZeRO 0       global_stepN/mp_rank_00_model_states.pt                 whole, as PyTorch's optimizer keeps it
    ZeRO 1, 2    and zero_pp_rank_R_mp_rank_00_optim_states.pt           each group of parameters laid end to end, cut into R
    ZeRO 3       zero_pp_rank_R_mp_rank_00_{model,optim}_states.pt       each parameter cut into R equal parts, the last padded

The files are mapped into memory, so a rank reads only the parts that it needs, one parameter at a time. DeepSpeed's own way
(`ds_to_universal`) writes every tensor to a file of its own first, and does not read what one rank without ZeRO wrote.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
WITHOUT_ZERO = "without ZeRO"
FLAT, PARTITIONED = "at ZeRO 1 or 2", "at ZeRO 3"
REPLICATED = "at ZeRO 0"
FORM_OF_STAGE = {None: WITHOUT_ZERO, 0: REPLICATED, 1: FLAT, 2: FLAT, 3: PARTITIONED}


def form_of(checkpoint: Path) -> str:
    """How the optimizer's state lies in a `checkpoint-N`: one of the values of FORM_OF_STAGE."""
    if not any(checkpoint.glob("global_step*")):
        return WITHOUT_ZERO
    if any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt")):
        return PARTITIONED
    return FLAT if any(checkpoint.glob("global_step*/*_optim_states.pt")) else REPLICATED


@dataclass
class SavedState:
    """A checkpoint's tensors.

    Attributes:
        shapes: of every trained parameter. buffers: tensors of the model that are no parameters, by name.
        pieces: (parameter, MASTER or one of MOMENTS) -> flat tensors that give it, laid end to end; perhaps with padding after.
        step: how many steps Adam has taken.
    """

    shapes: dict[str, torch.Size] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    pieces: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    step: float = 0.0

    def part(self, name: str, what: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements start..stop of a parameter's master or moment, flat, fp32; fewer where it ends before."""
        size = self.shapes[name].numel()
        stop, found, place = min(size, size if stop is None else stop), [], 0
        for piece in self.pieces[name, what]:
            first, last = max(start - place, 0), min(stop - place, piece.numel())
            if first < last:
                found.append(piece[first:last])
            place += piece.numel()
        result = torch.cat(found).float() if found else torch.empty(0)
        assert result.numel() == max(stop - start, 0), f"{name}: {what} is not whole in this checkpoint"
        return result

    def whole(self, name: str, what: str = MASTER) -> Tensor:
        """A parameter's master or moment in its shape, fp32."""
        return self.part(name, what).view(self.shapes[name])

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every parameter and buffer, one after the other; floating-point ones fp32."""
        for name in self.shapes:
            yield name, self.whole(name)
        for name, buffer in self.buffers.items():
            yield name, buffer.float() if buffer.is_floating_point() else buffer.clone()


def read_state(checkpoint: Path, order: Sequence[str] | None = None) -> SavedState:
    """The tensors of a complete `checkpoint-N` (`checkpoint.latest_checkpoint`). Nothing is read before it is asked for.

    Args:
        checkpoint: its folder.
        order: the trained parameters in the order of the optimizer, for the forms that number them; None leaves the moments
            out where they are only numbered.
    """
    form = form_of(checkpoint)
    if form == WITHOUT_ZERO:
        return _without_zero(checkpoint, order)
    (folder,) = checkpoint.glob("global_step*")
    return {REPLICATED: _replicated, FLAT: _flat, PARTITIONED: _partitioned}[form](folder, order)


def _load(file: Path) -> Any:
    from bitdistill.distributed.process_group import let_checkpoints_in

    let_checkpoints_in()
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def _by_rank(folder: Path, kind: str) -> list[Any]:
    files = list(folder.glob(f"*zero_pp_rank_*_mp_rank_00_{kind}_states.pt"))
    files.sort(key=lambda file: int(file.name.partition("_pp_rank_")[2].partition("_")[0]))
    return [_load(file) for file in files]


def _without_zero(checkpoint: Path, order: Sequence[str] | None) -> SavedState:
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(checkpoint.glob("model*.safetensors")):
        tensors |= load_file(file)
    state = SavedState()
    trained = tensors.keys() if order is None else order
    _add_masters(state, tensors, trained)
    if order is not None:
        _add_numbered(state, _load(checkpoint / "optimizer.pt"), order)
    return state


def _replicated(folder: Path, order: Sequence[str] | None) -> SavedState:
    saved, state = _load(folder / "mp_rank_00_model_states.pt"), SavedState()
    tensors, seen = {}, {}
    for name, tensor in saved["module"].items():  # a tied weight stands under each of its names
        first = seen.setdefault((tensor.data_ptr(), tensor.shape), name)
        if first == name or (order is not None and name in order):
            tensors[name] = tensor
    trained = [name for name in tensors if name not in saved["buffer_names"]] if order is None else order
    _add_masters(state, tensors, trained)
    if order is not None:
        _add_numbered(state, saved["optimizer"], order)
    return state


def _add_masters(state: SavedState, tensors: dict[str, Tensor], trained: Sequence[str]) -> None:
    for name in trained:
        state.shapes[name] = tensors[name].shape
        state.pieces[name, MASTER] = [tensors[name].reshape(-1)]
    state.buffers |= {name: tensor for name, tensor in tensors.items() if name not in state.shapes}


def _add_numbered(state: SavedState, optimizer: dict[str, Any], order: Sequence[str]) -> None:
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    for name, number in zip(order, numbers, strict=True):
        found = optimizer["state"].get(number)
        if found is None:  # it never had a gradient
            found = {moment: torch.zeros(state.shapes[name]) for moment in MOMENTS} | {"step": state.step}
        for moment in MOMENTS:
            state.pieces[name, moment] = [found[moment].reshape(-1)]
        state.step = max(state.step, float(found["step"]))


def _flat(folder: Path, order: Sequence[str] | None) -> SavedState:
    model, state = _load(folder / "mp_rank_00_model_states.pt"), SavedState()
    for group in model["param_shapes"]:
        state.shapes |= group
    state.buffers = {name: model["module"][name] for name in model["buffer_names"] if name in model["module"]}
    for rank in _by_rank(folder, "optim"):
        saved = rank["optimizer_state_dict"]
        adam = saved["base_optimizer_state"]["state"]
        for group, mapping in enumerate(saved["param_slice_mappings"]):
            flat = {MASTER: saved["single_partition_of_fp32_groups"][group]}
            flat |= {moment: adam[group][moment] for moment in MOMENTS}
            state.step = float(adam[group]["step"])
            for name, place in mapping.items():
                for what, tensor in flat.items():
                    piece = tensor[place.start : place.start + place.numel]
                    state.pieces.setdefault((name, what), []).append(piece)
    return state


def _partitioned(folder: Path, order: Sequence[str] | None) -> SavedState:
    model, state = _by_rank(folder, "model")[0], SavedState()
    names = set(model["buffer_names"])
    state.buffers = {name: tensor for name, tensor in model["module"].items() if name in names}
    groups: list[OrderedDict[str, torch.Size]] = model["param_shapes"]
    ranks = _by_rank(folder, "optim")
    for rank in ranks:
        saved = rank["optimizer_state_dict"]
        adam = saved["optimizer_state_dict"]["state"]
        for group, shapes in enumerate(groups):
            flat = {MASTER: saved["fp32_flat_groups"][group]} | {moment: adam[group][moment] for moment in MOMENTS}
            state.step = float(adam[group]["step"])
            place = 0
            for name, shape in shapes.items():
                state.shapes[name] = shape
                size = math.ceil(shape.numel() / len(ranks))
                for what, tensor in flat.items():
                    state.pieces.setdefault((name, what), []).append(tensor[place : place + size])
                place += size
    return state
