"""One-line adoption: a live object of torch becomes ours, in place."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from fastopt import backend, nn, wrappers
from fastopt.adopt import OPTIMIZERS, adopt
from fastopt.optim import FusedOptimizer
from fastopt.tracers import register_quantization

T = TypeVar("T")

_MODULES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if hasattr(torch.nn, name)
}
_THEIRS = {ours: theirs for theirs, ours in _MODULES.items()}
_OURS = tuple(getattr(nn, name) for name in nn.__all__)
# Modules of torch near those fastopt has: a report says that they stay.
_NEAR = (
    "torch.nn.modules.normalization",
    "torch.nn.modules.batchnorm",
    "torch.nn.modules.instancenorm",
    "torch.nn.modules.loss",
    "torch.nn.modules.adaptive",
)
_NEAR_NAMES = frozenset({"Softmin", "Softmax2d", "MultiheadAttention"})

register_quantization(_MODULES)
_logger = logging.getLogger("fastopt")


@dataclass
class SwapReport:
    """The modules of a model that run through fastopt's, and those that are still torch's.

    replaced: name of a module -> its class; kept: name -> why it is still torch's
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"modules replaced: {len(self.replaced)}, kept: {len(self.kept)}"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.replaced.items()]
        lines += [f"  {name or '(the model)'}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def swap(x: T) -> T:
    """Turn an optimizer or the modules of a model into fastopt's of those names, in place.

    An optimizer of torch.optim keeps its parameter groups, states and hooks, and so does what holds
    it: a learning rate scheduler, a GradScaler. In a wrapper (accelerate's, Lightning's, timm's,
    torch.distributed.optim's) the optimizer inside becomes ours, which `fastopt.of` gives.

    In a model, every torch.nn.Softmax, LogSoftmax, CrossEntropyLoss, LayerNorm, RMSNorm, GroupNorm,
    BatchNorm and InstanceNorm takes fastopt.nn's class: parameters, buffers, hooks and state_dict
    keys stay what they are, and `swap_report(model)` says what was replaced, and what not and why
    (it is logged as "fastopt", INFO). torch.nn.SyncBatchNorm.convert_sync_batchnorm takes ours as
    it takes torch's. Calls of torch's functions are not modules: use fastopt.functional. What is
    ours already stays as it is. Returns x.

    Raises TypeError for an object fastopt has no match for, RuntimeError where something fastopt
    does not know has wrapped the step of the optimizer.
    """
    if isinstance(x, torch.nn.Module):
        for _, module, ours in _replaceable(x):
            module.__class__ = ours
        _logger.info("swap: %s", swap_report(x))
        return x
    path = wrappers.path_to(x, lambda each: type(each) in OPTIMIZERS or _is_ours(each))
    if not path:
        known = ", ".join(sorted(f"torch.optim.{theirs.__name__}" for theirs in OPTIMIZERS))
        raise TypeError(
            f"fastopt.swap has no match for {wrappers.name_of(x)}; it takes any torch.nn.Module, "
            f"exactly {known}, and what wraps one of these: the attributes "
            f"{', '.join(wrappers.NAMES)} are looked in. For a subclass, derive yours from "
            "fastopt.optim's class instead."
        )
    if not _is_ours(path[-1]):
        adopt(path[-1], path[:-1])
    return x


def _is_ours(x: object) -> bool:
    return isinstance(x, FusedOptimizer)


def unswap(model: T) -> T:
    """Turn fastopt's modules in a model back into torch's, in place, and return the model.

    Raises TypeError for what is not a module (an optimizer goes back through its state_dict, which
    torch.optim's class loads), RuntimeError for a module with an option that torch's class has not:
    a weight_offset, z_loss or softcap. Nothing has been changed then.
    """
    _check_module("unswap", model)
    ours = [
        (name, module)
        for name, module in model.named_modules()  # type: ignore[attr-defined]
        if type(module) in _THEIRS
    ]
    for name, module in ours:
        if options := nn.options_of(module):
            came = ", ".join(f"{option}={value}" for option, value in options.items())
            raise RuntimeError(
                f"{name or 'the model'} is a fastopt.nn.{type(module).__name__} with {came}, which "
                f"torch.nn.{type(module).__name__} does not have: it would compute something else. "
                f"Set {' and '.join(options)} to the default first, or keep the module."
            )
    for _, module in ours:
        module.__class__ = _THEIRS[type(module)]
    return model


def swap_report(model: torch.nn.Module) -> SwapReport:
    """The modules of a model that are fastopt's, and those near them that are not, and why.

    Raises TypeError for what is not a module.
    """
    _check_module("swap_report", model)
    report = SwapReport()
    for name, module in model.named_modules():
        if isinstance(module, _OURS):
            report.replaced[name] = type(module).__name__
        elif reason := _reason_to_keep(module):
            report.kept[name] = reason
        elif type(module) in _MODULES:
            report.kept[name] = f"a torch.nn.{type(module).__name__}: fastopt.swap takes it"
    return report


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"fastopt.{function} takes a torch.nn.Module, got {type(model).__module__}."
            f"{type(model).__qualname__}. Give it the model; an optimizer goes back through its "
            "state_dict, which torch.optim's class of its name loads."
        )


def _replaceable(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Module, type[torch.nn.Module]]]:
    for name, module in model.named_modules():
        if type(module) in _MODULES and not _reason_to_keep(module):
            yield name, module, _MODULES[type(module)]


def _reason_to_keep(module: torch.nn.Module) -> str | None:
    """Why a module that does what one of ours does, or nearly, must stay torch's."""
    cls = type(module)
    if isinstance(module, _OURS):
        return None
    if cls not in _MODULES:
        base = next((theirs for theirs in _MODULES if isinstance(module, theirs)), None)
        if base is not None:
            return f"{cls.__qualname__} is a subclass of torch.nn.{base.__name__} with its own ways"
        if cls.__module__ in _NEAR or cls.__name__ in _NEAR_NAMES:
            return f"fastopt has no {cls.__name__}"
        return None
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.device.type not in (*backend.supported_devices(), "meta"):
            return f"fastopt has no kernels for device type {tensor.device.type!r}"
    return None
