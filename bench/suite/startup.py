"""What a user waits for before anything happens: imports, and the first token of `bitdistill generate`."""

import subprocess
import sys


def timed(code):
    """Seconds that a fresh interpreter takes for `code`."""
    import time

    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - started


class Import:
    """A fresh process."""

    params = ("bitdistill", "bitdistill.runtime", "bitdistill.layers")
    param_names = ("module",)
    number, repeat = 1, 5

    def time_import(self, module):
        timed(f"import {module}")

    def track_over_bare_python(self, module):
        from .side_by_side import ratio

        return 1 / ratio(lambda: timed(f"import {module}"), lambda: timed("pass"), rounds=5, seconds=0)

    track_over_bare_python.unit = "x python -c pass"
