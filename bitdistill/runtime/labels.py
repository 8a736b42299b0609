"""How likely each of some answers is after a prompt, as requests that share the decoder's steps with any others.

The answers are a tree: each opening that some of them have in common is one request, whose logits are only looked at. The
empty opening is the prompt itself; the others continue it where it lies, and begin when it has been computed.
"""

from collections.abc import Sequence

import numpy as np

from bitdistill.runtime.batching import Request
from bitdistill.runtime.sampling import log_softmax

Tree = dict[tuple[int, ...], list[tuple[int, int]]]


def label_tree(labels: Sequence[Sequence[int]]) -> Tree:
    """Opening -> (label, its token after this opening) for each label that begins so; the empty opening comes first.

    Args:
        labels: L token lists, none empty.
    """
    tree: Tree = {}
    for number, label in enumerate(labels):
        for place, token in enumerate(label):
            tree.setdefault(tuple(label[:place]), []).append((number, token))
    return dict(sorted(tree.items()))


def label_requests(index: int, prompt: Sequence[int], tree: Tree, likelihoods: np.ndarray) -> list[Request]:
    """One request for each opening, the prompt's own first; the others are to begin when that has ended.

    Args:
        index: of the prompt. prompt: its ids. tree: of `label_tree`.
        likelihoods: float64 (L,), zeros; when all have ended, ``sum_t log p(label_t | prompt, label_<t)`` of each label.
    """
    return [
        Request(index, [*prompt, *opening], 1, _Look(likelihoods, following), prompt_tokens=len(prompt))
        for opening, following in tree.items()
    ]


class _Look:
    """Chooses nothing; adds the log-probabilities of some tokens to the likelihoods of their labels."""

    def __init__(self, likelihoods: np.ndarray, following: list[tuple[int, int]]):
        self._likelihoods, self._following = likelihoods, following

    def choose(self, logits: np.ndarray) -> None:
        log_p = log_softmax(logits)
        for label, token in self._following:
            self._likelihoods[label] += log_p[token]
