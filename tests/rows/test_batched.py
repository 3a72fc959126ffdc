"""Gradients of every function and module, batched or not, of any order, under any transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian

import fastopt.nn
from fastopt import functional
from tests.rows.cases import draw, same
from tests.rows.every import EVERY, F64, FUNCTIONS, MODULES, Call, as_tuple, leaves

# torch's own forward derivatives are scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def test_every_function_and_module_is_among_the_cases() -> None:
    functions = {name.partition(",")[0].partition(" ")[0] for name in FUNCTIONS}
    assert functions - {"weight_norm"} == set(functional.__all__)
    modules = {name.partition(",")[0] for name in MODULES}
    assert modules - {"parametrizations"} == set(fastopt.nn.__all__)
    kinds = {name.partition(", ")[2] for name in MODULES if name.startswith("parametrizations")}
    assert kinds == set(fastopt.parametrizations.__all__)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_of_first_and_second_order(name: str) -> None:
    """Against finite differences, reverse and forward; batched ones are as one by one."""
    call = EVERY[name]
    same(call.run(*call.tensors), call.right(*call.tensors))
    assert gradcheck(
        call.run, leaves(call), check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert gradgradcheck(call.run, leaves(call), check_batched_grad=True)


# What autograd makes of a function: each gives what must be the same for both sides of a call.

Function = Callable[..., Any]


def upstream(call: Call, n: int | None = None) -> list[Tensor]:
    """A gradient of each output, or n of them."""
    shapes = [y.shape for y in as_tuple(call.right(*call.tensors))]
    many = () if n is None else (n,)
    return [draw(*many, *shape, dtype=F64, seed=40 + k) for k, shape in enumerate(shapes)]


def again(grads: Any, given: list[Tensor]) -> Any:
    """The gradients of something made of gradients, where there are any."""
    total = sum(grad.sin().sum() for grad in grads)
    if not total.requires_grad:
        return ()
    return torch.autograd.grad(total, given, materialize_grads=True)


def twice(call: Call, function: Function, many: int | None = None) -> Any:
    """Gradients that are differentiated, of one upstream gradient or of several at once."""
    given, dy = leaves(call), upstream(call, many)
    outputs = as_tuple(function(*given))
    options: dict[str, Any] = {"is_grads_batched": many is not None, "materialize_grads": True}
    grads = torch.autograd.grad(outputs, given, dy, create_graph=True, **options)
    return [grad.detach() for grad in grads], again(grads, given)


def mapped(call: Call, function: Function, create_graph: bool) -> Any:
    """vmap of functorch over backward, of a graph that was made before."""
    given = leaves(call)
    outputs = as_tuple(function(*given))

    def backward(*dy: Tensor) -> Any:
        return torch.autograd.grad(
            outputs, given, dy, retain_graph=True, create_graph=create_graph,
            materialize_grads=True,
        )  # fmt: skip

    return torch.vmap(backward)(*upstream(call, 2))


def with_a_tangent(call: Call, function: Function) -> Any:
    """Of the upstream gradient, where the graph was made before there were any."""
    given, dy = leaves(call), upstream(call)
    outputs = as_tuple(function(*given))
    with fwad.dual_level():
        duals = [fwad.make_dual(d, d.cos()) for d in dy]
        grads = torch.autograd.grad(outputs, given, duals)
        return [tuple(fwad.unpack_dual(grad)) for grad in grads]


def total(function: Function) -> Callable[..., Tensor]:
    return lambda *given: sum(y.sin().sum() for y in as_tuple(function(*given)))  # type: ignore[return-value]


def all_of(call: Call) -> tuple[int, ...]:
    return tuple(range(len(call.tensors)))


def stacked(call: Call) -> tuple[Tensor, ...]:
    return tuple(torch.stack([t, 2 * t, t + 1]) for t in call.tensors)


MADE: dict[str, Callable[[Call, Function], Any]] = {
    "create_graph": twice,
    "is_grads_batched, create_graph": lambda c, f: twice(c, f, 2),
    "vmap over backward": lambda c, f: mapped(c, f, False),
    "vmap over backward, create_graph": lambda c, f: mapped(c, f, True),
    "a tangent of the upstream": with_a_tangent,
    **{
        f"jacobian, vectorize, {mode}": lambda c, f, mode=mode: jacobian(
            f, c.tensors, vectorize=True, strategy=mode
        )
        for mode in ("reverse-mode", "forward-mode")
    },
    **{
        f"hessian, vectorize, {mode}": lambda c, f, mode=mode: hessian(
            total(f), c.tensors, vectorize=True, outer_jacobian_strategy=mode
        )
        for mode in ("reverse-mode", "forward-mode")
    },
    "jacrev": lambda c, f: torch.func.jacrev(f, argnums=all_of(c))(*c.tensors),
    "jacfwd": lambda c, f: torch.func.jacfwd(f, argnums=all_of(c))(*c.tensors),
    "func.hessian": lambda c, f: torch.func.hessian(total(f), argnums=all_of(c))(*c.tensors),
    "jvp": lambda c, f: torch.func.jvp(f, c.tensors, tuple(t.cos() for t in c.tensors)),
    "vmap": lambda c, f: torch.vmap(f)(*stacked(c)),
    "vmap of grad": lambda c, f: torch.vmap(torch.func.grad(total(f), argnums=all_of(c)))(
        *stacked(c)
    ),
}


def check(call: Call, how: str, candidate: Function | None = None) -> None:
    same(MADE[how](call, candidate or call.run), MADE[how](call, call.right))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms(name: str) -> None:
    for how in MADE:
        check(FUNCTIONS[name], how)


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_move_under_forward_mode(training: bool) -> None:
    """As torch's, and no tangent is left in them."""
    v, tangent = draw(3, 4, dtype=F64), draw(3, 4, dtype=F64, seed=1)
    found = []
    for f in (functional, torch.nn.functional):
        running = (torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64))
        with fwad.dual_level():
            y = f.batch_norm(fwad.make_dual(v, tangent), *running, training=training)
            found.append([*fwad.unpack_dual(y), *running])
            assert all(fwad.unpack_dual(t).tangent is None for t in running)
    same(*found)


