"""Which sequence is in which slot of the KV cache, and which part of it the next prompt can use again.

A slot keeps the keys and values of its sequence after that has ended, until the slot is needed again. A prompt that begins
like any sequence in the cache, running or not, starts after the part that they share. This is the whole prompt cache: it
needs no memory of its own and no tuning, and reused keys are copies, bit for bit.
"""

from collections.abc import Callable, Sequence


class Slots:
    """The slots of a KV cache.

    Args:
        cache: the keys and values (kernels/cpu/decoder.py:KVCache); its slots are handed out here.
        windows: how many last positions each layer sees; None is all.
        larger: makes a cache of as many slots with room for so many positions, or more, for `reserve`.
    """

    def __init__(self, cache, windows: Sequence[int | None], larger: Callable | None = None):
        self.cache, self._windows, self._larger = cache, windows, larger
        self._position_bytes = cache.nbytes // (cache.slots * cache.padded_capacity * len(windows))  # of one layer
        self.ids: list[list[int]] = [[] for _ in range(cache.slots)]  # the tokens whose keys and values are there
        self._busy: set[int] = set()
        self._used = [0] * cache.slots  # when each was taken last
        self._clock = 0

    @property
    def busy(self) -> int:
        """How many slots are taken."""
        return len(self._busy)

    def read_bytes(self, slot: int) -> int:
        """Keys and values that the last position of a slot attends to, itself included."""
        length = len(self.ids[slot])
        return self._position_bytes * sum(length if w is None else min(length, w) for w in self._windows)

    def remember(self, other: "Slots") -> None:
        """Takes over from a smaller cache the sequences that were used last, as many as there is room for. To be called
        while nothing is in these slots."""
        latest = sorted(range(len(other.ids)), key=lambda slot: -other._used[slot])
        for slot, source in enumerate(latest[: len(self.ids)]):
            if len(other.ids[source]) > self.cache.capacity:
                continue
            self.cache.copy(source, slot, len(other.ids[source]), other.cache)
            self.ids[slot], self._used[slot] = list(other.ids[source]), len(self.ids) - slot
        self._clock = len(self.ids)

    def reserve(self, positions: int) -> None:
        """Makes room for sequences of so many positions; what the slots hold stays, and so does which of them are taken.

        A cache is as large as its longest sequence so far needed and not as the context: in one with room to spare the
        sequences lie far apart. Where the system gives memory in pages of 2 MB, all of it would be resident, although most
        was never written to, and steps would be slower.
        """
        if positions <= self.cache.capacity:
            return
        assert self._larger is not None, "more positions than the cache has room for"
        before, self.cache = self.cache, self._larger(positions)
        for slot, ids in enumerate(self.ids):
            self.cache.copy(slot, slot, len(ids), before)

    def fits(self, slots: int, positions: int) -> bool:
        """Whether so many more sequences of so many positions can be taken at once."""
        return slots + self.busy <= self.cache.slots and positions <= self.cache.capacity

    def shared(self, prompt_ids: Sequence[int]) -> int:
        """How many positions `take` would find for this prompt: its last token is always computed, for its logits."""
        return min(max(common_prefix(ids, prompt_ids) for ids in self.ids), len(prompt_ids) - 1)

    def take(self, prompt_ids: Sequence[int]) -> int:
        """A slot for this sequence; `ids[slot]` is what it holds already of the prompt.

        A sequence that the prompt continues is continued where it lies. Else the free slot that was not used for the
        longest time is overwritten, with the longest shared beginning copied into it.
        """
        free = [slot for slot in range(len(self.ids)) if slot not in self._busy]
        assert free, "more sequences than slots"
        known = self.shared(prompt_ids)
        lengths = [min(common_prefix(ids, prompt_ids), known) for ids in self.ids]
        continued = [slot for slot in free if lengths[slot] == known and len(self.ids[slot]) <= known + 1]
        if known and continued:
            slot = continued[0]
        else:
            slot = min(free, key=lambda free_slot: self._used[free_slot])
            if lengths[slot] < known:
                self.cache.copy(lengths.index(known), slot, known)
        self.ids[slot] = list(prompt_ids[:known])
        self._busy.add(slot)
        self._clock += 1
        self._used[slot] = self._clock
        return slot

    def give_back(self, slot: int) -> None:
        """The sequence has ended; its keys and values stay until the slot is taken."""
        self._busy.remove(slot)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared
