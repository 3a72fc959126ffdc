"""Clipping, skipping and averaging inside the step: what torch does in passes of its own."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastopt
from fastopt.optim import FusedOptimizer
from fastopt.optim.sgd import sgd, sgd_scalars
from tests.optim import pairs
from tests.optim.pairs import CASES, SHAPES, construct, give_grads, make_params

INF, NAN = math.inf, math.nan
LIMIT = 0.7
# Small enough to clip most gradients of `give_grads`, large enough to leave some alone.
CLIPPING: dict[str, tuple[dict[str, Any], Callable[[list[Any]], Any]]] = {
    "norm": (
        {"max_grad_norm": LIMIT},
        lambda params: torch.nn.utils.clip_grad_norm_(params, LIMIT),
    ),
    "norm that is not reached": (
        {"max_grad_norm": 1e6},
        lambda params: torch.nn.utils.clip_grad_norm_(params, 1e6),
    ),
    "largest": (
        {"max_grad_norm": LIMIT, "norm_type": INF},
        lambda params: torch.nn.utils.clip_grad_norm_(params, LIMIT, INF),
    ),
    "value": (
        {"clip_value": LIMIT},
        lambda params: torch.nn.utils.clip_grad_value_(params, LIMIT),
    ),
}


def both(case: str, **options: Any) -> list[tuple[torch.optim.Optimizer, list[Any]]]:
    """torch's optimizer, and ours with these options, on equal parameters."""
    sides = []
    for package, more in ((torch, {}), (fastopt, options)):
        params = make_params()
        sides.append((construct(package, case, params, **more), params))
    return sides


def run(case: str, how: str, steps: int = 5, **wrong: Any) -> None:
    options, clip = CLIPPING[how]
    (theirs, their_params), (ours, our_params) = both(case, **(options | wrong))
    for step in range(steps):
        missing = [step % 4] if step else []
        for params in (their_params, our_params):
            give_grads(params, step, missing)
        kept = [None if p.grad is None else p.grad.clone() for p in our_params]
        clip(their_params)
        theirs.step()
        ours.step()
        for param, grad in zip(our_params, kept, strict=True):
            assert grad is None or torch.equal(param.grad, grad)  # read, never written
    pairs.assert_params_close(our_params, their_params)


# Clipping by value is a kernel of its own for each rule.
@pytest.mark.parametrize(
    ("case", "how"),
    [(case, how) for how in CLIPPING for case in (pairs.ONE_EACH if how == "value" else CASES)],
)
def test_clipping_is_what_torch_does_before_the_step(case: str, how: str) -> None:
    run(case, how)


@pytest.mark.parametrize("how", ["norm", "largest", "value"])
def test_this_comparison_sees_a_step_that_does_not_clip(how: str) -> None:
    none = dict.fromkeys(("max_grad_norm", "clip_value"))
    with pytest.raises(AssertionError):
        run("SGD-momentum", how, **none)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["norm", "largest", "value"])
def test_other_dtypes(how: str, dtype: torch.dtype) -> None:
    """The norm of half gradients is that of their values, not rounded on the way."""
    options, _ = CLIPPING[how]
    params, wide = make_params(dtype=dtype), make_params(dtype=dtype)
    wide = [torch.nn.Parameter(p.detach().double()) for p in wide]
    ours = fastopt.optim.SGD(params, lr=0.1, **options)
    theirs = torch.optim.SGD(wide, lr=0.1)
    give_grads(params, 0)
    for p, q in zip(params, wide, strict=True):
        assert p.grad is not None
        q.grad = p.grad.double().clone()
    CLIPPING[how][1](wide)
    theirs.step()
    ours.step()
    for p, q in zip(params, wide, strict=True):
        room = torch.finfo(dtype).eps * max(1.0, float(q.detach().abs().max()))
        assert (p.detach().double() - q.detach()).abs().max() <= room


@pytest.mark.parametrize("scale", [1e-20, 1e20, 1e30])
def test_norms_of_tiny_and_huge_gradients(scale: float) -> None:
    """Their squares would vanish or overflow in float32."""
    params = make_params()
    optimizer = fastopt.optim.SGD(params, lr=1.0, max_grad_norm=LIMIT)
    give_grads(params, 0)
    for param in params:
        assert param.grad is not None
        param.grad.mul_(scale)
    grads = torch.cat([p.grad.double().flatten() for p in params if p.grad is not None])
    before = [p.detach().clone() for p in params]
    optimizer.step()
    norm = float(grads.norm())
    assert float(optimizer.last_step.grad_norm) == pytest.approx(norm, rel=1e-6)
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, params, strict=True)])
    if scale > 1.0:
        assert float(moved.norm()) == pytest.approx(LIMIT, rel=1e-5)


def test_the_norm_is_the_same_for_any_number_of_threads() -> None:
    found = []
    kept = torch.get_num_threads()
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        params = [torch.nn.Parameter(torch.zeros(n)) for n in (300_001, 7, 40_000)]
        give_grads(params, 3)
        optimizer = fastopt.optim.SGD(params, lr=1.0, max_grad_norm=LIMIT)
        optimizer.step()
        found.append([float(optimizer.last_step.grad_norm), *(p.detach().clone() for p in params)])
    torch.set_num_threads(kept)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


