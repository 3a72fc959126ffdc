"""Errors: torch's type and message first, then what to do; raised before anything is written."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from fastopt import backend
from fastopt.optim import options
from tests import oracle

# Keywords ours take and torch's class does not.
ADDED = {"SGD": ["capturable"], "Adagrad": ["capturable"]}

two = torch.ones(2)
# torch's SGD takes lr=nan, its other classes do not; ours do alike.
LR = [{"lr": -1.0}, {"lr": math.nan}, {"lr": two}, {"lr": "fast"}]
DECAY = [{"weight_decay": -0.1}]
EPS = [{"eps": -1e-8}, {"eps": math.nan}]
BETAS: list[dict[str, Any]] = [
    {"betas": (-0.1, 0.9)},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (0.9, -1.0)},
    {"betas": 0.9},
    {"betas": (0.9,)},
]
TENSOR_BETAS: list[dict[str, Any]] = [
    {"betas": (torch.tensor(0.9), 0.999)},
    {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.999))},
    {"betas": (torch.tensor(0.9), torch.tensor(0.999)), "foreach": True},
    {"lr": torch.tensor(0.1), "foreach": True},
]
FLAGS: list[dict[str, Any]] = [
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
]
BAD: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"momentum": -0.1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        *FLAGS,
    ],
    "Adagrad": [{"lr_decay": -1.0}, {"initial_accumulator_value": -1.0}, *EPS, *FLAGS],
    "RMSprop": [{"momentum": -0.1}, {"alpha": -0.1}, *EPS],
    "Adadelta": [{"rho": -0.1}, {"rho": 1.5}, *EPS],
    "Adam": [*EPS, *BETAS, *TENSOR_BETAS, *FLAGS],
    "AdamW": [*EPS, *BETAS, *TENSOR_BETAS, *FLAGS],
    "Adamax": [*EPS, *BETAS],
    "NAdam": [*EPS, *BETAS, {"momentum_decay": -1.0}],
    "RAdam": [*EPS, *BETAS],
}
UNKNOWN: list[dict[str, Any]] = [{"learning_rate": 0.1}, {"eps": 1e-8, "epsilon": 1e-8}]


def classes(name: str) -> tuple[Any, Any]:
    return getattr(fastopt.optim, name), getattr(torch.optim, name)


def raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", oracle.NAMES)
def test_wrong_hyper_parameters_get_the_error_of_torch(name: str) -> None:
    ours, theirs = classes(name)
    for bad in (*LR, *DECAY, *BAD[name], *UNKNOWN):
        params = [torch.ones(2, requires_grad=True)]
        expected = raised(lambda bad=bad, params=params: theirs(params, **bad))
        came = raised(lambda bad=bad, params=params: ours(params, **bad))
        assert expected is not None or (name == "SGD" and bad is LR[1]), bad
        assert type(came) is type(expected), (bad, came, expected)
        assert str(came).startswith(str(expected)), (bad, came, expected)


def _shared() -> list[dict[str, Any]]:
    param = torch.ones(2, requires_grad=True)
    return [{"params": [param]}, {"params": [param]}]


PARAMETERS: dict[str, Callable[[], Any]] = {
    "nothing": list,
    "a tensor": lambda: torch.ones(2, requires_grad=True),
    "no tensors": lambda: [1.0],
    "a tensor that is no leaf": lambda: [torch.ones(2, requires_grad=True) * 2],
    "a set": lambda: [{"params": {torch.ones(2, requires_grad=True)}}],
    "the same in two groups": _shared,
}


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("name", oracle.NAMES)
def test_wrong_parameters_get_the_error_of_torch(name: str, kind: str) -> None:
    ours, theirs = classes(name)
    expected = raised(lambda: theirs(PARAMETERS[kind]()))
    came = raised(lambda: ours(PARAMETERS[kind]()))
    assert expected is not None
    assert type(came) is type(expected)
    assert str(came).startswith(str(expected))


@pytest.mark.parametrize("name", oracle.NAMES)
def test_signature_is_that_of_torch(name: str) -> None:
    """Order, kinds and defaults; what is added comes last and by keyword only."""
    ours, theirs = (list(inspect.signature(c.__init__).parameters.values()) for c in classes(name))
    added = ours[len(theirs) :]
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert [p.name for p in added] == [*ADDED.get(name, []), *options.DEFAULTS]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in added)


@pytest.mark.parametrize("name", oracle.NAMES)
def test_defaults_of_a_group_are_those_of_torch(name: str) -> None:
    ours, theirs = (c([torch.ones(2, requires_grad=True)]) for c in classes(name))
    assert ours.defaults == theirs.defaults
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])


# Errors of a step.


def assert_refused(
    optimizer: Any, params: list[Tensor], error: type[Exception], *says: str
) -> None:
    """The step raises, says all of these, and nothing is written, counted or initialised."""
    before = [param.detach().clone() for param in params]
    states = oracle.snapshot(optimizer, params)
    with pytest.raises(error) as caught:
        optimizer.step()
    for part in says:
        assert re.search(part, str(caught.value)), f"{part!r} is not in: {caught.value}"
    for k, (param, was) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(param, was), f"parameter {k} was written"
    after = oracle.snapshot(optimizer, params)
    assert after.keys() == states.keys(), "states were made"
    for key, value in after.items():
        assert oracle.same_bits(value, states[key]), f"{key} was written"


def good(n: int = 2) -> list[Tensor]:
    """Parameters with gradients, before and after the bad one in a test."""
    params = [torch.arange(1.0, 4.0, requires_grad=True) for _ in range(n)]
    for param in params:
        param.grad = torch.ones(3)
    return params


SUPPORTED = "float32, bfloat16, float16, float64, complex64, complex128"
BAD_DTYPES = [torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad"])
def test_unsupported_parameter_dtype(name: str, dtype: torch.dtype) -> None:
    first, last = good()
    bad = torch.ones(3).to(dtype)
    bad.grad = torch.ones(3).to(dtype)
    params = [first, bad.view(torch.uint8), last]
    optimizer = getattr(fastopt.optim, name)([first, bad, last])
    assert_refused(optimizer, params, TypeError, re.escape(str(dtype)), SUPPORTED, "Cast it")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn], ids=str)
def test_unsupported_gradient_dtype(dtype: torch.dtype) -> None:
    params = good()
    params[1].grad = None
    params[1].grad_dtype = None
    params[1].grad = torch.ones(3).to(dtype)
    optimizer = fastopt.optim.AdamW(params)
    assert_refused(optimizer, params, TypeError, "a gradient", re.escape(str(dtype)), SUPPORTED)


def test_a_real_parameter_with_a_complex_gradient() -> None:
    params = good()
    params[1].grad = None
    params[1].grad_dtype = None
    params[1].grad = torch.ones(3, dtype=torch.complex64)
    optimizer = fastopt.optim.AdamW(params)
    assert_refused(optimizer, params, RuntimeError, "complex64", "float32", "zero_grad")


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", oracle.NAMES)
def test_a_gradient_of_another_shape(name: str, stepped: bool) -> None:
    """With and without a plan from earlier steps; a good gradient goes on as if nothing was."""
    params = good(3)
    optimizer = getattr(fastopt.optim, name)(params)
    if stepped:
        optimizer.step()
        optimizer.step()
    data = params[1].data
    params[1].data = torch.ones(1, 3)
    says = ["The size of", r"\(1, 3\)", r"\(3,\)", "zero_grad"]
    assert_refused(optimizer, params, RuntimeError, *says)
    params[1].data = data
    optimizer.step()
    assert torch.equal(params[0], params[1])
    assert not torch.equal(params[1], torch.arange(1.0, 4.0))


class _GradientElsewhere(torch.nn.Parameter):
    """torch itself keeps a gradient on its parameter's device, until one of them is moved."""

    grad = torch.empty(3, device="meta")


