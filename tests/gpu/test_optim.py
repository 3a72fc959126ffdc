"""Whole optimizers through the Triton engine in the interpreter: torch's contract, one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastopt
from bench.gpu_oracle import CASES, Case, Checked
from fastopt.optim import FusedOptimizer, xp
from fastopt_kernels.gpu.step import launch as step_launch
from fastopt_kernels.gpu.step import tables
from tests.optim.test_averages import Oracle

# The last has a full block, and a tail.
SHAPES = ((17, 5), (3,), (), (0,), (517,))
ADAMW = next(case for case in CASES if case.name == "AdamW")
NAMES = {"ids": lambda case: case.name}


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype, generator=random)) for shape in shapes]


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor | None]:
    """Random, and none for the second parameter in the steps it is frozen for."""
    random = torch.Generator().manual_seed(step)
    grads: list[Tensor | None] = [
        torch.randn(p.shape, dtype=p.dtype, generator=random) for p in params
    ]
    if step in (3, 4):
        grads[1] = None
    return grads


def in_two_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]


class Launches:
    """How often each kernel was launched since the last look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = {"update_kernel": 0, "scalars_kernel": 0}
        for name in self.counts:
            monkeypatch.setattr(step_launch, name, self._counted(name, getattr(step_launch, name)))

    def _counted(self, name: str, kernel: Any) -> Any:
        counts = self.counts

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
                counts[name] += 1
                return kernel[grid]

        return Kernel()

    def taken(self) -> tuple[int, int]:
        found = self.counts["update_kernel"], self.counts["scalars_kernel"]
        self.counts.update(update_kernel=0, scalars_kernel=0)
        return found


def test_a_captured_step_keeps_what_its_plan_alone_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph may be replayed after the plan is gone; gaps and other layouts are read through
    buffers."""
    kept: list[Tensor] = []
    monkeypatch.setattr(tables, "_captured", kept)
    monkeypatch.setattr(tables.Tables, "_capturing", lambda _: True)
    params = [nn.Parameter(torch.randn(6, 8)[:, ::2]), nn.Parameter(torch.randn(4, 6))]
    for p in params:
        p.grad = torch.randn(p.shape[::-1]).t()
    optimizer = fastopt.optim.AdamW(params, capturable=True)
    optimizer.step()
    (launch_group,) = optimizer._plan.launch_groups
    held = {x.data_ptr() for x in kept}
    assert {int(address) for address in launch_group.launch.tensors[:, 1]} <= held
    assert launch_group.targets[0].data_ptr() in held
    assert params[1].data_ptr() not in held


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


@pytest.mark.parametrize("case", CASES, **NAMES)
def test_seven_steps_are_torchs_with_one_launch_each(case: Case, launches: Launches) -> None:
    params = parameters()
    checked = Checked(case, case.ours(in_two_groups(params)), truncates=True)
    for step in range(7):
        checked.step(gradients(params, step))
        assert launches.taken() == (1, 0)


@pytest.mark.parametrize("case", CASES, **NAMES)
def test_steps_counted_on_the_device_are_torchs(case: Case, launches: Launches) -> None:
    """As under capturable=True and fused=True; one small launch before computes the scalars."""
    params = parameters(shapes=((17, 5), (3,), (517,)))
    checked = Checked(case, case.ours(in_two_groups(params), capturable=True), truncates=True)
    for step in range(4):
        checked.step(gradients(params, step))
        assert launches.taken() == (1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("AdamW", "SGD momentum")], **NAMES)
def test_other_dtypes_step_like_torch_with_one_rounding(case: Case, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    checked = Checked(case, case.ours(in_two_groups(params)), truncates=True)
    for step in range(5):
        checked.step(gradients(params, step))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_step_like_torch(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    checked = Checked(ADAMW, ADAMW.ours(params), truncates=True)
    for step in range(3):
        checked.step(gradients(params, step))


def test_dtypes_mixed_in_one_optimizer_are_a_launch_each(launches: Launches) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    params = [parameters(dtype, [(9, 3)])[0] for dtype in (*dtypes, *dtypes)]
    checked = Checked(ADAMW, ADAMW.ours(params), truncates=True)
    for step in range(2):
        checked.step(gradients(params, step))
        assert launches.taken() == (len(dtypes), 0)


class WideStates(fastopt.optim.AdamW):
    """States in float32 whatever the parameter."""

    def initial_state(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.zeros_like(param, dtype=torch.float32)


def test_states_may_be_wider_than_their_parameter(launches: Launches) -> None:
    params = parameters(torch.bfloat16)
    checked = Checked(ADAMW, WideStates(params, **ADAMW.options), truncates=True)
    for step in range(5):
        checked.step(gradients(params, step))
        assert launches.taken() == (1, 0)
    states = checked.ours.state[params[0]]
    assert states["exp_avg"].dtype is states["exp_avg_sq"].dtype is torch.float32


@pytest.mark.parametrize("case", CASES, **NAMES)
def test_the_state_dict_is_torchs(case: Case) -> None:
    ours, theirs = parameters(), parameters()
    optimizers = case.ours(ours), case.torchs(theirs)
    for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
        for p, grad in zip(params, gradients(params, 0), strict=True):
            p.grad = grad
        optimizer.step()
    mine, right = (optimizer.state_dict() for optimizer in optimizers)
    assert [set(g) for g in mine["param_groups"]] == [set(g) for g in right["param_groups"]]
    assert mine["state"].keys() == right["state"].keys()
    for key, state in right["state"].items():
        assert list(mine["state"][key]) == list(state)
        for name, value in state.items():
            got = mine["state"][key][name]
            assert (got is None) == (value is None), name
            if value is not None:
                assert (got.shape, got.dtype) == (value.shape, value.dtype), name
                torch.testing.assert_close(got, value, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("case", CASES, **NAMES)
def test_gradients_that_are_not_finite_give_what_torch_gives(case: Case) -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e20, -1e20, 1e-30, 0.0, 1.0])
    params = parameters(shapes=[(64, len(values))])
    checked = Checked(case, case.ours(params), truncates=True)
    first = values * (1 + torch.rand(params[0].shape, generator=torch.Generator().manual_seed(1)))
    for grad in (first, first.roll(1, 1), torch.ones_like(first)):
        checked.step([grad])
    assert not params[0].isfinite().all()


def test_gradients_at_odd_offsets_of_one_buffer_step_like_torch(launches: Launches) -> None:
    """As DDP's buckets lay them out."""
    params = parameters(shapes=[(5,), (600,), (7,), (1025,)])
    checked = Checked(ADAMW, ADAMW.ours(params), truncates=True)
    flat = torch.empty(sum(p.numel() for p in params) + 1)[1:]
    views = flat.split([p.numel() for p in params])
    for step in range(3):
        flat.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(step)))
        checked.step(list(views))
        assert launches.taken() == (1, 0)


