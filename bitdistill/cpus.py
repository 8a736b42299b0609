"""How many CPUs this process may use. Every number of threads in this project is derived from it.

A machine shows all of its cores to a process, even if the process may use only a few: because of its affinity (taskset, a
batch system) or a quota of its control group (docker --cpus, Kubernetes, systemd's CPUQuota). If it starts more threads
than that, they wait for each other.
"""

import os
from pathlib import Path, PurePosixPath

MOUNT = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """The CPUs in this process's affinity, or fewer where a quota of a control group says so; at least 1.

    Quotas are read of version 1 and version 2, of the process's own group and of every group around it: the smallest
    counts. A part of a CPU is rounded down. Without control groups (other systems, no /proc) affinity alone counts.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *(int(quota) for quota in _quotas())]))


def _quotas() -> list[float]:
    """CPUs that each control group around this process allows."""
    found = []
    for folder in _groups():
        limits = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(limits) == 2 and all(limit.isdigit() for limit in limits) and int(limits[1]) > 0:
            found.append(int(limits[0]) / int(limits[1]))  # no quota is "max", or -1 in version 1
    return found


def _groups() -> list[Path]:
    """The folders of the process's control groups for CPUs and of all groups around them, where they may be mounted.

    In a container the path of /proc/self/cgroup may be the host's: the mounted folder itself, which is the last of the
    groups around it, is the container's own then.
    """
    folders = [MOUNT, MOUNT / "cpu", MOUNT / "cpu,cpuacct"]
    for line in _lines(Path("/proc/self/cgroup")):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
        if number == "0" and not controllers:
            roots = [MOUNT, MOUNT / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [MOUNT / controllers, MOUNT / "cpu"]
        else:
            continue
        folders += [root / around for root in roots for around in (group, *group.parents)]
    return list(dict.fromkeys(folders))


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not there, or not to be read: no limit that is known
        return []
