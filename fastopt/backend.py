"""The one place where a device leads to a backend, imported when its first tensor arrives."""

from __future__ import annotations

import importlib
from functools import cache
from types import FunctionType, ModuleType

import torch
from torch import Tensor

from fastopt.compiler import outside_dynamo

# Of scratch, which is not to lie on torch's default device. By its name it takes 0.2 us to find.
CPU = torch.device("cpu")
_KERNELS = {"cpu": "fastopt_kernels.cpu", "cuda": "fastopt_kernels.gpu"}
_NEEDS = {"cpu": "numba", "cuda": "triton"}


def supported_devices() -> tuple[str, ...]:
    """Device types that have compiled kernels."""
    return tuple(_KERNELS)


@cache
def kernels(device_type: str, module: str) -> ModuleType:
    """A module of kernels for a device type ("cuda" is NVIDIA and AMD): engine, softmax, ...

    Raises RuntimeError for a device without kernels, ImportError where its compiler is missing.
    """
    if device_type not in _KERNELS:
        raise RuntimeError(
            f"fastopt has no kernels for device type {device_type!r}: it supports "
            f"{', '.join(_KERNELS)}. Move the tensors there, or keep torch's own for them."
        )
    try:
        return _opaque(importlib.import_module(f"{_KERNELS[device_type]}.{module}"))
    except ImportError as error:
        package = _NEEDS[device_type]
        raise ImportError(
            f"fastopt runs on {device_type} with {package}, which did not import ({error}). "
            f"Install it: pip install {package}"
        ) from error


def _opaque(module: ModuleType) -> ModuleType:
    """A module whose functions torch.compile leaves to Python: they take addresses."""
    package = module.__name__.partition(".")[0]
    for name, function in list(vars(module).items()):
        if isinstance(function, FunctionType) and function.__module__.startswith(package):
            setattr(module, name, outside_dynamo(function))
    return module


def by_numba(x: Tensor) -> bool:
    """True where Numba's kernels serve a tensor; what they keep of a row is laid out otherwise."""
    return x.is_cpu and _KERNELS["cpu"] == "fastopt_kernels.cpu"


def kernels_for(x: Tensor, module: str) -> ModuleType:
    """The module of kernels for a tensor's device."""
    return kernels("cpu" if x.is_cpu else x.device.type, module)


def step_kernels(device_type: str) -> ModuleType:
    """The module with `Launch`, by which optimizers step on a device type."""
    return kernels(device_type, "step.launch")
