"""`bitdistill check`: where a student of a base model can run, before anything is trained."""

import sys
from dataclasses import fields
from typing import Literal

from bitdistill import folders
from bitdistill.names import DEPLOY_TARGETS


def check(
    model: str,
    deploy_target: Literal[*DEPLOY_TARGETS] | None = None,
    norms: Literal["none", "two", "all"] | None = None,
    weight_scale: Literal["tensor", "row", "group"] | None = None,
    group_size: Literal[64, 128, 256] | None = None,
    act_scale: Literal["token", "block"] | None = None,
) -> None:
    """Prints in which tools a student of a base model opens, as what, and why not in the others.

    Args:
        model: a base model, a local folder or a hub id; only its config.json is read.
        deploy_target: a tool; the student then has the settings that --deploy_target of training would choose.
        norms: refine.norms of the student; what the target needs, else two.
        weight_scale: refine.weight_scale; what the target needs, else tensor.
        group_size: refine.group_size; what the target needs, else 128.
        act_scale: refine.act_scale; what the target needs, else token.
    """
    from rich.console import Console
    from rich.table import Table

    from bitdistill.export.targets import TARGETS, Choice, settings_for, verdicts
    from bitdistill.student.model_folder import read_config

    config = read_config(folders.local_path(model))
    given = {"norms": norms, "weight_scale": weight_scale, "group_size": group_size, "act_scale": act_scale}
    settings = settings_for(deploy_target, config) if deploy_target else {}
    choice = Choice(**settings | {name: value for name, value in given.items() if value is not None})
    shown = [field.name for field in fields(choice) if field.name != "subln_eps"]
    if choice.weight_scale != "group":
        shown.remove("group_size")
    table = Table(title=f"{model}, " + ", ".join(f"refine.{name} {getattr(choice, name)}" for name in shown))
    for column in ("tool", "opens", "export --format", "type", "bits/weight", "size", "tokens/s", "why not"):
        table.add_column(column, overflow="fold")
    for row in verdicts(config, choice):
        if row["possible"]:
            speed = "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.0f}"
            megabytes = row["file_bytes"] / 1e6
            bits, size = f"{row['bits_per_weight']:.2f}", f"{megabytes:,.{0 if megabytes >= 10 else 1}f} MB"
            table.add_row(row["title"], "yes", row["format"], row["file_type"], bits, size, speed, "")
        else:
            table.add_row(row["title"], "no", row["format"] or "", "", "", "", "", row["why"])
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    said = "tokens/s: decoding, estimated for two cores with AVX2 and 30 GB/s (docs/performance.md); not for types that were"
    console.print(f"{said} not measured there, nor for files of less than 32 MB.", highlight=False)
    for what in TARGETS[deploy_target].gives_up if deploy_target else ():
        console.print(f"given up for {TARGETS[deploy_target].title}: {what}", highlight=False)
