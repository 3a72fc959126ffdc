"""The averages of an optimizer that steps in backward (release_gradients)."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fastopt.optim.state import averages
from fastopt.optim.step import interrupts
from fastopt.optim.step.group_key import ParamRef
from fastopt.optim.step.plan import Plan


class BackwardOptimizer(averages.AveragedOptimizer, Protocol):
    """An optimizer as its steps in backward see it."""

    _lock: threading.RLock

    def param_refs(self) -> Iterator[ParamRef]:
        """Every parameter, in order."""

    def plan_of(self, ref: ParamRef, plan: Plan | None) -> Plan:
        """A plan for one parameter alone; the one given, where it still holds."""

    def plan_of_averages(self, param_refs: list[ParamRef]) -> Plan:
        """A plan in which nothing is stepped, and only averages move."""

    def run_plan(self, plan: Plan) -> None:
        """One step of what a plan holds."""

    def average_moves(self, plan: Plan) -> averages.AverageMoves | None:
        """Moves of the averages of parameters that this step has no gradient for."""

    def end_release(self, released: Any) -> None:
        """Step no longer in backward."""


class BackwardSteps:
    """The parameters that a backward has stepped. A backward is a step: when it ends, the averages
    of those it had no gradient for move."""

    def __init__(self, optimizer: BackwardOptimizer) -> None:
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
                if moves := self._optimizer.average_moves(plan):
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
        return optimizer.plan_of_averages(param_refs)


def _is_nested() -> bool:
    """True where the backward that runs was begun by a function of another one."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not BackwardCFunction.apply.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None
