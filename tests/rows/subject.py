"""What is under test, and torch's functions of the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastopt import functional, nn

Function = Callable[..., Tensor]

NAMES = ("softmax", "log_softmax", "logsumexp", "cross_entropy", "layer_norm", "rms_norm")
NORMS = ("layer_norm", "rms_norm")
OVER_DIM = ("softmax", "log_softmax", "logsumexp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OURS: dict[str, Function] = {name: getattr(functional, name) for name in NAMES}
TORCH: dict[str, Function] = {
    name: torch.logsumexp if name == "logsumexp" else getattr(F, name) for name in NAMES
}
MODULES: dict[str, Any] = {
    name: getattr(nn, name)
    for name in ("Softmax", "LogSoftmax", "CrossEntropyLoss", "LayerNorm", "RMSNorm")
}
# What torch differentiates by, of the arguments that are tensors.
DIFFERENTIABLE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*OVER_DIM, "cross_entropy"), ("input",)),
    "layer_norm": ("input", "weight", "bias"),
    "rms_norm": ("input", "weight"),
}
