"""What GET /metrics tells, in Prometheus' text format."""

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily

from beacon_jax.serving.engine import Observer

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_SHORT = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


class Metrics(Observer):
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        counter = lambda name, text, *labels: prometheus.Counter(
            f"beacon_jax_{name}", text, labels, registry=registry
        )
        histogram = lambda name, text, buckets: prometheus.Histogram(
            f"beacon_jax_{name}", text, registry=registry, buckets=buckets
        )
        self.requests = counter(
            "requests", "Requests by route and status.", "route", "status"
        )
        self._prompt = counter("prompt_tokens", "Tokens of prompts that were read.")
        self._made = counter("generated_tokens", "Tokens of answers.")
        self.compressed = counter("compressed_tokens", "Tokens read into memories.")
        self._waited = histogram("queue_seconds", "Time in the queue.", _SECONDS)
        self._began = histogram(
            "first_token_seconds", "From the request to its first token.", _SECONDS
        )
        self._each = histogram(
            "token_seconds", "Time between two tokens of a row.", _SHORT
        )

    def waited(self, seconds: float) -> None:
        self._waited.observe(seconds)

    def read(self, tokens: int) -> None:
        self._prompt.inc(tokens)

    def began(self, seconds: float) -> None:
        self._began.observe(seconds)

    def made(self, tokens: int, rows: int, seconds: float) -> None:
        self._made.inc(tokens)
        self._each.observe(seconds)

    def watch(self, service) -> None:
        """Adds what is read when it is asked for: queue, rows and memories."""
        self.registry.register(_Now(service))

    def text(self) -> bytes:
        """Returns all of it."""
        return prometheus.generate_latest(self.registry)


class _Now:
    def __init__(self, service):
        self._service = service

    def collect(self):
        service = self._service
        found = {
            f"{name}_requests": number
            for name, number in service.engine.state().items()
        }
        found["rows"] = service.limits.rows
        found["memories_resident"] = service.store.held
        found["memory_resident_bytes"] = service.store.held_nbytes
        found["memories_in_the_making"] = len(service.reading.jobs())
        for name, value in found.items():
            text = name.replace("_", " ")
            yield GaugeMetricFamily(f"beacon_jax_{name}", f"Now: {text}.", value)
