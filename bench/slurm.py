"""A real Slurm of two nodes on one machine, and the batch script of docs/scaling.md in it, stopped in three ways.

    sudo python bench/slurm.py [--folder FOLDER]

Each node is a network namespace of two_hosts.py with a host name and processes of its own (UTS and PID namespaces) and one
slurmd; munged and slurmctld have their keys, settings and state in the folder. The script is submitted as the page shows it,
with 1 rank per node, no GPUs, and the embedded demo's base model in place of `...`:

1. undisturbed;
2. `term`: its steps get SIGTERM, as from `--signal=TERM@120` before the time limit;
3. `requeue`: `scontrol requeue`, as pre-emption does: SIGTERM, and SIGKILL after KillWait;
4. `node`: SIGKILL to everything on the second node, which is started again when the job has ended there.

Each time the job must be queued again and go on by itself, to the weights of the undisturbed run, bit for bit. Needs root and
Debian's packages slurmctld, slurmd, slurm-client and munge. Everything it started is ended.
The temporary folder stays if something was not equal.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chaos import MARKER, checkpoints
from two_hosts import CABLE, HOSTS, ROOT, SETTINGS, connect, disconnect, weights

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "nsenter", "unshare", "ip")
PATIENCE = 300  # seconds for a job to reach its end, or its queue
SLURM_CONF = """ClusterName=bitdistill
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=3
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=30
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
MUNGE = {
    "key-file": "key",
    "socket": "munge.socket",
    "log-file": "munged.log",
    "pid-file": "munged.pid",
    "seed-file": "seed",
}
POLITELY = ("munged", "slurmctld")  # ended by SIGTERM; a node by SIGKILL to its process 1


def batch_script() -> str:
    """The script of docs/scaling.md."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"```\n(.*?)```", page, flags=re.S) if "#SBATCH" in block)


def submitted(run: Path) -> str:
    """The script with 1 rank per node, no GPUs, and the demo's base model as what is trained."""
    script = batch_script()
    changes = {
        " --gpus-per-node 8": "",
        "--nproc_per_node 8": "--nproc_per_node 1",
        "--model ...": " ".join(["--output_dir", str(run), *SETTINGS]),
    }
    for old, new in changes.items():
        if script.count(old) != 1:
            raise SystemExit(f"docs/scaling.md: the batch script should contain {old!r} once")
        script = script.replace(old, new)
    return script


class Cluster:
    """munged, slurmctld and a slurmd on each host."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}

    def start(self) -> None:
        """Starts everything, and waits until both nodes are idle."""
        first, address = next(iter(HOSTS.items()))
        (self.folder / "state").mkdir()
        (self.folder / "key").write_bytes(os.urandom(128))
        (self.folder / "key").chmod(0o600)
        lines = [f"NodeName={host} NodeAddr={address} CPUs=1\n" for host, address in HOSTS.items()]
        text = SLURM_CONF.format(first=first, address=address, folder=self.folder)
        (self.folder / "slurm.conf").write_text("".join(lines) + text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        hosts = "".join(f"{address} {host}\n" for host, address in HOSTS.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        files = [f"--{name}={self.folder}/{file}" for name, file in MUNGE.items()]
        self.daemon("munged", ["munged", "--foreground", *files])
        time.sleep(1)
        self.daemon("slurmctld", self.on(first, "exec slurmctld -D"))
        for host in HOSTS:
            (self.folder / f"spool-{host}").mkdir()
            self.start_node(host)
        self.until(lambda: self.ask("sinfo", "-h", "-o", "%T %D") == "idle 2", "the nodes are not idle", 60)

    def on(self, host: str, shell: str, *namespaces: str) -> list[str]:
        """The command that runs a line of shell on a host."""
        prepare = f"hostname {host} && mount --bind {self.folder}/hosts /etc/hosts && export SLURM_CONF={self.folder}/slurm.conf"
        enter = ["nsenter", f"--net=/run/netns/{host}", "unshare", "--uts", "--mount", *namespaces]
        return [*enter, "sh", "-c", f"{prepare} && {shell}"]

    def daemon(self, name: str, command: list[str]) -> None:
        """Starts a command that stays."""
        with (self.folder / f"{name}.out").open("a") as file:
            self.daemons[name] = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def start_node(self, host: str) -> None:
        """slurmd under a process 1 of its own: they end together, with all that slurmd started."""
        alone = ("--pid", "--fork", "--mount-proc", "--kill-child")
        self.daemon(host, self.on(host, "{ slurmd -D & wait; }", *alone))

    def ask(self, *command: str) -> str:
        """What a command of Slurm's says on the first node."""
        line = [*self.on(next(iter(HOSTS)), f'{command[0]} "$@"'), "sh", *command[1:]]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False).stdout.strip()

    def until(self, true, otherwise: str, seconds: float = PATIENCE) -> None:
        """Waits for a condition."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise TimeoutError(otherwise)
            time.sleep(0.3)

    def stop(self) -> None:
        """Ends what was started."""
        for name in reversed(list(self.daemons)):
            process = self.daemons[name]
            process.send_signal(signal.SIGTERM if name in POLITELY else signal.SIGKILL)
        for process in self.daemons.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def submit(cluster: Cluster, run: Path) -> str:
    """Hands the script to sbatch. Returns the job's number."""
    script = run.with_suffix(".sh")
    script.write_text(submitted(run))
    job = cluster.ask("sbatch", "--parsable", "--chdir", str(ROOT), "--output", f"{run}.log", str(script))
    if not job.isdigit():
        raise SystemExit(f"sbatch did not take the script: see {cluster.folder}")
    return job


