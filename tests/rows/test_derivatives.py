"""Derivatives of any order and kind, forward mode, function transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.rows import oracle
from tests.rows.cases import draw, probabilities, same, targets
from tests.rows.subject import MODULES, OURS, TORCH, Function

# torch's own forward derivatives are scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

F64 = torch.float64
T = torch.tensor([2, 0, -100, 1])
WEIGHT = torch.tensor([0.5, 1.0, 1.5], dtype=F64)

# (op, call on an op and the tensors to differentiate by, those tensors)
Case = tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]


def x(*shape: int, seed: int = 0) -> Tensor:
    return draw(*(shape or (4, 3)), dtype=F64, seed=seed)


def indices(**options: Any) -> Case:
    return "cross_entropy", lambda f, x: f(x, T, **options), (x(),)


def of_probabilities(weight: bool = False, **options: Any) -> Case:
    def call(f: Function, x: Tensor, p: Tensor, *w: Tensor) -> Tensor:
        return f(x, p, *w, **options)

    weights = (WEIGHT.clone(),) if weight else ()
    return "cross_entropy", call, (x(), probabilities(x()), *weights)


CASES: dict[str, Case] = {
    "softmax": ("softmax", lambda f, x: f(x, 1), (x(),)),
    "softmax of columns": ("softmax", lambda f, x: f(x, 1), (x(2, 3, 2),)),
    "softmax of float32": ("softmax", lambda f, x: f(x.float(), 1, dtype=F64), (x(),)),
    "log_softmax": ("log_softmax", lambda f, x: f(x, -1), (x(),)),
    "log_softmax of columns": ("log_softmax", lambda f, x: f(x, 0), (x(),)),
    "logsumexp": ("logsumexp", lambda f, x: f(x, 1), (x(),)),
    "logsumexp of columns": ("logsumexp", lambda f, x: f(x, 0, keepdim=True), (x(),)),
    "logsumexp of dims": ("logsumexp", lambda f, x: f(x, (0, 2)), (x(2, 3, 2),)),
    "cross_entropy": indices(),
    "cross_entropy none": indices(reduction="none"),
    "cross_entropy sum": indices(reduction="sum", weight=WEIGHT),
    "cross_entropy smoothed": indices(label_smoothing=0.2, weight=WEIGHT),
    "cross_entropy smoothed none": indices(label_smoothing=0.2, reduction="none"),
    "cross_entropy of columns": (
        "cross_entropy", lambda f, x: f(x, torch.tensor([[0, 2], [1, 1]])), (x(2, 3, 2),),
    ),
    "cross_entropy of one row": ("cross_entropy", lambda f, x: f(x, torch.tensor(1)), (x(3),)),
    "cross_entropy of probabilities": of_probabilities(),
    "cross_entropy of weighted probabilities": of_probabilities(True, reduction="sum"),
    "cross_entropy of smoothed probabilities": of_probabilities(
        True, reduction="none", label_smoothing=0.3
    ),
    "layer_norm": ("layer_norm", lambda f, x, w, b: f(x, (3,), w, b), (x(), x(3), x(3, seed=1))),
    "layer_norm of two dims": (
        "layer_norm", lambda f, x, w: f(x, (3, 2), w, None, 0.1), (x(2, 3, 2), x(3, 2)),
    ),
    "layer_norm of a bias": ("layer_norm", lambda f, x, b: f(x, (3,), None, b), (x(), x(3))),
    "layer_norm alone": ("layer_norm", lambda f, x: f(x, (3,)), (x(),)),
    "rms_norm": ("rms_norm", lambda f, x, w: f(x, (3,), w), (x(), x(3))),
    "rms_norm alone": ("rms_norm", lambda f, x: f(x, (3,), None, 0.1), (x(),)),
}  # fmt: skip


def sides(case: str, ours: Function | None = None) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """Ours and torch's as functions of tensors, and the tensors."""
    name, call, tensors = CASES[case]
    mine = ours or OURS[name]
    return (
        lambda *given: call(mine, *given),
        lambda *given: call(TORCH[name], *given),
        tuple(tensor.clone() for tensor in tensors),
    )


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


# Derivatives.


