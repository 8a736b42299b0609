"""What all measurements here need: the machine's name, its read bandwidth, resident memory, energy, medians."""

import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bitdistill.cpus import available_cpus


def cores() -> int:
    """Cores that this process may use."""
    return available_cpus()


def machine() -> dict[str, Any]:
    """Date, processor, cores, memory, kernel, Python, and the commit of this checkout ("+" if files were changed)."""
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    name = platform.processor() or platform.machine()
    flags = ""
    if cpuinfo.is_file():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        name = f"{lines.get('model name', name)} (family {lines.get('cpu family')}, model {lines.get('model')})"
        wanted = ("avx2", "avx512_vnni", "avx512_vbmi", "avx_vnni", "avx512_bf16", "amx_int8")
        flags = " ".join(flag for flag in wanted if flag in lines.get("flags", "").split())
    memory = int(meminfo.read_text().split()[1]) / 2**20 if meminfo.is_file() else 0.0
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": name,
        "features": flags,
        "cores": cores(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of this checkout, with "+" after it when tracked files were changed; "" outside git."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def summary(values: list[float]) -> dict[str, float]:
    """{"median", "min", "max"} of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Bandwidth:
    """Read bandwidth of this machine: every thread adds up its own array, larger than the caches.

    Args:
        threads: reading at once. bytes_per_thread: 512 MB by default.
    """

    def __init__(self, threads: int, bytes_per_thread: int = 512 * 2**20):
        from numba import njit

        @njit(nogil=True)
        def read(words):
            quarter = len(words) // 4  # four places at once: one alone leaves the prefetchers of a core half idle
            a = b = c = d = np.uint64(0)
            for i in range(quarter):
                a ^= words[i]
                b ^= words[quarter + i]
                c ^= words[2 * quarter + i]
                d ^= words[3 * quarter + i]
            return a ^ b ^ c ^ d

        generator = np.random.default_rng(0)
        self._read = read
        self._arrays = [generator.integers(0, 2**63, bytes_per_thread // 8, np.uint64) for _ in range(threads)]
        read(self._arrays[0][:8])

    def gigabytes_per_second(self) -> float:
        """The fastest of three passes over all arrays: memory that rested for a while is slow in the first one."""
        return max(self._pass() for _ in range(3))

    def _pass(self) -> float:
        threads = [threading.Thread(target=self._read, args=(array,)) for array in self._arrays]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(array.nbytes for array in self._arrays) / (time.perf_counter() - started) / 1e9


class Neighbors:
    """How many cores other programs keep busy from the moment this is made. Linux only.

    Args:
        pids: running processes that are no neighbors. This one is none, nor are its children that have ended.
        cpus: the cores that all of these are pinned to, by number; None where they may use every core.
    """

    def __init__(self, *pids: int, cpus: list[int] | None = None):
        self._pids, self._cpus, self._since = pids, cpus, time.perf_counter()
        self._start = self._seconds()

    def _seconds(self) -> tuple[float, float]:
        """Processor seconds of others on those cores, and of everybody on all other cores."""
        tick = os.sysconf("SC_CLK_TCK")
        here = elsewhere = 0.0
        for name, *words in (line.split() for line in Path("/proc/stat").read_text().splitlines()):
            if not re.fullmatch(r"cpu\d+", name):
                continue
            spent = [int(word) / tick for word in words[:8]]
            busy = sum(spent) - spent[3] - spent[4]  # without idle time and waiting for disks; with stolen time
            if self._cpus is None or int(name[3:]) in self._cpus:
                here += busy
            else:
                elsewhere += busy
        here -= sum(os.times()[:4])
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            here -= (int(fields[11]) + int(fields[12])) / tick
        return here, elsewhere

    def cores(self) -> tuple[float, float]:
        """Processor seconds per second since then: of others on those cores, and of everybody on all other cores."""
        seconds = time.perf_counter() - self._since
        here, elsewhere = (
            max(0.0, now - start) / seconds for now, start in zip(self._seconds(), self._start, strict=True)
        )
        return here, elsewhere


def pin(threads: int, *pids: int) -> list[int]:
    """Pins this process, and all that it starts, to as many cores as there are threads: those that are used least now.

    Args:
        pids: of processes that run already and are pinned to the same cores.

    Returns: the numbers of the cores.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if threads < len(allowed):
        watched = {cpu: Neighbors(cpus=[cpu]) for cpu in allowed}
        time.sleep(0.5)
        allowed = sorted(sorted(allowed, key=lambda cpu: watched[cpu].cores()[0])[:threads])
        for pid in (os.getpid(), *pids):
            for task in Path(f"/proc/{pid}/task").iterdir():  # every thread has an affinity of its own
                os.sched_setaffinity(int(task.name), allowed)
    return allowed


def resident_bytes(pid: int | str = "self") -> dict[str, int]:
    """Resident memory of a process in bytes: {"anonymous", "file"} (mapped files, libraries included), Linux only."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem"):
            fields[name] = int(value.split()[0]) * 1024
    return {"anonymous": fields["RssAnon"] + fields["RssShmem"], "file": fields["RssFile"]}


@contextlib.contextmanager
def sampled(look: Callable[[], int], poll_seconds: float) -> Iterator[list[int]]:
    """A thread looks every `poll_seconds` while the block runs; gives a list whose only item is the largest number so far."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            try:
                peak[0] = max(peak[0], look())
            except (FileNotFoundError, KeyError, ProcessLookupError):  # the process has just ended
                return
            ended.wait(poll_seconds)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def peak_resident(command: list[str], poll_seconds: float = 0.02, **options: Any) -> tuple[str, int]:
    """Runs a command and samples the resident memory of its process.

    Returns: (its standard output, the largest anonymous + file-mapped bytes seen).

    Raises:
        subprocess.CalledProcessError: it failed; stderr says why.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    with sampled(lambda: sum(resident_bytes(process.pid).values()), poll_seconds) as peak:
        output, errors = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output, errors)
    return output, peak[0]


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes that this process's resident memory grew by at most during a call; at least 1. Linux only.

    The kernel keeps the peak itself (VmHWM), which is set back before: nothing between two samples is missed.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc: what was freed goes back to the system, and counts when it is used again
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = sum(resident_bytes().values())
    work()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return max(1, 1024 * int(peak.split()[1]) - before)


def peak_anonymous_growth(work: Callable[[], object], poll_seconds: float = 0.002) -> int:
    """Bytes of its own that this process grew by at most during a call; at least 1. Linux only.

    The pages of mapped files are no part of it: the system takes them back when anybody needs the memory. The kernel keeps no
    peak of this, so a thread looks again and again.
    """
    gc.collect()
    before = resident_bytes()["anonymous"]
    with sampled(lambda: resident_bytes()["anonymous"], poll_seconds) as peak:
        work()
    return max(1, peak[0] - before, resident_bytes()["anonymous"] - before)


class Energy:
    """Joules that the processor packages used since this object was made; None where RAPL cannot be read."""

    def __init__(self):
        zones = Path("/sys/class/powercap").glob("intel-rapl:?")
        self._counters = [zone / "energy_uj" for zone in zones if os.access(zone / "energy_uj", os.R_OK)]
        self._start = self._read()

    def _read(self) -> list[int]:
        return [int(counter.read_text()) for counter in self._counters]

    def joules(self) -> float | None:
        """Since the start; a counter that wrapped around in between makes it None, too."""
        used = [now - before for now, before in zip(self._read(), self._start, strict=True)]
        return sum(used) / 1e6 if used and min(used) >= 0 else None


def write_json(path: str | Path, value: Any) -> None:
    """Writes a result file, folders included."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    whole.write_text(json.dumps(value, indent=1) + "\n")
    whole.replace(path)  # a run that is broken off leaves the file as it was


def table(rows: list[list[str]], align: str) -> str:
    """Rows of cells, the first the heading, as aligned text. align: "<" or ">" for each column."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def figure(value: float) -> str:
    """A number for a table: whole ones in full with thousands separated, others with three digits."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def repeat(measure: Callable[[], float], times: int) -> dict[str, float]:
    """`summary` of a measurement taken several times."""
    return summary([measure() for _ in range(times)])
