"""How likely each of some answers (labels) is after a prompt; computed as requests that share decoder steps with all others.

The labels form a tree of token prefixes. Each prefix of a label is one request: its logits are read, and no token
is chosen. The empty prefix is the prompt itself; the other requests continue from the prompt's slot in the KV cache and start
when the prompt has been computed.
"""

from collections.abc import Sequence

import numpy as np

from bitdistill.runtime.batching import Request
from bitdistill.runtime.sampling import log_softmax

Tree = dict[tuple[int, ...], list[tuple[int, int]]]


def label_tree(labels: Sequence[Sequence[int]]) -> Tree:
    """{prefix: [(label, its next token)]} for all labels that begin with the prefix; the empty prefix comes first.

    Args:
        labels: L token lists, none empty.
    """
    tree: Tree = {}
    for number, label in enumerate(labels):
        for place, token in enumerate(label):
            tree.setdefault(tuple(label[:place]), []).append((number, token))
    return dict(sorted(tree.items()))


def label_requests(index: int, prompt: Sequence[int], tree: Tree, likelihoods: np.ndarray) -> list[Request]:
    """One request for each prefix. The prompt's own comes first; the others must start after it has ended.

    Args:
        index: of the prompt. prompt: its ids. tree: of `label_tree`.
        likelihoods: float64 (L,), zeros; when all have ended, ``sum_t log p(label_t | prompt, label_<t)`` of each label.
    """
    return [
        Request(index, [*prompt, *prefix], 1, _Look(likelihoods, following), prompt_tokens=len(prompt))
        for prefix, following in tree.items()
    ]


class _Look:
    """Chooses nothing; adds the log-probabilities of some tokens to the likelihoods of their labels."""

    def __init__(self, likelihoods: np.ndarray, following: list[tuple[int, int]]):
        self._likelihoods, self._following = likelihoods, following

    def choose(self, logits: np.ndarray) -> None:
        log_p = log_softmax(logits)
        for label, token in self._following:
            self._likelihoods[label] += log_p[token]
