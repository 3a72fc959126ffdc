"""NaN, infinity, huge and tiny numbers: what torch's loop gives, while they come and afterwards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tests import oracle

NAN, INF = math.nan, math.inf
NON_FINITE = [NAN, INF, -INF]
HUGE = [1e18, -1e20, 1e30, -3e38]
TINY = [1e-20, -1e-30, 1e-38, -1e-40, 1e-45, 0.0, -0.0]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 1.0},
    ],
    "Adagrad": [{}, {"initial_accumulator_value": 0.5, "lr_decay": 0.1}],
    "RMSprop": [{}, {"momentum": 0.9}, {"centered": True}, {"centered": True, "momentum": 0.9}],
    "Adadelta": [{}],
    "Adam": [{}, {"amsgrad": True}, {"betas": (0.0, 0.0)}, {"decoupled_weight_decay": True}],
    "AdamW": [{}, {"amsgrad": True}, {"betas": (0.3, 0.6)}],
    "Adamax": [{}, {"betas": (0.0, 0.0)}],
    "NAdam": [{}, {"decoupled_weight_decay": True}],
    "RAdam": [{}, {"betas": (0.5, 0.9)}],
}
EACH = [
    pytest.param(name, decay | options, id="-".join([name, *map(str, (decay | options).items())]))
    for name in oracle.NAMES
    for options in OPTIONS[name]
    for decay in ({}, {"weight_decay": 0.1}, {"maximize": True})
]


def special(
    values: list[float], dtype: torch.dtype = torch.float32, at: int = 3
) -> tuple[list[Tensor], list[list[Any]]]:
    """Two parameters whose gradients hold the values in step `at`, each in several places (in
    vectors and in a loop's remainder), among ordinary ones; ordinary gradients before and after."""
    params, grads = oracle.inputs([(8 * len(values) + 3,), (len(values),)], dtype, decades=1)
    for grad in grads[at]:
        spot = torch.tensor(values, dtype=torch.float64).to(dtype)
        grad[: len(values)] = spot
        if len(grad) > 5 * len(values):
            grad[-len(values) :] = spot
    return params, grads


def run_both(
    name: str, options: dict[str, Any], params: list[Tensor], grads: Any
) -> list[tuple[str, Tensor, Tensor]]:
    """(name, ours, torch's) of every parameter and state after every step."""
    copies = [oracle.plain(param) for param in params]
    make = oracle.torch_loop(name, lr=0.05, **options)
    theirs = oracle.run(make, copies, grads, states_from=0)
    ours = oracle.run(oracle.fused(name, lr=0.05, **options), params, grads, states_from=0)
    found = []
    for step, (mine, torchs) in enumerate(zip(ours, theirs, strict=True), 1):
        assert mine.keys() == torchs.keys()
        for (k, key), value in mine.items():
            found.append((f"{name} {key} {k} after step {step}", value, torchs[k, key]))
    return found


def assert_same_pattern(what: str, ours: Tensor, theirs: Tensor) -> None:
    """NaN where torch has NaN, an infinity of its sign where torch has one, finite elsewhere."""
    for kind, is_kind in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = (is_kind(ours) != is_kind(theirs)).nonzero().flatten().tolist()
        assert not differ, (
            f"{what}: {kind} differs at {differ}: ours {ours[differ].tolist()}, "
            f"torch {theirs[differ].tolist()}"
        )


def assert_close(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Where both are finite: the same within some roundings, subnormals too."""
    facts = torch.finfo(ours.dtype)
    finite = torch.isfinite(theirs)
    torch.testing.assert_close(
        ours[finite],
        theirs[finite],
        rtol=64 * facts.eps,
        atol=64 * facts.smallest_normal * facts.eps,
        msg=lambda text: f"{what}: {text}",
    )


def assert_as_near(what: str, ours: Tensor, theirs: Tensor, reference: Tensor) -> None:
    """Element by element, and some roundings more."""
    finite = torch.isfinite(theirs)
    errors = [(x.double() - reference)[finite].abs() for x in (ours, theirs)]
    some = 64 * torch.finfo(ours.dtype).eps * reference[finite].abs().clamp(min=1.0)
    worse = (errors[0] > 1.5 * errors[1] + some).nonzero().flatten().tolist()
    assert not worse, (
        f"{what}: ours {ours[finite][worse].tolist()}, torch {theirs[finite][worse].tolist()}, "
        f"float64 {reference[finite][worse].tolist()}"
    )


@pytest.mark.parametrize(("name", "options"), EACH)
def test_nan_and_infinity_spread_as_in_torch(name: str, options: dict[str, Any]) -> None:
    for what, ours, theirs in run_both(name, options, *special(NON_FINITE)):
        assert_same_pattern(what, ours, theirs)


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize(("name", "options"), EACH)
def test_huge_gradients_overflow_as_in_torch(
    name: str, options: dict[str, Any], first: int
) -> None:
    """And where torch's parameter stays finite ours is as near to float64, or nearer: NAdam's v
    over its bias correction overflows in torch's loop, and its parameter stands still."""
    params, grads = special(HUGE, at=first)
    right = oracle.exact(oracle.torch_loop(name, lr=0.05, **options), params, grads)
    for what, ours, theirs in run_both(name, options, params, grads):
        assert_same_pattern(what, ours, theirs)
        label, _, step = what.rpartition(" after step ")
        if " param " in label:
            reference = right[int(step) - 1][int(label[-1]), "param"]
            assert_as_near(what, ours, theirs, reference)


@pytest.mark.parametrize(("name", "options"), EACH)
def test_tiny_gradients_underflow_as_in_torch(name: str, options: dict[str, Any]) -> None:
    """From the first step on, so that states are as tiny; nothing is flushed to zero."""
    params, grads = special(TINY, at=0)
    for row in grads[1:3]:
        for grad, first in zip(row, grads[0], strict=True):
            if isinstance(grad, Tensor):
                grad.copy_(first)
    for what, ours, theirs in run_both(name, options, params, grads):
        assert_same_pattern(what, ours, theirs)
        tiny_so_far = what[-1] in "123" and "param" not in what
        if tiny_so_far and ours.dim():
            assert_close(what, ours[: len(TINY)], theirs[: len(TINY)])


@pytest.mark.parametrize("name", oracle.NAMES)
def test_non_finite_parameters_stay_as_in_torch(name: str) -> None:
    """Without weight decay an infinite parameter does not reach the states: 0 * inf is not 0."""
    for options in ({}, {"weight_decay": 0.1}):
        params, grads = special(TINY)
        for param in params:
            param[:3] = torch.tensor(NON_FINITE)
        for what, ours, theirs in run_both(name, options, params, grads):
            assert_same_pattern(what, ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", oracle.NAMES)
def test_nan_and_infinity_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    options = {} if name == "SGD" else {"eps": 1e-3}
    for what, ours, theirs in run_both(name, options, *special(NON_FINITE, dtype)):
        assert_same_pattern(what, ours, theirs)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_complex_number_is_finite_where_that_of_torch_is(name: str, part: int) -> None:
    """As a number: torch's complex products (0 * inf) carry a NaN over to the other part, where
    ours steps the parts apart."""
    params, grads = oracle.inputs([(40,)], torch.complex64, gaps=False)
    torch.view_as_real(grads[3][0])[:3, part] = torch.tensor(NON_FINITE)
    for what, ours, theirs in run_both(name, {}, params, grads):
        assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs)), what


def test_parallel_steps_keep_subnormals_and_nan() -> None:
    """The threads of the parallel kernel flush nothing to zero."""
    numel = 40_000
    param = torch.zeros(numel, requires_grad=True)
    param.grad = torch.full((numel,), 1e-40)
    param.grad[-1] = NAN
    fastopt.optim.SGD([param], lr=1.0).step()
    assert bool((param[:-1] == -param.grad[:-1]).all())
    assert math.isnan(param[-1].item())


def test_a_nan_stays_one_element() -> None:
    """Neighbours of a NaN and the other parameters are as they would be without it."""
    params, grads = special(NON_FINITE)
    clean = [[oracle.plain(grad) for grad in row] for row in grads]
    for grad in clean[3]:
        grad.nan_to_num_(0.0, 0.0, 0.0)
    spoilt = [~torch.isfinite(grad) for grad in grads[3]]
    with_nan = [p.clone() for p in params]
    oracle.run(oracle.fused("AdamW"), with_nan, grads)
    oracle.run(oracle.fused("AdamW"), params, clean)
    for ours, without, bad in zip(with_nan, params, spoilt, strict=True):
        assert oracle.same_bits(ours[~bad], without[~bad])
        assert not bool(torch.isfinite(ours[bad]).all())


def test_dropping_nan_would_be_noticed() -> None:
    """Teeth: an optimizer that skips non-finite elements, or flushes tiny ones, is refused."""
    params, grads = special(NON_FINITE)
    found = run_both("AdamW", {}, params, grads)
    what, _, theirs = next(entry for entry in found if "param 0 after step 4" in entry[0])
    with pytest.raises(AssertionError, match="NaN differs"):
        assert_same_pattern(what, theirs.nan_to_num(), theirs)
    tiny = torch.tensor([1e-40])
    with pytest.raises(AssertionError):
        assert_close("flushed", torch.zeros(1), tiny)
