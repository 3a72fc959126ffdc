"""Options count where they are given, also where what is given is false, zero or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt
from fastopt.optim import FusedOptimizer
from fastopt.optim.sgd import sgd, sgd_scalars
from tests.optim.pairs import NAMES, give_grads, make_params

BF16 = torch.bfloat16
# Of each option a value that is on, and one that is given and false.
VALUES: dict[str, tuple[Any, Any]] = {
    "max_grad_norm": (0.1, None),
    "clip_value": (0.1, None),
    "skip_nonfinite": (True, False),
    "ema_decay": (0.9, 0.0),
    "ema_warmup": (5, 0),
    "param_rounding": ("master", "nearest"),
    "rounding_seed": (7, 0),
    "state_dtype": (torch.float32, None),
    "telemetry": (True, False),
    "maximize": (True, False),
    "foreach": (True, False),
    "fused": (True, False),
}
# What an option needs beside it to change anything.
BESIDE: dict[str, dict[str, Any]] = {
    "ema_warmup": {"ema_decay": 0.99},
    "rounding_seed": {"param_rounding": "stochastic"},
}


def trace(optimizer: Any, params: list[nn.Parameter]) -> list[Any]:
    """What four steps do: bits and dtypes of all that is kept, and whether one is watched."""
    for step in range(4):
        give_grads(params, step)
        if step == 2:
            params[0].grad[0] = torch.inf  # type: ignore[index]
        optimizer.step()
    watched = True
    try:
        optimizer.telemetry()
    except RuntimeError:
        watched = False
    found: list[Any] = [watched]
    for p in params:
        found.append(p.detach().clone())
        for name, value in sorted(optimizer.state[p].items()):
            found += [name, value.dtype, value.clone()]
    return found


def alike(mine: list[Any], other: list[Any]) -> bool:
    return len(mine) == len(other) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) else a == b
        for a, b in zip(mine, other, strict=True)
    )


def plainly(cls: type, **options: Any) -> list[Any]:
    """The trace of one group that has exactly these options."""
    params = make_params([(300,), (7,)], BF16)
    return trace(cls([{"params": params, **options}], lr=0.01), params)


WAYS: dict[str, Callable[..., list[Any]]] = {}


def way(function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    WAYS[function.__name__] = function
    return function


@way
def by_keyword(cls: type, name: str, on: Any, off: Any, beside: dict[str, Any]) -> list[Any]:
    params = make_params([(300,), (7,)], BF16)
    return trace(cls(params, lr=0.01, **{name: off}, **beside), params)


@way
def in_a_group(cls: type, name: str, on: Any, off: Any, beside: dict[str, Any]) -> list[Any]:
    """Where the keyword says otherwise."""
    params = make_params([(300,), (7,)], BF16)
    return trace(cls([{"params": params, name: off}], lr=0.01, **{name: on}, **beside), params)


@way
def in_a_group_added(cls: type, name: str, on: Any, off: Any, beside: dict[str, Any]) -> list[Any]:
    """Where keyword and the other group say otherwise; that has no gradients."""
    params = make_params([(300,), (7,)], BF16)
    other = nn.Parameter(torch.ones(3, dtype=BF16))
    optimizer = cls([{"params": other, name: on}], lr=0.01, **{name: on}, **beside)
    optimizer.add_param_group({"params": params, name: off})
    optimizer.param_groups.pop(0)
    return trace(optimizer, params)


def check_counts(cls: type, name: str, how: str) -> None:
    on, off = VALUES[name]
    beside = BESIDE.get(name, {})
    right = plainly(cls, **{name: off}, **beside)
    assert alike(WAYS[how](cls, name, on, off, beside), right)
    # And the option is one that these checks can tell.
    if name not in ("maximize", "foreach", "fused"):
        assert not alike(right, plainly(cls, **{name: on}, **beside))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", VALUES)
def test_what_is_given_counts(name: str, how: str) -> None:
    check_counts(fastopt.optim.AdamW, name, how)


class OnlyWhatIsTrue(fastopt.optim.AdamW):
    """Wrong: takes only options that are true."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for name in VALUES:
            if not param_group.get(name, True):
                del param_group[name]
        super().add_param_group(param_group)


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError):
        check_counts(OnlyWhatIsTrue, "telemetry", "in_a_group")


