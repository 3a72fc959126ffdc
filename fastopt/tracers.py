"""fastopt.nn's modules in torch.fx, torch.jit.script and torch.ao.quantization."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, TypeVar

from torch import nn

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=type[nn.Module])


class _LeafModule(str):
    """`__module__` of a class whose instances answer torch.nn: torch.fx.Tracer, and those derived
    from it, record the call of such a module as one node.

    Not torch.nn.modules: of what answers that, torch.compile skips the guards.
    """

    def __get__(self, instance: object, owner: type | None = None) -> str:
        return "torch.nn"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)  # where a class is pickled by name, the name is a plain str


def traceable(cls: M, options_of: Callable[[nn.Module], dict[str, Any]]) -> M:
    """A class of fastopt.nn as a leaf in a graph of torch.fx, as torch's modules are;
    torch.jit.script takes it, or refuses it in one line.

    options_of: of a module, the options that torch's class does not have and that are in use
    """

    def prepare(module: nn.Module) -> nn.Module:
        return _prepare_scriptable(module, options_of)

    cls.__module__ = _LeafModule(cls.__module__)
    cls.__prepare_scriptable__ = prepare  # type: ignore[attr-defined]
    return cls


def scriptable(method: F) -> F:
    """A method of torch's class, named `_scripted`: TorchScript compiles it in place of ours, and a
    module may have one of a name only."""
    assert isinstance(method, FunctionType)
    code, names, defaults = method.__code__, method.__globals__, method.__defaults__
    return FunctionType(code, names, "_scripted", defaults, method.__closure__)  # type: ignore[return-value]


def _prepare_scriptable(
    module: nn.Module, options_of: Callable[[nn.Module], dict[str, Any]]
) -> nn.Module:
    """The module itself, for torch.jit.script, which asks each module first: another one would take
    its place in the model that is scripted.

    Raises TypeError where TorchScript would compile something else than the module computes.
    """
    if type(module).forward.__module__ != "fastopt.nn":  # of a subclass
        return module
    name = f"fastopt.nn.{type(module).__name__}"
    remedy = "Use torch.jit.trace, which takes all of fastopt.nn."
    if not hasattr(module, "_scripted"):
        raise TypeError(f"torch.jit.script takes no {name}: torch has no such module. {remedy}")
    for option, value in options_of(module).items():
        raise TypeError(
            f"torch.jit.script takes no {name} with {option}={value}, which torch's module "
            f"does not have. {remedy}"
        )
    return module


def register_quantization(ours: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Let torch.ao.quantization, which looks modules up by exact class, take ours as torch's.

    ours: by torch's class. fuse_modules, fuse_modules_qat, prepare and convert of eager mode.
    """
    fusions = _table("fuser_method_mappings", "_DEFAULT_OP_LIST_TO_FUSER_METHOD")
    for kinds, fuse in list(fusions.items()):
        if not ours.keys().isdisjoint(kinds):
            fusions[tuple(ours.get(kind, kind) for kind in kinds)] = _fused_as_torchs(fuse, ours)
    quantized = _table("quantization_mappings", "DEFAULT_STATIC_QUANT_MODULE_MAPPINGS")
    quantized.update({ours[kind]: quantized[kind] for kind in ours.keys() & quantized.keys()})


def _table(module: str, name: str) -> dict[Any, Any]:
    """One of torch's, which `import torch` makes; an empty one where it does not."""
    return getattr(sys.modules.get(f"torch.ao.quantization.{module}"), name, {})


def _fused_as_torchs(
    fuse: Callable[..., nn.Module], ours: Mapping[type[nn.Module], type[nn.Module]]
) -> Callable[..., nn.Module]:
    """A fusion of torch's for modules of ours. What is fused is torch's: it has no forward."""
    theirs = {mine: kind for kind, mine in ours.items()}

    def torchs(module: nn.Module) -> nn.Module:
        if type(module) in theirs:
            module = copy.copy(module)
            module.__class__ = theirs[type(module)]
        return module

    return lambda is_qat, *modules: fuse(is_qat, *map(torchs, modules))
