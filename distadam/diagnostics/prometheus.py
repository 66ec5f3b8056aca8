"""Records as gauges of the Prometheus client's registry, for whoever scrapes it."""

from __future__ import annotations

import importlib
from typing import Any

from distadam.diagnostics.sinks import missing, scalars

ABOUT = {
    "step": "Steps done.",
    "step_s": "Seconds of a step.",
    "parts": "Seconds of the last step by part: what this rank computed and waited for.",
    "loss": "Training loss.",
    "lr": "Learning rate by parameter group.",
    "grad_norm": "2-norm of the averaged gradient, before clipping.",
    "loss_scale": "Factor on the loss; gradients are divided by it.",
    "skipped_steps": "Steps that changed nothing because a gradient was not finite.",
    "tokens_per_s": "Tokens of this rank a second.",
    "sent_bytes": "Payload bytes that this rank has sent, by collective.",
    "memory": "Bytes that live in the optimizer, by kind.",
}


def client() -> Any:
    """Return the prometheus_client module.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return importlib.import_module("prometheus_client")
    except ImportError as error:
        raise missing("prometheus-client", "prometheus") from error


class PrometheusSink:
    """Sets gauges to the last values: ``distadam_<name>{rank=..., label=...}``, ``distadam_parameter_<name>{...}``.

    Incidents are counted by what they are: ``distadam_incidents_total{rank=..., what=...}``. It opens no port:
    `monitor` does, and shows what goes to ``Monitor.sink``.

    Args:
        rank: becomes a label of every metric.
        registry: prometheus_client's default one unless given.

    Raises:
        MissingDependency: without the prometheus-client package.
    """

    def __init__(self, rank: int = 0, registry: Any = None) -> None:
        self._client = prometheus_client = client()
        self._registry = prometheus_client.REGISTRY if registry is None else registry
        self._rank = str(rank)
        self._gauges: dict[str, Any] = {}
        self._incidents = prometheus_client.Counter(
            "distadam_incidents", "Incidents that watch() has seen.", ["rank", "what"], registry=self._registry
        )
        self._step = self._gauge("step", ABOUT["step"], ["rank"])

    def _gauge(self, name: str, about: str, labels: list[str]) -> Any:
        if name not in self._gauges:
            gauge = self._client.Gauge(f"distadam_{name}", about, labels, registry=self._registry)
            self._gauges[name] = gauge
        return self._gauges[name]

    def write(self, record: dict[str, Any]) -> None:
        """Set gauges to the record's numbers."""
        kind = record["kind"]
        if kind == "incident":
            self._incidents.labels(self._rank, record["what"]).inc()
        if kind == "step":
            self._step.labels(self._rank).set(record["step"])
        for (name, label), value in scalars(record).items():
            if kind == "parameters":
                gauge = self._gauge(f"parameter_{name}", f"{name} of a parameter's last update.", ["rank", "parameter"])
                gauge.labels(self._rank, label).set(value)
            else:
                gauge = self._gauge(name, ABOUT.get(name, f"{name} of the last step."), ["rank", "label"])
                gauge.labels(self._rank, label).set(value)

    def close(self) -> None:
        """Take the metrics out of the registry."""
        for metric in (*self._gauges.values(), self._incidents):
            self._registry.unregister(metric)
        self._gauges.clear()
