"""Timing on a GPU, and how a measurement is judged: floors, targets, one table. The arithmetic needs no GPU.

**How a time is taken.** Several copies of the inputs, together larger than the L2 cache, are used in turn, so that nothing
is read from the cache. A batch is one call for each copy, between two CUDA events. Before it, the GPU is put to sleep until
the CPU has queued the whole batch, so that the GPU's work is measured and not Python's. (If the first event has passed
before the CPU is done, the sleep was too short, and the batch is repeated with a longer one. Work that waits for the GPU in
its middle can never be queued as a whole, and is marked.) Results of a batch are kept until its end, so that each call
writes to memory of its own. Contenders take turns: a round times each once. A figure is the median over rounds, with the
smallest and the largest.

**How it is judged.** A floor is the least time that the device could need: bytes that must be moved over the copy
bandwidth, or operations over the rate of matrix products, both measured in the same run. A target is a share of the floor's
speed, an upper bound in seconds, or a speed-up over a contender of the same run.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from measure import table

ROTATED_BYTES = 256 * 2**20  # five times the L2 cache of an H200
SHORTEST_SLEEP, LONGEST_SLEEP = 2**18, 2**30  # cycles: 0.15 ms, 0.6 s
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call over rounds. `waits`: the CPU could not queue it whole, so the figure includes the CPU's time."""

    median: float
    smallest: float
    largest: float
    waits: bool = False


@dataclass(frozen=True)
class Target:
    """What is asked of a figure.

    Args:
        kind: "floor" (floor / time >= value), "seconds" (time <= value), "speedup" (contender / time >= value; 0 asks
            nothing), "bytes" (memory <= value), "fewer" (contender's memory / memory >= value), "error" (error <= value),
            "none".
        value: the bound. contender: whose time or memory it is compared with.
    """

    kind: str = "none"
    value: float = 0.0
    contender: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table; what does not apply is None.

    Args:
        section, what: where it stands and what was measured. timing: seconds per call. floor: seconds.
        target: what was asked. figure: floor / time, contender / time, bytes or an error, as the target's kind has it; without a
            target floor / time. met: whether it is. note: what else there is to say.
    """

    section: str
    what: str
    timing: Timing | None
    floor: float | None
    target: Target
    figure: float | None
    met: bool | None
    note: str = ""

    def json(self) -> dict:
        """As plain values."""
        return asdict(self)


def judge(
    section: str,
    what: str,
    timing: Timing | None,
    floor: float | None = None,
    target: Target = Target(),
    measured: float | None = None,
    contender: float | None = None,
    note: str = "",
) -> Row:
    """A row with its figure worked out.

    Args:
        timing: of the call, or None where nothing was timed. floor: seconds. measured: bytes or error, for those kinds.
        contender: its median seconds, or its bytes.
    """
    figure = met = None
    if target.kind in ("bytes", "error"):
        figure, met = measured, None if measured is None else measured <= target.value
    elif target.kind == "fewer":
        if measured is not None and contender is not None:
            figure = contender / max(measured, 1)
            met = figure >= target.value
    elif timing is not None:
        if target.kind == "seconds":
            figure, met = timing.median, timing.median <= target.value
        elif target.kind == "speedup":
            figure = None if contender is None else contender / timing.median
            met = None if figure is None or not target.value else figure >= target.value
        else:
            figure = None if floor is None else floor / timing.median
            met = figure >= target.value if target.kind == "floor" and figure is not None else None
    return Row(section, what, timing, floor, target, figure, met, note)


def copies_needed(bytes_of_a_copy: int, most: int = 64) -> int:
    """How many copies of the inputs a rotation takes: together ROTATED_BYTES, at least 2."""
    return max(2, min(most, math.ceil(ROTATED_BYTES / max(1, bytes_of_a_copy))))


class OutOfTime(Exception):
    """A section's share of the time is used up."""


class Deadline:
    """The time of a run, shared out to its sections.

    Args:
        seconds: for all. clock: seconds now.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + seconds
        self._section_end = self._end

    def left(self) -> float:
        """Seconds until the end of all."""
        return self._end - self._clock()

    def begin(self, seconds: float) -> None:
        """A section begins, which may use so many seconds, and no more than are left.

        Raises:
            OutOfTime: less than a tenth of that is left.
        """
        if self.left() < seconds / 10:
            raise OutOfTime(f"{max(0.0, self.left()):.0f} s were left of the {seconds:.0f} s that it needs")
        self._section_end = min(self._end, self._clock() + seconds)

    def check(self) -> None:
        """Raises OutOfTime when the section's time is over."""
        if self._clock() >= self._section_end:
            raise OutOfTime("its time was over")