def check_derivatives(case: str, ours: Function | None = None) -> None:
    mine, _, tensors = sides(case, ours)
    assert gradcheck(
        mine, leaves(tensors), check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert gradgradcheck(mine, leaves(tensors), check_batched_grad=True, check_fwd_over_rev=True)


DOUBLE_CASES = [case for case in CASES if "float32" not in case]


@pytest.mark.parametrize("case", DOUBLE_CASES)
def test_derivatives_of_first_and_second_order(case: str) -> None:
    """By every differentiable argument, reverse and forward, batched or not."""
    check_derivatives(case)


@pytest.mark.parametrize("case", CASES)
def test_each_argument_alone(case: str) -> None:
    """What is not asked for is not computed, and changes nothing."""
    mine, torchs, tensors = sides(case)
    for k in range(len(tensors)):
        found = []
        for function in (mine, torchs):
            given = [t.clone().requires_grad_(j == k) for j, t in enumerate(tensors)]
            y = function(*given)
            (grad,) = torch.autograd.grad(y, given[k], torch.ones_like(y))
            found.append(grad)
        same(*found)


def layer_norm_by_hand(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """torch's own layer_norm has a wrong third derivative (2.13), and none without a weight."""
    dims = tuple(range(-len(shape), 0))
    centered = x - x.mean(dims, keepdim=True)
    y = centered / (centered.square().mean(dims, keepdim=True) + eps).sqrt()
    return y * (1 if weight is None else weight) + (0 if bias is None else bias)


THRICE = [case for case in CASES if case not in ("layer_norm of a bias", "layer_norm alone")]


@pytest.mark.parametrize("case", THRICE)
def test_third_derivative(case: str) -> None:
    mine, torchs, tensors = sides(case)
    if case.startswith("layer_norm"):
        torchs = sides(case, layer_norm_by_hand)[0]
    found = []
    for function in (mine, torchs):
        given = leaves(tensors)
        y = function(*given).square().sum()
        for _ in range(3):
            grads = torch.autograd.grad(y, given, create_graph=True)
            y = sum(grad.sin().sum() for grad in grads)
        found.append(y.detach())
    same(*found)


@pytest.mark.parametrize("case", CASES)
def test_backward_twice_and_a_graph_made_later(case: str) -> None:
    """retain_graph: the same bits; then create_graph from the same output: the same values."""
    mine, _, tensors = sides(case)
    given = leaves(tensors)
    y = mine(*given)
    upstream = draw(*y.shape, dtype=y.dtype, seed=9)
    before = upstream.clone()
    grads = [torch.autograd.grad(y, given, upstream, retain_graph=True) for _ in range(3)]
    for other in grads[1:]:
        assert all(map(oracle.same_bits, grads[0], other))
    later = torch.autograd.grad(y, given, upstream, create_graph=True)
    for plain, graphed in zip(grads[0], later, strict=True):
        same(graphed.detach(), plain)
    assert oracle.same_bits(upstream, before)
    assert all(map(oracle.same_bits, given, tensors))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


# Forward mode and function transforms.


def check_jvp(case: str, ours: Function | None = None) -> None:
    mine, torchs, tensors = sides(case, ours)
    tangents = tuple(draw(*t.shape, dtype=t.dtype, seed=5) for t in tensors)
    same(torch.func.jvp(mine, tensors, tangents), torch.func.jvp(torchs, tensors, tangents))
    for mode in (nullcontext, torch.no_grad):
        for needs_grad in (False, True):
            with mode(), fwad.dual_level():
                duals = [
                    fwad.make_dual(t.clone().requires_grad_(needs_grad), tangent)
                    for t, tangent in zip(tensors, tangents, strict=True)
                ]
                found = fwad.unpack_dual(mine(*duals))
                expected = fwad.unpack_dual(torchs(*duals))
                assert found.tangent is not None, "the tangent was dropped"
                same((found.primal, found.tangent), (expected.primal, expected.tangent))


@pytest.mark.parametrize("case", CASES)
def test_jvp(case: str) -> None:
    """torch.func's and forward AD's own, whether or not a gradient is wanted as well."""
    check_jvp(case)


@pytest.mark.parametrize("case", CASES)
def test_a_tangent_of_the_upstream_is_not_dropped(case: str) -> None:
    """Where the graph is made before there are any tangents."""
    mine, torchs, tensors = sides(case)
    found = []
    for function in (mine, torchs):
        given = leaves(tensors)
        y = function(*given)
        dy, tangent = (draw(*y.shape, dtype=y.dtype, seed=seed) for seed in (1, 2))
        with fwad.dual_level():
            grads = torch.autograd.grad(y, given, fwad.make_dual(dy, tangent))
            found.append([tuple(fwad.unpack_dual(grad)) for grad in grads])
        for grad in found[-1]:
            assert grad[1] is not None, "the tangent was dropped"
    same(*found)


@pytest.mark.parametrize("case", CASES)
def test_forward_over_reverse_and_the_like(case: str) -> None:
    mine, torchs, tensors = sides(case)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        same(transform(mine)(*tensors), transform(torchs)(*tensors))
    found, expected = (torch.func.vjp(function, *tensors) for function in (mine, torchs))
    upstream = torch.ones_like(expected[0])
    same((found[0], found[1](upstream)), (expected[0], expected[1](upstream)))


def check_vmap(case: str, ours: Function | None = None) -> None:
    """Over a dim in front and one at the end, over some of the tensors and over all of them."""
    mine, torchs, tensors = sides(case, ours)

    def summed(function: Any) -> Any:
        return torch.func.grad(lambda *given: function(*given).sin().sum())

    for at in (0, -1):
        many = tuple(torch.stack([t, 2 * t, t + 1], at) for t in tensors)
        same(torch.vmap(mine, at)(*many), torch.vmap(torchs, at)(*many))
        same(torch.vmap(summed(mine), at)(*many), torch.vmap(summed(torchs), at)(*many))
    first = (torch.stack([tensors[0], tensors[0] + 1]), *tensors[1:])
    dims = (0, *[None] * (len(tensors) - 1))
    same(torch.vmap(mine, dims)(*first), torch.vmap(torchs, dims)(*first))
    given = (first[0].requires_grad_(), *first[1:])
    found = torch.autograd.grad(torch.vmap(mine, dims)(*given).sin().sum(), given[0])
    expected = torch.autograd.grad(torch.vmap(torchs, dims)(*given).sin().sum(), given[0])
    same(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_vmap(case: str) -> None:
    check_vmap(case)


def test_vmap_over_targets() -> None:
    logits, many = draw(4, 3), torch.stack([T, T.roll(1)])
    found = torch.vmap(lambda t: OURS["cross_entropy"](logits, t))(many)
    torch.testing.assert_close(found, torch.stack([F.cross_entropy(logits, t) for t in many]))


def test_per_sample_gradients_of_a_model() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 7), MODULES["LayerNorm"](7), MODULES["RMSNorm"](7),
        MODULES["LogSoftmax"](-1),
    )  # fmt: skip
    params = {key: value.detach() for key, value in model.named_parameters()}
    batch, target = draw(6, 5), targets(6, classes=7)

    def loss(params: Any, sample: Tensor, t: Tensor) -> Tensor:
        y = torch.func.functional_call(model, params, (sample[None],))
        return OURS["cross_entropy"](y, t[None])

    found = torch.vmap(torch.func.grad(loss), (None, 0, 0))(params, batch, target)
    for k in range(6):
        model.zero_grad()
        loss(dict(model.named_parameters()), batch[k], target[k]).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(found[key][k], parameter.grad)


# Deliberately wrong candidates.


class _OneDerivative(torch.autograd.Function):
    """A backward that autograd cannot see into, and that says nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        y = torch.softmax(x.detach(), dim)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        y = y.detach()
        return y * (dy - (dy * y).sum(ctx.dim, keepdim=True)), None


def test_a_silent_wrong_second_derivative_is_refused() -> None:
    with pytest.raises(Exception, match=r"Jacobian|not implemented|require|jvp"):
        check_derivatives("softmax", lambda x, dim: _OneDerivative.apply(x, dim))


def test_a_dropped_tangent_is_refused() -> None:
    def detached(x: Tensor, dim: int) -> Tensor:
        return torch.softmax(fwad.unpack_dual(x).primal.detach(), dim)

    with pytest.raises((AssertionError, RuntimeError)):
        check_jvp("softmax", detached)


class _DimForgotten(torch.autograd.Function):
    """Takes the batched dim for the first, wherever it is."""

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return torch.softmax(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, dim: int) -> Any:
        return torch.softmax(x, dim + 1), 0


def test_a_dim_that_vmap_forgets_is_refused() -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_vmap("softmax", lambda x, dim: _DimForgotten.apply(x, dim))
