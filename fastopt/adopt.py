"""A live optimizer of torch.optim becomes ours, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch

from fastopt import optim

OPTIMIZERS: dict[type, type[optim.FusedOptimizer]] = {
    getattr(torch.optim, name): getattr(optim, name)
    for name in optim.__all__
    if hasattr(torch.optim, name)
}


def adopt(optimizer: torch.optim.Optimizer, wrappers: Iterable[Any] = ()) -> None:
    """Give an optimizer, which is of a class in OPTIMIZERS, our class of that name.

    wrappers: objects that hold the optimizer, and its `step` perhaps
    """
    theirs = type(optimizer)
    wrapped = optimizer.__dict__.get("step")
    cell = None
    if wrapped is not None and not _is_step(wrapped, optimizer, theirs):
        cell = _cell_of_step(wrapped, theirs)
    replacements = list(_where_held(optimizer, theirs, wrappers))
    ours = OPTIMIZERS[theirs]
    optimizer.__class__ = ours
    optimizer._patch_step_function()
    if cell is not None:
        cell.cell_contents = ours.step
        if getattr(wrapped, "__wrapped__", None) is theirs.step:
            wrapped.__wrapped__ = ours.step  # type: ignore[union-attr]
    for replace in replacements:
        replace(MethodType(ours.step, optimizer))
    optimizer._forget(state_was_accessed=True)  # type: ignore[attr-defined]


def _where_held(
    optimizer: torch.optim.Optimizer, theirs: type, wrappers: Iterable[Any]
) -> Iterator[Callable[[MethodType], None]]:
    """For each place that holds the bound `step` of torch's class, a function that puts another
    there: attributes, and cells of functions that are attributes. (accelerate keeps both for its
    GradScaler.)"""
    for holder in (optimizer, *wrappers):
        attributes = getattr(holder, "__dict__", {})
        for name, value in attributes.items():
            if _is_step(value, optimizer, theirs):
                yield partial(attributes.__setitem__, name)
            elif holder is not optimizer and isinstance(value, FunctionType):
                for cell in value.__closure__ or ():
                    if _is_step(_contents(cell), optimizer, theirs):
                        yield partial(setattr, cell, "cell_contents")


def _is_step(x: Any, optimizer: torch.optim.Optimizer, theirs: Any) -> bool:
    return isinstance(x, MethodType) and x.__self__ is optimizer and x.__func__ is theirs.step


def _contents(cell: CellType) -> Any:
    """Its value; None where nothing has been assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _cell_of_step(wrapper: Any, theirs: type) -> CellType:
    """The cell where a wrapper of `step` on the instance (a scheduler's) keeps the step it calls.

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