def test_grad_scale_is_divided_out_inside_a_fused_step(launches: Launches) -> None:
    params = parameters()
    checked = Checked(ADAMW, ADAMW.ours(params, fused=True), truncates=True)
    for step in range(3):
        checked.ours.grad_scale = torch.tensor(2.0**step)
        checked.step(gradients(params, step), g_scale=2.0**-step)
        assert launches.taken() == (1, 1)


def lion(p: float, g: float, m: float, decay: float, lr: float, mu: float, nu: float) -> Any:
    """p' = decay p - lr sign(m + mu (g - m));  m' = m + nu (g - m).  Chen et al. 2023."""
    u = xp.lerp(m, g, mu)
    return decay * p - lr * xp.sign(u), xp.lerp(m, g, nu)


def lion_scalars(step: float, lr: float, beta1: float, beta2: float, weight_decay: float) -> Any:
    return 1.0 - lr * weight_decay, lr, 1.0 - beta1, 1.0 - beta2


class Lion(FusedOptimizer):
    rule, scalars, state_names = lion, lion_scalars, ("exp_avg",)

    def __init__(self, params: Any, lr: float = 1e-4, weight_decay: float = 0.0, **more: Any):
        defaults = {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay}
        super().__init__(params, defaults | more)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_rule_of_a_users_own_runs_on_triton(on_device: bool, launches: Launches) -> None:
    params = parameters()
    optimizer = Lion(params, lr=0.1, weight_decay=0.1, capturable=on_device)
    right = [p.detach().double() for p in params]
    momenta = [torch.zeros_like(p) for p in right]
    for step in range(4):
        grads = [torch.randn_like(p) for p in params]
        for k, (p, grad) in enumerate(zip(params, grads, strict=True)):
            p.grad = grad
            update = 0.9 * momenta[k] + 0.1 * grad.double()
            right[k] = right[k] * (1 - 0.1 * 0.1) - 0.1 * update.sign()
            momenta[k] = 0.99 * momenta[k] + 0.01 * grad.double()
        optimizer.step()
        assert launches.taken() == (1, int(on_device)), step
    for p, q, m in zip(params, right, momenta, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), m, rtol=1e-5, atol=1e-7)


class NoOp(fastopt.optim.AdamW):
    def step(self, closure: Any = None) -> None:
        before = [p.detach().clone() for p in self._all_params()]
        super().step(closure)
        for p, old in zip(self._all_params(), before, strict=True):
            p.data.copy_(old)


class Undecayed(fastopt.optim.AdamW):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        super().step(closure)
        for group in self.param_groups:
            group["weight_decay"] = ADAMW.options["weight_decay"]


