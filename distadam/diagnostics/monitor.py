"""`monitor`: /healthz and /metrics of a rank, for whoever starts jobs and whoever looks after them."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from distadam.comm import Clock, Mark
from distadam.diagnostics.monitor_process import Answering
from distadam.diagnostics.prometheus import PrometheusSink, client
from distadam.diagnostics.sinks import Sink
from distadam.diagnostics.timeline import Timeline
from distadam.errors import ConfigError
from distadam.optimizer import ShardedOptimizer


def monitor(
    optimizer: ShardedOptimizer,
    *,
    port: int,
    host: str = "127.0.0.1",
    stall_s: float = 300.0,
    checkpoints: str | os.PathLike[str] | None = None,
    times: bool = True,
    every_s: float = 1.0,
) -> Monitor:
    """Answer ``/healthz`` and ``/metrics`` (Prometheus) for this rank until closed.

        with diagnostics.monitor(optimizer, port=9100 + run.local_rank) as monitor:
            for batch in batches:
                ...
                optimizer.step()
                monitor.log(loss=loss, tokens=batch.numel())

    ``/healthz`` is 200 while steps are done and 503 once the last one (before the first: this call) is more than
    ``stall_s`` ago. ``/metrics`` has the step, its time and the parts of it, learning rates, gradient norm, loss scale,
    skipped steps, bytes sent, bytes of memory by kind, the age of the last step and checkpoint, and what `Monitor.log`
    is given. A small process of its own answers, so that answers cost training nothing and come when it is stuck.

    Args:
        optimizer: any rule, any storage.
        port: to listen on; each rank of a host needs its own. 0: the system chooses, `Monitor.port` says.
        host: address to listen on; loopback unless asked. There is no password and no encryption: ``"0.0.0.0"`` shows
            the numbers to everybody who reaches this host.
        stall_s: seconds; longer than the longest pause between steps (compilation, validation, a save), or call
            `Monitor.beat` in these.
        checkpoints: directory whose newest commit marker gives the age of the last checkpoint; the other process looks.
        times: measure the parts of a step with a `timeline`; False where one is on the optimizer already.
        every_s: seconds between renewals of the numbers (ages are always right).

    Raises:
        ConfigError: the address is taken or not this host's; ``stall_s`` or ``every_s`` make no sense.
        MissingDependency: without the prometheus-client package.
        UsageError: with ``times``, somebody observes the optimizer's times already.

    Collective: no; every rank, or only some. Syncs: on the CPU at a renewal, for the all-reduce of the gradient norm;
    numbers on CUDA are read once a copy has arrived.
    """
    if not isinstance(optimizer, ShardedOptimizer):
        raise TypeError(f"monitor expected an optimizer of distadam but got {type(optimizer).__name__}.")
    if not stall_s > 0 or not every_s >= 0:
        raise ConfigError(
            f"monitor expected stall_s above 0 and every_s of 0 or more but got {stall_s!r} and {every_s!r}."
        )
    return Monitor(
        optimizer, port=port, host=host, stall_s=float(stall_s), checkpoints=checkpoints, times=times, every_s=every_s
    )


class Monitor:
    """See `monitor`; a context manager that closes itself.

    Attributes:
        host, port: where it listens.
        step: steps done, going on from the optimizer's own count.
        registry: the prometheus_client registry behind ``/metrics``: metrics that are registered there are shown too.
        sink: for `watch` or `timeline`: what it is given is shown.
    """

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        *,
        port: int,
        host: str,
        stall_s: float,
        checkpoints: str | os.PathLike[str] | None,
        times: bool,
        every_s: float,
    ) -> None:
        access = optimizer.checkpoint_access()
        self._optimizer = optimizer
        self._rank = access.collectives.groups.rank
        self._client = client()
        self.registry = self._client.CollectorRegistry()
        self._numbers = PrometheusSink(self._rank, self.registry)
        self._client.ProcessCollector(registry=self.registry)
        self.sink: Sink = _Shown(self._numbers)
        self._every_s = every_s
        counts = [float(flat.steps.max()) for flat in access.flats if flat.device.type != "meta"]
        self.step = int(max(counts, default=0.0))
        self._device = access.flats[0].device if access.flats else torch.device("cpu")
        self._clock = Clock([self._device])
        self._skipped = torch.zeros((), device=self._device)
        self._logged: dict[str, float | Tensor] = {}
        self._tokens: int | None = None
        self._parts = _Parts()
        self._arriving: tuple[dict[str, Any], list[tuple[str, str]], Tensor, Mark] | None = None
        self._taken = (self.step, time.monotonic())
        self._timeline = (
            Timeline(optimizer, sink=self._parts, first_step=self.step + 1, keep=1, ranges=False) if times else None
        )
        try:
            self._answering = Answering(
                host,
                port,
                rank=self._rank,
                stall_s=stall_s,
                content_type=self._client.CONTENT_TYPE_LATEST,
                checkpoints=checkpoints,
            )
        except Exception:
            if self._timeline is not None:
                self._timeline.close()
            raise
        self.host, self.port = host, self._answering.port
        self._closed = False
        self._hook = optimizer.register_step_post_hook(self._end_step)
        self.beat()
        self._take()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where it answers, as seen from this host."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def log(self, *, tokens: int = 0, **values: float | Tensor) -> None:
        """Add numbers of this step; the next renewal shows them. Syncs: never.

        Args:
            tokens: that this rank read in the step; shown as a second's mean, ``tokens_per_s``.
            values: ``loss`` and whatever else; numbers or 0-D tensors of any device.
        """
        if tokens:
            self._tokens = tokens + (self._tokens or 0)
        for name, value in values.items():
            self._logged[name] = value.detach() if isinstance(value, Tensor) else value

    def beat(self) -> None:
        """Say that training lives though no step is done: in a long validation, for example."""
        self._answering.beat(self.step, time.monotonic())

    def close(self) -> None:
        """Stop answering; leave no hook and no process behind. The second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._hook.remove()
        if self._timeline is not None:
            self._timeline.close()
        self._answering.close()

    # What is shown ---------------------------------------------------------------------------------------------------

    def _end_step(self, *_: Any) -> None:
        self.step += 1
        found_inf: Tensor | None = getattr(self._optimizer, "found_inf", None)
        if found_inf is not None:  # GradScaler's, while it steps
            self._skipped += (found_inf != 0).to(self._device, non_blocking=True)
        loss_scale: Tensor | None = getattr(self._optimizer, "grad_scale", None)
        if loss_scale is not None:
            self._logged["loss_scale"] = loss_scale.detach()
        self.beat()
        if self._arriving is not None:
            self._look_for_arrived()
        elif time.monotonic() - self._taken[1] >= self._every_s:
            self._take()

    def _take(self) -> None:
        """Collect the numbers; those on a CUDA device are copied and shown at a later step, when they have arrived."""
        (step_before, before_s), now = self._taken, time.monotonic()
        self._taken = (self.step, now)
        stats = self._optimizer.comm_stats
        record: dict[str, Any] = {
            "kind": "step",
            "time": time.time(),
            "step": self.step,
            "rank": self._rank,
            "parts": dict(self._parts.last),
            "lr": {},
            "sent_bytes": dict(stats.payload_nbytes),
            "memory": dict(self._optimizer.memory_report().nbytes),
        }
        if self.step > step_before:
            record["step_s"] = (now - before_s) / (self.step - step_before)
        if self._tokens is not None:
            record["tokens_per_s"] = self._tokens / (now - before_s)
            self._tokens = 0
        values: dict[tuple[str, str], float | Tensor] = {(name, ""): value for name, value in self._logged.items()}
        norm = self._optimizer.grad_norm
        if norm is not None:
            values["grad_norm", ""] = norm
        values["skipped_steps", ""] = self._skipped
        for number, group in enumerate(self._optimizer.param_groups):
            values["lr", str(number)] = group["lr"]
        far = {key: value for key, value in values.items() if isinstance(value, Tensor) and value.device.type == "cuda"}
        for key, value in values.items():
            if key not in far:
                _put(record, key, float(value))
        if not far:
            self._numbers.write(record)
            self._show()
            return
        on_device = torch.stack([value.reshape(()).to(self._device, torch.float64) for value in far.values()])
        host = torch.empty(len(far), dtype=torch.float64, pin_memory=True).copy_(on_device, non_blocking=True)
        self._arriving = (record, list(far), host, self._clock.mark(self._device))

    def _look_for_arrived(self) -> None:
        if self._arriving is None or self._clock.seconds(self._arriving[3]) is None:
            return
        record, keys, host, _ = self._arriving
        self._arriving = None
        for key, value in zip(keys, host.tolist(), strict=True):
            _put(record, key, value)
        self._numbers.write(record)
        self._show()

    def _show(self) -> None:
        self._answering.show(self._client.generate_latest(self.registry))


def _put(record: dict[str, Any], key: tuple[str, str], value: float) -> None:
    name, label = key
    if label:
        record[name][label] = value
    else:
        record[name] = value


class _Parts:
    """Keeps the parts of the last step whose times are known."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def write(self, record: dict[str, Any]) -> None:
        self.last = record["parts"]


class _Shown:
    """A sink onto the monitor's registry, which outlives whoever writes to it."""

    def __init__(self, numbers: PrometheusSink) -> None:
        self._numbers = numbers

    def write(self, record: dict[str, Any]) -> None:
        self._numbers.write(record)

    def close(self) -> None:
        """The monitor goes on."""
