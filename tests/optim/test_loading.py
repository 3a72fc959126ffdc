"""A state_dict is checked as a whole before any of it is taken."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tests import oracle
from tests.optim.pairs import give_grads, make_params
from tests.optim.test_errors import BAD, BETAS, DECAY, LR, raised

NAN, INF = math.nan, math.inf
SHAPES = ((300,), (7, 5), ())
NAMED = ("first", "layer.weight", "last")


def stepped(name: str, steps: int = 2, named: bool = True, **options: Any) -> Any:
    """An optimizer of three parameters that has taken some steps."""
    params: list[Any] = list(make_params(SHAPES))
    given = list(zip(NAMED, params, strict=True)) if named else params
    optimizer = getattr(fastopt.optim, name)(given, lr=1e-2, **options)
    for seed in range(steps):
        give_grads(params, seed)
        optimizer.step()
    return optimizer


def everything(optimizer: Any) -> dict[str, Any]:
    """Copies of what a load could change, and the identities of what it could replace."""
    held = optimizer.__dict__
    states = {id(key): state for key, state in held["state"].items()}
    params = [p for group in held["param_groups"] for p in group["params"]]
    return copy.deepcopy(
        {
            "params": [p.detach() for p in params],
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in held["param_groups"]],
            "states": states,
            "defaults": optimizer.defaults,
            "uncounted": {
                id(key): state for key, state in optimizer._store.hidden_counters.items()
            },
        }
    ) | {
        "identities": [id(x) for x in (held["param_groups"], held["state"], *states.values())],
        "tensors": [id(x) for state in states.values() for x in state.values()],
        "attributes": {name: id(value) for name, value in held.items()},
    }


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)


def check_refused(optimizer: Any, saved: dict[str, Any], *says: str) -> Exception:
    """The load raises, says this, and has changed nothing."""
    before = everything(optimizer)
    error = raised(lambda: optimizer.load_state_dict(saved))
    assert error is not None, "it is taken"
    for text in says:
        assert text in str(error), error
    assert alike(everything(optimizer), before), "it has changed something"
    return error


# Options and hyper-parameters.

OPTIONS: list[dict[str, Any]] = [
    {"max_grad_norm": -1.0},
    {"max_grad_norm": NAN},
    {"max_grad_norm": 0.0},
    {"max_grad_norm": "1"},
    {"max_grad_norm": 1.0, "clip_value": 1.0},
    {"clip_value": -1.0},
    {"clip_value": NAN},
    {"norm_type": 3},
    {"ema_decay": 7.0},
    {"ema_decay": NAN},
    {"ema_warmup": -1},
    {"ema_warmup": "long"},
    {"param_rounding": "up"},
    {"rounding_seed": -1},
    {"rounding_seed": 0.5},
    {"state_dtype": "4bit"},
    {"state_dtype": {"exp_avg": torch.float16}},
]


@pytest.mark.parametrize("bad", OPTIONS, ids=str)
@pytest.mark.parametrize("has", [{}, {"max_grad_norm": 0.9}, {"ema_decay": 0.9}], ids=str)
def test_options_that_the_constructor_refuses(bad: dict[str, Any], has: dict[str, Any]) -> None:
    optimizer = stepped("AdamW", **has)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(bad)
    params = make_params(SHAPES)
    expected = raised(lambda: fastopt.optim.AdamW(params, **has | bad))
    error = check_refused(optimizer, saved, next(iter(bad)), "parameter group 0")
    assert type(error) is type(expected), (error, expected)


@pytest.mark.parametrize("name", oracle.NAMES)
def test_hyper_parameters_that_the_constructor_refuses(name: str) -> None:
    """With its own error first; the second group is at fault, and the first one is not taken."""
    wrong = [*LR, {"lr": None}, {"lr": "0.1"}, *DECAY, *BAD[name]]
    if {"eps": NAN} in BAD[name]:
        wrong += [{"eps": "a"}, {"eps": None}]
    if BETAS[0] in BAD[name]:
        wrong += [{"betas": (2, 2)}, {"betas": None}]
    for bad in wrong:
        cls = getattr(fastopt.optim, name)
        expected = raised(lambda bad=bad, cls=cls: cls(make_params(SHAPES), **bad))
        if expected is None:
            assert (name, bad) == ("SGD", LR[1])
            continue
        params = make_params(SHAPES)
        optimizer = cls([{"params": params[:1]}, {"params": params[1:]}])
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["lr"] = 0.5
        saved["param_groups"][1].update(bad)
        error = check_refused(optimizer, saved, str(expected), "parameter group 1")
        same = type(expected) if type(expected) is not IndexError else ValueError
        assert type(error) is same, (bad, error)


def test_numbers_that_no_constructor_checks() -> None:
    for name, bad in [
        ("SGD", {"dampening": "a"}),
        ("SGD", {"momentum": 0.9, "dampening": None}),
        ("RMSprop", {"alpha": "a"}),
        ("NAdam", {"momentum_decay": torch.ones(2)}),
    ]:
        optimizer = stepped(name, **({"momentum": 0.9} if name == "SGD" else {}))
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0].update(bad)
        check_refused(optimizer, saved, "parameter group 0")


def lion(p, g, m, decay, lr, keep, mix):
    m = keep * m + mix * g
    return decay * p - lr * m, m


def lion_scalars(step, lr, beta, weight_decay):
    return 1.0 - lr * weight_decay, lr, beta, 1.0 - beta


class Strict(fastopt.optim.FusedOptimizer):
    """A user's own, which checks what it takes."""

    rule, scalars, state_names = lion, lion_scalars, ("exp_avg",)

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9, weight_decay: float = 0.0):
        if beta > 1.0:
            raise ValueError(f"Invalid beta: {beta}")
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})