class CudaTimer:
    """Times calls on the current CUDA device, as the docstring of this file says."""

    def __init__(self, rounds: int):
        self.rounds = rounds

    def compare(self, works: dict[str, Sequence[Call]], rounds: int | None = None) -> dict[str, Timing]:
        """Contenders in turn.

        Args:
            works: by name, one call for each copy of the inputs. rounds: fewer than usual for what is slow.
        """
        import torch

        for calls in works.values():  # compile, fill caches of the allocator
            for call in (calls[0], calls[0], calls[-1]):
                call()
        torch.cuda.synchronize()
        seconds: dict[str, list[float]] = {name: [] for name in works}
        waits, cycles = dict.fromkeys(works, False), dict.fromkeys(works, SHORTEST_SLEEP)
        for _ in range(rounds or self.rounds):
            for name, calls in works.items():
                spent, cycles[name] = self._batch(calls, cycles[name])
                seconds[name].append(spent / len(calls))
                waits[name] |= cycles[name] == 0
        return {name: summarize(values, waits[name]) for name, values in seconds.items()}

    def _batch(self, calls: Sequence[Call], cycles: int) -> tuple[float, int]:
        """(seconds of all calls, the sleep that was long enough for the CPU to queue them; 0 if none is)."""
        import torch

        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if cycles:
                torch.cuda._sleep(cycles)
            start.record()
            kept = [call() for call in calls]
            late = start.query()
            end.record()
            end.synchronize()
            del kept
            if not late or not cycles:
                return start.elapsed_time(end) / 1e3, cycles
            cycles = 4 * cycles if cycles < LONGEST_SLEEP else 0

    def graph(self, calls: Sequence[Call]) -> Call:
        """All calls as one CUDA graph, whose replay is a call."""
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]

        def replay(kept=kept) -> None:
            graph.replay()

        return replay

    def peak_bytes(self, call: Call) -> int:
        """The most that a call allocates beyond what is there, results that it returns included."""
        import torch

        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before


class DryTimer:
    """Calls each work once, and times nothing: for machines without a GPU."""

    def compare(self, works: dict[str, Sequence[Call]], rounds: int | None = None) -> dict[str, None]:
        """Each contender's first call."""
        for name, calls in works.items():
            calls[0]()
            print(f"    works: {name}", flush=True)
        return dict.fromkeys(works)

    def graph(self, calls: Sequence[Call]) -> Call:
        """The first of the calls."""
        return calls[0]

    def peak_bytes(self, call: Call) -> None:
        """Nothing is known of memory."""
        call()


def summarize(seconds: Sequence[float], waits: bool = False) -> Timing:
    """The median, the smallest and the largest."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds), waits)


# ---------------------------------------------------------------------------------------------------- the table


def show_seconds(seconds: float | None) -> str:
    """In us below 1 ms, in ms below 1 s."""
    if seconds is None:
        return "-"
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 100 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds:.3g} s"


def show_bytes(count: float) -> str:
    """In MB below 1 GB."""
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"


def _cells(row: Row) -> list[str]:
    target, figure = row.target, row.figure
    asked = {
        "floor": f">= {100 * target.value:.0f} % of it",
        "seconds": f"<= {show_seconds(target.value)}",
        "speedup": f">= {target.value:g} x {target.contender}" if target.value else f"(beside {target.contender})",
        "fewer": f">= {target.value:g} x below {target.contender}",
        "bytes": f"<= {show_bytes(target.value)}",
        "error": f"<= {target.value:g}",
        "none": "-",
    }[target.kind]
    if figure is None:
        got = "-"
    elif target.kind == "bytes":
        got = show_bytes(figure)
    elif target.kind == "error":
        got = f"{figure:.2g}"
    elif target.kind == "seconds":
        got = "-" if row.floor is None else f"{100 * row.floor / figure:.0f} % of floor"
    elif target.kind in ("speedup", "fewer"):
        got = f"{figure:.3g} x"
    else:
        got = f"{100 * figure:.0f} % of floor"
    timing = row.timing
    took = "-"
    if timing is not None:
        took = f"{show_seconds(timing.median)} [{show_seconds(timing.smallest)}, {show_seconds(timing.largest)}]"
        took += " *" if timing.waits else ""
    met = {True: "met", False: "NOT MET", None: "-"}[row.met]
    return [row.what, show_seconds(row.floor), asked, took, got, met, row.note]


def show(rows: Sequence[Row]) -> str:
    """One table, a block per section."""
    heading = ["what", "floor", "target", "median [min, max]", "ratio", "", "note"]
    cells = [heading]
    for index, row in enumerate(rows):
        if index == 0 or rows[index - 1].section != row.section:
            cells.append([f"{row.section}:", *[""] * 6])
        cells.append(["  " + _cells(row)[0], *_cells(row)[1:]])
    text = "\n".join(line.rstrip() for line in table(cells, "<>>>>< <".replace(" ", "")).splitlines())
    if any(row.timing is not None and row.timing.waits for row in rows):
        text += "\n* waits for the GPU in its middle, or its launches cannot be queued: the CPU's time is in the figure"
    return text
