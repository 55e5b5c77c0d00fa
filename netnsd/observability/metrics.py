"""What Prometheus reads: gauges and counters, taken from the daemon at the moment of asking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from netnsd import wire


@dataclass(frozen=True, slots=True)
class Figures:
    """All figures of one moment. ``states``: environments by state; ``services`` and ``health`` likewise.

    ``restarts``: how often a service was started again, since the daemon's start.
    """

    states: dict[str, int]
    published_ports: int
    addresses_free: int
    pools: Iterable[wire.Pool]
    creations_under_way: int
    creations_waiting: int
    creations_refused: int
    services: dict[str, int]
    health: dict[str, int]
    restarts: int


class Metrics:
    """The text that ``GET /metrics`` answers.

    Args:
        figures: takes the figures.
    """

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures
        # None of the process's own: reading those of /proc belongs to the exporter of the host.
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """Everything, in the text format 0.0.4."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing is known ahead (prometheus_client asks at registration)."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client calls for each text."""
        found = self._figures()
        for name, meaning, counts in (
                ("netnsd_environments", "Environments, by state", found.states),
                ("netnsd_services", "Services, by state", found.services),
                ("netnsd_service_health", "Services whose health is checked, by what was found", found.health)):
            states = GaugeMetricFamily(name, meaning, labels=["state"])
            for state, count in counts.items():
                states.add_metric([state], count)
            yield states
        yield CounterMetricFamily("netnsd_service_restarts", "Starts of services that had ended by themselves",
                                  found.restarts)
        yield GaugeMetricFamily("netnsd_published_ports", "Host ports that are leased", found.published_ports)
        yield GaugeMetricFamily("netnsd_addresses_free", "Environments that the supernet has room for",
                                found.addresses_free)
        yield from _pools(list(found.pools))
        yield GaugeMetricFamily("netnsd_creations_under_way", "Creations that are worked on", found.creations_under_way)
        yield GaugeMetricFamily("netnsd_creations_waiting", "Creations that wait for their turn",
                                found.creations_waiting)
        yield CounterMetricFamily("netnsd_creations_refused", "Creations that were answered overloaded",
                                  found.creations_refused)


def _pools(pools: list[wire.Pool]) -> Iterator[Metric]:
    gauges = (("size", "What is to be ready"), ("target", "What is to be ready now, as demand has grown"),
              ("ready", "What is ready"))
    for name, meaning in gauges:
        gauge = GaugeMetricFamily(f"netnsd_pool_{name}", meaning, labels=["pool"])
        for pool in pools:
            gauge.add_metric([pool.name], getattr(pool, name))
        yield gauge
    for name, meaning in (("claimed", "Creations that got one from the pool"), ("missed", "Creations that did not")):
        counter = CounterMetricFamily(f"netnsd_pool_{name}", meaning, labels=["pool"])
        for pool in pools:
            counter.add_metric([pool.name], getattr(pool, name))
        yield counter
