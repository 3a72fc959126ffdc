"""Steps that a GradScaler skips, or has nothing to look at for: what the optimizer says of them,
and what those who follow its steps see."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tests.optim.pairs import assert_params_close, give_grads, make_params

LARGE = 1e6
# Of these torch's scaler calls step for one that is to be skipped, too; of OUTSIDE it does not.
INSIDE: tuple[dict[str, Any], ...] = (
    {"fused": True},
    {"max_grad_norm": LARGE},
    {"clip_value": LARGE},
    {"fused": True, "max_grad_norm": LARGE, "norm_type": math.inf},
)
OUTSIDE: tuple[dict[str, Any], ...] = ({}, {"skip_nonfinite": True})
SCALERS = {"torch": torch.amp.GradScaler, "ours": fastopt.GradScaler}


def named(*cases: tuple[str, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(SCALERS[whose], options, id=f"{whose}-{'-'.join(options) or 'plain'}")
        for whose, options in cases
    ]


EVERY = named(*((whose, options) for whose in SCALERS for options in (*INSIDE, *OUTSIDE)))
REPORTED = named(
    *(("torch", options) for options in INSIDE),
    *(("ours", options) for options in (*INSIDE, *OUTSIDE)),
)


def give_scaled(params: list[Any], seed: int, scale: float, overflow: bool = False) -> None:
    give_grads(params, seed)
    for param in params:
        param.grad.mul_(scale)
    if overflow:
        params[-1].grad.fill_(math.inf)


def begun(cls: Any, scale: float = 8.0) -> Any:
    scaler = cls("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))
    return scaler


# No gradients.


def outcome(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:40]}"
    return ""


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize(("cls", "options"), EVERY)
def test_a_step_without_gradients_is_torchs(
    cls: Any, options: dict[str, Any], unscaled: bool
) -> None:
    """Of torch's fused step where ours unscales, else of one that is not."""
    said = []
    fused = options in INSIDE or (cls is fastopt.GradScaler and "skip_nonfinite" in options)
    for package in (torch, fastopt):
        params = make_params()
        more = options if package is fastopt else {"fused": fused}
        optimizer = package.optim.AdamW([{"params": params}, {"params": []}], **more)
        scaler = begun(torch.amp.GradScaler if package is torch else cls)
        if unscaled:
            scaler.unscale_(optimizer)
        said.append([outcome(lambda s=scaler, o=optimizer: s.step(o)), outcome(scaler.update)])
        assert all(map(torch.equal, params, make_params()))
        assert not hasattr(optimizer, "found_inf")
    assert said[0] == said[1]
    assert said[1][1].startswith("AssertionError: No inf checks")


@pytest.mark.parametrize(("cls", "options"), EVERY)
def test_one_of_two_optimizers_without_gradients(cls: Any, options: dict[str, Any]) -> None:
    """It gets some later, and goes on as if nothing had been."""
    expected = make_params()
    theirs = torch.optim.AdamW(expected, lr=0.1)
    idle, params = make_params(), make_params()
    optimizers = [fastopt.optim.AdamW(p, lr=0.1, **options) for p in (params, idle)]
    scaler = begun(cls)
    for step in range(3):
        give_grads(expected, step)
        theirs.step()
        give_scaled(params, step, scaler.get_scale())
        scaler.step(optimizers[0])
        if options in INSIDE:
            scaler.step(optimizers[1])
        scaler.update()
    assert_params_close(params, expected)
    for step in range(3):
        give_scaled(idle, step, scaler.get_scale())
        scaler.step(optimizers[1])
        scaler.update()
    assert_params_close(idle, expected)


# What was found in a skipped step.


def check_reports(cls: Any, options: dict[str, Any], ours: Any = fastopt.optim.AdamW) -> None:
    params = make_params()
    optimizer = ours(params, **options)
    scaler = begun(cls)
    for overflows in (True, False, True):
        give_scaled(params, 1, scaler.get_scale(), overflows)
        scaler.step(optimizer)
        scaler.update()
        if not overflows and not optimizer.measures_gradients():
            with pytest.raises(RuntimeError, match="max_grad_norm"):
                _ = optimizer.last_step
            continue
        report = optimizer.last_step
        assert bool(report.skipped) == overflows
        assert int(report.nonfinite) == overflows * params[-1].numel()
        assert bool(report.grad_norm.isinf()) == overflows


@pytest.mark.parametrize(("cls", "options"), REPORTED)
def test_last_step_is_the_one_that_was_skipped(cls: Any, options: dict[str, Any]) -> None:
    check_reports(cls, options)


class SaysNothing(fastopt.optim.AdamW):
    """Wrong: a step that is skipped leaves no word."""

    def note_skip(self, *args: Any) -> None: ...


