"""Two optimizers side by side: torch.optim's class and ours, on equal parameters.

Comparisons here are about the contract (who is stepped, when, with which settings), so float32 and
torch's own loop serve as the oracle; a wrong step is off by about lr, 1e-2, hundreds of times what
the tolerances allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastopt

# Every class with each of its rules: every option that selects another update.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"weight_decay": 0.1}),
    "SGD-momentum": ("SGD", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "SGD-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adagrad": ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1}),
    "RMSprop": ("RMSprop", {"weight_decay": 0.1}),
    "RMSprop-centered": ("RMSprop", {"centered": True, "weight_decay": 0.1}),
    "RMSprop-momentum": ("RMSprop", {"momentum": 0.5, "weight_decay": 0.1}),
    "RMSprop-both": ("RMSprop", {"centered": True, "momentum": 0.5, "weight_decay": 0.1}),
    "Adadelta": ("Adadelta", {"weight_decay": 0.1}),
    "Adam": ("Adam", {"weight_decay": 0.1}),
    "Adam-amsgrad": ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW": ("AdamW", {"weight_decay": 0.1}),
    "AdamW-amsgrad": ("AdamW", {"amsgrad": True, "weight_decay": 0.1}),
    "Adamax": ("Adamax", {"weight_decay": 0.1}),
    "NAdam": ("NAdam", {"weight_decay": 0.1}),
    "NAdam-decoupled": ("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "RAdam": ("RAdam", {"weight_decay": 0.1}),
    "RAdam-decoupled": ("RAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
}
NAMES = ("SGD", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam")
# One case a class, with a state for each.
ONE_EACH = [
    "SGD-momentum", "Adagrad", "RMSprop-both", "Adadelta", "Adam", "AdamW-amsgrad", "Adamax",
    "NAdam", "RAdam",
]  # fmt: skip
SHAPES: tuple[tuple[int, ...], ...] = ((7, 5), (11,), (), (3, 2, 2))
LR = 0.02
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def make_params(
    shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
    ]


def give_grads(params: Sequence[Tensor], seed: int, missing: Sequence[int] = ()) -> None:
    """New gradient tensors, the same for the same seed; None for the positions in `missing`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for position, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if position in missing else grad


def construct(package: Any, case: str, params: Any, **more: Any) -> torch.optim.Optimizer:
    """The optimizer of a case, from `torch` or `fastopt`, or of a class given instead of them."""
    name, options = CASES[case]
    cls = package if isinstance(package, type) else getattr(package.optim, name)
    optimizer: torch.optim.Optimizer = cls(params, **{"lr": LR, **options, **more})
    return optimizer


def assert_params_close(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for position, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            mine.detach(), other.detach(), **TOLERANCE,
            msg=lambda text, position=position: f"parameter {position}: {text}",
        )  # fmt: skip


def assert_states_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Two state_dicts alike: keys in one order, dtypes, shapes, values, step counts exactly."""
    assert list(ours) == list(theirs)
    assert ours["param_groups"] == theirs["param_groups"]
    assert [list(group) for group in ours["param_groups"]] == [
        list(group) for group in theirs["param_groups"]
    ]
    assert sorted(ours["state"]) == sorted(theirs["state"])
    for index, state in theirs["state"].items():
        assert list(ours["state"][index]) == list(state)
        for name, value in state.items():
            mine = ours["state"][index][name]
            assert type(mine) is type(value), (index, name)
            exact = {"rtol": 0.0, "atol": 0.0} if name == "step" else TOLERANCE
            torch.testing.assert_close(
                mine, value, **exact,
                msg=lambda text, where=(index, name): f"state {where}: {text}",
            )  # fmt: skip
            if isinstance(value, Tensor):
                assert mine.is_contiguous() == value.is_contiguous()
                assert mine.requires_grad == value.requires_grad


def assert_one_is_lost(
    make: Callable[[torch.nn.Parameter, Any], torch.optim.Optimizer], dtype: Any, value: float
) -> None:
    """One gradient of `value`, among states of `dtype`, harms what it would among float32 ones."""
    params = [torch.nn.Parameter(torch.ones(600)) for _ in range(2)]
    for owned, kept_in in zip(params, (dtype, torch.float32), strict=True):
        optimizer = make(owned, kept_in)
        for step in range(3):
            owned.grad = torch.full_like(owned, 0.5)
            if step == 1:
                owned.grad[7] = value
            optimizer.step()
    ours, theirs = (p.detach() for p in params)
    assert torch.equal(ours[7].isnan(), theirs[7].isnan())
    others = torch.arange(600) != 7
    assert ours[others].isfinite().all()
    torch.testing.assert_close(ours[256:], theirs[256:], rtol=0, atol=2e-3)


class Pair:
    """torch's optimizer and ours on equal parameters, driven alike.

    ours: a class that stands in for fastopt's (a deliberately wrong one, say).
    """

    def __init__(
        self,
        case: str,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        ours: type | None = None,
        **more: Any,
    ) -> None:
        self.case = case
        self.their_params = make_params(shapes, dtype)
        self.our_params = make_params(shapes, dtype)
        self.theirs = construct(torch, case, self.their_params, **more)
        self.ours = construct(ours or fastopt, case, self.our_params, **more)
        self.count = 0

    @property
    def sides(self) -> tuple[tuple[torch.optim.Optimizer, list[torch.nn.Parameter]], ...]:
        return (self.theirs, self.their_params), (self.ours, self.our_params)

    def step(self, missing: Sequence[int] = ()) -> None:
        """One step of both with new gradients, the same for both."""
        self.count += 1
        for optimizer, params in self.sides:
            give_grads(params, self.count, missing)
            optimizer.step()

    def run(self, steps: int) -> Pair:
        for _ in range(steps):
            self.step()
        return self

    def check(self, states: bool = True) -> None:
        """Parameters alike; with `states`, whole state_dicts. Reading the states lets ours know
        that somebody may hold them, so a test of the other path leaves them for the end."""
        assert_params_close(self.our_params, self.their_params)
        if states:
            assert_states_close(self.ours.state_dict(), self.theirs.state_dict())