@pytest.mark.parametrize("name", oracle.NAMES)
def test_a_gradient_on_another_device(name: str) -> None:
    params = [*good(1), _GradientElsewhere(torch.ones(3)), *good(1)]
    optimizer = getattr(fastopt.optim, name)(params)
    assert_refused(optimizer, params, RuntimeError, "one device", "cpu", "meta", "zero_grad")


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "another shape": lambda state: torch.zeros(2),
    "a shape of as many elements": lambda state: torch.zeros(3, 1),
    "no memory": lambda state: torch.empty(3, device="meta"),
    "internal overlap": lambda state: torch.zeros(1).expand(3),
    "a sparse layout": lambda state: torch.zeros(3).to_sparse(),
    "an unsupported dtype": lambda state: torch.zeros(3, dtype=torch.int64),
    "complex numbers": lambda state: torch.zeros(3, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_state_that_does_not_fit(name: str, kind: str) -> None:
    """Its address would be written beyond its end: torch refuses these too."""
    params = good(3)
    optimizer = fastopt.optim.AdamW(params)
    optimizer.step()
    kept = optimizer.state[params[1]][name]
    optimizer.state[params[1]][name] = STATES[kind](kept)
    before = [param.detach().clone() for param in params]
    with pytest.raises((RuntimeError, TypeError), match=name):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert [optimizer.state[param]["step"].item() for param in params] == [1.0, 1.0, 1.0]
    optimizer.state[params[1]][name] = kept
    optimizer.step()
    assert torch.equal(params[0], params[1])


def test_a_parameter_that_grew_after_its_state_was_made() -> None:
    params = good(3)
    optimizer = fastopt.optim.AdamW(params)
    optimizer.step()
    params[1].grad = None
    params[1].data = torch.ones(5000)
    params[1].grad = torch.ones(5000)
    assert_refused(optimizer, params, RuntimeError, "exp_avg", r"\(3,\)", r"\(5000,\)")


# Sparse gradients.


def sparse(values: Tensor) -> Tensor:
    return values.to_sparse().coalesce()


DENSE_ONLY = [name for name in oracle.NAMES if name not in ("SGD", "Adagrad")]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", DENSE_ONLY)
def test_sparse_gradients_where_torch_has_none(name: str, stepped: bool) -> None:
    params = good(3)
    ours, theirs = (cls(params) for cls in classes(name))
    if stepped:
        ours.step()
    params[1].grad = sparse(torch.ones(3))
    assert_refused(ours, params, RuntimeError, "sparse gradients", r"sparse=False|SGD")
    expected = str(raised(theirs.step))
    with pytest.raises(RuntimeError, match="^" + re.escape(expected)):
        ours.step()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_with_weight_decay(name: str, stepped: bool) -> None:
    """torch refuses these once it has stepped what comes before; ours before anything."""
    params = good(3)
    ours, theirs = (cls(params, weight_decay=0.1) for cls in classes(name))
    if stepped:
        ours.step()
    params[1].grad = sparse(torch.ones(3))
    assert_refused(ours, params, RuntimeError, "sparse", "weight_decay")
    assert type(raised(theirs.step)) is RuntimeError


# Devices.


@pytest.fixture
def engines() -> Iterator[dict[str, str]]:
    """The table of backends, to be changed; looked up anew."""
    kept = dict(backend._KERNELS)
    backend.kernels.cache_clear()
    yield backend._KERNELS
    backend._KERNELS.clear()
    backend._KERNELS.update(kept)
    backend.kernels.cache_clear()


def test_a_device_without_a_backend(engines: dict[str, str]) -> None:
    del engines["cpu"]
    params = good()
    optimizer = fastopt.optim.AdamW(params)
    says = ["no kernels for device type 'cpu'", "supports cuda", "keep torch's own"]
    assert_refused(optimizer, params, RuntimeError, *says)


def test_a_backend_that_does_not_import(
    engines: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    params = good()
    optimizer = fastopt.optim.AdamW(params)
    monkeypatch.setattr(importlib, "import_module", fail)
    assert_refused(optimizer, params, ImportError, "cpu", "numba", "pip install numba")


@pytest.mark.parametrize("name", oracle.NAMES)
def test_meta_parameters_need_no_backend(name: str) -> None:
    """A dry run: states get torch's shapes and dtypes, and nothing is computed."""
    found = []
    for cls in classes(name):
        param = torch.empty(3, 5, device="meta", requires_grad=True)
        param.grad = torch.empty(3, 5, device="meta")
        optimizer = cls([param])
        optimizer.step()
        state = optimizer.state.get(param, {}).items()
        found.append({key: (x.shape, x.dtype, x.device) for key, x in state if x is not None})
    assert found[0] == found[1]


def test_a_step_that_writes_before_it_refuses_would_be_noticed() -> None:
    """Teeth: torch's own loop steps the first parameter, then raises."""
    params = good()
    params[1].grad = sparse(torch.ones(3))
    optimizer = torch.optim.SGD(params, weight_decay=0.1, foreach=False)
    with pytest.raises(AssertionError, match="parameter 0 was written"):
        assert_refused(optimizer, params, RuntimeError, "sparse")
