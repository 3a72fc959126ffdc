"""linear_cross_entropy: backward again, derivatives of any order and kind, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastopt.functional import linear_cross_entropy, logit_chunks
from tests.rows import oracle
from tests.rows.cases import draw, same, targets
from tests.rows.test_linear_cross_entropy import BOTH, WANTED, N, ask, unfused

# torch's own forward derivatives are scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several, and a last one that is short."""
    monkeypatch.setitem(logit_chunks.CHUNK, "cpu", 8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_twice_is_the_same_as_once(dtype: torch.dtype, reduction: str) -> None:
    """Also where the caller has written over the first gradient, and where other upstream gradients
    come in between."""
    made = ask(dtype, reduction=reduction)
    given = {k: x.clone() if x is not None else None for k, x in made.inputs.items()}
    leaves = [given[key].requires_grad_() for key in WANTED]  # type: ignore[union-attr]
    loss = linear_cross_entropy(**given, reduction=reduction)  # type: ignore[arg-type]
    ones = torch.ones_like(loss)
    first = torch.autograd.grad(loss, leaves, ones, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(3)
    torch.autograd.grad(loss, leaves, 5 * ones, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, ones)
    assert all(map(oracle.same_bits, kept, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves, ones)
    assert all(oracle.same_bits(given[k], x) for k, x in made.inputs.items() if x is not None)


def test_gradients_add_up_over_micro_batches() -> None:
    made = ask()
    w = made.inputs["linear_weight"].clone().requires_grad_()  # type: ignore[union-attr]
    for _ in range(2):
        loss = linear_cross_entropy(made.inputs["input"], w, made.inputs["target"])  # type: ignore[arg-type]
        loss.backward(retain_graph=True)
        loss.backward()
    once = ask(bias=False, wanted=("linear_weight",)).run(linear_cross_entropy)[
        "grad linear_weight"
    ]
    torch.testing.assert_close(w.grad, 4 * once / made.upstream)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_of_any_kind(reduction: str) -> None:
    x, w, b = (draw(*shape, dtype=torch.float64) for shape in ((9, 4), (3, 4), (3,)))
    target = targets(9, classes=3)
    target[1] = -100

    def call(function: Any) -> Any:
        def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            options = {"linear_bias": b, "reduction": reduction, **BOTH}
            return function(x, w, target, **options)  # type: ignore[no-any-return]

        return loss

    mine, right = call(linear_cross_entropy), call(unfused)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    assert gradcheck(mine, leaves, check_batched_grad=True)
    assert gradgradcheck(mine, leaves)
    same(torch.func.jvp(mine, (x, w, b), (x, w, b)), torch.func.jvp(right, (x, w, b), (x, w, b)))
    many = torch.stack([x, 2 * x])
    dims = (0, None, None)
    same(torch.vmap(mine, dims)(many, w, b), torch.vmap(right, dims)(many, w, b))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_in_one_graph(reduction: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    made = ask(reduction=reduction, **BOTH)
    torch.testing.assert_close(made.run(compiled), made.run(linear_cross_entropy))


def test_the_ops_pass_opcheck() -> None:
    made = ask()
    x, w, t, b = (made.inputs[k] for k in ("input", "linear_weight", "target", "linear_bias"))
    numbers = (-100, 0.0, 0.02, 5.0, 8)
    leaves = [x.requires_grad_(), w.requires_grad_(), t, b.requires_grad_(), None]  # type: ignore[union-attr]
    for reduction in (0, 1):
        args = (*leaves, reduction, *numbers, torch.float32, [True] * 3)
        torch.library.opcheck(torch.ops.fastopt.linear_cross_entropy.default, args)
    plain = [None if x is None else x.detach() for x in leaves]
    args = (draw(N), *plain, *numbers, [True, True, False])
    torch.library.opcheck(torch.ops.fastopt.linear_cross_entropy_backward.default, args)


# A deliberately wrong candidate.


class _InPlace(torch.autograd.Function):
    """The gradient of forward, scaled where it lies: three times as large the second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            loss = F.cross_entropy(F.linear(leaf, w), t)
            (ctx.dx,) = torch.autograd.grad(loss, leaf)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:  # type: ignore[override]
        return ctx.dx.mul_(dloss), None, None


def test_a_gradient_damaged_in_place_is_seen() -> None:
    leaf = draw(5, 4).clone().requires_grad_()
    loss = _InPlace.apply(leaf, draw(3, 4), torch.tensor([0, 1, 2, 0, 1]))
    upstream = torch.tensor(3.0)
    grads = [torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0].clone() for _ in "12"]
    assert not oracle.same_bits(*grads)
