"""A step that cannot be computed counts nothing and writes nothing, in whatever launch it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tests import oracle
from tests.optim.pairs import give_grads, make_params

Params = list[Any]


def held(optimizer: Any, params: Params) -> list[Tensor]:
    """Copies of the parameters, their states and all counts."""
    kept = [optimizer.__dict__["state"], optimizer._store.hidden_counters]
    dicts = [each.get(p, {}) for each in kept for p in params]
    return [
        x.to_dense().clone() if isinstance(x, Tensor) else torch.tensor(x)
        for x in (*(p.detach() for p in params), *(x for d in dicts for x in d.values()))
    ]


def check_nothing_counts(
    optimizer: Any,
    params: Params,
    bad: dict[str, Any],
    step: Callable[[int], None],
    group: int = -1,
) -> None:
    """After two steps a group's hyper-parameters are spoilt: steps raise and change nothing. Put
    right, the run goes on as one that was never spoilt."""
    step(0)
    step(1)
    before = held(optimizer, params)
    good = {name: optimizer.param_groups[group].get(name, 0) for name in bad}
    optimizer.param_groups[group].update(bad)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError, RuntimeError, OverflowError)):
            step(2)
        after = held(optimizer, params)
        assert len(after) == len(before)
        assert all(map(torch.equal, after, before)), f"{bad} has left something"
    optimizer.param_groups[group].update(good)
    step(2)
    assert not all(map(torch.equal, held(optimizer, params), before))


def plain_step(optimizer: Any, params: Params, missing: tuple[int, ...] = ()) -> Any:
    def step(seed: int) -> None:
        give_grads(params, seed, missing)
        optimizer.step()

    return step


NOTHING: list[Any] = [None, "0.1", "a", b"1", [0.1], torch.ones(2), 1j]
HYPERS = {
    "SGD": ("lr", "momentum", "dampening", "weight_decay"),
    "Adagrad": ("lr", "lr_decay", "eps"),
    "RMSprop": ("lr", "alpha", "eps"),
    "Adadelta": ("rho", "eps"),
    "Adam": ("lr", "eps"),
    "AdamW": ("lr", "weight_decay"),
    "Adamax": ("lr", "eps"),
    "NAdam": ("lr", "momentum_decay"),
    "RAdam": ("lr", "eps"),
}


@pytest.mark.parametrize("name", oracle.NAMES)
def test_what_is_no_number_counts_no_step(name: str) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {}
    wrong = [{hyper: x} for hyper in HYPERS[name] for x in NOTHING]
    if name in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam"):
        wrong += [{"betas": x} for x in [None, 0.9, (0.9,), (), ("0.9", 0.999), (0.9, None)]]
    for bad in wrong:
        params = make_params()
        optimizer = getattr(fastopt.optim, name)(params, lr=0.1, **options)
        check_nothing_counts(optimizer, params, bad, plain_step(optimizer, params))


@pytest.mark.parametrize("lr", ["0.1", b"0.1", "fast", None])
def test_a_rate_that_is_text_is_a_type_error(lr: Any) -> None:
    params = make_params()
    optimizer = fastopt.optim.AdamW(params)
    optimizer.param_groups[0]["lr"] = lr
    give_grads(params, 0)
    with pytest.raises(TypeError, match="lr="):
        optimizer.step()


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"clip_value": 0.5}, {"clip_value": "a"}),
    ({"max_grad_norm": 0.5}, {"max_grad_norm": "a"}),
    ({"ema_decay": 0.9}, {"ema_decay": "a"}),
    ({"ema_decay": 0.9, "ema_warmup": 3}, {"ema_warmup": "long"}),
    ({"param_rounding": "stochastic"}, {"rounding_seed": "a"}),
    ({"param_rounding": "stochastic"}, {"rounding_seed": -1}),
]


@pytest.mark.parametrize(("options", "bad"), OPTIONS, ids=str)
def test_options_that_are_nothing_to_compute_with(
    options: dict[str, Any], bad: dict[str, Any]
) -> None:
    """In two launches, of two dtypes."""
    params = [*make_params(), *make_params(dtype=torch.bfloat16)]
    optimizer = fastopt.optim.AdamW(params, **options)
    check_nothing_counts(optimizer, params, bad, plain_step(optimizer, params))


KINDS: dict[str, dict[str, Any]] = {
    "two dtypes": {},
    "states that were looked at": {"looked": True},
    "gradients are missing": {"missing": (0, 3)},
    "shared memory": {"shared": True},
    "scaled": {"scaled": True},
}


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_launch_of_a_good_group_waits_for_all(kind: str, name: str) -> None:
    how = KINDS[kind]
    params = [*make_params(), *make_params(dtype=torch.bfloat16)]
    groups = [{"params": params[:4]}, {"params": params[4:]}]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(fastopt.optim, name)(groups, lr=0.1, **options)
    step = plain_step(optimizer, params, how.get("missing", ()))
    if how.get("looked"):
        assert len(optimizer.state) == 0
    if how.get("shared"):
        step(9)
        for state in optimizer.state.values():
            for value in state.values():
                value.share_memory_()
    if how.get("scaled"):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    check_nothing_counts(optimizer, params, {"lr": None}, step)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("name", ["SGD", "NAdam"])
def test_a_parameter_given_twice_is_counted_twice_or_not_at_all(name: str) -> None:
    first, second = make_params(((9,), (9,)))
    options = {"momentum": 0.9} if name == "SGD" else {}
    groups = [{"params": [first, first]}, {"params": [second, second]}]
    optimizer = getattr(fastopt.optim, name)(groups, lr=0.1, **options)
    params = [first, second]
    check_nothing_counts(optimizer, params, {"lr": None}, plain_step(optimizer, params))


def fades(p, g, lr):
    return (p - lr * g,)


def fades_scalars(step, lr, until):
    if step > until:
        raise ArithmeticError("no rate is left")
    return (lr,)


class Fades(fastopt.optim.FusedOptimizer):
    """Its scalars can be computed for some steps only."""

    rule, scalars = fades, fades_scalars

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "until": 1000.0})


@pytest.mark.parametrize("differentiable", [False, True])
def test_scalars_that_fail_at_some_step_count_nothing(differentiable: bool) -> None:
    params = [p.detach() for p in (*make_params(), *make_params(dtype=torch.bfloat16))]
    optimizer = Fades([{"params": params[:4]}, {"params": params[4:], "until": 2.0}])
    optimizer.param_groups[1]["differentiable"] = differentiable
    for seed in range(2):
        give_grads(params, seed)
        optimizer.step()
    before = held(optimizer, params)
    for seed in range(2, 4):
        give_grads(params, seed)
        with pytest.raises(ArithmeticError):
            optimizer.step()
        assert all(map(torch.equal, held(optimizer, params), before))


class CountsFirst(fastopt.optim.AdamW):
    """Wrong: counts, and then sees what it is given."""

    def step(self, closure: Any = None) -> Any:
        for state in self.state.values():
            state["step"] += 1
        result = super().step(closure)
        for state in self.state.values():
            state["step"] -= 1
        return result


def test_a_step_that_counts_first_would_be_noticed() -> None:
    params = make_params()
    optimizer = CountsFirst(params)
    with pytest.raises(AssertionError, match="has left something"):
        check_nothing_counts(optimizer, params, {"lr": None}, plain_step(optimizer, params))


# Other ways to step.


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
@pytest.mark.parametrize("bad", [{"lr": None}, {"lr": "0.1"}], ids=str)
def test_a_sparse_gradient_beside_dense_ones(name: str, bad: dict[str, Any]) -> None:
    layer = torch.nn.Embedding(9, 3, sparse=True)
    params = [*make_params(), layer.weight]
    options = {"momentum": 0.9} if name == "SGD" else {}
    groups = [{"params": params[:4]}, {"params": params[4:]}]
    optimizer = getattr(fastopt.optim, name)(groups, lr=0.1, **options)

    def step(seed: int) -> None:
        give_grads(params[:4], seed)
        layer.weight.grad = None
        layer(torch.tensor([seed, 3])).square().sum().backward()
        optimizer.step()

    check_nothing_counts(optimizer, params, bad, step)


def test_a_sparse_gradient_that_cannot_be_unscaled() -> None:
    layer = torch.nn.Embedding(9, 3, sparse=True)
    params = [*make_params(), layer.weight]
    optimizer = fastopt.optim.Adagrad(params, lr=0.1)
    before = held(optimizer, params)
    give_grads(params[:4], 0)
    layer(torch.tensor([1, 3])).square().sum().backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="cannot unscale sparse gradients"):
        optimizer.step()
    assert all(map(torch.equal, held(optimizer, params), before))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam"])
def test_a_gradient_that_is_released(name: str) -> None:
    params = make_params(((9,),))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(fastopt.optim, name)(params, lr=0.1, **options)
    optimizer.release_gradients()

    def step(seed: int) -> None:
        params[0].grad = None
        (params[0] * torch.linspace(1, seed + 2, 9)).sum().backward()

    check_nothing_counts(optimizer, params, {"lr": None}, step)
