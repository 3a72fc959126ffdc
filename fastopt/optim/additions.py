"""The methods of every optimizer that torch's have none of: options, telemetry, averages, and steps
in backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastopt.optim import options
from fastopt.optim.state import averages, formats
from fastopt.optim.step import sharding
from fastopt.optim.step.grad_norm import ClipResult, DeviceClipResult
from fastopt.optim.step.grad_scale import NO_SCALE, Scale
from fastopt.optim.step.in_backward import Released
from fastopt.optim.step.measuring import MeasuringOptimizer
from fastopt.optim.step.plan import Plan
from fastopt.optim.step.telemetry import ParameterTelemetry, Telemetry, names_of, rows_of


class Additions(MeasuringOptimizer):
    """The part of an optimizer that goes beyond torch's."""

    defaults: dict[str, Any]
    _plan: Plan | None = None
    _released: Released | None = None
    _averaging: averages.Averaging | None = None
    # Telemetry of the last step before this optimizer was copied or unpickled.
    _copied_telemetry: dict[Tensor, ParameterTelemetry] | None = None

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for options of a group that mean nothing, which a subclass checks."""
        raise NotImplementedError

    def _add_option(self, name: str, value: Any) -> None:
        """An option torch's class does not have; groups show it only where it is given."""
        self.defaults[name] = value
        for group in self.param_groups:
            group.setdefault(name, value)

    def _set_options(self, given: Mapping[str, Any]) -> None:
        """Set options of the step, for the groups that have none of their own."""
        if given.get("state_dtype") is not None:
            given = {**given, "state_dtype": formats.named(given["state_dtype"])}
        options.check({**self.defaults, **given})
        for name, value in options.chosen(given, self.defaults).items():
            self._add_option(name, value)
        for group in self.param_groups:
            self._check_group(group)
        sharding.check(self)  # type: ignore[arg-type]

    def telemetry(self, named: Iterable[tuple[str, Tensor]] | None = None) -> Telemetry:
        """Norms and counts of each parameter in the last step (telemetry=True), by name.

        named: as model.named_parameters(); otherwise the names the optimizer was given, or
        "group.index". Of a sharded parameter it is about this rank's part, and says so (`shard`):
        no rank waits for another here. Raises RuntimeError where no step was watched.
        """
        rows = self._telemetry_rows()
        if rows is None:
            raise RuntimeError(
                f"no step of this {type(self).__name__} has been watched: construct it with "
                "telemetry=True, and call step()."
            )
        names = names_of(self.param_groups, named)
        return Telemetry({name: rows[param] for param, name in names.items() if param in rows})

    def _telemetry_rows(self) -> dict[Tensor, ParameterTelemetry] | None:
        plans = [] if self._plan is None else [self._plan]
        if self._released is not None:
            plans += self._released.plans.values()
        launch_groups = (each for plan in plans for each in plan.launch_groups)
        return rows_of(launch_groups, self._copied_telemetry, self._skipped_telemetry)

    def release_gradients(
        self,
        per_tensor: bool = False,
        *,
        model: torch.nn.Module | None = None,
        local: bool = False,
    ) -> Released:
        """From now on step each parameter in backward, as soon as its gradient is there, and free
        the gradient; step() finds nothing left to do. Returns an object whose `remove()` ends it.

        A backward is then a step: accumulation over several backwards and GradScaler, which learns
        too late, do not go with it. per_tensor: clip (max_grad_norm) or skip (skip_nonfinite) each
        tensor by its own norm; without it both are refused with RuntimeError, since the norm of
        all gradients is not known before the last one is there. Lv et al. 2023 (arXiv:2306.09782).

        model: with several ranks, the model that reduces the gradients, or a module around it. A
        DistributedDataParallel steps at the end of a backward that reduces (not in no_sync()), a
        fully_shard model shard by shard. local: a parameter of no such model is stepped by each
        rank's own gradient; without it that is refused with RuntimeError.
        """
        # A FusedOptimizer is all that steps in backward ask for.
        released = Released(self, per_tensor, model, local)  # type: ignore[arg-type]
        if self._released is not None:
            self._released.remove()
        self._released = released
        return released

    def end_release(self, released: Released) -> None:
        """Step no longer in backward; `Released.remove` calls this."""
        if self._released is released:
            averages.end_backward(self)
            self._released = None
        self._plan = None

    def averaged(self) -> AbstractContextManager[None]:
        """Parameters hold their running averages inside (ema_decay), and their own values again
        after, also where that is by an error; before the first step they keep their own. step()
        and load_state_dict() raise RuntimeError inside."""
        return averages.averaged(self)

    def average_moves(
        self,
        plan: Plan,
        scale: Scale = NO_SCALE,
        clip: ClipResult | DeviceClipResult | None = None,
    ) -> averages.AverageMoves | None:
        """Moves of the averages of parameters that a step of this plan has no gradient for."""
        unstepped = plan.unstepped_averages()
        # Under release_gradients a step has been taken already: by a backward, when that ended.
        if not unstepped or (self._released is not None and not plan.ends_backward):
            return None
        return averages.AverageMoves(self._store, self.param_groups, unstepped, scale, clip)
