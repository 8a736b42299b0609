"""`bitdistill plan`: what training a model takes, before anything starts."""

import dataclasses
import math

from bitdistill.errors import UserError
from bitdistill.planning import DEVICES, GIB, Device, Plan, Work, command_line, devices_of, plans, shape_of

SHOWN = 12  # lines of the table
STATE = ("weights", "gradients", "optimizer", "codes", "DeepSpeed's copy", "gathered")


def plan(
    model: str | None = None,
    gpus: str = "1xH100",
    tokens: float = 1e9,
    stage: str = "pretrain",
    teacher: str | None = None,
    teacher_cache: bool = False,
    hidden_states: bool | None = None,
    block_size: int = 1024,
    per_device_batch_size: int = 8,
    tokens_per_step: int | None = None,
    tokens_per_second: float | None = None,
    memory_gb: float | None = None,
    host_memory_gb: float = 128.0,
    flop_per_second: float | None = None,
    link_gb_per_second: float | None = None,
    price_per_hour: float | None = None,
) -> None:
    """Prints what a stage takes with every ZeRO stage and offload: memory, time, network, disk, cost; and the best command.

    Nothing is loaded: the model's config.json is enough. Rates, links and prices of a device are assumptions, which are
    printed with the table; each has an option.

    Args:
        model: a folder with config.json, or a hub id.
        gpus: how many devices of which kind: 8xH200, 1xH100, 2xA100, 4xB200, 1xRTX4090, 2xCPU.
        tokens: how many tokens the whole stage trains on.
        stage: pretrain (stage 2), or distill (stage 3).
        teacher: the teacher of stage 3, a folder or hub id; the model itself by default.
        teacher_cache: whether stage 3 reads what the teacher says from disk (--distill.teacher_cache true).
        hidden_states: whether hidden states are compared with those of a teacher in memory (lambda_hidden above 0) and, in
            stage 2, read by the student's layers (teacher forcing): true in the recipes standard and laptop, false in paper.
            By default true, unless teacher_cache is.
        block_size: tokens per sequence.
        per_device_batch_size: sequences of a micro-step on each rank.
        tokens_per_step: tokens of an optimizer step on all ranks; one micro-step of each rank by default.
        tokens_per_second: the measured rate of one rank; it replaces flop_per_second.
        memory_gb: the memory of one device.
        host_memory_gb: main memory for each rank, for what is offloaded.
        flop_per_second: what one device sustains in training.
        link_gb_per_second: how much one rank can send.
        price_per_hour: the price of one device, in dollars.

    Raises:
        UserError: an unknown device or stage, a number that is not above zero, a model without a readable config, or states of a
            teacher that is read from disk.
    """
    from bitdistill.student.model_folder import read_config

    _check(
        model,
        stage,
        tokens=tokens,
        block_size=block_size,
        per_device_batch_size=per_device_batch_size,
        tokens_per_step=tokens_per_step,
        tokens_per_second=tokens_per_second,
        memory_gb=memory_gb,
        host_memory_gb=host_memory_gb,
        flop_per_second=flop_per_second,
        link_gb_per_second=link_gb_per_second,
        price_per_hour=price_per_hour,
    )
    if hidden_states is None:
        hidden_states = not teacher_cache
    elif hidden_states and teacher_cache:
        do = "Give --hidden_states false, or no --teacher_cache."
        raise UserError("hidden_states", expected="false with a teacher that is read from disk", got="true", do=do)
    beside = teacher or model if stage == "distill" else model if hidden_states else None
    count, name = devices_of(gpus)
    device = _changed(
        DEVICES[name],
        memory_bytes=memory_gb and memory_gb * 1e9,
        flop_per_second=flop_per_second,
        link_bytes_per_second=link_gb_per_second and link_gb_per_second * 1e9,
        price_per_hour=price_per_hour,
    )
    per_micro_step = block_size * per_device_batch_size
    smallest = per_micro_step * count
    if tokens_per_step is not None and tokens_per_step < smallest:
        expected = f"at least {smallest:,}: one micro-step of {per_micro_step:,} tokens on each of {count} ranks"
        do = "Give a larger step, or a smaller --per_device_batch_size."
        raise UserError("tokens_per_step", expected=expected, got=f"{tokens_per_step:,}", do=do)
    work = Work(
        shape_of(read_config(model)),
        total_tokens=tokens,
        tokens_per_micro_step=per_micro_step,
        tokens_per_step=tokens_per_step or smallest,
        teacher=shape_of(read_config(beside, "teacher")) if beside else None,
        teacher_cached=teacher_cache,
        states=hidden_states,
        forced=hidden_states and stage == "pretrain",
    )
    rate = {"tokens_per_second": tokens_per_second, "host_bytes_per_rank": host_memory_gb * 1e9}
    _show(plans(work, device, count, **rate), work, device, f"{count} x {name}", model)