def state(cluster: Cluster, job: str) -> str:
    """PENDING, RUNNING, COMPLETED, ..."""
    found = re.search(r"JobState=(\w+)", cluster.ask("scontrol", "show", "job", job))
    return found[1] if found else "gone"


def disturb(cluster: Cluster, how: str, run: Path, job: str) -> None:
    """Stops the job after its first checkpoint, and waits until it is in the queue again."""
    cluster.until(lambda: any((path / MARKER).exists() for path in checkpoints(run, "base")), "no checkpoint")
    began, second = time.monotonic(), list(HOSTS)[1]
    if how == "term":
        cluster.ask("scancel", "--signal=TERM", job)
    elif how == "requeue":
        cluster.ask("scontrol", "requeue", job)
    else:
        cluster.daemons[second].kill()
        cluster.daemons[second].wait()
    cluster.until(lambda: state(cluster, job) == "PENDING", f"{how}: not queued again")
    print(f"{how}: queued again after {time.monotonic() - began:.0f} s", flush=True)
    if how == "node":
        cluster.start_node(second)


def finish(cluster: Cluster, run: Path, job: str) -> list[str]:
    """Waits for the end of a job. Returns what was wrong with it."""
    cluster.until(lambda: state(cluster, job) not in ("PENDING", "RUNNING", "COMPLETING"), f"{run.name} did not end")
    return [] if state(cluster, job) == "COMPLETED" else [f"{run.name}: {state(cluster, job)}"]


def said(run: Path) -> list[str]:
    """The project's own lines in a job's log."""
    text = Path(f"{run}.log").read_text(encoding="utf-8", errors="replace")
    lines = [line.rpartition("\r")[2] for line in text.splitlines()]
    return [f"  {line}" for line in lines if "bitdistill: " in line or "continues at" in line]


def compare(cluster: Cluster) -> list[str]:
    """All four jobs. Returns what was wrong."""
    undisturbed = cluster.folder / "undisturbed"
    wrong = finish(cluster, undisturbed, submit(cluster, undisturbed))
    if wrong:
        return wrong
    for how in ("term", "requeue", "node"):
        run = cluster.folder / how
        began = time.monotonic()
        job = submit(cluster, run)
        disturb(cluster, how, run, job)
        failed = finish(cluster, run, job)
        if not failed and weights(run) != weights(undisturbed):
            failed = [f"{how}: other weights"]
        print("\n".join(said(run)))
        print(
            f"{how}: {', '.join(failed) or 'the weights of the undisturbed run'}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        wrong += failed
    return wrong


def main() -> int:
    """Returns 0 when each job went on and reached the weights of the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a new folder for all files; by default a temporary one")
    options = parser.parse_args()
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        print(f"needs root, and these programs that are not here: {', '.join(missing) or 'none'}")
        return 1
    if options.folder is not None and options.folder.exists() and any(options.folder.iterdir()):
        print(f"{options.folder} is not empty: name a new folder")
        return 1
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="slurm-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ.update(PATH=tools, GLOO_SOCKET_IFNAME=CABLE, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the nodes are taken down, too
    disconnect()
    connect()
    cluster = Cluster(folder)
    try:
        cluster.start()
        wrong = compare(cluster)
    except TimeoutError as error:
        wrong = [str(error)]
    finally:
        cluster.stop()
        disconnect()
    if options.folder is None and not wrong:
        shutil.rmtree(folder)
    print(f"Slurm: {', '.join(wrong) or 'every job went on by itself and reached the same weights'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
