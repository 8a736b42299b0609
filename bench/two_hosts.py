"""Two hosts on one machine: network namespaces with a cable between them, and what happens when it is pulled.

    sudo python bench/two_hosts.py [--launcher torchrun] [--folder FOLDER]

Each host is a network namespace with an address of its own; gloo carries the collectives over a virtual cable (a veth pair). The
embedded demo's base model is trained on both, one rank each, started separately on each host as on a cluster:

1. undisturbed;
2. in a new folder, and the cable is pulled in the middle (`ip link set down`): both hosts must end by themselves within the
   time-out, in one line each, and leave no process behind;
3. the cable is put back and the same command goes on.

The weights must be those of the undisturbed run, bit for bit. Needs root, iproute2 and a file system that both hosts see.
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chaos import MARKER, checkpoints

ROOT = Path(__file__).resolve().parents[1]
HOSTS = {"bitdistill-a": "10.77.0.1", "bitdistill-b": "10.77.0.2"}
CABLE, PORT = "cable", 29577
RANK_TIMEOUT = 20  # seconds
PATIENCE = RANK_TIMEOUT + 40  # until both hosts have ended; a busy machine needs more than the time-out alone
SETTINGS = shlex.split(
    "--stage base --max_steps 60 --base.save_steps 5 --base.logging_steps 1 --base.per_device_train_batch_size 4 "
    f"--report false --rank_timeout {RANK_TIMEOUT}"
)


def ip(*words: str, check: bool = True) -> None:
    """Runs iproute2's command."""
    subprocess.run(["ip", *words], check=check, capture_output=not check)


def connect() -> None:
    """Makes the hosts and the cable between them."""
    first, second = HOSTS
    for host in HOSTS:
        ip("netns", "add", host)
        ip("-n", host, "link", "set", "lo", "up")
    ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
    for host, address in HOSTS.items():
        ip("-n", host, "address", "add", f"{address}/24", "dev", CABLE)
        ip("-n", host, "link", "set", CABLE, "up")


def disconnect() -> None:
    """Removes the hosts, and the cable with them."""
    for host in HOSTS:
        ip("netns", "delete", host, check=False)


def launch_line(launcher: str, number: int, folder: Path) -> list[str]:
    """What is typed on host `number`."""
    first = next(iter(HOSTS.values()))
    if launcher == "torchrun":
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    else:
        hostfile = folder.parent / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in HOSTS.values()))
        line = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hostfile), "--no_ssh"]
    line += ["--node_rank", str(number), "--master_addr", first, "--master_port", str(PORT)]
    return [*line, str(ROOT / "bitdistill" / "train.py"), "--output_dir", str(folder), *SETTINGS]


def start(launcher: str, folder: Path) -> list[subprocess.Popen]:
    """The job on both hosts."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    found = []
    for number, host in enumerate(HOSTS):
        command = ["ip", "netns", "exec", host, *launch_line(launcher, number, folder)]
        log = folder.parent / f"{folder.name}.{host}.log"
        with log.open("a", encoding="utf-8") as file:
            found.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    return found


def wait(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """The exit statuses, once all have ended. Raises subprocess.TimeoutExpired after so many seconds."""
    until = time.monotonic() + seconds
    return [process.wait(timeout=max(until - time.monotonic(), 0.1)) for process in processes]


def left_behind() -> list[str]:
    """Processes that still live in one of the hosts."""
    found = []
    for host in HOSTS:
        found += subprocess.run(
            ["ip", "netns", "pids", host], check=True, capture_output=True, text=True
        ).stdout.split()
    return found


def pull(launcher: str, folder: Path) -> list[str]:
    """Starts the job, pulls the cable after its first checkpoint. Returns what was wrong with the end."""
    processes = start(launcher, folder)
    while not any((path / MARKER).exists() for path in checkpoints(folder, "base")):
        if any(process.poll() is not None for process in processes):
            return ["ended before its first checkpoint"]
        time.sleep(0.05)
    ip("-n", next(iter(HOSTS)), "link", "set", CABLE, "down")
    pulled = time.monotonic()
    try:
        statuses = wait(processes, PATIENCE)
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        return [f"still there {PATIENCE} s after the cable was pulled"]
    print(f"cable pulled: both hosts ended after {time.monotonic() - pulled:.0f} s with status {statuses}")
    time.sleep(2)
    wrong = [f"status {statuses}"] if 0 in statuses else []
    return wrong + [f"left behind: {process}" for process in left_behind()]


def weights(folder: Path) -> str:
    """The fingerprint of the trained weights."""
    return hashlib.sha256((folder / "base" / "model.safetensors").read_bytes()).hexdigest()


def said(folder: Path) -> list[str]:
    """The lines of the project itself in a run's logs, with their host."""
    found = []
    for host in HOSTS:
        text = (folder.parent / f"{folder.name}.{host}.log").read_text(encoding="utf-8", errors="replace")
        lines = [line.rpartition("\r")[2] for line in text.splitlines()]
        found += [f"  {host}: {line}" for line in lines if "bitdistill: " in line or "continues at" in line]
    return found


def main() -> int:
    """Returns 0 when the interrupted run ended cleanly and reached the weights of the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument("--folder", type=Path, help="a new folder for the runs; a temporary one by default")
    options = parser.parse_args()
    root = (options.folder or Path(tempfile.mkdtemp(prefix="two-hosts-"))).absolute()
    root.mkdir(parents=True, exist_ok=True)
    disconnect()
    connect()
    try:
        if wait(start(options.launcher, root / "undisturbed"), 600) != [0, 0]:
            print(f"the undisturbed run failed: see {root}/undisturbed.*.log")
            return 1
        wrong = pull(options.launcher, root / "disturbed")
        ip("-n", next(iter(HOSTS)), "link", "set", CABLE, "up")
        if wait(start(options.launcher, root / "disturbed"), 600) != [0, 0]:
            wrong.append("did not go on")
        elif weights(root / "disturbed") != weights(root / "undisturbed"):
            wrong.append("other weights")
        print("\n".join(said(root / "disturbed")))
    finally:
        for process in left_behind():
            os.kill(int(process), 9)
        disconnect()
    print(f"{options.launcher}: {', '.join(wrong) or 'ended clean, went on, and reached the same weights'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
