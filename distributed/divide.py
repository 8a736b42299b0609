"""ZeRO 3 before DeepSpeed's engine is there: a module's parameters divided among the ranks as soon as they are loaded."""

from typing import Any

from torch import nn


def divide(module: nn.Module, zero_optimization: dict[str, Any]) -> None:
    """Leaves each rank its part of every parameter of a module that is not divided yet. Every rank calls it.

    Args:
        module: its parameters hold the same values on every rank.
        zero_optimization: DeepSpeed's section, as in `presets.deepspeed_config`, with stage 3.
    """
    import deepspeed

    assert zero_optimization["stage"] == 3, "only ZeRO 3 divides the parameters"
    known = {name: value for name, value in zero_optimization.items() if value != "auto"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": known}
    deepspeed.zero.Init(module=module, config_dict_or_path=config)