def test_a_group_with_a_limit_of_its_own() -> None:
    def groups(params: list[Any]) -> list[dict[str, Any]]:
        return [{"params": params[:2]}, {"params": params[2:3], "max_grad_norm": 0.1},
                {"params": params[3:]}]  # fmt: skip

    ours_params, params = make_params(), make_params()
    ours = fastopt.optim.AdamW(groups(ours_params), lr=0.01, max_grad_norm=LIMIT)
    theirs = torch.optim.AdamW([{"params": g["params"]} for g in groups(params)], lr=0.01)
    for step in range(3):
        give_grads(ours_params, step)
        give_grads(params, step)
        torch.nn.utils.clip_grad_norm_([*params[:2], *params[3:]], LIMIT)
        torch.nn.utils.clip_grad_norm_(params[2:3], 0.1)
        theirs.step()
        ours.step()
    pairs.assert_params_close(ours_params, params)
    assert ours.last_step.clip_coefficient.shape == (3,)


# Skipping, and what is reported.


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("case", pairs.ONE_EACH)
def test_a_skipped_step_leaves_every_bit(case: str, value: float) -> None:
    params = make_params()
    optimizer: Any = construct(fastopt, case, params, skip_nonfinite=True)
    give_grads(params, 0)
    optimizer.step()
    assert not optimizer.last_step.skipped
    before = copy.deepcopy((optimizer.state_dict(), [p.detach().clone() for p in params]))
    give_grads(params, 1)
    assert params[0].grad is not None
    params[0].grad.view(-1)[2] = params[0].grad.view(-1)[5] = value
    optimizer.step()
    report = optimizer.last_step
    assert report.skipped
    assert int(report.nonfinite) == 2
    assert not report.grad_norm.isfinite()
    for param, kept in zip(params, before[1], strict=True):
        assert torch.equal(param.detach(), kept)
    for index, state in optimizer.state_dict()["state"].items():
        for name, now in state.items():
            assert torch.equal(
                torch.as_tensor(now), torch.as_tensor(before[0]["state"][index][name])
            )


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("how", ["norm", "largest", "value"])
def test_without_skipping_what_is_not_finite_does_what_it_does_in_torch(
    how: str, value: float
) -> None:
    options, clip = CLIPPING[how]
    (theirs, their_params), (ours, our_params) = both("SGD", **options)
    for params in (their_params, our_params):
        give_grads(params, 0)
        params[0].grad.view(-1)[2] = value
    clip(their_params)
    theirs.step()
    ours.step()
    for mine, other in zip(our_params, their_params, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), equal_nan=True)


def test_the_report() -> None:
    params = make_params()
    optimizer = fastopt.optim.Adam(params, max_grad_norm=LIMIT)
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        _ = optimizer.last_step
    give_grads(params, 0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    optimizer.step()
    report = optimizer.last_step
    torch.testing.assert_close(report.grad_norm, norm)
    torch.testing.assert_close(report.clip_coefficient, LIMIT / (norm + 1e-6))
    assert not report.skipped
    assert int(report.nonfinite) == 0


# GradScaler.


SCALERS = [torch.amp.GradScaler, fastopt.GradScaler]


@pytest.mark.parametrize("cls", SCALERS)
@pytest.mark.parametrize("unscaled_before", [False, True])
def test_the_norm_under_a_scaler_is_that_of_unscaled_gradients(
    unscaled_before: bool, cls: type[torch.amp.GradScaler]
) -> None:
    (theirs, their_params), (ours, our_params) = both("AdamW", max_grad_norm=LIMIT)
    for step in range(3):
        for optimizer, params in ((theirs, their_params), (ours, our_params)):
            scaler = cls("cpu", init_scale=1024.0)
            give_grads(params, step)
            scaler.scale(torch.ones(()))
            for param in params:
                param.grad.mul_(1024.0)
            if optimizer is theirs or unscaled_before:
                scaler.unscale_(optimizer)
            if optimizer is theirs:
                torch.nn.utils.clip_grad_norm_(params, LIMIT)
            scaler.step(optimizer)
            scaler.update()
    pairs.assert_params_close(our_params, their_params)


@pytest.mark.parametrize("cls", SCALERS)
def test_a_scaler_that_found_infinity_skips(cls: type[torch.amp.GradScaler]) -> None:
    params = make_params()
    optimizer = fastopt.optim.AdamW(params, max_grad_norm=LIMIT)
    before = [p.detach().clone() for p in params]
    scaler = cls("cpu", init_scale=1024.0)
    give_grads(params, 0)
    scaler.scale(torch.ones(()))
    assert params[1].grad is not None
    params[1].grad[0] = INF
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))
    assert scaler.get_scale() == 512.0
    if cls is fastopt.GradScaler:
        assert optimizer.last_step.skipped
        assert int(optimizer.last_step.nonfinite) == 1


