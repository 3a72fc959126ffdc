"""fastopt.swap and fastopt.of on what wraps an optimizer.

The classes here keep and call the optimizer as the libraries they are named after do.
"""

from __future__ import annotations

import copy
import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from torch.optim import lr_scheduler

import fastopt
from tests.optim.pairs import NAMES, assert_params_close, give_grads, make_params

# By the import of torch.distributed.optim.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Accelerated(torch.optim.Optimizer):
    """accelerate's: with a scaler its own `step` replaces the optimizer's for the time of a step,
    which shows whether the scaler has skipped it."""

    def __init__(self, optimizer: Any, scaler: Any = None) -> None:
        self.optimizer, self.scaler, self._is_overflow = optimizer, scaler, False
        if scaler is not None:
            self._accelerate_step_called = False
            self._optimizer_original_step_method = optimizer.step
            self._optimizer_patched_step_method = patched(self, optimizer.step)

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def step_was_skipped(self) -> bool:
        return self._is_overflow

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def step(self, closure: Any = None) -> None:
        if self.scaler is None:
            self.optimizer.step(closure)
            return
        self.optimizer.step = self._optimizer_patched_step_method
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()
        self._is_overflow = not self._accelerate_step_called
        self.optimizer.step = self._optimizer_original_step_method
        self._accelerate_step_called = False


def patched(accelerated: Accelerated, method: Any) -> Any:
    def patched_step(*args: Any, **kwargs: Any) -> Any:
        accelerated._accelerate_step_called = True
        return method(*args, **kwargs)

    return patched_step


class Lookahead(torch.optim.Optimizer):
    """timm's: it has the groups of the optimizer, and keeps slow weights among its states."""

    def __init__(self, base_optimizer: Any, alpha: float = 0.5, k: int = 2) -> None:
        defaults = {"lookahead_alpha": alpha, "lookahead_k": k, "lookahead_step": 0}
        self._base_optimizer = base_optimizer
        self.param_groups, self.defaults = base_optimizer.param_groups, base_optimizer.defaults
        self.defaults.update(defaults)
        self.state = defaultdict(dict)
        for group in self.param_groups:
            for name, value in defaults.items():
                group.setdefault(name, value)

    def state_dict(self) -> Any:
        return self._base_optimizer.state_dict()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self._base_optimizer.step(closure)
        for group in self._base_optimizer.param_groups:
            group["lookahead_step"] += 1
            if group["lookahead_step"] % group["lookahead_k"] == 0:
                for param in group["params"]:
                    slow = self._base_optimizer.state[param].setdefault("slow", param.clone())
                    slow.add_(param - slow, alpha=group["lookahead_alpha"])
                    param.copy_(slow)
        return loss


class Lightning:
    """Lightning's: an instance of the optimizer's class, with none of its attributes."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Lightning", (type(self), type(optimizer)), {})

    @property
    def optimizer(self) -> Any:
        return self._optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Averager:
    step = 0

    def average_parameters(self, params: Any) -> None: ...


def zero(params: Any) -> Any:
    module = importlib.import_module("torch.distributed.optim")
    return module.ZeroRedundancyOptimizer(params, torch.optim.AdamW, lr=0.02)


def local_sgd(params: Any) -> Any:
    module = importlib.import_module("torch.distributed.optim")
    return module.PostLocalSGDOptimizer(adamw(params), Averager())


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.02)


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=8.0)


def scheduled(params: Any, wrap: Callable[[Any], Any]) -> Any:
    """By a scheduler that has wrapped `step` already."""
    optimizer = adamw(params)
    wrapper = wrap(optimizer)
    wrapper.kept = lr_scheduler.StepLR(optimizer, 100)
    return wrapper


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "accelerate": lambda params: Accelerated(adamw(params)),
    "accelerate, scaled": lambda params: Accelerated(adamw(params), scaler()),
    "accelerate, scaled and scheduled": lambda params: scheduled(
        params, lambda optimizer: Accelerated(optimizer, scaler())
    ),
    "timm": lambda params: Lookahead(adamw(params)),
    "timm, without states": lambda params: Lookahead(torch.optim.SGD(params, lr=0.02)),
    "timm in accelerate": lambda params: Accelerated(Lookahead(adamw(params))),
    "Lightning": lambda params: Lightning(adamw(params)),
    "ZeRO": zero,
    "local SGD": local_sgd,
    "a scheduler": lambda params: lr_scheduler.StepLR(adamw(params), 2),
}


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def torchs_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled where an update of torch runs."""
    ran: list[str] = []
    for module, name in (("adam", "adam"), ("sgd", "sgd")):
        found = importlib.import_module(f"torch.optim.{module}")
        update = getattr(found, name)

        def run(*args: Any, name: str = name, update: Any = update, **kwargs: Any) -> None:
            ran.append(name)
            update(*args, **kwargs)

        monkeypatch.setattr(found, name, run)
    return ran


def step(wrapper: Any, params: Any, seed: int) -> bool | None:
    """One step, with a NaN in the fifth; whether the wrapper says that it was skipped."""
    give_grads(params, seed)
    grad_scaler = getattr(wrapper, "scaler", None)
    if grad_scaler is not None:
        grad_scaler.scale(torch.ones(()))
        for param in params:
            param.grad.mul_(grad_scaler.get_scale() if seed != 4 else float("nan"))
    stepper = wrapper.optimizer if isinstance(wrapper, lr_scheduler.StepLR) else wrapper
    stepper.step()
    if stepper is not wrapper:
        wrapper.step()
    return getattr(wrapper, "step_was_skipped", None)


