"""CPU tensors through the GPU kernels, for a process that runs Triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET=1 in the environment before triton is imported, for a
whole process; what fastopt itself keeps away from a CPU (steps counted, and gradients judged, on
the device) is let in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bench.gpu_rows import NotApplicableError
from fastopt import backend
from fastopt.optim.step import plan
from fastopt.optim.step.plan import GroupKey

# As pyproject.toml asks for it.
OLDEST_NUMBA = (0, 68)
_NUMBA = backend._KERNELS["cpu"]
# What a plan asks, as fastopt has it.
_OWN = (plan.counts_on_device, plan.measures_on_device, plan._check_param)


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _counts_on_device(device: torch.device, key: GroupKey) -> bool:
    return bool(key.capturable or key.fused or key.may_be_skipped)


def _measures_on_device(device: torch.device) -> bool:
    return True


def _check_param(param: Any, key: GroupKey) -> None:
    _OWN[2](param, key._replace(capturable=False))


def _set_route(kernels: str, asked: tuple[Any, Any, Any]) -> None:
    backend._KERNELS["cpu"] = kernels
    backend.kernels.cache_clear()
    plan.counts_on_device, plan.measures_on_device, plan._check_param = asked


def route_cpu_to_triton() -> None:
    """From here on this process runs what is on the CPU by the GPU kernels."""
    if not is_interpreted():
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    _set_route(backend._KERNELS["cuda"], (_counts_on_device, _measures_on_device, _check_param))
    # NumPy stands in for the device and warns of what IEEE arithmetic may do there.
    np.seterr(all="ignore")


@contextmanager
def numba_on_cpu() -> Iterator[None]:
    """Inside, what is on the CPU runs by Numba's kernels, also in the interpreter's process.

    Raises NotApplicableError without a Numba that they compile with.
    """
    before = backend._KERNELS["cpu"]
    asked = (plan.counts_on_device, plan.measures_on_device, plan._check_param)
    try:
        import numba
    except Exception as error:  # one that does not fit this NumPy is as absent as none
        raise NotApplicableError(f"numba does not import: {error}") from None
    if tuple(map(int, numba.__version__.split(".")[:2])) < OLDEST_NUMBA:
        raise NotApplicableError(f"numba {numba.__version__} is older than the kernels take")
    _set_route(_NUMBA, _OWN)
    try:
        yield
    finally:
        _set_route(before, asked)