def test_a_hook_may_change_gradients_after_the_scaler_has_looked() -> None:
    params = make_params()
    optimizer = fastopt.optim.SGD(params, lr=1.0, max_grad_norm=LIMIT)

    def double(*_: Any) -> None:
        for param in params:
            param.grad = 2.0 * param.grad  # type: ignore[operator]

    optimizer.register_step_pre_hook(double)
    scaler = fastopt.GradScaler("cpu", init_scale=4.0)
    give_grads(params, 0)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert float(optimizer.last_step.grad_norm) == pytest.approx(2.0 * norm / 4.0, rel=1e-6)


def test_our_scaler_is_torchs_for_other_optimizers() -> None:
    """State, growth and skips, for an optimizer of torch's, and for one of ours that does not look
    at its gradients."""
    for make in (torch.optim.SGD, fastopt.optim.SGD):
        found = []
        for cls in SCALERS:
            params = make_params()
            optimizer = make(params, lr=0.1)
            scaler = cls("cpu", init_scale=8.0, growth_interval=1)
            for step in range(3):
                give_grads(params, step)
                scaler.scale(torch.ones(()))
                if step == 1:
                    assert params[0].grad is not None
                    params[0].grad.fill_(NAN)
                scaler.step(optimizer)
                scaler.update()
            found.append((scaler.state_dict(), [p.detach().clone() for p in params]))
        assert found[0][0] == found[1][0]
        pairs.assert_params_close(found[1][1], found[0][1])


# Options.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"clip_value": NAN}, "clip_value"),
        ({"norm_type": 1.0, "max_grad_norm": 1.0}, "norm_type"),
        ({"max_grad_norm": 1.0, "clip_value": 1.0}, "together"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"max_grad_norm": 1.0, "differentiable": True}, "differentiable"),
    ],
)
@pytest.mark.parametrize("name", pairs.NAMES)
def test_options_that_mean_nothing_are_refused(
    name: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        getattr(fastopt.optim, name)(make_params(), **options)


def test_sparse_gradients_are_refused_before_anything_is_written() -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = fastopt.optim.SGD(table.parameters(), lr=0.1, max_grad_norm=1.0)
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()
    assert torch.equal(table.weight.detach(), before)


@pytest.mark.parametrize("options", [{"clip_value": 1.0}, {"max_grad_norm": 1.0, "norm_type": INF}])
def test_complex_gradients_have_no_largest_element(options: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = fastopt.optim.SGD([param], lr=0.1, **options)
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="complex"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones_like(param))


def test_complex_gradients_have_a_norm() -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2)]
    ours = fastopt.optim.SGD(params[:1], lr=0.1, max_grad_norm=LIMIT)
    theirs = torch.optim.SGD(params[1:], lr=0.1)
    for param in params:
        param.grad = torch.tensor([3.0 + 4.0j, -1.0j, 2.0])
    torch.nn.utils.clip_grad_norm_(params[1:], LIMIT)
    ours.step()
    theirs.step()
    pairs.assert_params_close(params[:1], params[1:])


def test_groups_of_different_norms_are_refused() -> None:
    params = make_params()
    groups = [{"params": params[:2]}, {"params": params[2:], "norm_type": INF}]
    optimizer = fastopt.optim.SGD(groups, lr=0.1, max_grad_norm=LIMIT)
    give_grads(params, 0)
    with pytest.raises(ValueError, match="norm_type"):
        optimizer.step()


def test_a_limit_may_be_set_and_lifted_later() -> None:
    (theirs, their_params), (ours, our_params) = both("SGD")
    for step, limit in enumerate((None, LIMIT, 0.1, None)):
        for params in (their_params, our_params):
            give_grads(params, step)
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(their_params, limit)
        ours.param_groups[0]["max_grad_norm"] = limit
        theirs.step()
        ours.step()
    pairs.assert_params_close(our_params, their_params)


def test_groups_show_only_what_is_set() -> None:
    plain = fastopt.optim.AdamW(make_params())
    assert list(plain.param_groups[0]) == list(torch.optim.AdamW(make_params()).param_groups[0])
    clipped = fastopt.optim.AdamW(make_params(), max_grad_norm=1.0)
    assert clipped.param_groups[0]["max_grad_norm"] == 1.0
    assert "ema_decay" not in clipped.param_groups[0]


def test_a_users_own_optimizer_takes_them() -> None:
    class Mine(FusedOptimizer):
        rule, scalars = sgd, sgd_scalars

        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    assert "max_grad_norm" in inspect.signature(Mine.__init__).parameters
    params = make_params(SHAPES[:1])
    optimizer = Mine(params, max_grad_norm=LIMIT)  # type: ignore[call-arg]
    give_grads(params, 0)
    before = params[0].detach().clone()
    optimizer.step()
    moved = (before - params[0].detach()) / 0.1
    assert float(moved.norm()) == pytest.approx(LIMIT, rel=1e-4)
