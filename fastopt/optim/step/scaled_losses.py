"""Losses that a GradScaler scales, where parameters are stepped in backward: refused.

In backward it is too late: a hook of a parameter cannot find the loss, and a scaler is given the
optimizer only afterwards. So the refusal comes from `scale`, which follows the graph of a loss to
its parameters. torch.amp.GradScaler has no hook for that: the first release wraps its `scale`, and
those of its subclasses.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class SteppedInBackward(Protocol):
    """Parameters that are stepped in backward."""

    def leaves(self) -> Iterator[Tensor]:
        """The leaves of a graph whose backward steps."""


_released: weakref.WeakSet[SteppedInBackward] = weakref.WeakSet()
# Nodes that compute a part of the graph anew in backward: its parameters are not in the graph.
_HIDING = frozenset({"CheckpointFunctionBackward"})


def refuse_for(released: SteppedInBackward) -> None:
    """From now on refuse to scale the losses of parameters that are released."""
    _released.add(released)
    for scaler in _with_subclasses(torch.amp.GradScaler):
        scale = scaler.__dict__.get("scale")
        if scale is not None and not hasattr(scale, "checks_released"):
            scaler.scale = _checked(scale)  # type: ignore[method-assign]


def allow_for(released: SteppedInBackward) -> None:
    _released.discard(released)


def refusal() -> RuntimeError:
    return RuntimeError(
        "GradScaler does not go with release_gradients(): parameters would be stepped in backward "
        "by gradients that are still scaled, before the scaler can unscale them or skip. Call "
        "remove() on what release_gradients() returned, or train without a scaler (bfloat16 needs "
        "none)."
    )


def _with_subclasses(scaler: type[torch.amp.GradScaler]) -> Iterator[type[torch.amp.GradScaler]]:
    yield scaler
    for each in scaler.__subclasses__():
        yield from _with_subclasses(each)


def _checked(scale: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(scale)
    def wrapper(self: torch.amp.GradScaler, outputs: Any) -> Any:
        if _released and self.is_enabled() and _leads_to_released(list(_tensors(outputs))):
            raise refusal()
        return scale(self, outputs)

    wrapper.checks_released = True  # type: ignore[attr-defined]
    return wrapper


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, list | tuple):
        for each in outputs:
            yield from _tensors(each)


def _leads_to_released(losses: list[Tensor]) -> bool:
    """True where a backward from these losses reaches a parameter that is stepped in it."""
    params = {id(leaf) for each in _released for leaf in each.leaves()}
    if any(id(loss) in params for loss in losses):
        return True
    todo = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if id(getattr(node, "variable", None)) in params or node.name() in _HIDING:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return False
