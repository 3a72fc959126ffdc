"""The one place where a device leads to a backend, imported when its first tensor arrives."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

_ENGINES = {"cpu": "fastopt_kernels.cpu.engine", "cuda": "fastopt_kernels.gpu.engine"}
_NEEDS = {"cpu": "numba", "cuda": "triton"}


def supported_devices() -> tuple[str, ...]:
    """Device types that have compiled kernels."""
    return tuple(_ENGINES)


@cache
def engine(device_type: str) -> ModuleType:
    """The engine of a device type ("cuda" is NVIDIA and AMD).

    Raises RuntimeError for a device without kernels, ImportError where its compiler is missing.
    """
    if device_type not in _ENGINES:
        raise RuntimeError(
            f"fastopt has no kernels for device type {device_type!r}: it supports "
            f"{', '.join(_ENGINES)}. Move the parameters there, or keep torch.optim for them."
        )
    try:
        return importlib.import_module(_ENGINES[device_type])
    except ImportError as error:
        package = _NEEDS[device_type]
        raise ImportError(
            f"fastopt steps {device_type} parameters with {package}, which did not import "
            f"({error}). Install it: pip install {package}"
        ) from error
