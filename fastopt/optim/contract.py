"""The parts of an optimizer that its plans, averages and checkpoints use."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fastopt.optim.update import Update

Group = dict[str, Any]


class InitialStates(Protocol):
    """States and counters before the first step of a parameter."""

    def initial_state(self, name: str, param: Tensor, group: Group) -> Tensor:
        """A state of an element: a tensor laid out like the parameter."""

    def initial_number(self, value: float, param: Tensor, group: Group) -> Tensor:
        """() float32 or float64: a counter of the parameter."""


class Stepped(Protocol):
    """An optimizer as its plans and the options that are refused see it."""

    param_groups: list[Group]
    _in_zero: bool

    def sparse_error(self, group: Group) -> str | None:
        """The reason why sparse gradients are refused; None where they are not."""

    def step_sparse(self, param: Tensor, grad: Tensor, group: Group) -> None:
        """One step of a parameter whose gradient is sparse."""

    def update_of(self, group: Group) -> Update:
        """The update that steps a parameter group."""


class Loadable(Stepped, Protocol):
    """An optimizer as load_state_dict sees it; a torch.optim.Optimizer too."""

    defaults: dict[str, Any]
    _store: Any

    def register_load_state_dict_pre_hook(self, hook: Any) -> Any:
        """torch's."""

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        """torch's."""

    def _check_group(self, group: Group) -> None:
        """Raises ValueError for options of a group that mean nothing."""

    def _forget(self, state_was_accessed: bool) -> None:
        """Drop the plan, and begin a store of the states that are there now."""
