"""DeepSpeed's command, where a signal to it must reach the ranks: in a container, or under a supervisor.

    python -m bitdistill.distributed.start --num_gpus 8 bitdistill/train.py ...      instead of `deepspeed --num_gpus 8 ...`

`deepspeed` dies of SIGTERM at once (as process 1 of a container it never even sees it), and the container ends with it, before
its ranks could save. Here the signal goes to the ranks, the command waits until they have saved a checkpoint and ended
(distributed/termination.py), and its exit status is theirs: 143 after SIGTERM, 130 after Ctrl-C.
"""

import contextlib
import signal
import sys

import psutil
from deepspeed.launcher import runner


def main() -> int:
    """Runs `deepspeed` with this command line. Returns its exit status, or 128 and the number of the signal that ended it."""
    received: list[int] = []

    def hand_on(number: int, _frame: object) -> None:
        received.append(number)
        if number == signal.SIGTERM:  # Ctrl-C goes to the ranks without us
            for process in _ranks():
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    status = 0
    try:
        runner.main()
    except SystemExit as end:
        status = int(end.code or 0)
    return 128 + received[0] if received and status else status


def _ranks() -> list[psutil.Process]:
    """The processes that train; before they are there, those that are to start them."""
    children = psutil.Process().children(recursive=True)
    found = []
    for process in children:
        with contextlib.suppress(psutil.Error):
            if any(word.startswith("--local_rank=") for word in process.cmdline()):
                found.append(process)
    return found or children


if __name__ == "__main__":
    sys.exit(main())
