"""fastopt.swap on modules: torch's become ours in place, and go back; the report says which."""

from __future__ import annotations

import linecache
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize

import fastopt
from fastopt import SwapReport, swap, swap_report, unswap
from tests.rows.cases import draw, targets

N_ROWS, WIDTH = 7, 13


CASES: dict[str, Callable[[], nn.Module]] = {
    "Softmax": lambda: nn.Softmax(-1),
    "Softmax over columns": lambda: nn.Softmax(dim=0),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "CrossEntropyLoss": nn.CrossEntropyLoss,
    "CrossEntropyLoss with a weight": lambda: nn.CrossEntropyLoss(
        weight=draw(WIDTH, seed=2).abs(), ignore_index=3, reduction="sum", label_smoothing=0.2
    ),
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "LayerNorm over two dims": lambda: nn.LayerNorm((N_ROWS, WIDTH), eps=0.1),
    "LayerNorm without a bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "LayerNorm without weights": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "GroupNorm": lambda: nn.GroupNorm(1, WIDTH),
    "BatchNorm1d": lambda: nn.BatchNorm1d(WIDTH),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=0.1),
    "RMSNorm without an eps": lambda: nn.RMSNorm(WIDTH),
    "RMSNorm without weights": lambda: nn.RMSNorm(WIDTH, elementwise_affine=False),
}


def make(case: str) -> nn.Module:
    """A module with parameters that differ from those it starts with."""
    return scrambled(CASES[case]())


def scrambled(model: nn.Module) -> Any:
    with torch.no_grad():
        for seed, param in enumerate(model.parameters()):
            param.copy_(draw(*param.shape, seed=seed) / 4 + 1)
    return model


def run(module: nn.Module) -> dict[str, Tensor]:
    """Output, and gradients of the input and the parameters."""
    x = draw(N_ROWS, WIDTH, seed=5).requires_grad_()
    rest = (targets(N_ROWS, classes=WIDTH),) if isinstance(module, nn.CrossEntropyLoss) else ()
    module.zero_grad()
    y = module(x, *rest)
    y.backward(draw(*y.shape, seed=6))
    grads = {name: param.grad.clone() for name, param in module.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **grads}


def kind(module: nn.Module, package: Any) -> type:
    return getattr(package, type(module).__name__)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def hooked(module: nn.Module) -> list[str]:
    """The list in which every kind of hook writes that it ran."""
    seen: list[str] = []

    def note(what: str, result: Any = None) -> Callable[..., Any]:
        return lambda *args: seen.append(what)

    module.register_forward_pre_hook(note("forward pre"))
    module.register_forward_hook(note("forward"))
    module.register_full_backward_pre_hook(note("backward pre"))
    module.register_full_backward_hook(note("backward"))
    module.register_state_dict_pre_hook(note("state_dict pre"))
    module.register_state_dict_post_hook(note("state_dict"))
    module.register_load_state_dict_pre_hook(note("load_state_dict pre"))
    module.register_load_state_dict_post_hook(note("load_state_dict"))
    return seen


def check_in_place(case: str, how: Callable[[Any], Any] = swap) -> None:
    module, torchs = make(case).eval(), make(case).eval()
    kept, keys, seen = tensors(module), list(module.state_dict()), hooked(module)
    before = run(module)
    module.load_state_dict(module.state_dict())
    expected_hooks = seen.copy()
    assert len(set(seen)) == 8
    seen.clear()

    assert how(module) is module
    assert type(module) is kind(module, fastopt.nn)
    assert isinstance(module, kind(module, nn))
    after = run(module)
    module.load_state_dict(module.state_dict())
    assert seen == expected_hooks
    assert list(module.state_dict()) == keys
    assert not module.training
    assert repr(module) == repr(torchs)
    assert list(tensors(module)) == list(kept)
    assert all(tensors(module)[name] is tensor for name, tensor in kept.items())
    expected = run(torchs)
    for name, tensor in expected.items():
        assert torch.equal(before[name], tensor)
        torch.testing.assert_close(after[name], tensor, msg=lambda text, n=name: f"{n}: {text}")

    assert unswap(module) is module
    assert type(module) is type(torchs)
    assert all(tensors(module)[name] is tensor for name, tensor in kept.items())
    back = run(module)
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("case", CASES)
def test_a_module_is_ours_in_place_and_goes_back(case: str) -> None:
    check_in_place(case)


