"""Warning signs of a ternary student that does not train well: what they are, their thresholds and the reasons for them,
and what to try.

This file knows neither models nor files. health.py hands it the lines of health.jsonl and metrics.jsonl as they are
written, and it answers with findings. After a resume the lines that were kept are handed to it again, which brings it
back to where it was. Each kind of finding is reported once per stage, at the first measurement that shows it.

    dead          a layer's codes are all zero, its output is zero, or no gradient has reached it twice in a row
    collapse      one code holds nearly all weights of a layer
    saturated     hardly a zero is left in a layer
    frozen        no code flips while the learning rate is far from zero
    thrash        codes flip back and forth faster than they can be learned with
    drift         weight_scale has left the start of the stage by a factor
    outliers      most int8 codes of a layer's input are zero, because single channels take the range
    drowned       the gradient of one loss term is a hundred times as large as that of the others
    rising        cross-entropy rises over the last third of what was logged
    chance        late in a stage on labels, cross-entropy is no lower than that of guessing

In healthy runs (the demo and a model of 6 M parameters on two tasks), the share of zeros lies between 0.28 and 0.35, up to
1 % of a layer's codes flip per step, scales move by up to 30 %, and at most 20 % of a layer's int8 input codes are zero.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# A code that holds 80 % of the weights leaves at most 0.92 bits of the 1.58; a Gaussian layer has 31 % zeros.
COLLAPSED_SHARE = 0.8
# Below, a layer is binary: its masters have left the middle, where a small gradient could still switch a weight off.
SATURATED_ZEROS = 0.05
# At a lower learning rate, as a share of the stage's peak, codes rest in sound runs too: warm-up and the schedule's end.
AWAKE_LEARNING_RATE = 0.1
# No flip in this many measurements, nor in so many looks at a code that a rate of FROZEN_FLIPS a step would have shown
# (rule of three: none seen in n looks bounds the rate by 3 / n). At 1e-5 a step a tenth of the codes change in 10 000.
FROZEN_MEASUREMENTS = 3
FROZEN_FLIPS = 1e-5
# At 5 % a step every code changes within 20 steps: faster than what is built on it can follow. Sound: up to 1 %.
THRASHED_FLIPS = 0.05
# Sound stages move the scale by up to 30 %; after a factor of three the layer is not the one the stage began with.
DRIFTED_FACTOR = 3.0
# Gaussian inputs have 1 % zero codes; three quarters means that the layer reads a quarter of its channels, or fewer.
WASTED_CODES = 0.75
# A term whose gradient is a hundredth of another's moves nothing: AdamW and clipping see the sum alone.
DROWNED_RATIO = 100.0
# A single measurement may be a batch without labels, or chance.
MEASUREMENTS_IN_A_ROW = 2
# The last third of fewer lines says nothing; and a rise counts beyond 5 % and three standard errors of the line noise.
RISING_LINES = 24
RISING_SHARE = 0.05
RISING_ERRORS = 3.0
# QNLI with SmolLM2-135M, guessing 0.693: students that ended at 71.6 % had 0.658 and 0.665 there, those that ended at 60.5 and
# 61.0 % had 0.714 and 0.710.
LATE, CHANCE_SHARE, CHANCE_LINES = 0.75, 0.97, 8
MAX_LABELS = 200

SMALLEST_IS_WORST = ("saturated",)

Layers = dict[str, dict[str, float]]  # name -> measurements
# (kind, the layers that show it with a number each, a sentence that may name {count}, {total}, {worst} and its {value})
Sign = tuple[str, dict[str, float], str]

ADVICE = {
    "dead": "Start from refine.gain calibrated or refine.norms all, and lower the learning rate or raise warmup_steps; "
    "a layer without gradient may be frozen, or its output may go into a layer that is dead.",
    "collapse": "Lower learning_rate or weight_decay, or raise warmup_steps; a longer stage 2 at a lower learning rate moves "
    "the weights apart again.",
    "saturated": "Lower learning_rate, raise weight_decay a little, or raise warmup_steps.",
    "frozen": "Raise learning_rate (ternary training needs 10 to 100 times that of full precision); check that the master "
    "weights are fp32 and that neither the schedule nor clipping keeps the step near zero.",
    "thrash": "Lower learning_rate, raise warmup_steps, or use larger batches (gradient_accumulation_steps).",
    "drift": "Lower learning_rate. If the scale falls, lower weight_decay as well; if it grows, raise weight_decay.",
    "outliers": "Try refine.norms all, a SubLN in front of every projection, and a longer stage 2, in which the model "
    "learns to spread its activations.",
    "drowned": "Set distill.gamma_attention to balanced with distill.gamma_rho near 1, or move gamma by the ratio seen.",
    "rising": "Lower learning_rate, raise warmup_steps, or lower max_grad_norm; in the stage distill, look which term of the "
    "loss works against the cross-entropy.",
    "chance": "Look first whether the teacher has learned the task. If it has, give the student more steps (a hard task may only "
    "begin to be learned when the learning rate falls), a lower learning rate, or a larger lambda_hidden.",
}


@dataclass(frozen=True)
class Finding:
    """One warning.

    Args:
        kind: a key of ADVICE. step: of the measurement.
        seen: a sentence with the numbers. layers: whom it concerns, the worst first; empty for the whole model.
    """

    kind: str
    step: int
    seen: str
    layers: tuple[str, ...] = ()

    def line(self, stage: str) -> dict:
        """The finding as a line of warnings.jsonl."""
        content = {"stage": stage, "step": self.step, "kind": self.kind, "seen": self.seen}
        return content | {"do": ADVICE[self.kind], "layers": list(self.layers)}


class Diagnosis:
    """Follows one stage.

    Args:
        learning_rate: the stage's peak. weights: number of weights of each layer, by its name.
        guessing: the cross-entropy of guessing (`guessing_loss`); None where nothing is to be guessed.
    """

    def __init__(self, learning_rate: float, weights: dict[str, int], guessing: float | None = None):
        self.learning_rate, self.weights, self.guessing = learning_rate, weights, guessing
        self._said: set[str] = set()
        self._quiet = dict.fromkeys(weights, 0)  # measurements since a layer's last flip, the learning rate awake
        self._in_a_row: dict[str, int] = {}
        self._losses: list[float] = []
        self._norms: tuple[float | None, ...] = ()

    def measured(self, line: dict) -> list[Finding]:
        """What a line of health.jsonl shows for the first time.

        Args:
            line: {"step", "learning_rate", "layers": {name: measurements}}.
        """
        layers, found = line["layers"], []
        for kind, sick, words in (*self._dead(layers), *_codes(layers), *self._movement(layers, line)):
            if sick:
                names = sorted(sick, key=sick.__getitem__, reverse=kind not in SMALLEST_IS_WORST)
                seen = words.format(count=len(sick), total=len(layers), worst=names[0], value=sick[names[0]])
                found.append(Finding(kind, line["step"], seen, tuple(names)))
        return self._new(found)

    def _dead(self, layers: Layers) -> Iterator[Sign]:
        """Layers that compute nothing or learn nothing."""
        zeros, output, gradients = (_values(layers, key) for key in ("zeros", "output_rms", "grad_norm"))
        yield "dead", {n: v for n, v in zeros.items() if v == 1}, "{count} of {total} layers hold zeros alone ({worst})"
        yield (
            "dead",
            {n: v for n, v in output.items() if v == 0},
            "{count} of {total} layers give zeros alone ({worst})",
        )
        words = (
            f"no gradient reaches {{count}} of {{total}} layers ({{worst}}), in {MEASUREMENTS_IN_A_ROW} measurements"
        )
        yield "dead", {n: v for n, v in gradients.items() if self._again(f"grad {n}", v == 0)}, words

    def _movement(self, layers: Layers, line: dict) -> Iterator[Sign]:
        """What a single measurement cannot show: inputs that stay degenerate, codes that flip too often or never."""
        wasted, flips = _values(layers, "zero_activations"), _values(layers, "flips")
        yield (
            "outliers",
            {n: v for n, v in wasted.items() if self._again(f"outliers {n}", v > WASTED_CODES)},
            "single channels take the int8 range of {count} of {total} layers' inputs (worst {worst}: {value:.0%} of the "
            "codes are zero)",
        )
        yield (
            "thrash",
            {n: v for n, v in flips.items() if self._again(f"thrash {n}", v > THRASHED_FLIPS)},
            "codes thrash in {count} of {total} layers (worst {worst}: {value:.1%} of them change in a step)",
        )
        rate = line.get("learning_rate", 0.0)
        yield (
            "frozen",
            dict.fromkeys(self._frozen(flips, rate), 0.0),
            f"not one code flips in {{count}} of {{total}} layers ({{worst}}) over {FROZEN_MEASUREMENTS} measurements or "
            f"more, at {rate / self.learning_rate:.0%} of the peak learning rate",
        )

    def logged(self, line: dict, *, progress: float = 1.0) -> list[Finding]:
        """What a line of metrics.jsonl shows for the first time.

        Args:
            line: {"step", "loss_ce", "gamma_attention", "grad_norm_attention", "grad_norm_task"}, as far as it has them.
            progress: share of the stage that is over. In the first half the learning rate may be at its peak, where a loss
                rises and falls again.
        """
        found, step = [], line["step"]
        norms, ratio = (line.get("grad_norm_attention"), line.get("grad_norm_task")), gradient_ratio(line)
        new, self._norms = norms != self._norms, norms  # a measurement may be logged more than once
        if new and ratio is not None and self._again("drowned", not 1 / DROWNED_RATIO < ratio < DROWNED_RATIO):
            strong, weak = ("relations", "task") if ratio > 1 else ("task", "relations")
            times = ratio if ratio > 1 else 1 / ratio if ratio else math.inf
            found.append(
                Finding(
                    "drowned",
                    step,
                    f"the gradient of the {strong} is {times:.3g} times that of the {weak} at Q, K and V",
                )
            )
        if isinstance(loss := line.get("loss_ce"), int | float) and math.isfinite(loss):
            self._losses.append(loss)
        rise = rise_of_last_third(self._losses) if progress >= 0.5 else None
        if rise is not None:
            found.append(
                Finding(
                    "rising", step, f"cross-entropy has risen by {rise:.0%} within the last third of the steps so far"
                )
            )
        last = self._losses[-(len(self._losses) // 3) :]
        if self.guessing is not None and progress >= LATE and len(last) >= CHANCE_LINES:
            mean = float(np.mean(last))
            if mean > CHANCE_SHARE * self.guessing:
                seen = f"cross-entropy of the last {len(last)} lines is {mean:.3f}; guessing by frequency has {self.guessing:.3f}"
                found.append(Finding("chance", step, seen))
        return self._new(found)

    def _new(self, found: list[Finding]) -> list[Finding]:
        new = [
            finding for i, finding in enumerate(found) if finding.kind not in self._said | {f.kind for f in found[:i]}
        ]
        self._said |= {finding.kind for finding in new}
        return new

    def _again(self, what: str, holds: bool) -> bool:
        """Whether it holds now and has held for MEASUREMENTS_IN_A_ROW."""
        self._in_a_row[what] = self._in_a_row.get(what, 0) + 1 if holds else 0
        return self._in_a_row[what] >= MEASUREMENTS_IN_A_ROW

    def _frozen(self, flips: dict[str, float], learning_rate: float) -> list[str]:
        """Layers that have not flipped for long enough to say so; small layers all together or not at all."""
        if learning_rate < AWAKE_LEARNING_RATE * self.learning_rate:
            return []
        for name, share in flips.items():
            self._quiet[name] = 0 if share > 0 else self._quiet[name] + 1
        quiet = [name for name in flips if self._quiet[name] >= FROZEN_MEASUREMENTS]
        looks = {name: self._quiet[name] * self.weights[name] for name in quiet}
        enough = 3 / FROZEN_FLIPS
        if flips and len(quiet) == len(flips) and sum(looks.values()) >= enough:
            return quiet
        return [name for name in quiet if looks[name] >= enough]


def _values(layers: Layers, key: str) -> dict[str, float]:
    """One measurement of the layers that have it."""
    return {name: layer[key] for name, layer in layers.items() if key in layer}


def _codes(layers: Layers) -> Iterator[Sign]:
    """How a layer's codes and scale are distributed, as a single measurement shows it."""
    zeros = _values(layers, "zeros")
    shares = {n: max(layer.get(code, 0) for code in ("minus", "zeros", "plus")) for n, layer in layers.items()}
    yield (
        "collapse",
        {n: share for n, share in shares.items() if share > COLLAPSED_SHARE and zeros.get(n) != 1},
        "one code holds most weights in {count} of {total} layers (worst {worst}: {value:.0%})",
    )
    yield (
        "saturated",
        {n: v for n, v in zeros.items() if v < SATURATED_ZEROS},
        "hardly a zero is left in {count} of {total} layers (worst {worst}: {value:.1%})",
    )
    drift = {n: v for n, v in _values(layers, "scale_drift").items() if v > 0}
    yield (
        "drift",
        {n: math.exp(abs(math.log(v))) for n, v in drift.items() if not 1 / DRIFTED_FACTOR < v < DRIFTED_FACTOR},
        "weight_scale of {count} of {total} layers has left the stage's start (worst {worst}: by a factor of {value:.1f})",
    )