class Derived(fastopt.optim.AdamW):
    """A user's own, which has a check beside torch's and passes the rest on."""

    def __init__(self, params: Any, lr: float = 0.1, **rest: Any) -> None:
        if lr > 1.0:
            raise ValueError("Too fast")
        super().__init__(params, lr, **rest)


class OfModel(fastopt.optim.AdamW):
    """A user's own, constructed of something else than parameters."""

    def __init__(self, model: torch.nn.Module, lr: float, decayed: bool) -> None:
        super().__init__(model.parameters(), lr)


@pytest.mark.parametrize(
    ("make", "bad", "says"),
    [
        (lambda: Strict(make_params()), {"beta": 2.0}, "Invalid beta: 2.0"),
        (lambda: Derived(make_params()), {"lr": 2.0}, "Too fast"),
        (lambda: Derived(make_params()), {"betas": (2, 2)}, "Invalid beta parameter"),
        (lambda: OfModel(torch.nn.Linear(2, 2), 0.1, True), {"eps": -1.0}, "Invalid epsilon"),
    ],
)
def test_constructors_of_users_are_asked_too(
    make: Callable[[], Any], bad: dict[str, Any], says: str
) -> None:
    optimizer = make()
    saved = copy.deepcopy(optimizer.state_dict())
    check_refused(optimizer, {**saved, "param_groups": [saved["param_groups"][0] | bad]}, says)
    saved["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5


# States.

STATES: dict[str, list[tuple[str, Any]]] = {
    "AdamW": [
        *(("step", bad) for bad in (-1.0, NAN, INF, 2.5, "3", None, True, [3.0], {})),
        *(("step", torch.tensor(bad)) for bad in (-1.0, NAN, 2.5, True, 1j, [1.0, 2.0])),
        ("step", ...),
        *(("exp_avg", bad) for bad in (..., None, 0.5, [0.0] * 35)),
        *(("exp_avg", torch.zeros(shape)) for shape in ((5, 7), (35,), (7, 1), ())),
        *(("exp_avg_sq", torch.zeros(7, 5, dtype=t)) for t in (torch.int64, torch.complex64)),
        ("exp_avg", torch.zeros(7, 5).to_sparse()),
        ("exp_avg_codes", torch.zeros(7, 5, dtype=torch.int8)),
        ("exp_avg_scale", torch.ones(1)),
        ("averaged", torch.zeros(5)),
        ("low_bits", torch.zeros(7, 5)),
        ("compensation", torch.zeros(7, 5, dtype=torch.int16)),
    ],
    "AdamW 8bit": [
        *((name, ...) for name in ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes")),
        *(("exp_avg_codes", torch.zeros(7, 5, dtype=t)) for t in (torch.float32, torch.uint8)),
        ("exp_avg_sq_codes", torch.zeros(7, 5, dtype=torch.int8)),
        ("exp_avg_codes", torch.zeros(35, dtype=torch.int8)),
        *(("exp_avg_scale", torch.tensor([bad])) for bad in (-1.0, NAN, INF)),
        *(("exp_avg_sq_scale", bad) for bad in (torch.ones(2), torch.ones(()), 1.0, {})),
        ("exp_avg_scale", torch.ones(1, dtype=torch.float64)),
        ("exp_avg", torch.zeros(7, 5)),
    ],
    "SGD 8bit": [
        *((f"momentum_buffer_{kind}", ...) for kind in ("codes", "scale")),
        *(("fastopt_step", bad) for bad in (-1.0, NAN, torch.tensor([1.0, 2.0]))),
    ],
    "NAdam": [*(("mu_product", bad) for bad in (..., NAN, "a", torch.ones(2)))],
    "Adagrad": [("sum", torch.zeros(2)), ("sum", ...)],
}
CASES = [(case, *bad) for case, all_bad in STATES.items() for bad in all_bad]


@pytest.mark.parametrize(("case", "key", "value"), CASES, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_states_that_do_not_fit(case: str, key: str, value: Any, named: bool) -> None:
    """...: no such entry."""
    name, _, state_dtype = case.partition(" ")
    options = {"state_dtype": state_dtype} if state_dtype else {}
    options |= {"momentum": 0.9} if name == "SGD" else {}
    optimizer = stepped(name, named=named, **options)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    saved["state"][1][key] = value
    if value is ...:
        del saved["state"][1][key]
    where = "parameter 'layer.weight'" if named else "parameter 1"
    error = check_refused(optimizer, saved, where, key.removesuffix("_codes"))
    assert isinstance(error, ValueError)


def test_a_state_that_is_no_dict() -> None:
    optimizer = stepped("AdamW")
    for junk in (None, 3, [1], torch.ones(3)):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][2] = junk
        check_refused(optimizer, saved, "parameter 'last'")


class Hasty(fastopt.optim.AdamW):
    """Wrong: takes the rate before anything has been checked."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.param_groups[0]["lr"] = state_dict["param_groups"][0]["lr"]
        super().load_state_dict(state_dict)


def test_a_load_by_halves_would_be_noticed() -> None:
    optimizer = Hasty(make_params(SHAPES))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(lr=0.5, eps=-1.0)
    with pytest.raises(AssertionError, match="changed something"):
        check_refused(optimizer, saved)


class Breaks(fastopt.optim.AdamW):
    """A user's own, which fails once torch has set the new groups and states."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.note = "half way"
        raise RuntimeError("out of luck")


def test_a_class_that_fails_half_way_is_as_before() -> None:
    optimizer = Breaks(make_params(SHAPES))
    saved = stepped("AdamW", named=False).state_dict()
    check_refused(optimizer, saved, "out of luck")
