"""What an observer counted, for Prometheus. Needs `pip install "nsa[prometheus]"`; importing this module does not."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nsa.layer_statistics import BRANCHES
from nsa.observing import Observer

# Of a layer: name in `Observer.snapshot`, name of the metric, what it says. Those of a branch have the label `branch`.
COUNTERS = (
    ("steps", "nsa_steps", "Steps of the layer that had queries"),
    ("queries", "nsa_queries", "Queries of the layer"),
    ("nonfinite", "nsa_nonfinite", "Elements of the attention's output that were NaN or infinite"),
    ("parity_steps", "nsa_parity_steps", "Steps that were compared with backend sdpa"),
)
GAUGES = (
    ("budget", "nsa_read_budget", "Keys that a query and kv head may read, on average"),
    ("overlap", "nsa_selection_overlap", "Share of a query's blocks that its neighbour selected too"),
    ("parity_mae", "nsa_parity_mae", "Mean absolute difference from backend sdpa"),
)
BRANCH_GAUGES = (
    ("gate_mean", "nsa_gate_mean", "Mean of the gate"),
    ("gate_std", "nsa_gate_std", "Standard deviation of the gate"),
    ("gate_low", "nsa_gate_low_share", "Share of gates near 0"),
    ("gate_high", "nsa_gate_high_share", "Share of gates near 1"),
    ("reads", "nsa_reads", "Keys that a query and kv head read, on average"),
    ("budget", "nsa_branch_read_budget", "Keys of the branch that a query and kv head may read, on average"),
)


class ObserverCollector:
    """A collector for a registry of prometheus_client; each scrape takes a `snapshot`, which waits for the device.

    Args:
        observer: from `nsa.observe`. Whoever closes it unregisters this too; it shows the last numbers until then. Two
            observers need a registry each: their layers have the same numbers.

    Raises:
        TypeError: the observer is none.
        ModuleNotFoundError: prometheus-client is not installed.

    Example:
        >>> import nsa, torch
        >>> from prometheus_client import CollectorRegistry, generate_latest
        >>> layer = nsa.NSAAttention(nsa.NSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16))
        >>> registry = CollectorRegistry()
        >>> with nsa.observe(layer) as observer:
        ...     registry.register(ObserverCollector(observer))
        ...     out = layer(torch.randn(1, 100, 64))
        >>> [line for line in generate_latest(registry).decode().splitlines() if line.startswith("nsa_queries")]
        ['nsa_queries_total{layer="0"} 100.0']
    """

    def __init__(self, observer: Observer) -> None:
        if not isinstance(observer, Observer):
            raise TypeError(f"observer: expected an nsa.Observer, got {type(observer).__name__}")
        import prometheus_client  # noqa: F401  # missing: better said now than at the first scrape

        self._observer = observer

    def describe(self) -> list[Any]:
        """The metrics without numbers: registering reads nothing, and a second collector in one registry is refused."""
        return list(self._families({}))

    def collect(self) -> Iterator[Any]:
        """The metrics of now."""
        return self._families(self._observer.snapshot())

    def _families(self, numbers: Mapping[str, Any]) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        layers = [layer.number for layer in self._observer.layers]

        def family(
            made: Any, name: str, says: str, keys: Iterable[tuple[tuple[str, ...], str]], labels: list[str]
        ) -> Any:
            metric = made(name, says, labels=labels)
            for values, key in keys:
                if key in numbers:
                    metric.add_metric(values, numbers[key])
            return metric

        for made, metrics in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for key, name, says in metrics:
                rows = [((str(layer),), f"layer.{layer}.{key}") for layer in layers]
                yield family(made, name, says, rows, ["layer"])
        for key, name, says in BRANCH_GAUGES:
            of = [((str(layer), branch), f"layer.{layer}.{key}.{branch}") for layer in layers for branch in BRANCHES]
            yield family(GaugeMetricFamily, name, says, of, ["layer", "branch"])
        routes = GaugeMetricFamily("nsa_route", "1 for where an operation goes now", labels=["layer", "op", "backend"])
        for layer in layers:
            prefix = f"layer.{layer}.route."
            for full, backend in numbers.items():
                if full.startswith(prefix):
                    routes.add_metric((str(layer), full.removeprefix(prefix), str(backend)), 1)
        yield routes
        where = ["op", "backend", "device"]
        for made, key, name, says in (
            (CounterMetricFamily, "failures", "nsa_failures", "Failures of a backend in this process"),
            (GaugeMetricFamily, "closed", "nsa_route_closed", "1 for a route that is closed in this process"),
        ):
            found = [full for full in numbers if full.startswith(f"{key}.")]
            yield family(made, name, says, [(tuple(full.split(".")[1:]), full) for full in found], where)
