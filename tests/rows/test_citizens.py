"""Citizens of torch: autograd's own rules, hooks, modes, subclasses, modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.rows import oracle
from tests.rows.cases import draw, problem, same, targets
from tests.rows.subject import MODULES, NAMES, OURS, TORCH, Function

# Autograd's own rules.


@pytest.mark.parametrize("name", NAMES)
def test_no_graph_where_none_is_wanted(name: str) -> None:
    made = problem(name, draw(4, 5))
    given = {k: v.clone().requires_grad_() if k == "input" else v  # type: ignore[union-attr]
             for k, v in made.inputs.items()}  # fmt: skip
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not OURS[name](**given, **made.options).requires_grad
    assert OURS[name](**given, **made.options).requires_grad
    assert not OURS[name](**made.inputs, **made.options).requires_grad
    with torch.inference_mode():
        inside = {k: None if v is None else v.clone() for k, v in made.inputs.items()}
        same(OURS[name](**inside, **made.options), OURS[name](**made.inputs, **made.options))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_after_forward_is_noticed(name: str) -> None:
    """Refused where the gradient would be of other numbers, as torch does."""
    made = problem(name, draw(4, 5))
    for written in ("input", "output"):
        leaf = made.inputs["input"].clone().requires_grad_()  # type: ignore[union-attr]
        source = leaf * 1
        y = OURS[name](**{**made.inputs, "input": source}, **made.options)
        with torch.no_grad():
            (y if written == "output" else source).mul_(2)
        try:
            (grad,) = torch.autograd.grad(y, leaf, made.upstream)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        else:
            torch.testing.assert_close(grad, made.run(OURS[name])["grad input"])


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_may_be_changed_in_place_where_torchs_may(
    name: str, shape: tuple[int, ...]
) -> None:
    """softmax needs its output again; a loss of each row may be weighted where it is."""
    made = problem(name, draw(*shape))

    def changed(function: Function) -> Tensor | None:
        leaf = made.inputs["input"].clone().requires_grad_()  # type: ignore[union-attr]
        y = function(**{**made.inputs, "input": leaf}, **made.options)
        y.mul_(2)
        try:
            return torch.autograd.grad(y, leaf, made.upstream)[0]
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            return None

    found = changed(OURS[name])
    if found is None:
        assert changed(TORCH[name]) is None
    else:
        torch.testing.assert_close(found, 2 * made.run(OURS[name])["grad input"])


def check_own_memory(name: str, shape: tuple[int, int], ours: Callable[..., Tensor]) -> None:
    made = problem(name, draw(*shape))
    given = [t for t in made.inputs.values() if t is not None]
    y = ours(**made.inputs, **made.options)
    assert y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in given}


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 5), (4, 5)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_have_memory_of_their_own(name: str, shape: tuple[int, int]) -> None:
    check_own_memory(name, shape, OURS[name])


def test_a_result_written_over_its_input_is_refused() -> None:
    def in_place(input: Tensor, dim: int) -> Tensor:
        return input.copy_(input.softmax(dim))

    with pytest.raises(AssertionError):
        check_own_memory("softmax", (4, 5), in_place)


@pytest.mark.parametrize("name", NAMES)
def test_saved_tensor_hooks_and_checkpoints(name: str) -> None:
    """Saved tensors may be moved away meanwhile, or computed a second time."""
    made = problem(name, draw(4, 5))
    expected = made.run(OURS[name])["grad input"]
    leaf = made.inputs["input"].clone().requires_grad_()  # type: ignore[union-attr]

    def call(source: Tensor) -> Tensor:
        return OURS[name](**{**made.inputs, "input": source}, **made.options)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = call(leaf)
    assert oracle.same_bits(torch.autograd.grad(y, leaf, made.upstream)[0], expected)
    again = checkpoint(call, leaf, use_reentrant=False)
    assert oracle.same_bits(torch.autograd.grad(again, leaf, made.upstream)[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_algorithms(name: str) -> None:
    made = problem(name, draw(4, 5))
    torch.use_deterministic_algorithms(True)
    try:
        found = made.run(OURS[name])
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in made.run(OURS[name]).items():
        assert oracle.same_bits(found[key], value)


# Subclasses and modes.


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Counting, Dispatched])
@pytest.mark.parametrize("name", NAMES)
def test_modes_see_the_call_and_change_nothing(name: str, mode: Any) -> None:
    made = problem(name, draw(4, 5))
    expected = made.run(OURS[name])
    with mode() as watching:
        found = made.run(OURS[name])
    assert watching.calls
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


class Named(Tensor):
    """torch's default: functions of it give it again."""


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_are_kept(name: str) -> None:
    made = problem(name, draw(4, 5))
    named = made.inputs["input"].clone().as_subclass(Named)  # type: ignore[union-attr]
    found = OURS[name](**{**made.inputs, "input": named}, **made.options)
    assert type(found) is Named
    expected = TORCH[name](**made.inputs, **made.options)
    torch.testing.assert_close(found.as_subclass(Tensor), expected)
    leaf = named.detach().requires_grad_()
    OURS[name](**{**made.inputs, "input": leaf}, **made.options).sum().backward()
    assert leaf.grad is not None


class Refusing(Tensor):
    """Takes over every call."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "taken over"


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_may_take_over(name: str) -> None:
    made = problem(name, draw(4, 5))
    given = made.inputs["input"].clone().as_subclass(Refusing)  # type: ignore[union-attr]
    assert OURS[name](**{**made.inputs, "input": given}, **made.options) == "taken over"


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_without_memory_are_not_read(name: str) -> None:
    """A wrapper's address is that of nothing: the call must reach the tensors it wraps."""
    made = problem(name, draw(4, 5))
    a, b = draw(4, 5), draw(4, 5, seed=1)

    def call(function: Function, source: Tensor) -> Tensor:
        return function(**{**made.inputs, "input": source}, **made.options)

    found = call(OURS[name], TwoTensor(a, b))
    assert isinstance(found, TwoTensor)
    torch.testing.assert_close(found.a, call(TORCH[name], a))
    torch.testing.assert_close(found.b, call(TORCH[name], b))
    leaf = TwoTensor(a, b).requires_grad_()
    call(OURS[name], leaf).sum().backward()
    assert isinstance(leaf.grad, TwoTensor)
    for inner, grad in ((a, leaf.grad.a), (b, leaf.grad.b)):
        plain = inner.clone().requires_grad_()
        call(TORCH[name], plain).sum().backward()
        torch.testing.assert_close(grad, plain.grad, rtol=1e-4, atol=1e-5)


# Modules.


def modules() -> list[torch.nn.Module]:
    return [
        MODULES["Softmax"](1), MODULES["LogSoftmax"](0), MODULES["LayerNorm"](5),
        MODULES["RMSNorm"](5, eps=0.1), MODULES["CrossEntropyLoss"](torch.rand(5), reduction="sum"),
    ]  # fmt: skip


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_of_modules(how: Callable[[Any], Any]) -> None:
    for module in modules():
        other = how(module)
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        rest = (targets(4, classes=5),) if "Loss" in repr(module) else ()
        given = draw(4, 5)
        assert oracle.same_bits(other(given, *rest), module(given, *rest))
        same(other.state_dict(), module.state_dict())


def test_softmax_modules_over_each_dim() -> None:
    given = draw(2, 3, 4)
    for name, dim in (("Softmax", 0), ("Softmax", -1), ("LogSoftmax", 1)):
        module, torchs = MODULES[name](dim), getattr(torch.nn, name)(dim)
        assert isinstance(module, type(torchs))
        torch.testing.assert_close(module(given), torchs(given))
