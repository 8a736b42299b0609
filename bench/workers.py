"""Processes that stay loaded between the rounds of a measurement, so that what is compared can take turns.

A script that is called with "serve" and JSON prints "ready", and then answers each line of its input with a line of JSON.
"""

import json
import os
import subprocess
import sys
from typing import Any


def start(script: str, arguments: list, **environment: str) -> subprocess.Popen:
    """A worker, ready.

    Args:
        script: its file. arguments: of its function `serve`.
        environment: variables over those of this process.
    """
    worker = subprocess.Popen(
        [sys.executable, script, "serve", json.dumps(arguments)],
        env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert worker.stdout.readline() == "ready\n"
    return worker


def ask(worker: subprocess.Popen, question: Any) -> Any:
    """What it answers to a line of JSON."""
    worker.stdin.write(json.dumps(question) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def end(worker: subprocess.Popen) -> None:
    """Closes its input, and waits until it has ended."""
    worker.stdin.close()
    worker.wait()
