"""The time of a step: in all, in Python, in launching, in kernels; medians of steps in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from fastopt_kernels import launches

WARM_STEPS = 3
FEWEST, MOST = 5, 2000
IDLE_CALLS = 5
Step = Callable[[], Any]


def warm(step: Step) -> None:
    """Compiles kernels, makes states, fills the allocator."""
    for _ in range(WARM_STEPS):
        step()


def seconds(step: Step, device: torch.device, budget: float = 0.5) -> float:
    """The median of one step."""
    return interleaved({"": step}, device, budget)[""]


def interleaved(
    steps: Mapping[str, Step], device: torch.device, budget: float = 0.5
) -> dict[str, float]:
    """The median of each, taken in turn for about so many seconds: a machine's speed drifts."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    deadline = perf_counter() + budget
    n = 0
    while n < FEWEST or (n < MOST and perf_counter() < deadline):
        for name, step in steps.items():
            taken[name].append(_burst(step, device))
        n += 1
    return {name: statistics.median(each) for name, each in taken.items()}


# Steps that are under way at once where a device runs them behind the host.
_QUEUED = 10


def _burst(step: Step, device: torch.device) -> float:
    if device.type == "cpu":
        start = perf_counter()
        step()
        return perf_counter() - start
    torch.cuda.synchronize(device)
    start = perf_counter()
    for _ in range(_QUEUED):
        step()
    torch.cuda.synchronize(device)
    return (perf_counter() - start) / _QUEUED


@dataclass
class Launched:
    """A launch of one step.

    kernel: the key of a kernel by Numba, or Triton's function; call_s: the call as the host sees
    it; idle_s: the same call with nothing to do; device_s: on the device, where there is one
    """

    name: str
    kernel: Any
    call_s: float = 0.0
    idle_s: float = 0.0
    device_s: float | None = None

    @property
    def launch_s(self) -> float:
        """The time to hand the work over, and to wait for all threads."""
        return self.call_s if self.device_s is not None else min(self.idle_s, self.call_s)

    @property
    def kernel_s(self) -> float:
        return self.device_s if self.device_s is not None else self.call_s - self.launch_s


@dataclass
class Breakdown:
    """The time of a step, by its parts. On a GPU host and kernels run side by side: total_s is not
    their sum, but the longer of the two."""

    total_s: float
    launches: list[Launched] = field(default_factory=list)
    host_s: float = 0.0

    @property
    def launch_s(self) -> float:
        return sum(launched.launch_s for launched in self.launches)

    @property
    def kernel_s(self) -> float:
        return sum(launched.kernel_s for launched in self.launches)

    @property
    def python_s(self) -> float:
        """All else: checks, tables, autograd, allocation, torch's own operators."""
        return max(0.0, self.host_s - sum(launched.call_s for launched in self.launches))


def breakdown(step: Step, device: torch.device, budget: float = 0.5) -> Breakdown:
    """The step as it is, and what a watcher of its launches sees in others between those."""
    total: list[float] = []
    host: list[float] = []
    watched: list[list[Launched]] = []
    deadline = perf_counter() + budget
    while len(total) < FEWEST or (len(total) < MOST and perf_counter() < deadline):
        total.append(_burst(step, device))
        with watching(device, idle=False) as seen:
            step()
        watched.append(seen)
        start = perf_counter()
        step()
        host.append(perf_counter() - start)
    found = Breakdown(statistics.median(total), _medians(watched), statistics.median(host))
    if device.type == "cpu":
        found.host_s = found.total_s
        with watching(device, idle=True) as seen:
            step()
        for launched, other in zip(found.launches, seen, strict=False):
            launched.idle_s = other.idle_s
    return found


def _medians(steps: list[list[Launched]]) -> list[Launched]:
    """Each launch of a step with its median over those steps that launched as the last one did."""
    last = [launched.name for launched in steps[-1]]
    alike = [step for step in steps if [launched.name for launched in step] == last]
    found = []
    for same in zip(*alike, strict=True):
        first = same[0]
        device = [x.device_s for x in same if x.device_s is not None]
        found.append(
            Launched(
                first.name,
                first.kernel,
                statistics.median(x.call_s for x in same),
                device_s=statistics.median(device) if device else None,
            )
        )
    return found


@contextmanager
def watching(device: torch.device, idle: bool = False) -> Iterator[list[Launched]]:
    """The launches inside; idle: also call each with nothing to do."""
    found: list[Launched] = []
    events: list[tuple[Launched, Any, Any]] = []

    @contextmanager
    def watcher(name: str, kernel: Any, call_idle: Callable[[], Any] | None) -> Iterator[None]:
        launched = Launched(name, kernel)
        if idle and call_idle is not None:
            launched.idle_s = statistics.median(_timed(call_idle) for _ in range(IDLE_CALLS))
        make_event: Any = torch.cuda.Event
        on_device = device.type != "cpu"
        begin, end = (make_event(enable_timing=True) if on_device else None for _ in range(2))
        if begin is not None:
            begin.record()
        start = perf_counter()
        yield
        launched.call_s = perf_counter() - start
        if end is not None:
            end.record()
            events.append((launched, begin, end))
        found.append(launched)

    with launches.watched(watcher):
        yield found
    if events:
        torch.cuda.synchronize(device)
    for launched, begin, end in events:
        launched.device_s = begin.elapsed_time(end) / 1e3


def _timed(step: Step) -> float:
    start = perf_counter()
    step()
    return perf_counter() - start