def check(name: str, swapped_at: int, ran: list[str], swap: Any = fastopt.swap) -> None:
    """Steps of a wrapper whose optimizer becomes ours in between, beside one that keeps torch's."""
    params = [make_params(), make_params()]
    torchs, ours = (WRAPPED[name](given) for given in params)
    for seed in range(7):
        if seed == swapped_at:
            assert swap(ours) is ours
            inside = fastopt.of(ours)
            assert type(inside) is getattr(fastopt.optim, type(inside).__name__)
        skipped = step(torchs, params[0], seed)
        assert ran or skipped
        ran.clear()
        assert step(ours, params[1], seed) == skipped
        assert bool(ran) == (seed < swapped_at and not skipped)
        ran.clear()
    assert_params_close(params[1], params[0])
    kept = inside_of(torchs)
    assert [g["lr"] for g in inside.param_groups] == [g["lr"] for g in kept.param_groups]


def inside_of(wrapper: Any) -> torch.optim.Optimizer:
    while type(wrapper) not in (torch.optim.AdamW, torch.optim.SGD):
        names = ("optimizer", "optim", "_optimizer", "_base_optimizer")
        wrapper = next(vars(wrapper)[name] for name in names if name in vars(wrapper))
    return wrapper


@pytest.mark.parametrize("swapped_at", [0, 3, 5])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_optimizer_inside_becomes_ours(
    name: str, swapped_at: int, torchs_steps: list[str]
) -> None:
    check(name, swapped_at, torchs_steps)


def class_alone(wrapper: Any) -> Any:
    wrapper.optimizer.__class__ = fastopt.optim.AdamW
    wrapper.optimizer._forget(state_was_accessed=True)
    return wrapper


def test_a_swap_that_leaves_the_wrapper_torchs_step_is_seen(torchs_steps: list[str]) -> None:
    with pytest.raises(AssertionError):
        check("accelerate, scaled", 3, torchs_steps, class_alone)


def test_what_a_wrapper_holds_stays_the_same_objects() -> None:
    params = make_params()
    wrapper = Lookahead(adamw(params))
    step(wrapper, params, 0)
    base, group = wrapper._base_optimizer, wrapper.param_groups[0]
    moment = base.state[params[0]]["exp_avg"]
    fastopt.swap(wrapper)
    assert wrapper._base_optimizer is base is fastopt.of(wrapper)
    assert wrapper.param_groups is base.param_groups
    assert base.param_groups[0] is group
    assert base.state[params[0]]["exp_avg"] is moment


def test_checkpoints_of_zero_go_on() -> None:
    params = make_params()
    wrapper = fastopt.swap(zero(params))
    step(wrapper, params, 0)
    wrapper.consolidate_state_dict()
    state = copy.deepcopy(wrapper.state_dict())
    torchs = zero(make_params())
    torchs.load_state_dict(state)
    wrapper.load_state_dict(copy.deepcopy(state))
    assert inside_of(torchs).state_dict()["state"].keys() == state["state"].keys()
    wrapper.param_groups[0]["lr"] = 0.5
    step(wrapper, params, 1)
    assert fastopt.of(wrapper).param_groups[0]["lr"] == 0.5


# fastopt.of.


@pytest.mark.parametrize("wrap", [lambda x: x, Accelerated, Lookahead, Lightning])
def test_what_wrappers_do_not_have_is_reached(wrap: Any) -> None:
    params = make_params()
    optimizer = fastopt.optim.AdamW(params, max_grad_norm=1.0, ema_decay=0.9, telemetry=True)
    wrapper = wrap(optimizer)
    assert fastopt.of(wrapper) is optimizer
    step(wrapper, params, 0)
    assert fastopt.of(wrapper).last_step.grad_norm > 0
    assert len(fastopt.of(wrapper).telemetry().keys()) == len(params)
    with fastopt.of(wrapper).averaged():
        pass
    assert fastopt.swap(wrapper) is wrapper
    assert fastopt.of(fastopt.of(wrapper)) is optimizer


class Circular:
    def __init__(self) -> None:
        self.optimizer = self

    def step(self) -> None: ...


@pytest.mark.parametrize(
    "make",
    [lambda: torch.ones(2), lambda: None, Circular, MagicMock, lambda: torch.optim.AdamW, object],
)
def test_where_there_is_no_optimizer(make: Any) -> None:
    given = make()
    with pytest.raises(TypeError, match=r"fastopt\.of finds no optimizer in") as caught:
        fastopt.of(given)
    assert type(given).__qualname__ in str(caught.value)
    assert "_base_optimizer" in str(caught.value)
    with pytest.raises(TypeError, match=r"fastopt\.swap has no match for") as caught:
        fastopt.swap(given)
    assert "_base_optimizer" in str(caught.value)


@pytest.mark.parametrize("wrap", [lambda x: x, Accelerated, Lookahead, Lightning])
def test_an_optimizer_that_is_not_ours_is_named_with_what_to_do(wrap: Any) -> None:
    with pytest.raises(TypeError, match=r"which is not fastopt's\. Call fastopt\.swap"):
        fastopt.of(wrap(adamw(make_params())))


class Own(torch.optim.AdamW):
    """Its step may do anything."""


@pytest.mark.parametrize("wrap", [Accelerated, Lookahead, Lightning])
def test_a_wrapper_of_what_has_no_match_is_refused(wrap: Any) -> None:
    for optimizer in (Own(make_params()), torch.optim.LBFGS(make_params())):
        with pytest.raises(TypeError, match=r"fastopt\.swap has no match") as caught:
            fastopt.swap(wrap(optimizer))
        assert all(f"torch.optim.{name}" in str(caught.value) for name in NAMES)
        assert type(optimizer).__module__ != "fastopt.optim"
