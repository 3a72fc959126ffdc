"""The facts of `fastopt doctor`: versions, backends, threads, caches, memory, kernels on disk.

Facts are plain dicts, lists, numbers and strings, so that they print as JSON; what they mean is
judged in `findings`.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import platform
import re
import tempfile
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

import fastopt
from fastopt.cli.demo.record import cpu_name
from fastopt.cli.shared import hardware, memory
from fastopt_kernels.cpu.base import cache_folder

Facts = dict[str, Any]

PACKAGES = ("torch", "numba", "llvmlite", "triton", "numpy")
# Some bring an OpenMP of their own.
_OPENMP = re.compile(r"\S*/lib(?:gomp|iomp5|omp)\b\S*\.so\S*")
_MAPS = Path("/proc/self/maps")

# Enough elements for several threads, and rows that a kernel takes in several vectors.
ROWS, COLUMNS = 64, 1000
TOLERANCE = 1e-5


def examine() -> Facts:
    """All facts. In a forked child nothing runs on threads: GNU OpenMP would end the process."""
    forked = _forked()
    return {
        "versions": _versions(),
        "machine": _machine(),
        "backends": {} if forked else {device: _backend(device) for device in ("cpu", "cuda")},
        "threads": _threads(forked),
        "memory": {} if forked else _memory(),
        "cache": _cache(),
    }


def _versions() -> Facts:
    ours = {"fastopt": fastopt.__version__, "python": platform.python_version()}
    return ours | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> Facts:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cpus": hardware.usable_cpus(),
        "caches": hardware.caches(),
        "memory_gib": hardware.memory_gib(),
        "transparent_huge_pages": hardware.huge_pages(),
        "system": platform.platform(),
    }


def _backend(device: str) -> Facts:
    """Facts on a device's kernels: "ready" if they run and give what torch gives in float64, "why"
    if not."""
    facts: Facts = {"present": device == "cpu" or torch.cuda.is_available(), "device": None}
    compiler = {"cpu": "numba", "cuda": "triton"}[device]
    facts |= {"compiler": compiler, "ready": False, "why": None, "first_call_s": None}
    if not facts["present"]:
        return facts | {"why": _no_gpu()}
    facts["device"] = cpu_name() if device == "cpu" else torch.cuda.get_device_name()
    try:
        importlib.import_module(compiler)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == compiler
        return facts | {
            "why": f"{compiler} is not installed"
            if missing
            else f"{compiler} does not import: {_said(error)}"
        }
    start = perf_counter()
    try:
        wrong = _wrong(device)
    except Exception as error:
        wrong = f"a kernel failed: {_said(error)}"
    return facts | {"ready": wrong is None, "why": wrong, "first_call_s": perf_counter() - start}


def _no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "no GPU: this torch is built for the CPU"
    return "no GPU: torch.cuda.is_available() is False"


def _wrong(device: str) -> str | None:
    """Says which of a row function and a step is not what torch's is in float64, if one is."""
    x = torch.linspace(-4, 4, ROWS * COLUMNS).view(ROWS, COLUMNS)
    y = fastopt.functional.softmax(x.to(device), -1).cpu()
    if not torch.allclose(y.double(), torch.softmax(x.double(), -1), TOLERANCE, TOLERANCE):
        return "softmax is not torch's"
    ours = _stepped(fastopt.optim.AdamW, x.to(device)).cpu()
    if not torch.allclose(
        ours.double(), _stepped(torch.optim.AdamW, x.double()), TOLERANCE, TOLERANCE
    ):
        return "a step of AdamW is not torch's"
    return None


def _stepped(optimizer: Any, x: torch.Tensor) -> torch.Tensor:
    param = nn.Parameter(x.clone())
    param.grad = torch.cos(x)
    optimizer([param], lr=0.1).step()
    return param.detach()


def _threads(forked: bool) -> Facts:
    """layer: numba's, None where no kernel has started its threads

    openmp: the OpenMP libraries in this process; openmp_error: why numba's layer for it is missing
    missing: the setting that asks for a layer that is not there, only if there is one
    """
    facts: Facts = {
        "torch": torch.get_num_threads(),
        "numba": None,
        "layer": None,
        "openmp": _openmp(),
        "openmp_error": None,
        "forked": forked,
        "start_method": multiprocessing.get_start_method(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
    try:
        numba: Any = importlib.import_module("numba")
    except Exception:
        return facts
    facts["numba"] = numba.config.NUMBA_NUM_THREADS
    try:
        facts["layer"] = numba.threading_layer()
    except ValueError:  # not started: one thread, or nothing ran
        return facts
    if missing := importlib.import_module("fastopt_kernels.cpu.base.threads").missing:
        facts["missing"] = missing
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError as error:
        facts["openmp_error"] = str(error)
    return facts


def _openmp() -> list[str]:
    try:
        return sorted(set(_OPENMP.findall(_MAPS.read_text(encoding="utf-8", errors="replace"))))
    except OSError:
        return []


def _forked() -> bool:
    """True in a child that was forked after fastopt's CPU kernels had been imported."""
    try:
        from fastopt_kernels.cpu.base import threads
    except Exception:
        return False
    return bool(threads._forked)


def _memory() -> Facts:
    kept = memory.output_cost_kept()
    return {
        "copy_gb_per_s": memory.copy_gb_per_s(),
        "libc": " ".join(platform.libc_ver()),
        "setting": os.environ.get(memory.VARIABLE),
        "output": asdict(memory.output_cost()),
        "output_kept": asdict(kept) if kept else None,
    }


def _cache() -> Facts:
    """The folder of compiled CPU kernels; error: why none can be kept there

    remedy: only where the folder is refused
    """
    folder = cache_folder.folder()
    refused = cache_folder.refusal(folder)
    if refused is None and cache_folder.limit() == 0:
        refused = cache_folder.Refusal(
            f"{cache_folder.SIZE} is 0", f"unset {cache_folder.SIZE}, or choose a larger size"
        )
    kernels = _sizes(folder) if folder.is_absolute() else []
    return {
        "folder": str(folder),
        "kernels": len(kernels),
        "bytes": sum(kernels),
        "error": refused.why if refused else _unwritable(folder),
        **({"remedy": refused.remedy} if refused else {}),
    }


def _sizes(folder: Path) -> list[int]:
    sizes = []
    with suppress(OSError):  # a folder that may not be read
        for kernel in folder.glob("*.kernel"):
            with suppress(OSError):  # another process has just removed it
                sizes.append(kernel.stat().st_size)
    return sizes


def _unwritable(folder: Path) -> str | None:
    try:
        cache_folder.make(folder)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _said(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
