"""What Prometheus reads: the engine's counters at this moment, and the requests over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pumice.infer.online import Counters

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# Of the engine's counters those that only grow, with what they count.
_TOTALS = {
    "finished": "requests answered",
    "failed": "requests that ended in an error",
    "cancelled": "requests whose client left or whose time was over",
    "prompt_tokens": "positions of prompts",
    "reused_tokens": "positions of prompts known from earlier requests",
    "new_tokens": "generated tokens",
    "images_encoded": "images encoded",
    "steps": "steps of the scheduler",
}
_GAUGES = {
    "waiting": "requests that have not begun",
    "reading": "requests whose prompt is being read",
    "running": "requests that get a token at every step",
    "positions": "cache positions of the running requests",
    "reserved": "positions that requests on their way may come to need",
    "prefix_positions": "positions kept for prompts that begin alike",
    "prefix_bytes": "bytes of them",
    "feature_bytes": "bytes of image features kept",
}


class Metrics:
    """The numbers of one server."""

    def __init__(self, counters: Callable[[], Counters]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(counters))
        self.requests = Counter(
            "pumice_http_requests",
            "requests by path and HTTP status",
            ("path", "status"),
            registry=self._registry,
        )
        self.seconds = Histogram(
            "pumice_http_request_seconds",
            "from a request to the end of its answer",
            ("path",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "pumice_first_token_seconds",
            "from a request to the first piece of a streamed answer",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    def __init__(self, counters: Callable[[], Counters]) -> None:
        self._counters = counters

    def collect(self) -> Iterable[Metric]:
        """Every counter as it is now."""
        now = asdict(self._counters())
        for name, what in _TOTALS.items():
            yield CounterMetricFamily(f"pumice_engine_{name}", what, value=now[name])
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"pumice_engine_{name}", what, value=now[name])
