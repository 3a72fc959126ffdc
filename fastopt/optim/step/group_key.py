"""The settings of a parameter group that a plan is built for, and the parameters it refers to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastopt.optim import options
from fastopt.optim.state import formats
from fastopt.optim.update import Update
from fastopt_kernels.chunks import STOCHASTIC, StepOptions


class GroupKey(NamedTuple):
    """The settings of a parameter group a plan is built for; other changes need no new plan.

    may_be_skipped: a device may skip the step, and the host does not know
    """

    update: Update
    capturable: bool
    fused: bool | None
    differentiable: bool
    step_options: StepOptions
    measures_gradients: bool
    stored: tuple[formats.Format, ...]
    may_be_skipped: bool

    def state_names(self, param: Tensor) -> tuple[str, ...]:
        """Tensors that are kept for a parameter."""
        step_options = options.options_of_param(self.step_options, param)
        names = options.state_names(formats.names_of(self.update, self.stored), step_options)
        return names + formats.scales_of(self.update, self.stored)

    def saves_count(self, param: Tensor) -> bool:
        """True where a state holds the count of an update that has none in torch's (SGD): chance
        follows from it, and goes on when a state_dict is loaded."""
        rounding = options.options_of_param(self.step_options, param).rounding
        follows = rounding == STOCHASTIC or formats.EIGHT in self.stored
        return follows and not self.update.counted

    def format_of(self, name: str) -> formats.Format:
        """The format of a state of the update."""
        if not self.stored:
            return None
        return self.stored[self.update.state_names.index(name)]


class ParamRef(NamedTuple):
    """A parameter, the number of its group, and its number among all parameters."""

    param: Tensor
    group: int
    position: int
