"""add_layer_norm and add_rms_norm: against float64 and torch's ops one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import gradcheck, gradgradcheck

from fastopt import functional
from fastopt.functional.dropout import dropped, mask
from fastopt.nn import AddLayerNorm, AddRMSNorm
from tests.rows import oracle
from tests.rows.cases import draw, same
from tests.rows.oracle import Bounds, same_bits
from tests.rows.subject import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

Values = dict[str, Tensor]
SEED = torch.tensor(7)
EPS = 1e-5
NORMS = (False, True)
IDS = {False: "add_layer_norm", True: "add_rms_norm"}.get


@dataclass(frozen=True)
class Case:
    """A call, and the gradients of both that it returns; None: it has none."""

    rms: bool
    x: Tensor
    residual: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor | None
    dsum: Tensor | None
    p: float = 0.0
    offset: float = 0.0

    @property
    def given(self) -> Values:
        found = {"x": self.x, "residual": self.residual, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def cast(self, dtype: torch.dtype) -> Case:
        tensors = {**self.given, "dy": self.dy, "dsum": self.dsum}
        return replace(self, **{k: None if t is None else t.to(dtype) for k, t in tensors.items()})


def make(
    rms: bool, *shape: int, dtype: torch.dtype = torch.float32, p: float = 0.0, **other: Any
) -> Case:
    x, residual, dy, dsum = (draw(*shape, dtype=dtype, seed=seed) for seed in range(4))
    weight, bias = (draw(shape[-1], dtype=dtype, seed=seed) for seed in (4, 5))
    case = Case(rms, x, residual, weight + 1, None if rms else bias, dy, dsum, p)
    return replace(case, **other)


def ours(case: Case, x: Tensor, residual: Tensor, **weights: Tensor) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"eps": EPS, "dropout_p": case.p, "seed": SEED, **weights}
    if case.rms:
        options["weight_offset"] = case.offset
        return functional.add_rms_norm(x, residual, x.shape[-1:], **options)
    return functional.add_layer_norm(x, residual, x.shape[-1:], **options)


def two_ops(
    case: Case,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    stored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch's, one after the other; stored: the sum that the norm is to be taken of."""
    total = dropped(x, SEED if case.p else None, x.shape[-1], case.p) + residual
    of = total if stored is None else total + (stored.to(total.dtype) - total).detach()
    if not case.rms:
        return F.layer_norm(of, x.shape[-1:], weight, bias, EPS), total
    weight = weight if weight is None or not case.offset else weight + case.offset
    return F.rms_norm(of, x.shape[-1:], weight, EPS), total


def run(case: Case, function: Callable[..., tuple[Tensor, Tensor]], **more: Any) -> Values:
    """y, sum and the gradients of all that is given."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.given.items()}
    y, total = function(case, **leaves, **more)
    found = {"y": y.detach(), "sum": total.detach()}
    pairs = [(out, grad) for out, grad in ((y, case.dy), (total, case.dsum)) if grad is not None]
    outputs, upstream = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    found |= {f"d{k}": grad for k, grad in zip(leaves, grads, strict=True) if grad is not None}
    return found


def check(case: Case, function: Callable[..., tuple[Tensor, Tensor]] = ours) -> Values:
    """Ours is as near to float64 as torch's two ops are: y of the sum that is stored."""
    mine, torchs = run(case, function), run(case, two_ops)
    exact = run(case.cast(torch.float64), two_ops, stored=mine["sum"])
    for name, value in mine.items():
        assert value.dtype == case.x.dtype, name
        assert value.shape == exact[name].shape, name
        dims = () if name in ("dweight", "dbias") else (-1,)
        # y of torch is the norm of torch's sum, which may be rounded the other way.
        theirs = torchs[name] if name == "sum" or not case.p else exact[name].to(value.dtype)
        bounds = Bounds(dims, luck=1.0 if case.p == 0 else 4.0)
        oracle.assert_not_worse(name, value, theirs, exact[name], value.dtype, bounds)
    return mine


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", NORMS, ids=IDS)
def test_random(rms: bool, dtype: torch.dtype) -> None:
    for shape in ((37, 781), (130, 7)):
        check(make(rms, *shape, dtype=dtype))


@pytest.mark.parametrize(("dtype", "rms"), [(torch.float32, False), (torch.bfloat16, True)])
def test_with_dropout(dtype: torch.dtype, rms: bool) -> None:
    found = check(make(rms, 37, 67, dtype=dtype, p=0.3))
    kept = mask(SEED, 37, 67, 0.3)
    assert found["dx"][~kept].eq(0).all()
    assert found["dx"][kept].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rms", NORMS, ids=IDS)
def test_it_is_the_two_functions_bit_for_bit(rms: bool, dtype: torch.dtype) -> None:
    case = make(rms, 37, 781, dtype=dtype)
    y, total = ours(case, **case.given)
    assert same_bits(total, case.x + case.residual)
    norm = functional.rms_norm if rms else functional.layer_norm
    weights = {k: t for k, t in case.given.items() if k in ("weight", "bias")}
    assert same_bits(y, norm(total, (781,), **weights, eps=EPS))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("which", ["dy", "dsum"])
