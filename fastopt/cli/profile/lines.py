"""A profile as lines of text, which a terminal and a file show alike."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

import fastopt
from fastopt.cli.demo.record import cpu_name
from fastopt.cli.profile.measure import COMPUTE, MEMORY, NONE, OVERHEAD, Profile

_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))
_WHY = {
    MEMORY: "fewer bytes would make it faster",
    COMPUTE: "less arithmetic would make it faster",
    OVERHEAD: "it is over before Python and launching are paid for; larger inputs would use it",
    NONE: "it waits, or needs more instructions than the arithmetic that is counted",
}


def conditions(device: torch.device) -> dict[str, Any]:
    """The conditions that a figure is worth little without: versions, machine, threads, date."""
    name = cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "fastopt": fastopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def lines(profile: Profile) -> list[str]:
    found = [title(profile)]
    found += [f"  {name:10} {text}" for name, text in rows(profile).items()]
    launches = profile.times.launches
    found += [
        f"  {'launch':10} {x.name}: {ms(x.kernel_s)} in the kernel, {ms(x.launch_s)} to launch"
        for x in launches
    ]
    found += [
        f"  {'kernel':10} {name}: {facts(kernel)}" for name, kernel in profile.kernels.items()
    ]
    here = conditions(profile.subject.device)
    found.append(
        f"  {'machine':10} {here['machine']}, {here['threads']} of {here['cores']} cores; fastopt "
        f"{here['fastopt']}, torch {here['torch']}"
    )
    return found


def title(profile: Profile) -> str:
    subject = profile.subject
    what = f"{count(subject.n_tensors, 'tensor')}, " if subject.kind == "optimizer" else ""
    return (
        f"{subject.name}, {subject.shape} in {subject.dtype} on {subject.device} "
        f"({what}{subject.n_elements:,} elements)"
    )


def rows(profile: Profile) -> dict[str, str]:
    """The lines that every subject has, by their headings."""
    subject, times, share = profile.subject, profile.times, profile.shares
    traffic = subject.traffic
    found = {
        "time": f"{ms(times.total_s)}: Python {ms(times.python_s)}, launching "
        f"{ms(times.launch_s)}, kernels {ms(times.kernel_s)}; "
        f"{count(len(times.launches), 'launch', 'es')}",
        "bytes": f"{size(traffic.read + traffic.updated)} read, "
        f"{size(traffic.written + traffic.updated)} written",
        "bandwidth": f"{_short(profile.rate / 1e9)} GB/s, {profile.rate / profile.bytes_per_s:.0%} "
        f"of {_short(profile.bytes_per_s / 1e9)} GB/s, the measured limit for this mix",
    }
    if subject.operations is not None and profile.intensity is not None:
        rate = subject.operations / times.total_s / 1e9
        found["arithmetic"] = (
            f"{profile.intensity:.2f} operations a byte; {_short(rate)} Gop/s, "
            f"{share[COMPUTE]:.0%} of {_short(profile.operations_per_s / 1e9)} Gop/s measured"
        )
    found["bound"] = (
        f"{profile.bound} ({_WHY[profile.bound]}); of the time, bytes explain "
        f"{share[MEMORY]:.0%}, arithmetic {share[COMPUTE]:.0%}, overhead {share[OVERHEAD]:.0%}"
    )
    return found


def facts(kernel: Mapping[str, Any]) -> str:
    """The text of the facts read from the machine code of one kernel."""
    if "registers" in kernel:
        return (
            f"{kernel['registers']} registers, {kernel['spills']} spills, "
            f"{kernel['shared_bytes']} bytes of shared memory, {kernel['warps']} warps, occupancy "
            f"{kernel['occupancy']:.0%}, loads of {kernel['load_bits']} bits, stores of "
            f"{kernel['store_bits']} bits, {kernel['launches']} a step"
        )
    came = "from the cache in" if kernel["from_cache"] else "compiled in"
    return (
        f"vectors of {kernel['vector_bits']} bits in {kernel['vectorized_loops']} of "
        f"{kernel['loops']} innermost loops, {count(kernel['threads'], 'thread')}; {came} "
        f"{ms(kernel['first_call_s'])} (compiling takes {ms(kernel['compile_s'])})"
    )


def target_lines(name: str, target: str, kernels: Mapping[str, Mapping[str, Any]]) -> list[str]:
    launches = sum(kernel["launches"] for kernel in kernels.values())
    found = [f"{name} on {target}, compiled and not run: {count(launches, 'launch', 'es')} a step"]
    return found + [f"  {kernel:24} {facts(read)}" for kernel, read in kernels.items()]


def count(n: int, what: str, plural: str = "s") -> str:
    return f"{n} {what}{plural * (n != 1)}"


def ms(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 1e-3:
        return f"{_short(1e6 * seconds)} us"
    return f"{_short(1e3 * seconds)} ms" if seconds < 1 else f"{_short(seconds)} s"


def size(n_bytes: float) -> str:
    for unit, name in _BYTES:
        if n_bytes >= unit:
            return f"{_short(n_bytes / unit)} {name}"
    return f"{n_bytes:.0f} bytes"


def _short(x: float) -> str:
    return f"{x:.{2 - (x >= 10) - (x >= 100)}f}"
