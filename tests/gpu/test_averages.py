"""Averages through the Triton engine, in the interpreter, where host or device counts the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastopt
from fastopt.optim.step.grad_scale import Scale
from tests.gpu.test_passes import bits, same
from tests.optim.pairs import give_grads, make_params
from tests.optim.test_averages import DECAY, Oracle, check

HOW: dict[str, dict[str, Any]] = {
    "host": {},
    "capturable": {"capturable": True},
    "fused": {"fused": True},
    "skip_nonfinite": {"skip_nonfinite": True},
}
SHAPES = [(17, 5), (3,), (), (600,), (7,)]


def missing_at(step: int) -> list[int]:
    """One gradient comes and goes, one comes late, and one is never there."""
    return [4, *([1] if step % 3 else []), *([3] if step < 5 else [])]


def run(make: Callable[[Any], Any], skipped: tuple[int, ...] = (), steps: int = 12) -> Any:
    """Steps beside AveragedModel's; the never stepped parameter is changed by its owner."""
    params = make_params(SHAPES)
    optimizer = make(params)
    oracle = Oracle(params)
    for step in range(steps):
        give_grads(params, step, missing_at(step))
        if step == 7:
            with torch.no_grad():
                params[4].add_(1.0)
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = torch.tensor(float(step in skipped))
        elif step in skipped:
            params[0].grad[1, 1] = torch.nan  # type: ignore[index]
        before = bits(optimizer, params)
        optimizer.step()
        if step not in skipped:
            oracle.update()
        elif before[5:]:
            assert same(before, bits(optimizer, params))
        if step >= len(skipped):
            check(optimizer, params, oracle.averages, 1e-6)
    return optimizer, params


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_every_average_moves_at_each_step(name: str, how: str) -> None:
    cls = getattr(fastopt.optim, name)
    run(lambda params: cls(params, lr=0.05, ema_decay=DECAY, **HOW[how]))


@pytest.mark.parametrize("skipped", [(0,), (0, 1, 8)], ids=str)
@pytest.mark.parametrize("how", ["fused", "skip_nonfinite"])
def test_steps_that_only_the_device_skips_move_none(
    how: str, skipped: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And begin none: the first that is taken does."""
    for name, value in (("on_host", lambda self: False), ("skip", None)):
        monkeypatch.setattr(Scale, name, value)
    run(lambda params: fastopt.optim.AdamW(params, lr=0.05, ema_decay=DECAY, **HOW[how]), skipped)


@pytest.mark.parametrize("how", [how for how in HOW if how != "host"])
@pytest.mark.parametrize(
    "options",
    [{}, {"ema_warmup": 6}, {"param_rounding": "master"}, {"max_grad_norm": 0.5}],
    ids=str,
)
def test_the_bits_of_steps_the_host_counts(how: str, options: dict[str, Any]) -> None:
    sides = []
    for counted in ("host", how):
        dtype = torch.bfloat16 if "param_rounding" in options else torch.float32
        params = make_params(SHAPES, dtype)
        groups = [{"params": params[:2]}, {"params": params[2:], "ema_decay": 0.5}]
        optimizer = fastopt.optim.SGD(
            groups, lr=0.1, momentum=0.9, ema_decay=DECAY, **options, **HOW[counted]
        )
        for step in range(9):
            give_grads(params, step, missing_at(step))
            optimizer.step()
        sides.append(bits(optimizer, params))
    assert same(*sides)


@pytest.mark.parametrize("how", ["host", "capturable"])
def test_an_average_that_begins_late_begins_with_the_parameter(how: str) -> None:
    params = make_params(SHAPES)
    theirs = torch.optim.AdamW(params, lr=0.05)
    for step in range(3):
        give_grads(params, step)
        theirs.step()
    late: list[nn.Parameter] = make_params([(9,)], seed=4)
    optimizer = fastopt.optim.AdamW(params, ema_decay=DECAY, **HOW[how])
    optimizer.load_state_dict(theirs.state_dict())
    for group in optimizer.param_groups:
        group.update({"ema_decay": DECAY, **HOW[how]})
    oracles = Oracle(params), Oracle(late)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": late})
        for owned in (params, late):
            give_grads(owned, step)
        optimizer.step()
        oracles[0].update()
        if step >= 3:
            oracles[1].update()
    check(optimizer, params, oracles[0].averages, 1e-6)
    check(optimizer, late, oracles[1].averages, 1e-6)


class StandsStill(fastopt.optim.SGD):
    """Wrong: an average without a gradient stands still."""

    def run_plan(self, plan: Any, *args: Any) -> None:
        plan.averaged = False
        super().run_plan(plan, *args)


@pytest.mark.parametrize("how", ["host", "capturable"])
def test_these_checks_see_a_wrong_optimizer(how: str) -> None:
    with pytest.raises(AssertionError, match="parameter"):
        run(lambda params: StandsStill(params, lr=0.05, ema_decay=DECAY, **HOW[how]))