def test_only_one_of_the_two_has_a_gradient(which: str, p: float) -> None:
    case = make(False, 9, 67, p=p, **{which: None})
    found, exact = run(case, ours), run(case.cast(torch.float64), two_ops)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias"])
def test_each_gradient_alone(wanted: str) -> None:
    case = make(False, 9, 67, p=0.3)
    whole = run(case, ours)
    given = {k: t.detach().requires_grad_(k == wanted) for k, t in case.given.items()}
    y, total = ours(case, **given)
    (grad,) = torch.autograd.grad((y, total), given[wanted], (case.dy, case.dsum))
    assert same_bits(grad, whole[f"d{wanted}"])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_residual_stream_of_another_dtype(p: float) -> None:
    """bfloat16 joins float32: the sum is float32, each gradient of the dtype of what it is of."""
    case = make(False, 37, 67, p=p)
    low = replace(case, x=case.x.bfloat16())
    found = run(low, ours)
    assert found["sum"].dtype is found["y"].dtype is found["dresidual"].dtype is torch.float32
    assert found["dx"].dtype is torch.bfloat16
    exact = run(low.cast(torch.float64), two_ops)
    torch.testing.assert_close(found["y"].double(), exact["y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["dx"].double(), exact["dx"], rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(
        found["dresidual"].double(), exact["dresidual"], rtol=1e-4, atol=1e-5
    )


# Sums in any layout, in any number of threads.


def test_threads_and_runs() -> None:
    before = torch.get_num_threads()
    for shape in ((1003, 67), (3, 30_001)):
        case, found = make(False, *shape, p=0.3), []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(run(case, ours))
        torch.set_num_threads(before)
        for other in found[1:]:
            assert all(same_bits(value, other[name]) for name, value in found[0].items())


def test_layouts() -> None:
    case = make(False, 12, 67, p=0.3)
    right = run(case, ours)
    wide = torch.zeros(12, 80)
    wide[:, 3:70] = case.x
    columns = case.residual.t().contiguous().t()
    found = run(
        replace(case, x=wide[:, 3:70], residual=columns, dy=case.dy.t().contiguous().t()), ours
    )  # type: ignore[union-attr]
    assert all(same_bits(value, found[name]) for name, value in right.items())
    one = replace(case, residual=case.residual[:1].expand(12, 67), dy=torch.ones(()).expand(12, 67))
    dense = replace(one, residual=one.residual.clone(), dy=torch.ones(12, 67))
    right = run(dense, ours)
    assert all(same_bits(value, right[name]) for name, value in run(one, ours).items())


def test_rows_of_several_dims_and_empty_ones() -> None:
    x, residual = draw(5, 3, 4), draw(5, 3, 4, seed=1)
    y, total = functional.add_layer_norm(x, residual, (3, 4))
    torch.testing.assert_close(y, F.layer_norm(total, (3, 4)))
    for shape in ((0, 5), (3, 0), (2, 0, 5)):
        x, weight = torch.empty(shape, requires_grad=True), torch.ones(shape[-1:]).requires_grad_()
        y, total = functional.add_rms_norm(x, x, shape[-1:], weight, dropout_p=0.5)
        assert y.shape == total.shape == shape
        grads = torch.autograd.grad((y, total), (x, weight), (torch.ones(shape),) * 2)
        assert grads[1].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_offset(dtype: torch.dtype) -> None:
    """Added in float32: a bfloat16 weight of 1e-3 beside 1 is not lost."""
    weight = draw(67, dtype=dtype, scale=1e-3)
    check(replace(make(True, 37, 67, dtype=dtype), offset=1.0, weight=weight))
    x = draw(37, 67, dtype=dtype).requires_grad_()
    y = functional.rms_norm(x, (67,), weight, EPS, weight_offset=1.0)
    wide = x.detach().double().requires_grad_()
    exact = F.rms_norm(wide, (67,), weight.double() + 1.0, EPS)
    room = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=room, atol=room)
    dy = draw(37, 67, dtype=dtype, seed=1)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (right,) = torch.autograd.grad(exact, wide, dy.double())
    torch.testing.assert_close(dx.double(), right, rtol=4 * room, atol=4 * room)


# Derivatives, transforms, compilation.


@pytest.mark.parametrize(("rms", "p"), [(False, 0.0), (True, 0.4)])
def test_derivatives(rms: bool, p: float) -> None:
    case = make(rms, 4, 3, dtype=torch.float64, p=p)
    leaves = tuple(tensor.requires_grad_() for tensor in case.given.values())

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ours(case, **dict(zip(case.given, tensors, strict=True)))

    def composed(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return two_ops(case, **dict(zip(case.given, tensors, strict=True)))

    assert gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, leaves)
    plain = tuple(leaf.detach() for leaf in leaves)
    tangents = tuple(draw(*t.shape, dtype=t.dtype, seed=9) for t in plain)
    same(torch.func.jvp(call, plain, tangents), torch.func.jvp(composed, plain, tangents))
    many = tuple(torch.stack([t, 2 * t]) for t in plain)
    same(torch.vmap(call)(*many), torch.vmap(composed)(*many))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = AddLayerNorm(8, dropout_p=0.2)
        self.rms = AddRMSNorm(8, weight_offset=1.0)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y, total = self.norm(self.first(x), residual)
        y, total = self.rms(y, total)
        return (y * total).sin().sum()


