"""An optimizer of a user's own, outside the package: a rule, its scalars and a class of ten lines
get the kernels, every dtype and the whole contract."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import fastopt
from fastopt.optim import FusedOptimizer, xp

# The last is large enough for a launch on several threads.
SHAPES = [(7, 5), (11,), (), (300, 130)]


def lion(
    p: float,
    g: float,
    m: float,
    decay: float,
    lr: float,
    b1: float,
    c1: float,
    b2: float,
    c2: float,
) -> tuple[float, ...]:
    """p' = decay p - lr sign(b1 m + (1 - b1) g);  m' = b2 m + (1 - b2) g.  Chen et al. 2023."""
    update = xp.sign(b1 * m + c1 * g)
    return decay * p - lr * update, b2 * m + c2 * g


def lion_scalars(
    step: float, lr: float, beta1: float, beta2: float, weight_decay: float
) -> tuple[float, ...]:
    return 1.0 - lr * weight_decay, lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2


class Lion(FusedOptimizer):
    rule, scalars, state_names = lion, lion_scalars, ("exp_avg",)

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **options):
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, **options)
        super().__init__(params, defaults)


class PlainLion(torch.optim.Optimizer):
    """The same with torch's operators, in float64 whatever the parameter, rounded when stored."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, (b1, b2), sign = group["lr"], group["betas"], -1 if group["maximize"] else 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["exp_avg"] = torch.tensor(0.0), torch.zeros_like(p)
                state["step"] += 1
                g, m = sign * p.grad.double(), state["exp_avg"].double()
                update = (b1 * m + (1 - b1) * g).sign()
                p.copy_((1 - lr * group["weight_decay"]) * p.double() - lr * update)
                state["exp_avg"].copy_(b2 * m + (1 - b2) * g)