# Of more dimensions than the input here: tests/rows/test_channel_norms.py.
ELSEWHERE = {"BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"}


def test_every_module_of_ours_is_among_the_cases() -> None:
    theirs = {name for name in fastopt.nn.__all__ if hasattr(torch.nn, name)}
    assert {type(make(case)).__name__ for case in CASES} | ELSEWHERE == theirs


# Deliberately wrong candidates.


def does_nothing(module: Any) -> Any:
    return module


def makes_another(module: Any) -> Any:
    other = fastopt.nn.LayerNorm(WIDTH).eval()
    other.load_state_dict(module.state_dict())
    return other


def copies_parameters(module: Any) -> Any:
    module.weight = nn.Parameter(module.weight.detach().clone())
    return swap(module)


def forgets_hooks(module: Any) -> Any:
    module._forward_hooks.clear()
    return swap(module)


def starts_training(module: Any) -> Any:
    return swap(module).train()


def computes_something_else(module: Any) -> Any:
    module.eps = 0.01
    return swap(module)


@pytest.mark.parametrize(
    "wrong",
    [
        does_nothing,
        makes_another,
        copies_parameters,
        forgets_hooks,
        starts_training,
        computes_something_else,
    ],
)
def test_these_checks_see_a_wrong_swap(wrong: Callable[[Any], Any]) -> None:
    with pytest.raises(AssertionError):
        check_in_place("LayerNorm", wrong)


# Containers.


def test_containers_and_modules_that_are_shared() -> None:
    shared = nn.LayerNorm(4)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), shared),
        nn.ModuleDict({"norm": nn.ModuleList([nn.RMSNorm(4)]), "again": shared}),
        nn.Softmax(1),
    )
    swap(model)
    assert swap_report(model).replaced == {
        "0.1": "LayerNorm",
        "1.norm.0": "RMSNorm",
        "2": "Softmax",
    }
    assert model[0][1] is model[1]["again"] is shared
    assert type(shared) is fastopt.nn.LayerNorm


def test_a_model_that_is_one_module() -> None:
    norm = nn.LayerNorm(4)
    assert str(swap_report(norm)) == (
        "modules replaced: 0, kept: 1\n"
        "  (the model): kept, a torch.nn.LayerNorm: fastopt.swap takes it"
    )
    assert swap(norm) is norm
    assert str(swap_report(norm)) == "modules replaced: 1, kept: 0\n  (the model): LayerNorm"


# What stays torch's, and the report.


class OwnNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnOfOurs(fastopt.nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class UnrelatedNorm(nn.Module):
    """As some libraries write theirs."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def patched() -> nn.Module:
    norm = nn.LayerNorm(4)
    forward = norm.forward
    norm.forward = lambda x: 3 * forward(x)
    return norm


def on_another_device() -> nn.Module:
    with FakeTensorMode():
        return nn.LayerNorm(4, device="xpu")


NEAR = [
    nn.SyncBatchNorm(4), nn.LocalResponseNorm(2), nn.MultiheadAttention(4, 2), nn.NLLLoss(),
    nn.BCEWithLogitsLoss(), nn.Softmin(1), nn.Softmax2d(), nn.AdaptiveLogSoftmaxWithLoss(4, 8, [4]),
]  # fmt: skip
KEPT = {
    "OwnNorm is a subclass of torch.nn.LayerNorm with its own ways": lambda: OwnNorm(4),
    "ParametrizedRMSNorm is a subclass of torch.nn.RMSNorm": lambda: (
        parametrize.register_parametrization(nn.RMSNorm(4), "weight", Doubled())
    ),
    "its forward has been replaced on the instance": patched,
    "fastopt has no kernels for device type 'xpu'": on_another_device,
    **{f"fastopt has no {type(m).__name__}": lambda m=m: m for m in NEAR},
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_is_not_one_of_those_modules_stays_with_a_reason(reason: str) -> None:
    module = KEPT[reason]()
    theirs, forward = type(module), module.forward
    model = nn.Sequential(module, nn.LayerNorm(4))
    swap(model)
    assert type(module) is theirs
    assert module.forward == forward
    report = swap_report(model)
    assert report.replaced == {"1": "LayerNorm"}
    assert list(report.kept) == ["0"]
    assert report.kept["0"].startswith(reason)
    assert "Parametrized" in reason or report.kept["0"] == reason


def test_what_is_kept_computes_what_it_did() -> None:
    x = draw(3, 4)
    model = nn.Sequential(OwnNorm(4), patched())
    expected = model(x)
    assert torch.equal(swap(model)(x), expected)


def test_the_report_passes_over_what_is_far_from_ours() -> None:
    model = nn.Sequential(nn.Linear(4, 4), UnrelatedNorm(), nn.ReLU(), nn.Dropout(), nn.Flatten())
    assert swap_report(swap(model)) == SwapReport()
    assert str(swap_report(model)) == "modules replaced: 0, kept: 0"


def test_modules_derived_from_ours_are_ours() -> None:
    model = nn.Sequential(OwnOfOurs(4), fastopt.nn.Softmax(1), nn.Softmax(1))
    swap(model)
    assert swap_report(model).replaced == {"0": "OwnOfOurs", "1": "Softmax", "2": "Softmax"}
    assert not swap_report(model).kept
    unswap(model)
    assert type(model[0]) is OwnOfOurs
    assert type(model[1]) is type(model[2]) is nn.Softmax


def test_the_report_in_words_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.SyncBatchNorm(4))
    with caplog.at_level(logging.INFO, logger="fastopt"):
        swap(model)
    words = "modules replaced: 1, kept: 1\n  0: LayerNorm\n  1: kept, fastopt has no SyncBatchNorm"
    assert str(swap_report(model)) == words
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("fastopt", logging.INFO)
    assert record.getMessage() == f"swap: {words}"


def test_nothing_is_printed_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    swap(nn.Sequential(nn.LayerNorm(4), nn.SyncBatchNorm(4)))
    assert capfd.readouterr() == ("", "")


# The implicit dim of a softmax, whose warning is of use only where it points to the caller.


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_the_warning_of_an_implicit_dim_points_to_the_call(name: str) -> None:
    x = draw(3, 4)
    module = swap(getattr(nn, name)())
    with pytest.warns(UserWarning, match="Implicit dimension choice") as caught:
        found = module(x)  # of the module
    torch.testing.assert_close(found, getattr(nn, name)(1)(x))
    assert points_to(caught, "# of the module")
    function = {"Softmax": "softmax", "LogSoftmax": "log_softmax"}[name]
    for call in (getattr(F, function), getattr(fastopt.functional, function)):
        with pytest.warns(UserWarning, match="Implicit dimension choice") as caught:
            call(x)  # of the function
        assert points_to(caught, "# of the function")


def points_to(caught: Any, what: str) -> bool:
    (warning,) = caught
    return what in linecache.getline(warning.filename, warning.lineno)


# What swap and the others do not take.


@pytest.mark.parametrize("given", [None, nn.LayerNorm, draw(2), [nn.LayerNorm(2)]])
def test_what_is_no_module_is_refused_by_name(given: Any) -> None:
    for function in (swap, unswap, swap_report):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module") as caught:
            function(given)
        assert f"fastopt.{function.__name__} " in str(caught.value)
        assert type(given).__qualname__ in str(caught.value)


def test_an_optimizer_goes_back_through_its_state_dict() -> None:
    param = nn.Parameter(draw(3))
    optimizer = swap(torch.optim.SGD([param], lr=0.1))
    with pytest.raises(TypeError, match=r"optim\.sgd\.SGD.* goes back through its state_dict"):
        unswap(optimizer)
    torch.optim.SGD([param], lr=0.5).load_state_dict(optimizer.state_dict())