def guessing_loss(answers: Iterable[Sequence[int]]) -> float | None:
    """Cross-entropy, in nats per answer token, of knowing nothing but how often each answer occurs.

    ``-sum_a p_a log(p_a) / sum_a p_a |a|``, a: an answer of |a| tokens

    Args:
        answers: tokens of each row's answer. Returns None where they are all the same, or too many to be labels: more than
            MAX_LABELS, or hardly any of them twice.
    """
    counts = Counter(map(tuple, answers))
    rows = counts.total()
    if not 1 < len(counts) <= min(MAX_LABELS, rows / 2):
        return None
    entropy = -sum(count / rows * math.log(count / rows) for count in counts.values())
    return entropy / (sum(count * len(answer) for answer, count in counts.items()) / rows)


def gradient_ratio(line: dict) -> float | None:
    """``gamma * |grad relations| / |grad task|`` at Q, K and V from a line of metrics.jsonl; None where it says nothing:
    without the two norms, before the first of them, and with a gamma of 0."""
    gamma, relations, task = (line.get(key) for key in ("gamma_attention", "grad_norm_attention", "grad_norm_task"))
    if not gamma or relations is None or not task:
        return None
    return gamma * relations / task


def rise_of_last_third(losses: list[float]) -> float | None:
    """By which share the mean of the last sixth lies above that of the sixth before, where that is more than noise.

    The noise of a line is read off the differences of neighbors, which a slow trend hardly touches.
    """
    if len(losses) < RISING_LINES:
        return None
    last = np.asarray(losses[-(2 * len(losses) // 3) :])
    noise = math.sqrt(np.square(np.diff(last)).mean() / 2)
    half = len(losses) // 6
    before, after = last[-2 * half : -half].mean(), last[-half:].mean()
    rise = after - before
    beyond = rise > RISING_SHARE * before and rise > RISING_ERRORS * noise * math.sqrt(2 / half)
    return rise / before if beyond else None
