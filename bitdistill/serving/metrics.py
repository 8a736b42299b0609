"""The numbers that Prometheus collects."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server.

    Args:
        running, waiting: functions that return how many sequences are in slots, and how many wait for one.
    """

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        labels = ("route", "status")
        self.requests = Counter("bitdistill_requests", "HTTP requests by route, status", labels, registry=self.registry)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = self._counter("cached_tokens", "Tokens of prompts that were found in the KV cache")
        self.new_tokens = self._counter("new_tokens", "Tokens of answers")
        self.predicted_rows = self._counter("predicted_rows", "Rows that /predict answered")
        self.cancelled = self._counter("cancelled", "Requests whose client left before the end")
        self.first_token = self._histogram("first_token_seconds", "From request to first token")
        self.seconds = self._histogram("request_seconds", "From request to the end of its answer")
        for name, text, function in (
            ("running", "Sequences that are being computed", running),
            ("waiting", "Sequences that wait for a slot", waiting),
        ):
            Gauge(f"bitdistill_{name}", text, registry=self.registry).set_function(function)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"bitdistill_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"bitdistill_{name}", text, registry=self.registry, buckets=SECONDS)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)
