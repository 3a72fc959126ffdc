"""The averages of an optimizer that steps in backward (release_gradients)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fastopt.optim.state import averages
from fastopt.optim.step import interrupts
from fastopt.optim.step.grad_scale import NO_SCALE
from fastopt.optim.step.plan import Plan

if TYPE_CHECKING:
    from fastopt.optim.optimizer import FusedOptimizer


class BackwardSteps:
    """The parameters that a backward has stepped. A backward is a step: when it ends, the averages
    of those it had no gradient for move."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._stepped: set[Tensor] = set()
        self._task: int | None = None

    def add(self, param: Tensor) -> None:
        """Note that the backward that runs is about to step a parameter.

        Raises RuntimeError inside averaged(), and frees the gradient.
        """
        optimizer = self._optimizer
        averages.refuse_inside(optimizer, "a backward that steps", param)
        if not any(group.get("ema_decay") is not None for group in optimizer.param_groups):
            return
        if param in self._stepped and self._task is None:
            self.end(param)
        # Reentrant checkpointing runs backwards within the backward: theirs is not the end.
        if not _is_nested() and (task := torch._C._current_graph_task_id()) != self._task:
            if self._task is not None:  # one that failed
                self.end(param)
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self.end)
        self._stepped.add(param)

    def end(self, begun: Tensor | None = None) -> None:
        """Move the averages of what has not been stepped, if anything has.

        begun: a parameter whose gradient is of the next backward
        """
        stepped, self._stepped, self._task = self._stepped, set(), None
        if stepped:
            with self._optimizer._lock:
                plan = self._plan(stepped, begun)
                if moves := averages.average_moves(self._optimizer, plan, NO_SCALE, None):
                    with interrupts.deferred():
                        moves.run()

    def _plan(self, stepped: set[Tensor], begun: Tensor | None) -> Plan:
        optimizer = self._optimizer
        param_refs = [
            ref
            for ref in optimizer.param_refs()
            # One with a gradient has its step before it.
            if ref.param not in stepped and (ref.param.grad is None or ref.param is begun)
        ]
        keys = optimizer._keys(False, [ref.param for ref in param_refs])
        plan = optimizer._make_plan(param_refs, [None] * len(param_refs), keys)
        plan.ends_backward = True
        return plan


def _is_nested() -> bool:
    """Whether the backward that runs was begun by a function of another one."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not BackwardCFunction.apply.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None