class Coupled(fastopt.optim.Adam):
    """Adam's decay, where AdamW's is right."""


@pytest.mark.parametrize("wrong", [NoOp, Undecayed, Coupled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_optimizer_does_not_pass(wrong: type, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    checked = Checked(ADAMW, wrong(params, **ADAMW.options), truncates=True)

    def take_three_steps() -> None:
        for step in range(3):
            checked.step(gradients(params, step))

    with pytest.raises(AssertionError, match="off, the worst at"):
        take_three_steps()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_clipping_by_value_and_averages(name: str, dtype: torch.dtype) -> None:
    """What stands around the rule, in the same launch."""
    cls, limit, decay = getattr(fastopt.optim, name), 0.5, 0.75
    params, plain = parameters(dtype), parameters(dtype)
    ours = cls(params, lr=0.01, clip_value=limit, ema_decay=decay)
    theirs = cls(plain, lr=0.01)
    oracle = Oracle(plain, decay)
    for step in range(1, 6):
        for owned in (params, plain):
            for param, grad in zip(owned, gradients(owned, step), strict=True):
                param.grad = grad
        torch.nn.utils.clip_grad_value_(plain, limit)
        ours.step()
        theirs.step()
        oracle.update()
    room = 4 * torch.finfo(dtype).eps
    for mine, other, average in zip(params, plain, oracle.averages, strict=True):
        assert torch.equal(mine.detach(), other.detach())
        torch.testing.assert_close(
            ours.state[mine]["averaged"].double(), average, rtol=room, atol=room
        )


@pytest.mark.parametrize("how", ["stochastic", "kahan", "master"])
def test_roundings_are_those_of_the_cpu(how: str) -> None:
    """SGD's steps one by one, with the functions that the CPU's kernels are made of."""
    from fastopt.optim.step.rng_keys import keys_of
    from fastopt_kernels.cpu.step import rounding

    params = parameters(torch.bfloat16)
    start = [p.detach().float().numpy().reshape(-1).copy() for p in params]
    ours = fastopt.optim.SGD(params, lr=0.125, param_rounding=how, rounding_seed=3)
    # What is kept beside the parameters: nothing, or zeros.
    kept = [np.zeros_like(values) for values in start]
    for step in range(1, 4):
        for param, grad in zip(params, gradients(params, 9 + step), strict=True):
            param.grad = grad
        # SGD, without a buffer, counts from 2.
        keys = keys_of(3, np.full(len(params), step + 1), np.arange(len(params)))
        ours.step()
        for k, param in enumerate(params):
            assert param.grad is not None
            g = param.grad.float().numpy().reshape(-1)
            for i in range(len(g)):
                p = start[k][i]
                if how == "kahan":
                    p = np.float32(p + kept[k][i])
                if how == "master":
                    p = rounding.join(p, kept[k][i])
                new = np.float32(p - np.float32(0.125) * g[i])
                if how == "stochastic":
                    start[k][i] = rounding.stochastic(new, i, keys[k])
                    continue
                start[k][i] = high = rounding.upper(new)
                make = rounding.rest if how == "kahan" else rounding.lower
                left = torch.tensor(make(new, np.float32(high)))
                kept[k][i] = left.bfloat16().float() if how == "kahan" else left
    for param, values in zip(params, start, strict=True):
        assert torch.equal(param.detach().float().reshape(-1), torch.from_numpy(values))


def test_torch_profiler_shows_a_step_by_the_name_of_its_optimizer() -> None:
    params = parameters(torch.float32)
    for param, grad in zip(params, gradients(params, 1), strict=True):
        param.grad = grad
    ours = fastopt.optim.AdamW(params, max_grad_norm=1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        ours.step()
    counts = {event.key: event.count for event in record.key_averages()}
    assert counts["fastopt::adamw"] == 1
    assert counts["fastopt::measure"] == 1


@pytest.mark.parametrize("lr", [None, "0.1", [0.1]], ids=str)
def test_what_is_no_number_counts_no_step_on_the_device(lr: Any) -> None:
    """Nor is the launch of another dtype, whose group is right, begun."""
    params = [*parameters(torch.float32)[:2], *parameters(torch.bfloat16)[:2]]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    ours = fastopt.optim.AdamW(groups, capturable=True)
    for step in range(3):
        for param, grad in zip(params, gradients(params, step), strict=True):
            param.grad = grad
        if step == 1:
            ours.param_groups[1]["lr"] = lr
        before = [x.clone() for p in params for x in (p.detach(), *ours.state[p].values())]
        if step:
            with pytest.raises(TypeError, match="lr="):
                ours.step()
            after = [x for p in params for x in (p.detach(), *ours.state[p].values())]
            assert all(map(torch.equal, after, before))
        else:
            ours.step()
    assert [float(state["step"]) for state in ours.state.values()] == [1.0] * 4
