"""When something happens on a device: CUDA events on its streams, the monotonic clock on the host."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from distadam.comm.streams import Pending

Mark = float | tuple[torch.device, torch.cuda.Event]
"""A moment: seconds of the monotonic clock, or an event that a device has still to reach."""


class Clock:
    """Marks moments of the hosts' and the devices' work and tells their seconds on one axis.

    Args:
        devices: those that marks will be made on. Syncs: each CUDA device once, to set its events beside the host's
            clock.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._bases: dict[torch.device, tuple[torch.cuda.Event, float]] = {}
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        for device in devices:
            if device.type == "cuda":
                event = self._record(device)
                event.synchronize()
                self._bases[device] = (event, time.monotonic())

    def mark(self, device: torch.device) -> Mark:
        """Return this moment of the device's current stream. Syncs: never."""
        return (device, self._record(device)) if device.type == "cuda" else time.monotonic()

    def completion(self, device: torch.device, pending: Pending) -> Mark | None:
        """Return the moment at which a collective on a CUDA device ends, by a stream that waits for nothing else.

        None where handles wait for the host: there `Pending.when_done` tells. Syncs: never.
        """
        if device.type != "cuda":
            return None
        side = self._sides.get(device)
        if side is None:
            side = self._sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            pending.follow()
            return device, self._record(device)

    def seconds(self, mark: Mark) -> float | None:
        """Return a mark on the axis of ``time.monotonic()``; None while its device has not got there. Syncs: never."""
        if not isinstance(mark, tuple):
            return mark
        device, event = mark
        if not event.query():  # type: ignore[no-untyped-call]
            return None
        base, began_s = self._bases[device]
        return began_s + float(base.elapsed_time(event)) / 1e3

    @staticmethod
    def _record(device: torch.device) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event
