"""Does Prometheus get every number, under names and labels that parse back? prometheus-client is an extra of nsa."""

import sys

import pytest
import torch
from nsa import NSAAttention, NSAConfig, observe
from nsa.prometheus import ObserverCollector
from nsa_routing import breaker
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(NSAAttention(NSAConfig(32, num_heads=4, num_kv_heads=2, head_dim=8)) for _ in range(2)))


def scraped(registry: CollectorRegistry) -> Samples:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_every_number_arrives(model: nn.Sequential) -> None:
    registry = CollectorRegistry(auto_describe=True)
    with observe(model, parity_every=1) as observer:
        registry.register(ObserverCollector(observer))
        model(torch.randn(1, 100, 32))
        route = breaker.breaker("triton", "combine", "cuda:0")
        route.closed = True
        route.failures["failed to compile"] += 2
        found, numbers = scraped(registry), observer.snapshot()
    names = {
        **{"steps": "nsa_steps_total", "queries": "nsa_queries_total", "nonfinite": "nsa_nonfinite_total"},
        **{"parity_steps": "nsa_parity_steps_total", "budget": "nsa_read_budget", "overlap": "nsa_selection_overlap"},
        **{"parity_mae": "nsa_parity_mae", "gate_mean": "nsa_gate_mean", "gate_std": "nsa_gate_std"},
        **{"gate_low": "nsa_gate_low_share", "gate_high": "nsa_gate_high_share", "reads": "nsa_reads"},
    }
    where = (("backend", "triton"), ("device", "cuda:0"), ("op", "combine"))
    expected: Samples = {("nsa_failures_total", where): 2.0, ("nsa_route_closed", where): 1.0}
    for name, value in numbers.items():
        parts = name.split(".")
        if parts[0] != "layer" or parts[2] == "module":
            continue
        labels = {"layer": parts[1]}
        if parts[2] == "route":
            labels |= {"op": parts[3], "backend": str(value)}
            expected["nsa_route", tuple(sorted(labels.items()))] = 1.0
        else:
            of_branch = len(parts) == 4
            labels |= {"branch": parts[3]} if of_branch else {}
            metric = "nsa_branch_read_budget" if of_branch and parts[2] == "budget" else names[parts[2]]
            expected[metric, tuple(sorted(labels.items()))] = float(value)
    assert found == expected
    assert len(found) == 2 + 2 * (7 + 6 * 3 + 6)


def test_before_the_first_step_there_are_counts_alone(model: nn.Sequential) -> None:
    registry = CollectorRegistry()
    with observe(model) as observer:
        registry.register(ObserverCollector(observer))
        found = scraped(registry)
    assert {name for name, _ in found} == {
        *("nsa_steps_total", "nsa_queries_total", "nsa_nonfinite_total", "nsa_parity_steps_total")
    }
    assert set(found.values()) == {0.0}


def test_registering_reads_nothing(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    with observe(model) as observer:
        monkeypatch.setattr(type(observer), "snapshot", lambda _: pytest.fail("read"))
        CollectorRegistry(auto_describe=True).register(ObserverCollector(observer))


def test_two_observers_in_one_registry_are_refused(model: nn.Sequential) -> None:
    """Layer 0 of both would be one series of two numbers."""
    registry = CollectorRegistry()
    with observe(model[0]) as one, observe(model[1]) as other:
        first = ObserverCollector(one)
        registry.register(first)
        with pytest.raises(ValueError, match="nsa_steps"):
            registry.register(ObserverCollector(other))
        registry.unregister(first)
        registry.register(ObserverCollector(other))


def test_what_is_no_observer() -> None:
    with pytest.raises(TypeError, match=r"^observer: expected an nsa.Observer, got int$"):
        ObserverCollector(3)


def test_without_the_client_it_is_said_at_once(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with observe(model) as observer, pytest.raises(ModuleNotFoundError, match="prometheus_client"):
        ObserverCollector(observer)