def test_one_graph_and_the_same_numbers() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, example)

    torch.manual_seed(0)
    model, x, residual = Model(), draw(4, 6), draw(4, 8)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = []
    for function in (model, compiled):
        torch.manual_seed(5)
        model.zero_grad()
        function(x, residual).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    same(*found)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_ops_pass_opcheck(p: float) -> None:
    case, seed = make(False, 4, 5, p=p), SEED if p else None
    args = (*(t.detach().requires_grad_() for t in case.given.values()), seed, 1, EPS, 0.0, p, True)
    torch.library.opcheck(torch.ops.fastopt.add_norm, args)
    _, total, stats = (t.detach() for t in torch.ops.fastopt.add_norm(*args))
    options = (seed, 1, 0.0, p, True, torch.float32, torch.float32, [True] * 4)
    given = (case.dy, case.dsum, total, case.weight, case.bias, stats, *options)
    torch.library.opcheck(torch.ops.fastopt.add_norm_backward, given)


def test_modules() -> None:
    x, residual = draw(4, 3, 5), draw(4, 3, 5, seed=1)
    for ours_, theirs in ((AddLayerNorm, nn.LayerNorm), (AddRMSNorm, nn.RMSNorm)):
        module, norm = ours_((3, 5), dropout_p=0.5).eval(), theirs((3, 5))
        assert list(module.state_dict()) == list(norm.state_dict())
        y, total = module(x, residual)
        torch.testing.assert_close((y, total), (norm(x + residual), x + residual))
        assert "dropout_p=0.5" in repr(module)


# Errors.

X, W = draw(2, 3), torch.ones(3)
BAD: dict[str, tuple[type[Exception], tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "shapes that differ": (RuntimeError, (X, X[:1], (3,)), {}, ("residual", r"\(2, 3\)", "Expand")),
    "another normalized_shape": (RuntimeError, (X, X, (4,)), {}, (r"\(4,\)", r"\(2, 3\)")),
    "no normalized_shape": (RuntimeError, (X, X, ()), {}, ("normalized_shape",)),
    "weight of another shape": (RuntimeError, (X, X, (3,), W[:2]), {}, ("weight", r"\(3,\)")),
    "integers": (RuntimeError, (X.int(), X, (3,)), {}, ("int32", "float32", "bfloat16")),
    "another device": (RuntimeError, (X, X.to("meta"), (3,)), {}, ("meta", "cpu")),
    "no tensor": (TypeError, (X, [1.0], (3,)), {}, ("residual", "list")),
    "p above 1": (ValueError, (X, X, (3,)), {"dropout_p": 1.5}, ("between 0 and 1", "1.5")),
    "p is NaN": (ValueError, (X, X, (3,)), {"dropout_p": float("nan")}, ("between 0 and 1",)),
    "seed of two": (
        ValueError, (X, X, (3,)), {"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, ("int64",),
    ),
    "seed too large": (ValueError, (X, X, (3,)), {"dropout_p": 0.5, "seed": 2**63}, ("64 bits",)),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_refused(name: str, what: str) -> None:
    kind, arguments, options, says = BAD[what]
    with pytest.raises(kind) as caught:
        getattr(functional, name)(*arguments, **options)
    for text in (name, *says):
        caught.match(text)


# Deliberately wrong candidates.


def _residual_dropped_too(case: Case, **given: Tensor) -> tuple[Tensor, Tensor]:
    x, residual, *others = given.values()
    nothing = torch.zeros_like(residual)
    return two_ops(case, x + residual, nothing, *others)


def _not_made_up_for(case: Case, **given: Tensor) -> tuple[Tensor, Tensor]:
    x, *others = given.values()
    kept = mask(SEED, prod(x.shape[:-1]), x.shape[-1], case.p)
    return two_ops(replace(case, p=0.0), x * kept, *others)


def _sum_without_gradient(case: Case, **given: Tensor) -> tuple[Tensor, Tensor]:
    y, total = two_ops(case, **given)
    return y, total.detach() + 0 * y


WRONG = {
    "residual dropped too": (_residual_dropped_too, make(False, 37, 67, p=0.3)),
    "what is dropped not made up for": (_not_made_up_for, make(False, 37, 67, p=0.3)),
    "no gradient through the sum": (_sum_without_gradient, make(True, 37, 67)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_candidate_is_refused(kind: str) -> None:
    candidate, case = WRONG[kind]
    with pytest.raises(AssertionError):
        check(case, candidate)
