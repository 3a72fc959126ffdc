"""Running averages of the parameters, kept by the step: torch's AveragedModel of the same run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastopt
from tests.optim import pairs
from tests.optim.pairs import construct, give_grads, make_params

DECAY = 0.9
BF16 = torch.bfloat16


class Oracle:
    """AveragedModel in float64, of parameters that are stepped elsewhere."""

    def __init__(self, params: Sequence[Tensor], decay: float = DECAY) -> None:
        self._params = params
        self._model = nn.ParameterList(self._wide())
        self._averaged = AveragedModel(self._model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def _wide(self) -> list[Tensor]:
        kinds = [torch.complex128 if p.is_complex() else torch.float64 for p in self._params]
        return [p.detach().to(kind) for p, kind in zip(self._params, kinds, strict=True)]

    def update(self) -> None:
        with torch.no_grad():
            for mine, p in zip(self._model, self._wide(), strict=True):
                mine.copy_(p)
        self._averaged.update_parameters(self._model)

    @property
    def averages(self) -> list[Tensor]:
        return [p.detach() for p in self._averaged.module]


def held(optimizer: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """What parameters hold inside averaged(), in double."""
    with optimizer.averaged():
        return [p.detach().clone().to(torch.promote_types(p.dtype, torch.float64)) for p in params]


def check(optimizer: Any, params: Sequence[Tensor], right: Sequence[Tensor], room: float) -> None:
    for k, (mine, exact) in enumerate(zip(held(optimizer, params), right, strict=True)):
        torch.testing.assert_close(
            mine, exact, rtol=room, atol=room, msg=lambda text, k=k: f"parameter {k}: {text}"
        )


def room_of(dtype: torch.dtype) -> float:
    """An average is of what was computed; a 16-bit parameter was rounded after."""
    return 8 * torch.finfo(dtype).eps


def warmed_up(history: Sequence[Sequence[Tensor]], decay: float, warmup: int) -> list[Tensor]:
    """What ema_warmup gives, in float64: history[0] are the parameters after the first step."""
    found = [p.double() for p in history[0]]
    for t, params in enumerate(history[1:], start=2):
        d = min(decay, (1 + t) / (10 + t)) if t <= warmup else decay
        found = [d * a + (1 - d) * p.double() for a, p in zip(found, params, strict=True)]
    return found


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *[(case, torch.float32) for case in pairs.ONE_EACH],
        *[("AdamW-amsgrad", dtype) for dtype in (BF16, torch.float64)],
    ],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_averaged_parameters(case: str, warmup: int, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    optimizer: Any = construct(fastopt, case, params, ema_decay=DECAY, ema_warmup=warmup)
    plain_params = make_params(dtype=dtype)
    plain = construct(fastopt, case, plain_params)
    history = []
    oracle = Oracle(params)
    for step in range(7):
        for each, owned in ((optimizer, params), (plain, plain_params)):
            give_grads(owned, step)
            each.step()
        history.append([p.detach().clone() for p in params])
        oracle.update()
    for mine, other in zip(params, plain_params, strict=True):
        assert torch.equal(mine.detach(), other.detach())
    right = warmed_up(history, DECAY, warmup) if warmup else oracle.averages
    check(optimizer, params, right, room_of(dtype))
    for param, own in zip(params, history[-1], strict=True):
        assert torch.equal(param.detach(), own)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(
    "dtype", [torch.float32, BF16, torch.float16, torch.float64, torch.complex64], ids=str
)
@pytest.mark.parametrize("case", ["SGD", "AdamW"])
def test_the_first_step_sets_the_average(case: str, dtype: torch.dtype, warmup: int) -> None:
    """Bit by bit, of a parameter without a gradient too; later the average is behind."""
    params = make_params(dtype=dtype)
    with torch.no_grad():
        params[1][:3] = torch.tensor([1e4, -1e-4, 0.0])
    optimizer: Any = construct(fastopt, case, params, lr=0.5, ema_decay=0.999, ema_warmup=warmup)
    for step in range(2):
        give_grads(params, step, missing=[3])
        optimizer.step()
        own = [p.detach().clone() for p in params]
        with optimizer.averaged():
            same = [torch.equal(p, q) for p, q in zip(params, own, strict=True)]
        assert same == ([True] * 4 if step == 0 else [False] * 3 + [True])


# Gradients that come and go.


def gradients_at(step: int) -> list[bool]:
    """Which of five parameters have a gradient: always, by chance, at first, late, and never."""
    chance = torch.rand((), generator=torch.Generator().manual_seed(step)).item()
    return [True, chance < 0.4, step < 5, step >= 40, False]


def drive(
    make: Callable[..., Any], params: list[nn.Parameter], steps: int
) -> Iterator[tuple[int, Any]]:
    """Steps by gradients that come and go; the last parameter is changed by its owner."""
    params[3].requires_grad_(False)
    params[4].requires_grad_(False)
    optimizer = make(params)
    for step in range(steps):
        there = gradients_at(step)
        give_grads(params, step, missing=[k for k, here in enumerate(there) if not here])
        params[3].requires_grad_(step >= 40)
        if step == 60:
            with torch.no_grad():
                params[4].add_(1.0)
        optimizer.step()
        yield step, optimizer


def check_all_move(make: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
    params = make_params([(7, 5), (11,), (), (3, 2, 2), (33,)], dtype)
    oracle = Oracle(params)
    for step, optimizer in drive(make, params, 120):
        oracle.update()
        if step % 17 == 0 or step == 119:
            check(optimizer, params, oracle.averages, room_of(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["SGD", "SGD-momentum", "AdamW", "NAdam"])
def test_every_average_moves_at_each_step(case: str, dtype: torch.dtype) -> None:
    check_all_move(lambda params: construct(fastopt, case, params, ema_decay=DECAY), dtype)


class StandsStill(fastopt.optim.SGD):
    """Wrong: an average without a gradient stands still."""

    def run_plan(self, plan: Any, *args: Any) -> None:
        plan.averaged = False
        super().run_plan(plan, *args)


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError, match="parameter"):
        check_all_move(lambda params: StandsStill(params, lr=0.01, ema_decay=DECAY))


@pytest.mark.parametrize("how", ["kahan", "master"])
def test_a_standing_parameter_is_averaged_with_what_its_rounding_kept(how: str) -> None:
    """Steps far below a rounding: the average of a master is that of the float32 it stands for."""
    start = torch.linspace(1, 2, 300)
    params = [nn.Parameter(start.to(kind)) for kind in (BF16, torch.float32)]
    with torch.no_grad():
        params[1].copy_(params[0])
    optimizers = [
        fastopt.optim.SGD([p], lr=1e-3, ema_decay=DECAY, param_rounding=how) for p in params
    ]
    for step in range(40):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.full_like(param, 0.25) if step < 4 else None
            optimizer.step()
    mine, exact = (o.state[p]["averaged"] for o, p in zip(optimizers, params, strict=True))
    torch.testing.assert_close(mine, exact, rtol=1e-5 if how == "kahan" else 1e-7, atol=0)


def test_groups_have_their_own_decay_and_some_none() -> None:
    params = make_params()
    groups = [
        {"params": params[:2], "ema_decay": 0.5},
        {"params": params[2:3], "ema_decay": None},
        {"params": params[3:]},
    ]
    optimizer = fastopt.optim.AdamW(groups, lr=0.05, ema_decay=0.99)
    oracles = [Oracle(params[:2], 0.5), Oracle(params[3:], 0.99)]
    late = make_params([(6,)], seed=3)
    for step in range(12):
        if step == 5:
            optimizer.add_param_group({"params": late, "ema_decay": 0.0})
        give_grads(params, step, missing=[step % 4])
        give_grads(late, step, missing=[0] if step % 2 else [])
        optimizer.step()
        for oracle in oracles:
            oracle.update()
    check(optimizer, params[:2], oracles[0].averages, 1e-6)
    check(optimizer, params[3:], oracles[1].averages, 1e-6)
    check(optimizer, [params[2], *late], [params[2].double(), late[0].double()], 0.0)
    assert "averaged" not in optimizer.state[params[2]]


def test_averages_of_half_parameters_do_not_stand_still() -> None:
    """Kept in float32: in bfloat16 a step of a thousandth is rounded away."""
    param = nn.Parameter(torch.ones(8, dtype=BF16))
    optimizer = fastopt.optim.SGD([param], lr=0.0, ema_decay=0.999)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    with torch.no_grad():
        param.fill_(2.0)
    for _ in range(1000):
        optimizer.step()
    average = optimizer.state[param]["averaged"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(
        average, torch.full_like(average, 2 - 0.999**1000), rtol=1e-3, atol=0
    )


def test_averages_made_in_inference_mode_move_outside_of_it() -> None:
    params = make_params()
    optimizer = fastopt.optim.AdamW(params, lr=0.05, ema_decay=DECAY)
    oracle = Oracle(params)
    for step in range(6):
        give_grads(params, step, missing=[1] if step else [1, 2])
        with torch.inference_mode(step == 0):
            optimizer.step()
        oracle.update()
    assert optimizer.state[params[1]]["averaged"].is_inference()
    check(optimizer, params, oracle.averages, 1e-6)


# Steps that are not taken.


@pytest.mark.parametrize("how", ["skip_nonfinite", "found_inf"])
@pytest.mark.parametrize("case", ["SGD", "AdamW"])
def test_skipped_steps_move_no_average_and_begin_none(case: str, how: str) -> None:
    """The first step is skipped; so is one in the middle. One parameter has no gradient."""
    options = {"skip_nonfinite": True} if how == "skip_nonfinite" else {"fused": True}
    params = make_params()
    optimizer: Any = construct(fastopt, case, params, ema_decay=DECAY, **options)
    oracle = Oracle(params)
    for step in range(8):
        skipped = step in (0, 4)
        give_grads(params, step, missing=[1])
        if how == "skip_nonfinite" and skipped:
            params[0].grad[0, 0] = torch.inf  # type: ignore[index]
        if how == "found_inf":
            optimizer.found_inf = torch.tensor(float(skipped))
        optimizer.step()
        if skipped:
            with torch.no_grad():  # by somebody else, before the average begins
                params[1].add_(1.0)
        else:
            oracle.update()
        right = oracle.averages if step else [p.detach().double() for p in params]
        check(optimizer, params, right, 1e-6)


# A model that holds its averages.


def stepped(case: str = "AdamW", **options: Any) -> tuple[list[nn.Parameter], Any]:
    params = make_params()
    optimizer = construct(fastopt, case, params, ema_decay=DECAY, **options)
    for step in range(3):
        give_grads(params, step)
        optimizer.step()
    return params, optimizer


def everything(optimizer: Any) -> list[Any]:
    return copy.deepcopy([optimizer.state_dict(), list(optimizer._all_params())])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("case", ["SGD", "AdamW"])
@pytest.mark.parametrize("what", ["step", "closure", "skipped", "load", "scaler"])
def test_nothing_is_done_inside_that_would_be_thrown_away(case: str, what: str) -> None:
    params, optimizer = stepped(case, fused=what == "skipped")
    before, called = everything(optimizer), []
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    actions: dict[str, Callable[[], Any]] = {
        "step": optimizer.step,
        "closure": lambda: optimizer.step(lambda: called.append(1)),
        "skipped": optimizer.step,
        "load": lambda: optimizer.load_state_dict(before[0]),
        "scaler": lambda: scaler.step(optimizer),
    }
    give_grads(params, 5)
    if what == "skipped":
        optimizer.found_inf = torch.ones(())
    with pytest.raises(RuntimeError, match=r"inside averaged\(\)"), optimizer.averaged():
        actions[what]()
    assert same(everything(optimizer), before)
    assert not called
    optimizer.found_inf = None
    optimizer.step()
    assert not same(everything(optimizer), before)


def test_blocks_may_be_nested_and_end_in_any_order() -> None:
    params, optimizer = stepped()
    own, averages = [p.detach().clone() for p in params], held(optimizer, params)
    outer, inner = optimizer.averaged(), optimizer.averaged()
    for enter_or_leave, right in (
        (outer.__enter__, averages),
        (inner.__enter__, averages),
        (lambda: outer.__exit__(None, None, None), averages),
        (lambda: inner.__exit__(None, None, None), own),
    ):
        enter_or_leave()
        for p, value in zip(params, right, strict=True):
            assert torch.equal(p.detach(), value.to(p.dtype))
    optimizer.step()


def test_own_values_are_back_after_an_error_and_an_interrupt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, optimizer = stepped()
    before = everything(optimizer)
    with pytest.raises(KeyboardInterrupt), optimizer.averaged():
        raise KeyboardInterrupt
    assert same(everything(optimizer), before)
    # One that comes while the values are written, there or back.
    from fastopt.optim.state import averages

    for turn in (2, 6):
        write, calls = averages._write, []

        def interrupted(
            param: Tensor, value: Tensor, write: Any = write, calls: Any = calls, turn: int = turn
        ) -> None:
            calls.append(param)
            if len(calls) == turn:
                raise KeyboardInterrupt
            write(param, value)

        monkeypatch.setattr(averages, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt), optimizer.averaged():
            pass
        monkeypatch.undo()
        assert same(everything(optimizer), before)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_averaged_before_the_first_step_leaves_nothing(name: str) -> None:
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = getattr(fastopt.optim, name)(params, ema_decay=DECAY)
    with optimizer.averaged():
        assert same([p.detach() for p in params], before)
    assert not optimizer.state
    optimizer.state_dict()
    optimizer.torch_state_dict()
    with pytest.raises(RuntimeError, match="has been watched"):
        optimizer.telemetry()
    assert not optimizer.state
