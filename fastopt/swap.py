"""One-line adoption: a live object of torch becomes ours, in place."""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any, TypeVar

import torch

from fastopt import optim

_OPTIMIZERS: dict[type, type[optim.FusedOptimizer]] = {
    getattr(torch.optim, name): getattr(optim, name)
    for name in optim.__all__
    if hasattr(torch.optim, name)
}

T = TypeVar("T")


def swap(x: T) -> T:
    """Turn a torch.optim optimizer into fastopt's class of that name, in place, and return it.

    Its parameter groups, states and hooks stay, and so does what holds it: a learning rate
    scheduler, a GradScaler. An optimizer that is ours already is returned as it is.

    Raises TypeError for an object that is not exactly of a class fastopt has, RuntimeError where
    something fastopt does not know has wrapped the instance's step.
    """
    if isinstance(x, optim.FusedOptimizer):
        return x
    ours = _OPTIMIZERS.get(type(x))
    if ours is None:
        known = ", ".join(sorted(f"torch.optim.{theirs.__name__}" for theirs in _OPTIMIZERS))
        raise TypeError(
            f"fastopt.swap has no match for {type(x).__module__}.{type(x).__qualname__}; it takes "
            f"exactly {known}. For a subclass, derive yours from fastopt.optim's class instead."
        )
    wrapped = x.__dict__.get("step")
    cell = _cell_of_step(wrapped, type(x)) if wrapped is not None else None
    x.__class__ = ours  # type: ignore[assignment]
    x._patch_step_function()  # type: ignore[attr-defined]
    if cell is not None:
        cell.cell_contents = ours.step
    x._forget(exposed=True)  # type: ignore[attr-defined]
    return x


def _cell_of_step(wrapper: Any, theirs: type) -> CellType:
    """Where a wrapper of `step` on the instance (a scheduler's) keeps the step it calls.

    Changing the class alone would keep running torch's; dropping the wrapper would make the
    scheduler warn that nobody stepped.
    """
    function = getattr(wrapper, "__func__", wrapper)
    cells = function.__closure__ or () if isinstance(function, FunctionType) else ()
    for cell in cells:
        if cell.cell_contents is theirs.step:  # type: ignore[attr-defined]
            return cell
        if isinstance(cell.cell_contents, FunctionType) and cell.cell_contents.__closure__:
            try:
                return _cell_of_step(cell.cell_contents, theirs)
            except RuntimeError:
                continue
    raise RuntimeError(
        f"the optimizer's step is wrapped on the instance by {function!r}, which fastopt cannot "
        "point at its own step. Swap the optimizer before wrapping it."
    )
