"""Which implementation of a BitLinear runs on a device: Triton kernels, compiled CPU kernels, or the PyTorch reference."""

import functools
import importlib.util
from types import ModuleType

import torch

from bitdistill.distributed import launch


@functools.cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """`kernels.gpu.bit_linear` or `kernels.cpu.bit_linear`, else None: then the reference does the work.

    Those of a GPU need an NVIDIA one of compute capability 8.0 or later and Triton. A GPU without them is told once.
    """
    if device.type == "cpu":
        from bitdistill.kernels.cpu import bit_linear

        return bit_linear
    if device.type != "cuda":
        return None
    missing = None
    if torch.version.hip is not None:
        missing = "an AMD GPU"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        missing = "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    elif importlib.util.find_spec("triton") is None:
        missing = "no Triton"
    if missing is not None:
        launch.say(
            f"{torch.cuda.get_device_name(device)}: the int8 kernels need an NVIDIA GPU of compute capability 8.0 or later "
            f"and Triton; found {missing}. Ternary layers run on plain PyTorch, with the same results, slower."
        )
        return None
    from bitdistill.kernels.gpu import bit_linear

    return bit_linear
