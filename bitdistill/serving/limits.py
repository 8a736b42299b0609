"""The limits of one server: how much its clients can ask of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Largest sizes and longest times.

    Args:
        slots: sequences that are computed at once.
        max_queue: sequences that may wait for a slot; one more is refused (429).
        max_new_tokens: the longest answer that a client may ask for.
        max_rows: rows of one call of /predict.
        max_body_bytes: the largest request (413 above).
        request_seconds: the longest time from a request to the end of its answer, waiting included.
        shutdown_seconds: how long running answers may go on after SIGTERM.
        body_seconds: how long a client may take to send its request (408 above).
    """

    slots: int = 16
    max_queue: int = 64
    max_new_tokens: int = 2048
    max_rows: int = 256
    max_body_bytes: int = 1 << 20
    request_seconds: int = 300
    shutdown_seconds: int = 30
    body_seconds: int = 20
