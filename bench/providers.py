"""Who takes the step: fastopt, torch in its four ways, and its peers where they are installed.

A provider makes an optimizer from parameters; one that cannot says why in `NoStepError`, and that
reason is what the tables show. All optimizers of a name get the same hyper-parameters.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

OPTIMIZERS = (
    "SGD", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"
)  # fmt: skip
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1e-3, "momentum": 0.9},
    "Adagrad": {"lr": 1e-3},
    "RMSprop": {"lr": 1e-3},
    "Adadelta": {"lr": 1.0},
    "Adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8},
    "AdamW": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "Adamax": {"lr": 1e-3},
    "NAdam": {"lr": 1e-3},
    "RAdam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8},
}
# States of an element, with these hyper-parameters.
STATES = {
    "SGD": 1, "Adagrad": 1, "RMSprop": 1, "Adadelta": 2, "Adam": 2, "AdamW": 2, "Adamax": 2,
    "NAdam": 2, "RAdam": 2,
}  # fmt: skip
# Inductor unrolls the step over its tensors: 3 s of compiling at 4 tensors, 8 s at 20.
COMPILE_MAX_TENSORS = 20

Step = Callable[[], Any]
Params = Sequence[nn.Parameter]


class NoStepError(Exception):
    """Why a provider has no step for this case."""


def traffic(optimizer: str, dtype: torch.dtype) -> int:
    """Bytes an element that no step can avoid: read g, read and write p and each state.

    AdamW in float32: read p, g, m, v, write p, m, v = 28 bytes.
    """
    return dtype.itemsize * (1 + 2 * (1 + STATES[optimizer]))


@dataclass(frozen=True)
class Provider:
    """name: as in the tables; make(optimizer, params) returns the step, or raises NoStepError."""

    name: str
    make: Callable[[str, Params], Step]


def _fastopt(optimizer: str, params: Params) -> Step:
    optim = import_peer("fastopt.optim")
    return _make(optim, optimizer, params)


def _torch(flag: str, value: bool) -> Callable[[str, Params], Step]:
    def make(optimizer: str, params: Params) -> Step:
        if flag not in inspect.signature(getattr(torch.optim, optimizer)).parameters:
            raise NoStepError(f"torch.optim.{optimizer} has no {flag}")
        return _make(torch.optim, optimizer, params, **{flag: value})

    return make


def _torch_compile(optimizer: str, params: Params) -> Step:
    if len(params) > COMPILE_MAX_TENSORS:
        raise NoStepError(f"{len(params)} tensors, over {COMPILE_MAX_TENSORS} compile for too long")
    if not any(map(shutil.which, ("g++", "clang++"))):
        raise NoStepError("torch.compile needs a C++ compiler, and there is none")
    return torch.compile(_make(torch.optim, optimizer, params))


def _deepspeed(optimizer: str, params: Params) -> Step:
    if not any(map(shutil.which, ("g++", "clang++"))):
        raise NoStepError("DeepSpeed compiles its kernels with a C++ compiler, and there is none")
    options = dict(HYPERPARAMETERS[optimizer])
    if optimizer in ("Adam", "AdamW"):
        # Its states are float32 whatever the parameters, unless it is told otherwise.
        cls = import_peer("deepspeed.ops.adam").DeepSpeedCPUAdam
        options |= {"adamw_mode": optimizer == "AdamW", "fp32_optimizer_states": False}
    elif optimizer == "Adagrad":
        cls = import_peer("deepspeed.ops.adagrad").DeepSpeedCPUAdagrad
    else:
        raise NoStepError(f"DeepSpeed has no {optimizer} on a CPU")
    return cls(params, **options).step


def _optimi(optimizer: str, params: Params) -> Step:
    return _make(import_peer("optimi"), optimizer, params)


def _bitsandbytes(optimizer: str, params: Params) -> Step:
    return _make(import_peer("bitsandbytes.optim"), optimizer, params, suffix="32bit")


def _torchao(optimizer: str, params: Params) -> Step:
    return _make(import_peer("torchao.optim"), optimizer, params, suffix="8bit")


def import_peer(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer that is broken is as absent as one not installed
        reason = "not installed" if isinstance(error, ModuleNotFoundError) else f"failed: {error}"
        raise NoStepError(f"{name} {reason}") from error


def _make(
    module: ModuleType, optimizer: str, params: Params, suffix: str = "", **how: bool
) -> Step:
    try:
        cls = getattr(module, optimizer + suffix)
    except AttributeError:
        raise NoStepError(f"{module.__name__} has no {optimizer}{suffix}") from None
    step: Step = cls(params, **HYPERPARAMETERS[optimizer], **how).step
    return step


FASTOPT = "fastopt"
FUSED, FOREACH, LOOP = "torch fused", "torch foreach", "torch loop"
# What torch.optim itself offers; "torch's best" is the fastest of these.
TORCH = (FUSED, FOREACH, LOOP)

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(FASTOPT, _fastopt),
        Provider(FUSED, _torch("fused", True)),
        Provider(FOREACH, _torch("foreach", True)),
        # What a user gets by default on a CPU, said explicitly.
        Provider(LOOP, _torch("foreach", False)),
        Provider("torch.compile", _torch_compile),
        Provider("DeepSpeed", _deepspeed),
        Provider("optimi", _optimi),
        Provider("bitsandbytes", _bitsandbytes),
        Provider("torchao 8-bit", _torchao),
    )
}