# Dtypes beside each other: whatever runs, the result is of the same dtype and near the same.

LOW, WIDE = torch.bfloat16, torch.float32
MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layer_norm": lambda v, w: functional.layer_norm(v, (4,), w),
    "rms_norm": lambda v, w: functional.rms_norm(v, (4,), w),
    "add_rms_norm": lambda v, w: functional.add_rms_norm(v, v.float(), (4,), w)[0],
    "group_norm": lambda v, w: functional.group_norm(v, 2, w),
    "batch_norm": lambda v, w: functional.batch_norm(v, None, None, w, training=True),
    "batch_norm, given": lambda v, w: functional.batch_norm(v, w.detach(), w.detach() ** 2, w),
    "cross_entropy": lambda v, w: functional.cross_entropy(
        v, torch.tensor([0, 2, 3]), w.detach().abs(), z_loss=0.1
    ),
}


@pytest.mark.parametrize(("of_x", "of_weight"), [(LOW, WIDE), (WIDE, LOW), (WIDE, F64)], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes(name: str, of_x: torch.dtype, of_weight: torch.dtype) -> None:
    function = MIXED[name]
    v, w = draw(3, 4, dtype=of_x), (draw(4, seed=1) + 2).to(of_weight)
    given = [v.clone().requires_grad_(), w.clone().requires_grad_()]
    y = function(*given)
    dy = draw(*y.shape, dtype=y.dtype, seed=2)

    def grads(**options: Any) -> list[Any]:
        found = torch.autograd.grad(y, given, dy, allow_unused=True, retain_graph=True, **options)
        return [g if g is None else g.detach() for g in found]

    tolerance = 0.03 if LOW in (of_x, of_weight) else 1e-5
    near = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(grads(create_graph=True), grads(), **near)
    expected = y.detach()
    torch.testing.assert_close(torch.vmap(function)(v[None], w[None])[0], expected, **near)
    primal, _ = torch.func.jvp(function, (v, w), (v, w))
    torch.testing.assert_close(primal, expected, **near)


# Arguments that depend on each other: a gradient by one is not that by the other as well.


@pytest.mark.parametrize("of_itself", [True, False], ids=["given twice", "computed from it"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_arguments_that_depend_on_each_other(create_graph: bool, of_itself: bool) -> None:
    w = draw(4, dtype=F64) + 1
    calls: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
        "layer_norm": lambda f, w, v: f.layer_norm(w + draw(3, 4, dtype=F64), (4,), w, v),
        "batch_norm": lambda f, w, v: f.batch_norm(
            draw(3, 4, dtype=F64) * w, None, None, w, v, True
        ),
        "rms_norm": lambda f, w, v: f.rms_norm(v * draw(3, 4, dtype=F64), (4,), w),
    }
    for call in calls.values():
        found = []
        for f in (functional, torch.nn.functional):
            leaf = w.clone().requires_grad_()
            y = call(f, leaf, leaf if of_itself else leaf.sin()).sin().sum()
            found.append(torch.autograd.grad(y, leaf, create_graph=create_graph)[0].detach())
        same(*found)


# Deliberately wrong candidates.


class _Constant(torch.autograd.Function):
    """Its gradient is a number to whoever differentiates it."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(v, w)
        return FUNCTIONS["group_norm (3, 4)"].right(v, w)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        v, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = FUNCTIONS["group_norm (3, 4)"].right(v, w)
            return torch.autograd.grad(y, (v, w), dy)


def test_a_gradient_without_a_graph_is_refused() -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check(FUNCTIONS["group_norm (3, 4)"], "create_graph", _Constant.apply)


def test_a_batch_taken_for_images_is_refused() -> None:
    def wrong(v: Tensor, w: Tensor) -> Tensor:
        return (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt() * w

    for how in ("vmap", "jacrev"):
        with pytest.raises(AssertionError):
            check(FUNCTIONS["group_norm (3, 4)"], how, wrong)
