"""The least arithmetic a step needs, counted from the formula and not from our kernels.

A sum, product, quotient, root, exponential or comparison counts as one. An optimizer's rule is run
on numbers that count; a function runs on meta tensors by torch's own operators, each taken apart
into elementwise operations, reductions and matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch._decomp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastopt.optim.update import Update
from fastopt_kernels.xp import rebind

_REDUCTIONS = {"sum", "mean", "amax", "amin", "var_mean", "var", "max", "prod"}
# Tagged as pointwise by torch, or nearly, but no arithmetic.
_MOVES = {"clone", "copy_", "_to_copy", "fill_", "zero_", "detach", "where", "masked_fill"}


class _Counted:
    """A number that counts what is done with it."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def _one(self, *_: Any) -> _Counted:
        self.counts[0] += 1
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _one
    __truediv__ = __rtruediv__ = __neg__ = __lt__ = __gt__ = __le__ = __ge__ = _one


def _counting(*args: _Counted) -> _Counted:
    return args[0]._one()


def _counting_two(*args: _Counted) -> _Counted:
    return args[0]._one()._one()


def _free(condition: Any, x: Any, y: Any) -> Any:
    return x


_XP = ModuleType("xp")
for _name in ("sqrt", "power", "absolute", "sign", "maximum"):
    setattr(_XP, _name, _counting)
_XP.add_scaled = _counting_two  # type: ignore[attr-defined]
_XP.lerp = lambda *args: args[0]._one()._one()._one()  # type: ignore[attr-defined]
_XP.where = _free  # type: ignore[attr-defined]


def of_update(update: Update) -> int:
    """Operations for one element: the rule's, and the scaling of the gradient."""
    counts = [1]
    n = int(update.rule.__code__.co_argcount)
    rebind(update.rule, _XP)(*[_Counted(counts) for _ in range(n)])
    return counts[0]


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the arithmetic of every operator, taking apart those that are made of others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0
        self._table = torch._decomp.decomposition_table

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        name, pointwise = packet.__name__, torch.Tag.pointwise in func.tags
        counted = pointwise or packet in flop_registry or name in _REDUCTIONS
        if not counted and func in self._table:
            with self:
                result = self._table[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if packet in flop_registry:
            self.count += flop_registry[packet](*args, **kwargs, out_val=result)
        elif name in _REDUCTIONS:
            self.count += args[0].numel()
        elif pointwise and name not in _MOVES:
            first = result[0] if isinstance(result, tuple) else result
            self.count += first.numel()
        return result


def of_function(
    function: Callable[..., Any], arguments: Mapping[str, Any], backward: bool
) -> int | None:
    """Operations of one call; None where it cannot be run without memory."""

    def meta(x: Any) -> Any:
        return x.detach().to("meta") if isinstance(x, Tensor) else x

    given = {name: meta(value) for name, value in arguments.items()}
    leaves = {
        name: given[name]
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.requires_grad
    }

    def call(*values: Tensor) -> Any:
        return function(**{**given, **dict(zip(leaves, values, strict=True))})

    try:
        counter = _Counter()
        with counter:
            # Inside a transform of functorch the function is made of torch's operators.
            if backward:
                y, pull, *_ = torch.func.vjp(call, *leaves.values())
                one = isinstance(y, Tensor)
                pull(torch.ones_like(y) if one else tuple(map(torch.ones_like, y)))
            else:
                first = next(name for name, x in given.items() if isinstance(x, Tensor))
                torch.func.vjp(lambda x: function(**{**given, first: x}), given[first])
    except (RuntimeError, NotImplementedError):
        return None
    return counter.count
