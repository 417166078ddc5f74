"""Measured time: of a whole forward pass, of every site inside it, and the machine's matrix-product peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from asdm_compress.models.sites import Site

ForwardPass = Callable[[], Any]
PATIENCE: Final = 20.0
FEWEST_REPEATS: Final = 3


class Clock(Protocol):
    """Marks moments, and tells the seconds between two of them once everything has run."""

    def mark(self) -> Any:
        """This moment, or that in which the device comes to it."""
        ...

    def synchronise(self) -> None:
        """Wait until everything has run."""
        ...

    def between(self, first: Any, second: Any) -> float:
        """Seconds."""
        ...


class _HostClock:
    def mark(self) -> float:
        return time.perf_counter()

    def synchronise(self) -> None:
        return None

    def between(self, first: float, second: float) -> float:
        return second - first


class _OwnClock(_HostClock):
    """The processor's time, which does not pass while others have the core."""

    def mark(self) -> float:
        return time.process_time()


class _CudaClock:
    """Device events, so that marking does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return float(first.elapsed_time(second)) / 1e3


def clock_for(device: torch.device, undisturbed: bool = False) -> Clock:
    """The clock of a device. `undisturbed`: where torch runs in one thread of the processor, that thread's own time."""
    if device.type == "cuda":
        return _CudaClock(device)
    return _OwnClock() if undisturbed and torch.get_num_threads() == 1 else _HostClock()


@dataclass(slots=True)
class SiteTimes:
    """Seconds per repeat: of the plain pass, of the pass with timers in it, and of every site inside the latter."""

    whole: list[float] = field(default_factory=list)
    timed_whole: list[float] = field(default_factory=list)
    sites: dict[str, list[float]] = field(default_factory=dict)


def time_sites(
    unet: nn.Module, sites: Sequence[Site], forward: ForwardPass, repeats: int, device: torch.device
) -> SiteTimes:
    """Time every site inside whole forward passes, alternating passes with timers and plain ones.

    Stops early once `PATIENCE` seconds have gone by and `FEWEST_REPEATS` repeats are done: long passes vary less.

    Sites whose modules do not run in one go (layers, projections) are left to the caller, who has their parts.
    """
    clock, times = clock_for(device), SiteTimes()
    forward()
    clock.synchronise()
    began = time.perf_counter()
    for done in range(repeats):
        if done >= FEWEST_REPEATS and time.perf_counter() - began > PATIENCE:
            break
        times.whole.append(_time_once(forward, clock))
        marks: dict[str, list[Any]] = {}
        with _timers(unet, sites, clock, marks):
            times.timed_whole.append(_time_once(forward, clock))
        for path, moments in marks.items():
            seconds = sum(clock.between(a, b) for a, b in zip(moments[::2], moments[1::2], strict=True))
            times.sites.setdefault(path, []).append(seconds)
    return times


def is_timed(site: Site) -> bool:
    """Whether the modules of a site run without anything of another site between them."""
    return site.kind not in ("layer", "projections")


@contextmanager
def _timers(unet: nn.Module, sites: Sequence[Site], clock: Clock, marks: dict[str, list[Any]]) -> Iterator[None]:
    handles = []
    for site in sites:
        if not is_timed(site):
            continue
        present = [unet.get_submodule(path) for path in site.modules if _has(unet, path)]
        moments = marks.setdefault(site.path, [])

        def mark(*_: Any, moments: list[Any] = moments) -> None:
            moments.append(clock.mark())

        handles.append(present[0].register_forward_pre_hook(mark))
        handles.append(present[-1].register_forward_hook(mark))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has(unet: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return unet.get_submodule(parent)._modules.get(name) is not None


def _time_once(forward: ForwardPass, clock: Clock) -> float:
    clock.synchronise()
    start = clock.mark()
    forward()
    end = clock.mark()
    clock.synchronise()
    return clock.between(start, end)


def time_side_by_side(
    passes: Sequence[ForwardPass],
    repeats: int,
    device: torch.device,
    patience: float = PATIENCE,
    undisturbed: bool = False,
) -> list[list[float]]:
    """Seconds of each of several passes, taken in turns so that a slow moment of the machine meets all of them.

    Stops early once `patience` seconds have gone by and `FEWEST_REPEATS` turns are done. `undisturbed`: where torch
    runs in one thread of the processor, seconds are that thread's own, without those in which others had the core.
    """
    clock = clock_for(device, undisturbed)
    for forward in passes:
        forward()
    samples: list[list[float]] = [[] for _ in passes]
    began = time.perf_counter()
    for done in range(repeats):
        if done >= FEWEST_REPEATS and time.perf_counter() - began > patience:
            break
        for forward, seconds in zip(passes, samples, strict=True):
            seconds.append(_time_once(forward, clock))
    return samples


def median_ratio(samples: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over turns of one pass's time divided by the other's in the same turn."""
    return median(a / b for a, b in zip(samples, baseline, strict=True))


def matmul_peak(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """The best rate of square matrix products on this device, in MACs per second."""
    clock = clock_for(device)
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> Tensor:
        return a @ b

    product()
    return float(size**3 / min(_time_once(product, clock) for _ in range(repeats)))