def _check(model: str | None, stage: str, **numbers: float | None) -> None:
    if model is None:
        do = "Give --model: a folder with config.json, or a hub id."
        raise UserError("model", expected="a model to plan for", got="none", do=do)
    if stage not in ("pretrain", "distill"):
        do = "Choose the stage that you plan; the other stages need less."
        raise UserError("stage", expected="pretrain or distill", got=repr(stage), do=do)
    for option, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            do = f"Give --{option} a positive number."
            raise UserError(option, expected="a number above zero", got=f"{value:g}", do=do)


def _changed(device: Device, **given: float | None) -> Device:
    """The device with the values that were given; None is a value that was not."""
    return dataclasses.replace(device, **{field: value for field, value in given.items() if value is not None})


def _show(found: list[Plan], work: Work, device: Device, devices: str, model: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: {work.total_tokens:.3g} tokens on {devices}, GiB per rank", title_justify="left")
    groups = {
        "state": STATE,
        "teacher": ("teacher",),
        "activations": ("activations", "states"),
        "rest": ("logits", "process"),
    }
    headings = ("ZeRO", "offload", "recompute", *groups, "GiB", "host", "s/step", "days", "$", "fits")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("ZeRO", "offload") else "right", no_wrap=True)
    for plan in found[:SHOWN]:
        setting = plan.setting
        offloaded = {"optimizer": setting.offload, "teacher": setting.teacher_offload}
        offloads = ", ".join(name for name, is_set in offloaded.items() if is_set)
        sizes = [sum(plan.parts.get(part, 0.0) for part in parts) / GIB for parts in groups.values()]
        sizes += [plan.device_bytes / GIB, plan.host_bytes / GIB]
        cost = f"{plan.cost:,.0f}" if device.price_per_hour else ""
        times = [f"{plan.step_seconds:.2f}", f"{plan.days:.2f}", cost, "yes" if plan.fits else "no"]
        recompute = "yes" if setting.checkpointing else ""
        table.add_row(
            str(setting.zero), offloads, recompute, *(f"{size:.1f}" if size else "" for size in sizes), *times
        )
    console = Console(width=max(150, Console().width))
    console.print(table)
    best = found[0]
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in best.parts.items())
    console.print(f"GiB per rank of the first line: {parts}.")
    console.print(
        f"Assumed: {device.memory_bytes / 1e9:.0f} GB and {device.flop_per_second / 1e12:.3g} TFLOP/s per device, "
        f"{device.link_bytes_per_second / 1e9:.0f} GB/s between them, ${device.price_per_hour:g} per device and hour. "
        f"A rank sends {best.network_bytes / 1e9:.2f} GB per step; the stage needs {best.disk_bytes / 1e9:.1f} GB of disk."
    )
    if len(found) > SHOWN:
        console.print(f"{len(found) - SHOWN} more settings are not shown; they are slower or do not fit.")
    if best.fits:
        console.print("The fastest setting that fits (of equally fast ones, the simplest):")
        print(command_line(best, model, device.kind))
    else:
        short = min(plan.device_bytes for plan in found) / GIB
        console.print(
            f"Nothing fits: the smallest needs {short:.1f} GiB per rank. Use more or larger devices, a smaller "
            f"--per_device_batch_size or --block_size."
        )
