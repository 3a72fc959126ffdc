"""One profile: times, bytes and limits of a subject, and which of them holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastopt.cli.profile import clock
from fastopt.cli.profile.clock import Breakdown, Launched
from fastopt.cli.profile.subjects import DTYPES, Subject
from fastopt.cli.shared import limits

MEMORY, COMPUTE, OVERHEAD, NONE = "memory", "compute", "overhead", "none"
# A bound holds from this share of the time on.
HOLDS = 0.5


@dataclass
class Profile:
    """The measurements of a subject.

    bytes_per_s, operations_per_s: the limits of this machine for this mix of streams, and for sums
    of products; kernels: what the machine code of each launch says, by its name
    """

    subject: Subject
    times: Breakdown
    bytes_per_s: float
    operations_per_s: float
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: list[Size] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Bytes a second of the whole step."""
        return self.subject.traffic.total / self.times.total_s

    @property
    def kernel_rate(self) -> float | None:
        """Bytes a second in the kernels alone."""
        seconds = self.times.kernel_s
        return self.subject.traffic.total / seconds if seconds > 0 else None

    @property
    def intensity(self) -> float | None:
        """Operations for each byte."""
        operations = self.subject.operations
        return None if operations is None else operations / self.subject.traffic.total

    @property
    def shares(self) -> dict[str, float]:
        """The share of the time that each limit explains."""
        times, subject = self.times, self.subject
        computing = (subject.operations or 0) / self.operations_per_s
        host = times.python_s + times.launch_s
        # A device computes while the host prepares the next step.
        waits = host if subject.device.type == "cpu" else max(0.0, times.total_s - times.kernel_s)
        return {
            MEMORY: subject.traffic.total / self.bytes_per_s / times.total_s,
            COMPUTE: computing / times.total_s,
            OVERHEAD: waits / times.total_s,
        }

    @property
    def bound(self) -> str:
        """The limit that holds; "none" where the kernel keeps the core busy with more than counts
        as arithmetic, or waits."""
        share = self.shares
        name = max(share, key=lambda name: share[name])
        return name if share[name] >= HOLDS else NONE

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values; times in milliseconds."""
        subject, times, traffic = self.subject, self.times, self.subject.traffic
        return {
            "name": subject.name,
            "kind": subject.kind,
            "shape": subject.shape,
            "dtype": subject.dtype,
            "device": str(subject.device),
            "elements": subject.n_elements,
            "tensors": subject.n_tensors,
            "total_ms": 1e3 * times.total_s,
            "python_ms": 1e3 * times.python_s,
            "launch_ms": 1e3 * times.launch_s,
            "kernel_ms": 1e3 * times.kernel_s,
            "bytes_read": traffic.read + traffic.updated,
            "bytes_written": traffic.written + traffic.updated,
            "gb_per_s": self.rate / 1e9,
            "kernel_gb_per_s": None if self.kernel_rate is None else self.kernel_rate / 1e9,
            "limit_gb_per_s": self.bytes_per_s / 1e9,
            "share_of_limit": self.rate / self.bytes_per_s,
            "operations": subject.operations,
            "operations_per_byte": self.intensity,
            "limit_gop_per_s": self.operations_per_s / 1e9,
            "bound": self.bound,
            "explained": self.shares,
            "launches": [_launch(launched) for launched in times.launches],
            "kernels": self.kernels,
            "sizes": [vars(size) for size in self.sizes],
        }


@dataclass(frozen=True)
class Size:
    """One point of bandwidth against size."""

    n_elements: int
    bytes: int
    gb_per_s: float
    limit_gb_per_s: float


def _launch(launched: Launched) -> dict[str, Any]:
    return {
        "name": launched.name,
        "launch_ms": 1e3 * launched.launch_s,
        "kernel_ms": 1e3 * launched.kernel_s,
    }


def measure(subject: Subject, budget: float) -> Profile:
    """Time a subject, and the machine beside it, for about so many seconds."""
    clock.warm(subject.step)
    times = clock.breakdown(subject.step, subject.device, budget)
    moved = limits.bytes_per_s(subject.traffic, subject.device, budget)
    computed = limits.operations_per_s(DTYPES[subject.dtype], subject.device)
    return Profile(subject, times, moved, computed)


def size_of(subject: Subject, budget: float) -> Size:
    """A subject of another size: its bandwidth, and the limit for as many bytes."""
    clock.warm(subject.step)
    total = subject.traffic.total
    seconds = clock.seconds(subject.step, subject.device, budget)
    limit = limits.bytes_per_s(subject.traffic, subject.device, budget)
    return Size(subject.n_elements, total, total / seconds / 1e9, limit / 1e9)
