"""What the checks and timings ask of a device, for CUDA and for Triton's interpreter on the CPU.

The interpreted stand-in runs the same checks where there is no GPU: a graph is the function it
would replay, a stream is none, time is the host's, and launches are counted at the engine.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch

from fastopt_kernels import launches

Step = Callable[[], Any]


# Names that torch.profiler shows on the device beside kernels and copies.
NO_KERNELS = ("Optimizer.", "ProfilerStep", "Context Sync", "Stream ", "Event Sync", "fastopt::")


@dataclass(frozen=True)
class Launches:
    """What a step put on the device: kernels, copies between host and device, their duration.

    seconds: of the kernels alone; None where nothing was measured
    by: who counted; where torch.profiler sees no device, fastopt counts what it starts itself
    """

    kernels: int
    copies: int | None
    seconds: float | None
    names: tuple[str, ...] = ()
    by: str = "torch.profiler"


def started(step: Step) -> Launches:
    """What fastopt starts in a step, by name; launches of others are not seen."""
    names: list[str] = []

    @contextmanager
    def note(name: str, kernel: Any, idle: Any) -> Iterator[None]:
        names.append(name)
        yield

    with launches.watched(note):
        step()
    return Launches(len(names), None, None, tuple(sorted(set(names))), "fastopt's own launches")


class Device(Protocol):
    """The queue of one device."""

    device: torch.device
    truncates: bool
    # After a capture that could not be ended: this process can do no other.
    broken: bool

    def synchronize(self) -> None: ...

    def time(self, step: Step) -> Callable[[], float]:
        """Run it; the result gives its seconds once the device has been synchronized."""
        ...

    def graph(self, step: Step) -> Step:
        """Capture a step that has run before; the result replays it."""
        ...

    def stream(self, waits: bool = True) -> AbstractContextManager[Any]:
        """Work inside goes to a stream of its own; it waits for what was queued on the current one
        unless told not to, and what is queued there afterwards waits for it."""
        ...

    def busy(self) -> None:
        """Keep the current stream busy for some milliseconds, the host not."""
        ...

    def no_synchronization(self) -> AbstractContextManager[Any]:
        """Waiting for the device inside raises."""
        ...

    def launches(self, step: Step) -> Launches: ...

    def free_bytes(self) -> int: ...

    def churn(self) -> None:
        """Overwrite freed device and pinned memory, as other work would."""
        ...


class Cuda:
    """CUDA's device 0 (or HIP's)."""

    truncates = False
    # About 20 ms at 2 GHz.
    BUSY_CYCLES = 40_000_000

    def __init__(self) -> None:
        self.broken = False
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def time(self, step: Step) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    def graph(self, step: Step) -> Step:
        graph, outer = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        raised: list[BaseException] = []

        def captured() -> None:
            try:
                step()
            except BaseException as error:
                raised.append(error)
                raise

        torch.cuda.synchronize()
        try:
            with warnings.catch_warnings():
                # That is what a step leaves which is refused at once.
                warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
                with torch.cuda.graph(graph):
                    captured()
        except BaseException as error:
            # Where torch cannot end a capture it does not go back to the stream before it.
            torch.cuda.set_stream(outer)
            self.broken |= error not in raised
            raise
        return graph.replay

    @contextmanager
    def stream(self, waits: bool = True) -> Iterator[None]:
        stream = torch.cuda.Stream()
        outer = torch.cuda.current_stream()
        if waits:
            stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            yield
        outer.wait_stream(stream)

    def busy(self) -> None:
        torch.cuda._sleep(self.BUSY_CYCLES)

    @contextmanager
    def no_synchronization(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                # torch says of it, once, that it is a prototype.
                warnings.filterwarnings("ignore", message="Synchronization debug mode")
                torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def launches(self, step: Step) -> Launches:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        # What annotations span is shown on the device as well: each step's, and fastopt's own.
        found = [
            e
            for e in profiler.events()
            if e.device_type == DeviceType.CUDA
            and not getattr(e, "is_user_annotation", False)
            and not e.name.startswith(NO_KERNELS)
        ]
        if not found:
            return started(step)
        copies = [e for e in found if e.name.startswith(("Memcpy", "Memset"))]
        kernels = [e for e in found if not e.name.startswith(("Memcpy", "Memset"))]
        seconds = sum(e.time_range.elapsed_us() for e in kernels) / 1e6
        return Launches(
            len(kernels), len(copies), seconds, tuple(sorted({e.name for e in kernels}))
        )

    def free_bytes(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def churn(self) -> None:
        gc.collect()
        junk = [
            torch.full((n,), 0x5A, dtype=torch.uint8, device=self.device)
            for n in (512, 4096, 65536, 2**20)
            for _ in range(8)
        ]
        pinned = [
            torch.full((n,), 0x5A, dtype=torch.uint8, pin_memory=True)
            for n in (512, 4096, 65536, 2**20)
            for _ in range(8)
        ]
        torch.cuda.synchronize()
        del junk, pinned


class Interpreted:
    """The CPU behind Triton's interpreter."""

    truncates = True
    broken = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def time(self, step: Step) -> Callable[[], float]:
        start = perf_counter()
        step()
        seconds = perf_counter() - start
        return lambda: seconds

    def graph(self, step: Step) -> Step:
        return step

    def stream(self, waits: bool = True) -> AbstractContextManager[Any]:
        return nullcontext()

    def busy(self) -> None:
        pass

    def no_synchronization(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def launches(self, step: Step) -> Launches:
        return started(step)

    def free_bytes(self) -> int:
        return 0

    def churn(self) -> None:
        pass
