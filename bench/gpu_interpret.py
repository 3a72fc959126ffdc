"""CPU tensors through the GPU kernels, for a process that runs Triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET=1 in the environment before triton is imported, for a
whole process; what fastopt itself keeps away from a CPU (steps counted, and gradients judged, on
the device) is let in.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from fastopt import backend
from fastopt.optim import plan
from fastopt.optim.plan import GroupKey


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def route_cpu_to_triton() -> None:
    """From here on this process runs what is on the CPU by the GPU kernels."""
    if not is_interpreted():
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    backend._KERNELS["cpu"] = backend._KERNELS["cuda"]
    backend.kernels.cache_clear()
    check = plan._check_param

    def counts_on_device(device: torch.device, key: GroupKey) -> bool:
        return bool(key.capturable or key.fused or key.unknown)

    def check_param(param: Any, key: GroupKey) -> None:
        check(param, key._replace(capturable=False))

    plan.counts_on_device = counts_on_device
    plan.looks_on_device = lambda device: True
    plan._check_param = check_param
    # NumPy stands in for the device and warns of what IEEE arithmetic may do there.
    np.seterr(all="ignore")
