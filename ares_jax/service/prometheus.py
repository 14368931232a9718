"""What Prometheus is told of a sampler: the engine's totals and load, and the requests answered."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_TOTALS = {
    "prefilled": "Prompt tokens prefilled",
    "decoded": "Response tokens drawn",
    "groups": "Requests finished",
    "preempted": "Requests put back because the cache was full",
    "calls": "Calls of the decode program",
}
_LOAD = {
    "live": "Responses decoded together now",
    "waiting": "Requests not yet begun",
    "free_pages": "Pages of the cache that are free",
    "policy_version": "Version of the weights",
}


class _Engine:
    def __init__(self, stats: Callable[[], Mapping[str, int]]):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        for name, value in self._stats().items():
            kind = CounterMetricFamily if name in _TOTALS else GaugeMetricFamily
            yield kind(f"ares_sampler_{name}", (_TOTALS | _LOAD).get(name, name), value=value)


def make_registry(stats: Callable[[], Mapping[str, int]]) -> tuple[CollectorRegistry, Counter]:
    """Returns what is told, and the counter of answers by path and status, which the server counts up."""
    registry = CollectorRegistry()
    registry.register(_Engine(stats))
    return registry, Counter("ares_sampler_answers", "Answers begun", ["path", "status"], registry=registry)
