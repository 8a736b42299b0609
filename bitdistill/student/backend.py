"""Chooses the implementation of a BitLinear on a device: Triton kernels, compiled CPU kernels, or the PyTorch reference;
and on a CPU also whether losses over the vocabulary run on compiled kernels.

Kernels are used only if a check on this machine found that they compute what the reference computes (self_check.py). After
`choose_kernels("reference")` they are not used at all.
"""

import functools
import importlib.util
from types import ModuleType

import torch

from bitdistill.distributed import process_group
from bitdistill.kernels import vocabulary
from bitdistill.student.self_check import ATTENTION, VOCABULARY, kernels_of, self_check


class _Chosen:
    """What `choose_kernels` chose."""

    kernels = "auto"
    attention = True  # whether its kernel is right on this machine, as far as is known


def choose_kernels(kernels: str) -> None:
    """Chooses for this process: "auto", the kernels wherever they are right, or "reference", plain PyTorch.

    Args:
        kernels: "auto" or "reference".
    """
    assert kernels in ("auto", "reference"), kernels
    _Chosen.kernels = kernels
    vocabulary.use_compiled_rows(kernels == "auto")
    kernels_for.cache_clear()


def missing_for(device: torch.device) -> str | None:
    """What a device lacks for kernels, in words, or None."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"a device of type {device.type}"
    if torch.version.hip is not None:
        return "an AMD GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    return "no Triton" if importlib.util.find_spec("triton") is None else None


@functools.cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """`kernels.gpu.bit_linear` or `kernels.cpu.bit_linear`, else None: then the reference does the work.

    Those of a GPU need an NVIDIA one of compute capability 8.0 or later and Triton. A GPU without them is told once, and so
    is a kernel that is not right on this machine.
    """
    if device.type not in ("cpu", "cuda") or _Chosen.kernels == "reference":
        return None
    if missing := missing_for(device):
        process_group.say(
            f"{torch.cuda.get_device_name(device)}: the int8 kernels need an NVIDIA GPU of compute capability 8.0 or later "
            f"and Triton; found {missing}. Ternary layers run on plain PyTorch, with the same results, slower."
        )
        return None
    wrong = {name: problem for name, problem in self_check(device, process_group.say).items() if problem is not None}
    for name, runs in ((VOCABULARY, "Losses over the vocabulary run"), (ATTENTION, "Attention runs")):
        if name in wrong:
            _leave_out(name)
            process_group.say(
                f"Kernels that are not right on this machine: {_list(wrong, [name])}. {runs} on plain PyTorch, slower. "
                "Please report it with the output of `bitdistill env`."
            )
            del wrong[name]
    kernels, products = kernels_of(device), [name for name in wrong if name.startswith("product ")]
    if products:
        kernels.leave_out_products([name.removeprefix("product ") for name in products])
        process_group.say(f"Products that are not right on this machine and are left out: {_list(wrong, products)}.")
    if len(wrong) > len(products) or (products and not kernels.has_products()):
        process_group.say(
            f"Kernels that are not right on this machine: {_list(wrong, list(wrong))}. Ternary layers run on plain PyTorch, "
            "slower. Please report it with the output of `bitdistill env`."
        )
        return None
    return kernels


def _leave_out(name: str) -> None:
    """Uses the kernels of a check no more in this process, and all others as before."""
    if name == VOCABULARY:
        vocabulary.use_compiled_rows(False)
    else:
        _Chosen.attention = False


def attention_is_right() -> bool:
    """Whether the CPU's attention kernel may be used: it is right on this machine, as are the others, and the user wants them."""
    return kernels_for(torch.device("cpu")) is not None and _Chosen.attention


def kernel_states() -> dict[str, str]:
    """Which kernels are right on this machine, in words; checks them where that has not been done.

    Returns: of "cpu kernels", and "cuda kernels" where there is a GPU.
    """
    states = {}
    for device in [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else []):
        if missing := missing_for(device):
            states[f"{device.type} kernels"] = f"none for {missing}"
            continue
        answers = self_check(device, lambda text: None)
        wrong = {name: problem for name, problem in answers.items() if problem is not None}
        right = f"{len(answers) - len(wrong)} of {len(answers)} checks against PyTorch hold"
        states[f"{device.type} kernels"] = f"{right}; not: {_list(wrong, list(wrong))}" if wrong else right
    return states


def _list(wrong: dict[str, str], names: list[str]) -> str:
    return "; ".join(f"{name} ({wrong[name]})" for name in names)
