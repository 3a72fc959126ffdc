"""Steps in the backward pass: a parameter as soon as its gradient is there, which is then freed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastopt.optim import passes
from fastopt.optim.plan import Place, Plan

if TYPE_CHECKING:
    from fastopt.optim.base import FusedOptimizer


class Released:
    """The hooks of an optimizer that steps in backward; `remove()` ends it."""

    def __init__(self, optimizer: FusedOptimizer, per_tensor: bool) -> None:
        if not per_tensor and passes.measures(optimizer.param_groups):
            raise RuntimeError(
                "max_grad_norm and skip_nonfinite look at all gradients before any parameter is "
                "written, but with release_gradients() the first ones are stepped and freed before "
                "the last ones are there. Leave them unset, or call "
                "release_gradients(per_tensor=True): each tensor is then clipped, or skipped, by "
                "its own norm."
            )
        self._optimizer = optimizer
        self.plans: dict[Tensor, Plan] = {}
        self._places: dict[Tensor, Place] = {}
        self._handles: list[RemovableHandle] = []
        position = 0
        for number, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                self._places[param] = Place(param, number, position)
                position += 1
                if param.requires_grad:
                    hook = param.register_post_accumulate_grad_hook(self._step)
                    self._handles.append(hook)

    def _step(self, param: Tensor) -> None:
        with torch.no_grad():
            plan = self._optimizer.plan_of(self._places[param], self.plans.get(param))
            self.plans[param] = plan
            self._optimizer.run_plan(plan)
        param.grad = None

    def remove(self) -> None:
        """Gradients stay again, for step()."""
        for handle in self._handles:
            handle.remove()
        self._optimizer.end_release(self)
