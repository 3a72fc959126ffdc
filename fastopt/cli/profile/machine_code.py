"""Facts from the machine code of kernels: of those that ran, or that a named GPU would run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastopt import backend
from fastopt.cli.profile.clock import Launched
from fastopt.cli.profile.subjects import Subject


def by_numba(launches: Sequence[Launched]) -> dict[str, dict[str, Any]]:
    """Of what was launched on this CPU, by name."""
    return {launched.name: _read(launched.kernel) for launched in launches}


def _read(key: str) -> dict[str, Any]:
    from fastopt_kernels.cpu import machine_code

    read = machine_code.read(key)
    return {
        "threads": torch.get_num_threads(),
        "vector_bits": read.loops.bits,
        "loops": read.loops.loops,
        "vectorized_loops": read.loops.vectorized,
        "compile_s": read.compile_s,
        "from_cache": read.from_disk,
        "first_call_s": read.load_s,
    }


def targets() -> tuple[str, ...]:
    """GPUs that kernels can be compiled for here; none without Triton."""
    if importlib.util.find_spec("triton") is None:
        return ()
    from fastopt_kernels.gpu import machine_code

    return tuple(machine_code.TARGETS)


def target_of(device: torch.device) -> str:
    """The name of this GPU among the targets, or its nearest older one."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(name[3:]) for name in targets() if name.startswith("sm_")]
    return f"sm_{max(n for n in known if n <= max(10 * major + minor, min(known)))}"


def for_target(target: str, make: Callable[[], Subject]) -> dict[str, dict[str, Any]]:
    """The kernels a step of a subject on CPU tensors would launch on that GPU: compiled and read,
    not run."""
    from fastopt_kernels.gpu import machine_code

    try:
        with _cpu_as_gpu(), machine_code.compiling(target) as launched:
            subject = make()
            launched.clear()
            subject.step()
    except KeyError as error:
        raise LookupError(
            f"the kernels for GPUs have no case for {error}: try another --dtype or --state"
        ) from error
    found: dict[str, dict[str, Any]] = {}
    for each in launched:
        n_warps = int(each.constants.get("num_warps", 4))
        facts = _by_triton(each.compiled, target, n_warps)
        name = each.name.removesuffix("_kernel")
        # One kernel may be launched with several tables of constants.
        same = [k for k in found if k.partition(" ")[0] == name]
        key = next((k for k in same if {**found[k], **facts} == found[k]), None)
        if key is None:
            key = f"{name} {len(same) + 1}" if same else name
            found[key] = {**facts, "launches": 0}
        found[key]["launches"] += 1
    return found


@contextmanager
def _cpu_as_gpu() -> Iterator[None]:
    """CPU tensors go to Triton's kernels inside, which must not run."""
    kept = dict(backend._KERNELS)
    backend._KERNELS["cpu"] = backend._KERNELS["cuda"]
    backend.kernels.cache_clear()
    try:
        yield
    finally:
        backend._KERNELS.update(kept)
        backend.kernels.cache_clear()


def _by_triton(kernel: Any, target: str, n_warps: int) -> dict[str, Any]:
    from fastopt_kernels.gpu import machine_code

    read, shared = machine_code.read(kernel), int(kernel.metadata.shared)
    loads, stores = machine_code.access_bits(kernel)
    return {
        "target": target,
        "registers": read.registers,
        "shared_bytes": shared,
        "spills": read.spilled,
        "warps": n_warps,
        "occupancy": machine_code.occupancy(target, read.registers, shared, n_warps),
        "load_bits": max(loads, default=0),
        "store_bits": max(stores, default=0),
        "float64_instructions": read.float64,
    }
