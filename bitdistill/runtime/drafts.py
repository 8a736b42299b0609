"""Lookup decoding: what may follow, from what followed before. Prompts are often quoted in their answers.

A draft is what came after the last occurrence of the newest three tokens, or else two, in the prompt and the answer so far. The
step that computes the newest token computes the drafted ones behind it, too, and as many of them stand as were chosen anyway
(batching.py). So an answer is the same, token for token, greedy or drawn: only the number of steps changes.
"""

NGRAMS = (3, 2)


class Drafts:
    """The drafts of one sequence.

    Args:
        longest: tokens of a draft, at most.
    """

    def __init__(self, longest: int):
        self._longest = longest
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> the position behind its last occurrence that has one
        self._known = 0

    def draft(self, ids: list[int], room: int) -> list[int]:
        """Tokens that may follow `ids`.

        Args:
            ids: the prompt and the answer so far: what it was in the last call, and more.
            room: at most so many.
        """
        for end in range(max(self._known, 1), len(ids)):
            for n in NGRAMS:
                if end >= n:
                    self._ends[tuple(ids[end - n : end])] = end
        self._known = len(ids)
        for n in NGRAMS:
            start = self._ends.get(tuple(ids[-n:])) if len(ids) > n else None
            if start is not None:
                return ids[start : start + max(0, min(self._longest, room))]
        return []