@pytest.mark.parametrize(("cls", "options"), REPORTED[:2])
def test_this_check_sees_an_optimizer_that_does_not_say(cls: Any, options: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_reports(cls, options, SaysNothing)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_finite_is_found_unscaled(dtype: torch.dtype, norm_type: float) -> None:
    """Another rank has overflowed. No square fits float32, and the parts are more than one."""
    params = make_params(((1_100_000,), (7, 5), (0, 3), ()), dtype)
    optimizer = fastopt.optim.SGD(params, lr=0.1, fused=True, norm_type=norm_type)
    give_scaled(params, 3, 1e25)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    grads = torch.cat([p.grad.double().flatten() for p in params if p.grad is not None])
    report = optimizer.last_step
    assert report.skipped
    assert report.nonfinite == 0
    right = float(torch.linalg.vector_norm(grads, norm_type)) / 4.0
    assert float(report.grad_norm) == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("kind", ["sparse", "complex", "large"])
def test_what_is_found_in_gradients_of_other_kinds(kind: str) -> None:
    param = torch.nn.Parameter(torch.ones(5, 3, dtype={"complex": torch.complex64}.get(kind)))
    param.grad = torch.zeros_like(param)
    param.grad[1, 1], param.grad[1, 2] = math.nan, 3.0
    nonfinite, norm = 1, math.nan
    if kind == "sparse":
        # One row twice: of the sum, one element is infinite.
        rows = torch.tensor([[3.0, 3e38, 0.0], [1.0, 3e38, 0.0]])
        param.grad = torch.sparse_coo_tensor(
            torch.tensor([[2, 2]]), rows, param.shape, check_invariants=True
        )
        nonfinite, norm = 1, math.inf
    elif kind == "large":
        # In float64 the square of what is finite may not fit.
        param = torch.nn.Parameter(param.detach().double())
        param.grad = torch.full_like(param, 1e200)
        nonfinite, norm = 0, math.inf
    optimizer = fastopt.optim.SGD([param], lr=0.1, fused=True)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert int(optimizer.last_step.nonfinite) == nonfinite
    assert float(optimizer.last_step.grad_norm) == pytest.approx(norm, nan_ok=True)


def test_a_scale_that_has_reached_zero_skips() -> None:
    params = make_params()
    optimizer = fastopt.optim.AdamW(params, max_grad_norm=1.0)
    scaler = begun(fastopt.GradScaler, 0.0)
    give_scaled(params, 0, 1.0, overflow=True)
    scaler.step(optimizer)
    assert optimizer.last_step.skipped
    assert all(map(torch.equal, params, make_params()))


# Those who follow the steps.


class Accelerated:
    """A step of an optimizer as accelerate's wrapper takes it, which learns that it was skipped
    from its own function not being called."""

    def __init__(self, optimizer: Any, scaler: Any) -> None:
        self.optimizer, self.scaler, self.was_skipped = optimizer, scaler, False
        self.called = False
        self.own = optimizer.step
        self.replaced = functools.partial(self._step, self.own)

    def _step(self, step: Any, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return step(*args, **kwargs)

    def step(self) -> None:
        self.called, self.optimizer.step = False, self.replaced
        self.scaler.step(self.optimizer, None)
        self.scaler.update()
        self.was_skipped, self.optimizer.step = not self.called, self.own


def rates(
    make: Any, cls: Any, options: dict[str, Any], wrapped: bool
) -> tuple[list[float], list[Tensor]]:
    """The learning rate after each step of an accelerated loop; wrapped: step by a scheduler."""
    params = make_params()
    optimizer = make(params, lr=0.1, **options)
    if wrapped:
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    accelerated, seen = Accelerated(optimizer, begun(cls)), []
    for step in range(4):
        give_scaled(params, step, accelerated.scaler.get_scale(), overflow=step in (0, 2))
        accelerated.step()
        if not accelerated.was_skipped:
            optimizer.param_groups[0]["lr"] /= 2.0
        elif cls is fastopt.GradScaler:
            assert optimizer.last_step.skipped
        seen.append(optimizer.param_groups[0]["lr"])
    return seen, params


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("cls", "options"), [case for case in EVERY if "fused" not in case.values[1]]
)
def test_a_function_in_place_of_step_sees_which_are_skipped(
    cls: Any, options: dict[str, Any], wrapped: bool
) -> None:
    """As with torch's fused=False; under our scaler `last_step` has them too."""
    ours, params = rates(fastopt.optim.AdamW, cls, options, wrapped)
    theirs, expected = rates(torch.optim.AdamW, torch.amp.GradScaler, {}, wrapped)
    assert ours == theirs
    assert_params_close(params, expected)


# Where the step unscales.


def inside(optimizer: Any) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False) is True


@pytest.mark.parametrize("option", [{"fused": True}, {"max_grad_norm": 1.0}, {"clip_value": 1.0}])
def test_unscaling_inside_the_step_follows_the_options(option: dict[str, Any]) -> None:
    (name,) = option
    optimizer = fastopt.optim.AdamW(make_params(), **option)
    plain = fastopt.optim.AdamW(make_params())
    assert (inside(optimizer), inside(plain)) == (True, False)
    assert not hasattr(plain, "_step_supports_amp_scaling")
    assert inside(copy.deepcopy(optimizer))
    optimizer.param_groups[0][name] = None
    assert not inside(optimizer)
    plain.add_param_group({"params": make_params(), **option})
    assert inside(plain)
    optimizer._step_supports_amp_scaling = False
    optimizer.param_groups[0].update(option)
    assert not inside(optimizer)


def test_a_swapped_optimizer_with_a_scheduler_unscales_where_it_clips() -> None:
    optimizer = torch.optim.AdamW(make_params())
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    fastopt.swap(optimizer)
    assert not inside(optimizer)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    assert inside(optimizer)
    own = optimizer.step
    optimizer.step = functools.wraps(own)(lambda *args: own(*args))  # type: ignore[method-assign]
    assert not inside(optimizer)


@pytest.mark.parametrize("option", [{"fused": True}, {"clip_value": 1.0}])
def test_under_fsdp1_the_scaler_unscales(
    option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scaler reduces what it found over ranks only there: replicas would drift."""
    monkeypatch.setattr("fastopt.optim.step.sharding.many_processes", lambda: True)
    params = make_params()
    optimizer = fastopt.optim.AdamW(params, **option)
    assert inside(optimizer)
    params[0]._fsdp_flattened = True
    assert not inside(optimizer)
