"""What a step through the Triton engine tells of each parameter, in the interpreter, against the
same in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt
from fastopt.optim.step.grad_scale import Scale
from fastopt_kernels.gpu.step import engine, telemetry
from tests.gpu.test_optim import parameters
from tests.gpu.test_passes import LIMIT, bits, give, given_in_turn, gradients, same

# Full blocks and tails; several chunks, of which the last is short.
SHAPES = ((17, 5), (engine.CHUNK + 517,), (), (600,))
COUNTED: dict[str, dict[str, Any]] = {"host": {}, "device": {"capturable": True}}
NAMES = ("grad_norm", "param_norm", "update_norm")


def expected(before: Tensor, after: Tensor, grad: Tensor) -> list[float]:
    ends = (grad.double(), after.double(), after.double() - before.double())
    return [float(x.norm()) for x in ends]


def off(row: Any, right: list[float], tolerance: float = 2e-5) -> list[str]:
    """The numbers that are not right."""
    return [
        name
        for name, x in zip(NAMES, right, strict=True)
        if getattr(row, name) != pytest.approx(x, rel=tolerance, nan_ok=True)
    ]


def watch(
    name: str, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> list[tuple[Any, list[float]]]:
    """What was told of the second step, and what is right."""
    params = parameters(dtype, SHAPES)
    optimizer = getattr(fastopt.optim, name)(params, lr=0.05, telemetry=True, **options)
    for step in range(2):
        give(params, gradients(params, step))
        before = [p.detach().clone() for p in params]
        optimizer.step()
    rows = optimizer.telemetry()
    assert list(rows) == [f"0.{k}" for k in range(len(params))]
    return [
        (row, expected(start, p.detach(), p.grad))  # type: ignore[arg-type]
        for row, start, p in zip(rows.values(), before, params, strict=True)
    ]


@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {}),
        ("SGD", {"momentum": 0.9, "max_grad_norm": LIMIT, "ema_decay": 0.9}),
        ("AdamW", {"state_dtype": "8bit", "clip_value": 0.5}),
    ],
    ids=["AdamW", "clipped", "8bit"],
)
def test_norms_are_those_of_the_step(name: str, options: dict[str, Any], counted: str) -> None:
    for row, right in watch(name, options | COUNTED[counted]):
        assert off(row, right) == []
        assert (row.nonfinite, row.lost) == (0, 0.0)


def test_norms_in_float64() -> None:
    for row, right in watch("AdamW", {}, torch.float64):
        assert off(row, right, 1e-12) == []


def test_a_rule_that_is_told_of_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    see = telemetry.see

    def other(sums: Any, g: Any, before: Any, exact: Any, after: Any, *rest: Any) -> Any:
        return see(sums, g, exact, before, after, *rest)

    monkeypatch.setattr(telemetry, "see", other)
    assert all(off(row, right) == ["param_norm"] for row, right in watch("AdamW", {}))


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit", "param_rounding": "kahan"}])
def test_watching_changes_nothing(options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if options else torch.float32
    sides = []
    for watched in (False, True):
        params = parameters(dtype, SHAPES[1:])
        optimizer = fastopt.optim.AdamW(params, lr=0.05, telemetry=watched, **options)
        for step in range(2):
            give(params, gradients(params, step))
            optimizer.step()
        sides.append(bits(optimizer, params))
    assert same(*sides)


@pytest.mark.parametrize(
    ("how", "lost"), [("nearest", 1.0), ("kahan", 0.0), ("master", 0.0), ("stochastic", 0.875)]
)
def test_the_share_of_updates_lost_to_rounding(how: str, lost: float) -> None:
    """A step of an eighth of the spacing above 1, and elements without one; the interpreter
    truncates to bfloat16, so the step is upwards."""
    param = nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    optimizer = fastopt.optim.SGD([param], lr=2.0**-10, telemetry=True, param_rounding=how)
    param.grad = torch.full_like(param, -1.0)
    param.grad[4000:] = 0.0
    optimizer.step()
    row = optimizer.telemetry()["0.0"]
    assert row.lost == pytest.approx(0.8 * lost, abs=0.02)
    assert row.update_norm == pytest.approx(2.0**-10 * 4000**0.5, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_neither_underflow_nor_overflow(scale: float) -> None:
    param = nn.Parameter(torch.zeros(1000))
    optimizer = fastopt.optim.AdamW([param], telemetry=True)
    param.grad = torch.full_like(param, scale)
    optimizer.step()
    assert optimizer.telemetry()["0.0"].grad_norm == pytest.approx(scale * 1000**0.5, rel=1e-5)


def test_only_parameters_of_the_step_are_told_of_and_what_is_not_finite_is_counted() -> None:
    params = parameters(shapes=SHAPES)
    optimizer = fastopt.optim.AdamW(params, telemetry=True, capturable=True)
    for step in range(2):
        give(params, gradients(params, step))
        if step:
            params[0].grad = None
            params[1].grad[[0, 4600]] = torch.tensor([math.nan, math.inf])  # type: ignore[index]
        optimizer.step()
    rows = optimizer.telemetry()
    assert list(rows) == ["0.1", "0.2", "0.3"]
    assert [row.nonfinite for row in rows.values()] == [2, 0, 0]
    assert math.isnan(rows["0.1"].grad_norm)
    assert params[3].grad is not None
    assert rows["0.3"].grad_norm == pytest.approx(float(params[3].grad.norm()), rel=1e-5)


@pytest.mark.parametrize("clip", [{}, {"max_grad_norm": LIMIT}], ids=["plain", "clipped"])
def test_gradients_are_measured_unscaled_also_in_a_skipped_step(
    clip: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is on the device, where the scaler changes it as soon as the step is over."""
    monkeypatch.setattr(Scale, "on_host", lambda self: False)
    monkeypatch.setattr(Scale, "skip", None)
    monkeypatch.setattr(Scale, "inverse", None)
    params = parameters(shapes=SHAPES[2:])
    optimizer = fastopt.optim.AdamW(
        [{"params": params, "fused": True}], lr=0.05, telemetry=True, **clip
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    scaler.scale(torch.ones(()))
    scale = 1024.0
    for step in range(3):
        grads = gradients(params, step)
        if step == 1:
            grads[1][7] = math.inf
        give(params, [scale * g for g in grads])
        before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        for row, p, old, grad in zip(
            optimizer.telemetry().values(), params, before, grads, strict=True
        ):
            assert off(row, expected(old, p.detach(), grad)) == []
            assert (row.nonfinite, row.lost) == (int((~grad.isfinite()).sum()), 0.0)
        scale = scaler.get_scale()


def whole(optimizer: Any, param: Tensor) -> Tensor:
    """A parameter with what its rounding keeps beside it."""
    state, high = optimizer.state[param], param.detach().float()
    if "low_bits" in state:
        return (high.view(torch.int32) + state["low_bits"].int()).view(torch.float32)
    return high + state["compensation"] if "compensation" in state else param.detach()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float64, {"max_grad_norm": LIMIT, "ema_decay": 0.9}),
        (torch.bfloat16, {"param_rounding": "kahan"}),
        (torch.bfloat16, {"param_rounding": "master", "state_dtype": "8bit"}),
    ],
    ids=["fp32", "clipped fp64", "kahan", "master 8bit"],
)
def test_a_skipped_step_is_measured(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = parameters(dtype, SHAPES)
    optimizer = fastopt.optim.AdamW(params, lr=0.05, skip_nonfinite=True, telemetry=True, **options)
    give(params, gradients(params, 0))
    optimizer.step()
    grads = gradients(params, 1)
    grads[1][[0, 9, 4600]] = torch.tensor([math.nan, math.inf, math.inf]).to(dtype)
    grads[2] = None
    give(params, grads)
    before = bits(optimizer, params)
    optimizer.step()
    assert same(before, bits(optimizer, params))
    rows = optimizer.telemetry()
    assert list(rows) == ["0.0", "0.1", "0.3"]
    assert [row.nonfinite for row in rows.values()] == [0, 3, 0]
    for k, row in zip((0, 1, 3), rows.values(), strict=True):
        p = whole(optimizer, params[k])
        assert off(row, expected(p, p, grads[k]), 1e-7) == []
        assert row.lost == 0.0


def test_where_numbers_lie_stays_for_a_captured_graph() -> None:
    """One place for all steps of the same tensors; another where some have no gradient."""
    params = parameters(shapes=SHAPES)
    optimizer = fastopt.optim.AdamW(params, telemetry=True)
    places = []
    for _ in given_in_turn(params, 3):
        optimizer.step()
        launch = optimizer._plan.launch_groups[0].launch
        places.append(launch._seen.room(1))
    assert places[0] is places[1] is not places[2]
    assert [len(place) for place in places] == [5, 5, 3]
