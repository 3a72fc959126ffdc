"""A live optimizer of torch.optim becomes ours, in place."""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any

import torch

from fastopt import optim

OPTIMIZERS: dict[type, type[optim.FusedOptimizer]] = {
    getattr(torch.optim, name): getattr(optim, name)
    for name in optim.__all__
    if hasattr(torch.optim, name)
}


def adopt(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer, which is of a class in OPTIMIZERS, our class of that name."""
    theirs = type(optimizer)
    wrapped = optimizer.__dict__.get("step")
    cell = _cell_of_step(wrapped, theirs) if wrapped is not None else None
    ours = OPTIMIZERS[theirs]
    optimizer.__class__ = ours
    optimizer._patch_step_function()
    if cell is not None:
        cell.cell_contents = ours.step
    optimizer._forget(exposed=True)  # type: ignore[attr-defined]


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
