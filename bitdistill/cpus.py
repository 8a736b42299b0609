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
    for folder in control_groups("cpu"):
        limits = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(limits) == 2 and all(limit.isdigit() for limit in limits) and int(limits[1]) > 0:
            found.append(int(limits[0]) / int(limits[1]))  # no quota is "max", or -1 in version 1
    return found


def control_groups(controller: str) -> list[Path]:
    """The folders of the process's control groups and of all groups around them, where they may be mounted.

    In a container the path of /proc/self/cgroup may be the host's: the mounted folder itself, which is the last of the
    groups around it, is the container's own then.

    Args:
        controller: whose limits are looked for: "cpu" or "memory".
    """
    folders = [MOUNT, MOUNT / controller, MOUNT / "cpu,cpuacct"]
    for line in read_lines(Path("/proc/self/cgroup")):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
        if number == "0" and not controllers:
            roots = [MOUNT, MOUNT / "unified"]
        elif controller in controllers.split(","):
            roots = [MOUNT / controllers, MOUNT / controller]
        else:
            continue
        folders += [root / around for root in roots for around in (group, *group.parents)]
    return list(dict.fromkeys(folders))


def _words(path: Path) -> list[str]:
    return " ".join(read_lines(path)).split()


def read_lines(path: Path) -> list[str]:
    """The lines of a file of the system; none where there is no such file, or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not there, or not to be read: no limit that is known
        return []