@pytest.mark.parametrize("cls", [getattr(fastopt.optim, name) for name in NAMES])
def test_an_average_without_memory_is_the_parameter(cls: Any) -> None:
    """ema_decay=0.0 is a decay; no decay is None."""
    params = make_params()
    optimizer = cls(params, ema_decay=0.0)
    assert optimizer.param_groups[0]["ema_decay"] == 0.0
    for step in range(3):
        give_grads(params, step)
        optimizer.step()
        assert all(torch.equal(optimizer.state[p]["averaged"], p) for p in params)
    optimizer = cls(params, ema_decay=None)
    assert "ema_decay" not in optimizer.param_groups[0]
    with pytest.raises(RuntimeError, match="with ema_decay"), optimizer.averaged():
        pass


@pytest.mark.parametrize("name", [n for n in VALUES if n not in ("max_grad_norm", "clip_value")])
def test_false_keywords_reach_every_group(name: str) -> None:
    """As torch's own: groups show what was given."""
    off = VALUES[name][1]
    optimizer = fastopt.optim.AdamW(make_params(), **{name: off})
    optimizer.add_param_group({"params": make_params([(3,)], seed=1)})
    for group in optimizer.param_groups:
        assert group.get(name) == off
        assert name in group or off is None
    assert "clip_value" not in optimizer.param_groups[0]


OWN = ["max_grad_norm", "skip_nonfinite", "ema_decay", "ema_warmup", "param_rounding", "telemetry"]


class Own(FusedOptimizer):
    """A user's optimizer whose class has options on."""

    rule, scalars = sgd, sgd_scalars

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        own = {name: VALUES[name][0] for name in OWN}
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, **own})


class Again(Own):
    """Its subclass, which passes options of its own on."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr, ema_decay=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("cls", [Own, Again])
def test_what_a_user_gives_comes_before_what_a_class_has(cls: type, name: str) -> None:
    params = make_params([(300,), (7,)], BF16)
    groups = [{"params": params[:1]}, {"params": params[1:], "ema_decay": 0.25}]
    optimizer = cls(groups, **{name: VALUES[name][1]})
    expected = {n: VALUES[n][0] for n in OWN} | ({"ema_decay": 0.5} if cls is Again else {})
    expected[name] = VALUES[name][1]
    for group, decay in zip(optimizer.param_groups, (expected["ema_decay"], 0.25), strict=True):
        assert {n: group[n] for n in OWN} == expected | {"ema_decay": decay}
    optimizer.add_param_group({"params": make_params([(3,)], BF16)})
    assert {n: optimizer.param_groups[2][n] for n in OWN} == expected


def test_chance_is_that_of_the_groups_own_seed() -> None:
    """As if the group were alone with it: the position counts, not what the others are given."""
    found = []
    for seeds in ((1, 2), (2, 2), (2, 1)):
        params = [nn.Parameter(torch.linspace(1, 2, 600, dtype=BF16)) for _ in range(2)]
        groups = [{"params": p, "rounding_seed": s} for p, s in zip(params, seeds, strict=True)]
        optimizer = fastopt.optim.SGD(groups, lr=1e-3, param_rounding="stochastic")
        give_grads(params, 0)
        optimizer.step()
        found.append([p.detach() for p in params])
    one_two, two_two, two_one = found
    assert torch.equal(one_two[1], two_two[1])
    assert not torch.equal(two_two[1], two_one[1])
    assert torch.equal(two_two[0], two_one[0])
    assert not torch.equal(two_two[0], one_two[0])


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.0, "differentiable": True},
        {"max_grad_norm": 0.0},
        {"clip_value": 0.0},
        {"ema_decay": 0.9, "ema_warmup": -1},
        {"ema_decay": 0.9, "ema_warmup": "5"},
        {"ema_decay": 0.9, "ema_warmup": float("nan")},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["keyword", "group", "added"])
def test_what_means_nothing_is_refused_where_it_is_given(options: dict[str, Any], how: str) -> None:
    params, cls = make_params(), fastopt.optim.AdamW
    give: dict[str, Callable[[], Any]] = {
        "keyword": lambda: cls(params, **options),
        "group": lambda: cls([{"params": params, **options}]),
        "added": lambda: cls(make_params()).add_param_group({"params": params, **options}),
    }
    with pytest.raises(ValueError, match=r"Invalid (max_grad|clip_v|ema_warmup)|differentiable="):
        give[how]()


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_capturable_is_shown_where_it_is_set(name: str) -> None:
    cls = getattr(fastopt.optim, name)
    params = make_params()
    groups = [{"params": params[:2], "capturable": False}, {"params": params[2:]}]
    assert [g["capturable"] for g in cls(groups, capturable=True).param_groups] == [False, True]