def make(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def give(params: Sequence[Tensor], seed: int, missing: Sequence[int] = ()) -> None:
    """Gradients well away from those that would cancel the momentum: where c is about 0 its sign
    is a matter of rounding."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for k, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator)
        param.grad = None if k in missing else grad.to(param.dtype)


def agree(ours: Sequence[Tensor], plain: Sequence[Tensor], flips: float = 1e-3) -> None:
    """Within two roundings, but for the share of elements whose c is about 0."""
    for mine, other in zip(ours, plain, strict=True):
        eps = torch.finfo(mine.dtype).eps
        far = (mine - other).abs() > 2 * eps * other.abs() + 2 * eps
        assert float(far.float().mean()) <= flips


def check_lion(cls: type, dtype: torch.dtype = torch.float32, steps: int = 6) -> None:
    sides = []
    for candidate in (PlainLion, cls):
        params = make(dtype)
        groups = [
            {"params": params[:2]},
            {"params": params[2:], "weight_decay": 0.5, "maximize": True, "betas": (0.5, 0.8)},
        ]
        optimizer = candidate(groups, lr=0.0625, weight_decay=0.25)
        for step in range(steps):
            give(params, step, missing=(0, 3) if step == 2 else ())
            optimizer.step()
        states = [optimizer.state[param] for param in params]
        sides.append((params, [s["exp_avg"] for s in states], [float(s["step"]) for s in states]))
    (plain, plain_moments, plain_steps), (ours, moments, counts) = sides
    agree(ours, plain)
    agree(moments, plain_moments)
    assert counts == plain_steps == [5.0, 6.0, 6.0, 5.0]
    assert all(moment.dtype is dtype for moment in moments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lion_follows_a_plain_implementation(dtype: torch.dtype) -> None:
    check_lion(Lion, dtype)


def coupled_scalars(
    step: float, lr: float, beta1: float, beta2: float, weight_decay: float
) -> tuple[float, ...]:
    return 1.0 - weight_decay, lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2


class WrongDecay(Lion):
    """Wrong: decays without the learning rate."""

    rule, scalars = lion, coupled_scalars


class OneBeta(Lion):
    """Wrong: ignores what the groups say."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["betas"] = (0.9, 0.99)
        return super().step(closure)


@pytest.mark.parametrize("wrong", [WrongDecay, OneBeta])
def test_these_checks_see_a_wrong_optimizer(wrong: type) -> None:
    with pytest.raises(AssertionError):
        check_lion(wrong)


def test_its_state_dict_is_saved_and_loaded() -> None:
    params = make()
    optimizer = Lion(params, lr=0.01)
    give(params, 0)
    optimizer.step()
    assert list(optimizer.state_dict()["state"][0]) == ["step", "exp_avg"]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = Lion(again, lr=0.5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for p, o in ((params, optimizer), (again, resumed)):
        give(p, 1)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(again, params, strict=True))
    assert float(resumed.state[again[0]]["step"]) == 2.0


def test_a_checkpoint_from_before_it_had_a_hyper_parameter_gets_the_default() -> None:
    params = make()
    optimizer = Lion(params, lr=0.01, weight_decay=0.5)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["weight_decay"]
    optimizer.load_state_dict(saved)
    give(params, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_copies_schedulers_closures_and_hooks_need_nothing_of_it() -> None:
    params = make()
    optimizer = Lion(params, lr=0.01)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *a: seen.append(1))
    for seed in range(3):
        give(params, seed)
        assert optimizer.step(lambda: 7.0) == 7.0
        scheduler.step()
    assert seen == [1, 1, 1]
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(twin) is Lion
        copies = twin.param_groups[0]["params"]
        give(copies, 9)
        twin.step()
        assert float(twin.state[copies[0]]["step"]) == 4.0


def test_capturable_and_fused_are_options_of_every_subclass() -> None:
    params = make()
    give(params, 0)
    optimizer = Lion(params, capturable=True)
    with pytest.raises(AssertionError, match=r"^If capturable=True"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, make(), strict=True))

    sides = []
    for fused in (False, True):
        params = make()
        optimizer = Lion(params, lr=0.0625, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(4):
            give(params, step)
            scaler.scale(torch.ones(()))
            for param in params:
                param.grad.mul_(scaler.get_scale() if step != 1 else float("inf"))
            scaler.step(optimizer)
            scaler.update()
        sides.append((params, float(optimizer.state[params[0]]["step"])))
    assert sides[0][1] == sides[1][1] == 3.0
    agree(sides[1][0], sides[0][0])


def test_differentiable_is_an_option_of_every_subclass() -> None:
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    p = torch.tensor([3.0, -2.0], dtype=torch.float64)
    optimizer = Lion([p], lr=lr, weight_decay=0.1, differentiable=True)
    p.grad = torch.tensor([1.0, -1.0], dtype=torch.float64)
    optimizer.step()
    (by_lr,) = torch.autograd.grad(p.sum(), [lr])
    torch.testing.assert_close(by_lr, torch.tensor(-0.1 * (3 - 2), dtype=torch.float64))


def halving(p: float, g: float, m: float, size: float) -> tuple[float, ...]:
    m = m + g
    return p - size * m, m


def halving_scalars(step: float, size: float, lr: float) -> tuple[float, ...]:
    return lr * size, size * 0.5


def test_numbers_kept_one_a_parameter_and_states_of_a_users_choice() -> None:
    """carried_names and initial_state: a step size that halves itself, and momentum that begins at
    one."""

    class Halving(FusedOptimizer):
        rule, scalars = halving, halving_scalars
        state_names, carried_names = ("m",), ("size",)

        def __init__(self, params: Any, lr: float = 1.0) -> None:
            super().__init__(params, {"lr": lr})

        def initial_state(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
            if name == "size":
                return self.initial_number(1.0, param, group)
            return torch.ones_like(param)

    p, late = torch.zeros(3), torch.zeros(2)
    optimizer = Halving([p, late])
    for step in range(3):
        p.grad, late.grad = torch.ones(3), torch.ones(2) if step else None
        optimizer.step()
    # p: 2, then 3 / 2, then 4 / 4; late: 2, then 3 / 2.
    torch.testing.assert_close(p, torch.full((3,), -4.5))
    torch.testing.assert_close(late, torch.full((2,), -3.5))
    assert float(optimizer.state[p]["size"]) == 0.125
    assert float(optimizer.state[late]["size"]) == 0.25


def test_both_compilers_names_are_the_public_ones() -> None:
    """A rule may call what fastopt.optim.xp has, and finds it documented there."""
    names = {"sqrt", "power", "absolute", "maximum", "where", "add_scaled", "lerp", "sign"}
    assert names <= set(dir(fastopt.optim.xp))
    assert all(getattr(fastopt.optim.xp, name).__doc__ for name in names)
