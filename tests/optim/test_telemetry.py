"""What a step tells of each parameter, against the same in float64."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

import fastopt
from tests.optim.pairs import give_grads, make_params

SHAPES = ((517,), (7, 41), (40_000,), ())
INF, NAN = math.inf, math.nan


def expected(before: torch.Tensor, after: torch.Tensor, grad: torch.Tensor) -> dict[str, float]:
    update = after.double() - before.double()
    return {
        "grad_norm": float(grad.double().norm()),
        "param_norm": float(after.double().norm()),
        "update_norm": float(update.norm()),
    }


def wrong(seen: Any, right: dict[str, float], tolerance: float) -> list[str]:
    """The numbers that are off."""
    return [
        name
        for name, x in right.items()
        if getattr(seen, name) != pytest.approx(x, rel=tolerance, nan_ok=True)
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {}),
        ("SGD", {"momentum": 0.9}),
        ("RMSprop", {}),
        ("AdamW", {"state_dtype": "8bit"}),
        ("AdamW", {"max_grad_norm": 0.1, "ema_decay": 0.9}),
    ],
)
def test_norms_are_those_of_the_step(name: str, options: dict[str, Any]) -> None:
    params = make_params(SHAPES)
    optimizer = getattr(fastopt.optim, name)(params, lr=0.05, telemetry=True, **options)
    for step in range(2):
        give_grads(params, step)
        before = [p.detach().clone() for p in params]
        optimizer.step()
    seen = optimizer.telemetry()
    assert list(seen) == [f"0.{k}" for k in range(len(params))]
    for row, param, start in zip(seen.values(), params, before, strict=True):
        assert param.grad is not None
        right = expected(start, param.detach(), param.grad)
        assert wrong(row, right, 1e-5) == []
        assert wrong(row, right | {"update_norm": 2 * right["update_norm"]}, 1e-5) == [
            "update_norm"
        ]
        assert row.ratio == pytest.approx(right["update_norm"] / right["param_norm"], rel=1e-5)
        assert (row.nonfinite, row.lost, row.numel) == (0, 0.0, param.numel())


def test_watching_changes_nothing() -> None:
    params, others = make_params(SHAPES), make_params(SHAPES)
    for owned, options in ((params, {"telemetry": True}), (others, {})):
        optimizer = fastopt.optim.AdamW(owned, lr=0.05, **options)
        for step in range(3):
            give_grads(owned, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize(
    ("how", "lost"), [("nearest", 1.0), ("kahan", 0.0), ("master", 0.0), ("stochastic", 0.875)]
)
def test_the_share_of_updates_lost_to_rounding(how: str, lost: float) -> None:
    param = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = fastopt.optim.SGD([param], lr=2.0**-11, telemetry=True, param_rounding=how)
    param.grad = torch.ones_like(param)
    optimizer.step()
    # A step of an eighth of the spacing below 1.
    row = optimizer.telemetry()["0.0"]
    assert row.lost == pytest.approx(lost, abs=0.03)
    assert row.update_norm == pytest.approx(2.0**-11 * 4000**0.5, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_neither_underflow_nor_overflow(scale: float) -> None:
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = fastopt.optim.AdamW([param], telemetry=True)
    param.grad = torch.full_like(param, scale)
    optimizer.step()
    assert optimizer.telemetry()["0.0"].grad_norm == pytest.approx(scale * 1000**0.5, rel=1e-5)


def test_names_flags_and_the_table() -> None:
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(20, 20) for name in ("first", "second", "third", "fourth", "fifth")}
    )
    optimizer = fastopt.optim.AdamW(list(model.named_parameters()), telemetry=True)
    factors = {"first": 1e-6, "second": 1.0, "third": 1e7, "fourth": 1.0, "fifth": 1.0}
    torch.manual_seed(0)
    for name, param in model.named_parameters():
        param.grad = torch.randn_like(param) * factors[name.partition(".")[0]]
    assert model["fifth"].weight.grad is not None
    model["fifth"].weight.grad[0, :2] = torch.tensor([float("nan"), float("inf")])
    optimizer.step()
    seen = optimizer.telemetry()
    assert list(seen) == [name for name, _ in model.named_parameters()]
    assert seen.flags == {"first": "vanishing", "third": "exploding", "fifth": "exploding"}
    assert seen["fifth.weight"].nonfinite == 2
    lines = str(seen).splitlines()
    assert len(lines) == 1 + len(seen)
    assert lines[1].startswith("first.weight")
    assert lines[1].endswith("vanishing")


def test_only_parameters_of_the_step_are_told_of() -> None:
    params = make_params(SHAPES)
    optimizer = fastopt.optim.AdamW(params, telemetry=True)
    give_grads(params, 0)
    optimizer.step()
    give_grads(params, 1, missing=(1,))
    optimizer.step()
    named = dict(zip("abcd", params, strict=True))
    seen = optimizer.telemetry(named.items())
    assert list(seen) == ["a", "c", "d"]
    for name, row in seen.items():
        assert named[name].grad is not None
        assert row.grad_norm == pytest.approx(float(named[name].grad.norm()), rel=1e-5)


def test_scaled_gradients_are_told_of_unscaled() -> None:
    (param,) = make_params(((300,),))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    optimizer = fastopt.optim.AdamW([param], telemetry=True, fused=True)
    give_grads([param], 0)
    assert param.grad is not None
    norm = float(param.grad.norm())
    param.grad *= 1024.0
    scaler.step(optimizer)
    assert optimizer.telemetry()["0.0"].grad_norm == pytest.approx(norm, rel=1e-5)


def test_a_layer_of_no_elements_is_not_flagged() -> None:
    """As of a small parameter that is sharded over many ranks."""
    params = make_params(((300,), (0,)))
    optimizer = fastopt.optim.AdamW([("a.w", params[0]), ("b.w", params[1])], telemetry=True)
    give_grads(params, 0)
    optimizer.step()
    seen = optimizer.telemetry()
    assert seen["b.w"].numel == 0
    assert seen.flags == {}
    assert len(str(seen).splitlines()) == 3


# Steps that are skipped.

# By whom, and with what options: on its own; by a scaler that asks the step to; by one of ours.
SKIPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "own": (None, {"skip_nonfinite": True}),
    "fused": (torch.amp.GradScaler, {"fused": True}),
    "clipping": (torch.amp.GradScaler, {"max_grad_norm": 1.0, "norm_type": math.inf}),
    "ours": (fastopt.GradScaler, {"skip_nonfinite": True}),
    "unscaled before": (fastopt.GradScaler, {}),
}


def skip(
    how: str, ours: Any = fastopt.optim.AdamW, after: int = 0, dtype: Any = None, **more: Any
) -> tuple[Any, list[Any]]:
    """A step that is skipped after some that are not: of the last parameter two elements are NaN
    and one is infinite; the first has no gradient."""
    cls, options = SKIPS[how]
    params = make_params(SHAPES[::-1], **({} if dtype is None else {"dtype": dtype}))
    optimizer = ours(params, lr=0.05, telemetry=True, **options, **more)
    scaler = None if cls is None else cls("cpu", init_scale=16.0, growth_interval=100)
    for step in range(after + 1):
        give_grads(params, step, missing=(0,) if step == after else ())
        if step == after:
            params[-1].grad[[1, 2, 300]] = torch.tensor([NAN, INF, NAN], dtype=params[-1].dtype)
        if scaler is None:
            optimizer.step()
            continue
        scaler.scale(torch.ones(()))
        for param in params:
            if param.grad is not None:
                param.grad *= 16.0
        scaler.step(optimizer)
        scaler.update()
    return optimizer, params


def check_skipped(optimizer: Any, params: list[Any], after: int) -> None:
    seen = optimizer.telemetry()
    assert list(seen) == ["0.1", "0.2", "0.3"]
    give_grads(params, after)
    for row, param in zip(seen.values(), params[1:], strict=True):
        right = expected(param.detach(), param.detach(), param.grad)
        if param is params[-1]:
            right["grad_norm"] = NAN
        assert wrong(row, right, 1e-5) == []
        assert row.nonfinite == (3 if param is params[-1] else 0)
        assert (row.lost, row.numel) == (0.0, param.numel())


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("how", SKIPS)
def test_of_a_skipped_step_it_shows_what_was_found(how: str, after: int) -> None:
    optimizer, params = skip(how, after=after)
    check_skipped(optimizer, params, after)
    assert optimizer.telemetry().flags == {"0": "exploding"}
    # The next step is measured as ever.
    give_grads(params, 7)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    for row, param, old in zip(optimizer.telemetry().values(), params, before, strict=True):
        assert wrong(row, expected(old, param.detach(), param.grad), 1e-5) == []


class ShowsTheStepBefore(fastopt.optim.AdamW):
    """Wrong."""

    def _note_skipped_telemetry(self, *args: Any) -> None: ...


@pytest.mark.parametrize("how", ["own", "fused"])
def test_this_check_sees_an_optimizer_that_shows_the_step_before(how: str) -> None:
    with pytest.raises(AssertionError):
        check_skipped(*skip(how, ShowsTheStepBefore, after=2), after=2)


@pytest.mark.parametrize("rounding", ["kahan", "master"])
def test_a_parameter_of_a_skipped_step_has_what_its_rounding_keeps(rounding: str) -> None:
    optimizer, params = skip("own", after=2, dtype=torch.bfloat16, param_rounding=rounding)
    kept = optimizer.state[params[-1]]["compensation" if rounding == "kahan" else "low_bits"]
    high = params[-1].detach().float()
    low = (high.view(torch.int32) + kept.int()).view(torch.float32)
    whole = high + kept.float() if rounding == "kahan" else low
    norm = optimizer.telemetry()["0.3"].param_norm
    assert norm == pytest.approx(float(whole.double().norm()), rel=1e-9)
    assert norm != pytest.approx(float(high.double().norm()), rel=1e-9)


def test_of_tensors_that_are_stepped_in_backward_those_that_are_skipped() -> None:
    params = make_params(((3,), (4,)))
    optimizer = fastopt.optim.SGD(params, lr=0.1, skip_nonfinite=True, telemetry=True)
    optimizer.release_gradients(per_tensor=True)
    scale = torch.tensor([1.0, INF, 1.0])
    for step in range(2):
        loss = (params[0] * (scale if step else 1.0)).sum() + (3.0 * params[1]).sum()
        loss.backward()
    seen = optimizer.telemetry()
    assert [row.nonfinite for row in seen.values()] == [1, 0]
    assert [row.update_norm for row in seen.values()] == pytest.approx([0.0, 0.6], rel=1e-5)


def test_without_the_option_there_is_nothing_to_tell() -> None:
    params = make_params(SHAPES)
    optimizer = fastopt.optim.AdamW(params)
    give_grads(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="telemetry=True"):
        optimizer.telemetry()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_tells_of_the_last_step(how: Any) -> None:
    model = torch.nn.Linear(30, 20)
    named = list(model.named_parameters())
    optimizer = fastopt.optim.AdamW(named, lr=0.05, telemetry=True, max_grad_norm=0.1)
    params = [param for _, param in named]
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    others, again = how((params, optimizer))
    twice = how(again)
    for each in (again, twice):
        assert dict(each.telemetry()) == dict(optimizer.telemetry())
        assert list(each.telemetry()) == ["weight", "bias"]
        assert torch.equal(each.last_step.grad_norm, optimizer.last_step.grad_norm)
    told = again.telemetry(zip("ab", others, strict=True))
    assert list(told) == ["a", "b"]
    # The next step tells of itself, or of nothing.
    give_grads(others, 7)
    again.step()
    assert again.telemetry()["weight"] != optimizer.telemetry()["weight"]
    twice.param_groups[0]["telemetry"] = False
    give_grads(twice.param_groups[0]["params"], 7)
    twice.step()
    with pytest.raises(RuntimeError, match="telemetry=True"):
        twice.telemetry()
