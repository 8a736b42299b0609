"""The benchmarks that `asv run` keeps a history of: one file a part of the project, one class an object that is timed.

Machines differ and are noisy, so what is compared over time are ratios of two things measured side by side in one
process (`track_..._ratio`), and exact counts (bytes, bits, mismatches). Absolute times are kept beside them. Imports are
inside `setup`, so that an older commit without a part is "n/a" there and not an error. Inputs are only ever added to.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
