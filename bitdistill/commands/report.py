"""`bitdistill report` shows a run as a page and a table; `bitdistill env` shows what would run it on this machine."""

import importlib.util

from bitdistill.errors import UserError
from bitdistill.text_files import user_path

OF_A_RUN = ("config.yaml", "metrics.jsonl", "evaluate/scores.json")  # one of which every run has


def report(run: str) -> None:
    """Writes report.html of a run directory again and prints its table.

    Args:
        run: the run directory.
    """
    from bitdistill.reporting.report import show_report

    folder = user_path(run, "RUN")
    if not any((folder / name).is_file() for name in OF_A_RUN):
        got = f"{run} without any of them" if folder.is_dir() else f"{run} (no such folder)"
        do = "Name the folder that a run was given as --output_dir."
        raise UserError("RUN", expected=f"the folder of a run, with {' or '.join(OF_A_RUN)}", got=got, do=do)
    show_report(folder)


def env() -> None:
    """Prints versions of this project, Python, the libraries and the machine, and which kernels are right here."""
    from bitdistill.reporting.versions import versions

    for name, version in versions().items():
        print(f"{name:<14} {version}")
    if importlib.util.find_spec("torch") is None:  # enough for inference
        return
    from bitdistill.student.backend import kernel_states

    for name, state in kernel_states().items():
        print(f"{name:<14} {state}")
