"""The values that each setting may have. They are checked before anything is loaded.

A limit belongs to the name of a setting, in whichever section it stands. tests/test_config.py walks through the tree of
settings and fails if a number has no limit.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from bitdistill.errors import UserError


@dataclass(frozen=True)
class Limit:
    """A range of numbers, said in words.

    Args:
        words: the range in words, for the message. lowest, highest: its ends.
        above: the lowest number itself is not allowed. below: the highest number itself is not allowed.
    """

    words: str
    lowest: float
    highest: float = math.inf
    above: bool = False
    below: bool = False

    def allows(self, value: float) -> bool:
        """Whether a number lies in the range; NaN lies in none, and infinity counts as no number."""
        over = value > self.lowest if self.above else value >= self.lowest
        return math.isfinite(value) and over and (value < self.highest if self.below else value <= self.highest)


LARGEST = 2**31 - 1  # counts beyond it overflow in the libraries below
COUNT = Limit("a whole number from 1 on", 1, LARGEST)
COUNT_OR_NONE = Limit("a whole number from 1 on, or 0 for none", 0, LARGEST)
TOKENS = Limit("a whole number of tokens from 2 on: one to read and one to predict", 2, LARGEST)
POSITIVE = Limit("a number above 0", 0, above=True)
NOT_NEGATIVE = Limit("0 or a number above it", 0)
DECAY = Limit("a number from 0 on and below 1", 0, 1, below=True)

LIMITS = {
    "adam_beta1": DECAY,
    "adam_beta2": DECAY,
    "annealing_end": DECAY,
    "annealing_start": DECAY,
    "block_size": TOKENS,
    "cache_top_k": COUNT,
    "calibration_blocks": COUNT,
    "gamma_attention": NOT_NEGATIVE,
    "gamma_every": COUNT,
    "gamma_rho": POSITIVE,
    "gradient_accumulation_steps": COUNT,
    "group_size": Limit("64, 128 or 256", 64, 256),
    "health_steps": COUNT_OR_NONE,
    "kd_temperature": POSITIVE,
    "kd_top_k": COUNT,
    "lambda_hidden": NOT_NEGATIVE,
    "lambda_logits": NOT_NEGATIVE,
    "learning_rate": POSITIVE,
    "logging_steps": COUNT,
    "max_grad_norm": NOT_NEGATIVE,
    "max_length": TOKENS,
    "max_rows": COUNT,
    "max_steps": Limit("a whole number of steps from 1 on", 1, LARGEST),
    "max_train_rows": COUNT,
    "num_train_epochs": POSITIVE,
    "per_device_eval_batch_size": COUNT,
    "per_device_train_batch_size": COUNT,
    "proof_rows": COUNT,
    "rank_timeout": POSITIVE,
    "relation_layers": Limit("decoder layers by number; negative ones count from the end", -LARGEST, LARGEST),
    "relation_temperature": POSITIVE,
    "save_steps": COUNT_OR_NONE,
    "seed": Limit("a whole number from 0 to 4294967295", 0, 2**32 - 1),
    "speed_tokens": COUNT_OR_NONE,
    "split_heads": COUNT,
    "subln_eps": POSITIVE,
    "teacher_forcing": DECAY,
    "teacher_relation_layers": Limit("decoder layers by number; negative ones count from the end", -LARGEST, LARGEST),
    "vocabulary_threshold": COUNT_OR_NONE,
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "zero": Limit("0, 1, 2 or 3", 0, 3),
}
UNTIL_THE_DATA_ENDS = -1  # max_steps of a stage that goes by num_train_epochs


def check_limits(section: Any, where: str = "") -> None:
    """Raises UserError for the first number out of its range, and for the first text that is empty.

    Args:
        section: a dataclass of settings; the sections inside it are checked, too.
        where: its dotted name, "" for the whole tree.
    """
    for setting in dataclasses.fields(section):
        name = f"{where}.{setting.name}" if where else setting.name
        value = getattr(section, setting.name)
        if dataclasses.is_dataclass(value):
            check_limits(value, name)
        elif setting.name == "max_steps" and where and value == UNTIL_THE_DATA_ENDS:
            continue
        else:
            for one in _each(value):
                _check(name, one)


def _each(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else [value]


def _check(name: str, value: Any) -> None:
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise UserError(name, expected="a text", got=repr(value), do="Write one, or leave the setting out.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    limit = LIMITS[name.rpartition(".")[2]]
    if not limit.allows(value):
        words = limit.words + (", or -1 to go by num_train_epochs" if name.endswith(".max_steps") else "")
        do = "Give such a number, or leave the setting out for the value of the recipe."
        raise UserError(name, expected=words, got=str(value), do=do)
