"""Puts the tensors of a checkpoint (saved_state.py) into a model and its optimizer that are laid out in another way: other
ranks, another ZeRO stage, or none.

DeepSpeed keeps flat fp32 tensors, of which each rank has its part: at ZeRO 1 and 2 a part of all parameters of a group laid end
to end, at ZeRO 3 a part of each parameter. `_hp_mapping` and `grad_position` say where a parameter lies in them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitdistill.distributed.saved_state import MASTER, MOMENTS, SavedState
from bitdistill.errors import UserError


@torch.no_grad()
def restore(
    saved: SavedState, names: Sequence[str], model: nn.Module, optimizer: torch.optim.Optimizer, zero: int | None
):
    """Fills masters, moments, the step counter and buffers. Every rank calls it; nothing is sent between them.

    Args:
        saved: from `read_state`. names: of the trained parameters. model: the Hugging Face model itself.
        optimizer: torch's for zero 0 and None, else DeepSpeed's around it. zero: the stage it trains in; None without DeepSpeed.

    Raises:
        UserError: the checkpoint has other parameters; or the state is offloaded to NVMe, where it cannot be filled.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: getattr(parameters[name], "ds_shape", parameters[name].shape) for name in names}
    if shapes != dict(saved.shapes):
        differing = sorted(set(shapes.items()) ^ set(saved.shapes.items()), key=str)
        got = f"one in which {differing[0][0]} differs"
        do = "Give --restart to begin this stage again."
        raise UserError("output_dir", expected=f"a checkpoint of these {len(shapes)} parameters", got=got, do=do)
    trained = {name: parameters[name] for name in names}
    if zero in (0, None):
        _fill_plain(saved, trained, optimizer)
    elif zero == 3:
        _fill_partitioned(saved, trained, optimizer)
    else:
        _fill_flat(saved, trained, optimizer)
    for name, buffer in model.named_buffers():
        if name in saved.buffers:
            buffer.copy_(saved.buffers[name])


def _fill_plain(saved: SavedState, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in trained.items():
        parameter.copy_(saved.whole(name))
        moments = {key: saved.whole(name, key).to(parameter.device) for key in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(saved.step)} | moments


def _fill_flat(saved: SavedState, trained: dict[str, nn.Parameter], optimizer) -> None:
    flats = optimizer.single_partition_of_fp32_groups
    states = [_state_of(optimizer.optimizer, flat, saved.step) for flat in flats]
    for name, parameter in trained.items():
        parameter.copy_(saved.whole(name))
        mapping = parameter._hp_mapping
        if mapping is None:  # all of it is another rank's
            continue
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        group = mapping.param_group_index
        for what, flat in {MASTER: flats[group], **states[group]}.items():
            part = saved.part(name, what, here.start, here.start + here.numel)
            flat[there.start : there.start + there.numel].copy_(part)


def _fill_partitioned(saved: SavedState, trained: dict[str, nn.Parameter], optimizer) -> None:
    if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
        raise UserError(
            "offload",
            expected="'none' or 'cpu' to continue on other ranks or at another ZeRO stage",
            got="'nvme'",
            do="Continue with the ranks and the stage that wrote the checkpoint, or with --offload cpu.",
        )
    flats = optimizer.fp32_partitioned_groups_flat
    states = [_state_of(optimizer.optimizer, flat, saved.step) for flat in flats]
    for name, parameter in trained.items():
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first = optimizer._get_param_partition_rank(parameter) * size
        for what, flat in {MASTER: flats[group], **states[group]}.items():
            part = saved.part(name, what, first, first + size)  # shorter where the last rank's is padded
            flat[start : start + len(part)].copy_(part)
            if what == MASTER:
                parameter.ds_tensor[: len(part)].copy_(part)
        if parameter.data.numel() == parameter.ds_numel:  # small ones stay whole on every rank
            parameter.data.copy_(saved.whole(name))


def _state_of(optimizer: torch.optim.Optimizer, flat: Tensor, step: float) -> dict[str, Tensor]:
    """Adam's moments of a flat tensor, made where the first step would have made them."""
    state = optimizer.state.setdefault(flat, {})
    state["step"] = torch.tensor(step)
    for moment in MOMENTS:
        if moment not in state:
            state[moment] = torch.zeros_like(flat)
    return {moment: state[moment] for moment in MOMENTS}
