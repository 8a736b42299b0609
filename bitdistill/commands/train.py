"""`bitdistill train`: the main job in one process, for a laptop, one GPU, and whoever has no checkout."""

import runpy


def train() -> None:
    """Makes a student of a model for a task, in one process: on a CPU or one GPU. `deepspeed` starts it on several.

    Runs train.py as `python -m bitdistill.train` does, with sys.argv[1:] as its options, and ends this process with its status.
    """
    runpy.run_module("bitdistill.train", run_name="__main__")
