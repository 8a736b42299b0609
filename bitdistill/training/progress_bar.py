"""The progress bar of a stage, and durations as people say them."""

import time

from tqdm.auto import tqdm
from transformers import TrainerCallback

TIMED_STEPS = 3  # after the first, from which the length of a stage is estimated


class ProgressBar(TrainerCallback):
    """One bar per stage, with the loss terms beside it, and once how long the stage will take."""

    def __init__(self, stage: str):
        self.stage, self.bar = stage, None
        self.first_step, self.first_end = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=f"{self.stage:<9}", unit="step")
        self.first_step = state.global_step + 1

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)
        timed = state.global_step - self.first_step  # the first step also compiles and fills caches: it is not timed
        if timed == 0:
            self.first_end = time.perf_counter()
        elif timed == TIMED_STEPS < state.max_steps - self.first_step:
            seconds = (time.perf_counter() - self.first_end) / timed * (state.max_steps - state.global_step)
            self.bar.write(f"{self.stage}: {state.max_steps:,} steps, about {in_words(seconds)} to go on this machine")

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name.removeprefix("loss_"): value for name, value in (logs or {}).items() if name.startswith("loss_")}
        if shown and self.bar is not None:
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def in_words(seconds: float) -> str:
    """A duration as people say it: 40 s, 12 min, 3.5 h or 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
