"""Optimizers inside the wrappers of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastopt.optim import FusedOptimizer

# Where wrappers keep what they wrap: accelerate, DeepSpeed, schedulers; torch.distributed.optim;
# Lightning and Fabric; timm.
NAMES = ("optimizer", "optim", "_optimizer", "base_optimizer", "_base_optimizer")


def of(optimizer: Any) -> FusedOptimizer:
    """The optimizer of fastopt inside a wrapper: where `last_step`, `averaged` and `telemetry` are.

    It is looked for in the attributes optimizer, optim, _optimizer, base_optimizer and
    _base_optimizer, as deep as they lead: accelerate's, Lightning's, timm's and
    torch.distributed.optim's wrappers have one of them. One of ours is returned as it is.

    Raises TypeError where there is none.
    """
    path = path_to(optimizer, lambda x: isinstance(x, FusedOptimizer))
    if path:
        return path[-1]  # type: ignore[no-any-return]
    found = path_to(optimizer, lambda x: isinstance(x, torch.optim.Optimizer))
    kind = name_of(optimizer)
    if not found:
        raise TypeError(
            f"fastopt.of finds no optimizer in {kind}: it looks in the attributes "
            f"{', '.join(NAMES)}. Give it the optimizer that fastopt made."
        )
    inside = "" if found[-1] is optimizer else f" in {kind}"
    raise TypeError(
        f"fastopt.of finds {name_of(found[-1])}{inside}, which is not fastopt's. "
        "Call fastopt.swap with it first."
    )


def path_to(x: Any, wanted: Callable[[Any], bool]) -> list[Any]:
    """From x, through what it wraps, to the first object that is wanted; empty if there is none."""
    return _search(x, wanted, [])


def _search(x: Any, wanted: Callable[[Any], bool], above: list[Any]) -> list[Any]:
    path = [*above, x]
    inside = [each for each in _wrapped_by(x) if not any(each is seen for seen in path)]
    # What takes on the class of the optimizer it wraps, as Lightning's do, is not that optimizer.
    if wanted(x) and not (inside and "param_groups" not in vars(x)):
        return path
    return next(filter(None, (_search(each, wanted, path) for each in inside)), [])


def _wrapped_by(x: Any) -> Iterator[Any]:
    for name in NAMES:
        each = getattr(x, name, None)
        if callable(getattr(type(each), "step", None)):
            yield each


def name_of(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"
