"""`bitdistill report` shows a run as a page and a table; `bitdistill env` shows what would run it on this machine."""


def report(run: str) -> None:
    """Writes report.html of a run directory again and prints its table.

    Args:
        run: the run directory.
    """
    from bitdistill.reporting.report import show_report

    show_report(run)


def env() -> None:
    """Prints versions of this project, Python, the libraries and the machine, and which kernels are right here."""
    from bitdistill.reporting.versions import versions

    for name, version in versions().items():
        print(f"{name:<14} {version}")
    from bitdistill.student.backend import kernel_states

    for name, state in kernel_states().items():
        print(f"{name:<14} {state}")
