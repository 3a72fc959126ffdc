"""scaled_masked_softmax: against float64 and torch's scale, mask and softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import gradcheck, gradgradcheck

from fastopt import functional
from fastopt.functional import masked_softmax as ops
from tests.rows import oracle
from tests.rows.cases import draw, same
from tests.rows.oracle import Bounds, same_bits
from tests.rows.subject import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

INF, NAN = float("inf"), float("nan")
SHAPE = (2, 3, 17, 37)
ours = functional.scaled_masked_softmax
Softmax = Callable[..., Tensor]


def flags(*shape: int, share: float = 0.6) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) < share


def torchs(x: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False) -> Tensor:
    """One op after the other; rows of which nothing is left are NaN."""
    scores = x * scale
    if mask is not None:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -INF) if boolean else scores + mask.to(x.dtype)
    if is_causal:
        right = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(right, -INF)
    return torch.softmax(scores, -1)


MASKS: dict[str, Tensor | None] = {
    "none": None,
    "over heads": flags(2, 1, 17, 37),
    "of keys": flags(2, 1, 1, 37),
    "of queries": flags(17, 1) | flags(17, 1, share=1.0),
    "of heads and batches": flags(2, 3, 1, 37),
    "one for all": torch.tensor(True),
    "two dims": flags(17, 37),
    "transposed": flags(37, 17).t(),
    "few left": flags(*SHAPE, share=0.04),
    "added": draw(2, 1, 17, 37, seed=3),
    "added, some -inf": torch.where(flags(17, 37), 0.0, -INF),
}


def run(function: Softmax, x: Tensor, dy: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf, *args)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def check(function: Softmax, x: Tensor, mask: Tensor | None, is_causal: bool = False) -> None:
    """As near to float64 as torch is; rows of which nothing is left are 0, gradients too."""
    args, dy = (0.3, is_causal), draw(*x.shape, dtype=x.dtype, seed=1)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = run(torchs, x.double(), dy.double(), wide, *args)
    nothing = exact[0].isnan().all(-1, keepdim=True)
    rounded = None if mask is None else mask if mask.dtype == torch.bool else mask.to(x.dtype)
    theirs = run(torchs, x, dy, rounded, *args)
    mine = run(function, x, dy, rounded, *args)
    for name, value, other, right in zip(("y", "dx"), mine, theirs, exact, strict=True):
        assert value.dtype == x.dtype, name
        assert value[nothing.expand_as(value)].eq(0).all(), name
        right, other = (t.masked_fill(nothing, 0.0) for t in (right, other))
        # dx = scale y (dy - sum dy y): what cancels in a row of few was as large as dy.
        bounds = Bounds((-1,), floor=0.1, luck=1.5)
        oracle.assert_not_worse(name, value, other, right, x.dtype, bounds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ["over heads", "added"])
def test_random(what: str, dtype: torch.dtype) -> None:
    x = draw(*SHAPE, dtype=dtype, scale=3.0)
    check(ours, x, MASKS[what])
    check(ours, x, MASKS[what], is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("what", MASKS)
def test_masks_of_every_shape(what: str, is_causal: bool) -> None:
    check(ours, draw(*SHAPE, scale=3.0), MASKS[what], is_causal)


def test_masks_are_not_expanded() -> None:
    """What broadcasts has strides of 0; only columns apart from each other are copied."""
    for what in ("over heads", "of keys", "of heads and batches", "two dims", "few left"):
        given = MASKS[what]
        assert given is not None
        walked, walk = ops.walk_of(given, SHAPE)
        assert walked.data_ptr() == given.data_ptr()
        assert 0 in walk[2:] or what == "few left"
    five = flags(2, 1, 3, 1, 4, 5)
    x = draw(2, 2, 3, 2, 4, 5)
    y = ours(x, five)
    same(y, ours(x, five.expand(x.shape).contiguous()))


def test_causal_is_that_of_attention() -> None:
    """More columns than rows and fewer: counted from the top left."""
    for shape in ((2, 5, 9), (2, 9, 5)):
        q, k = draw(2, shape[1], 4), draw(2, shape[2], 4, seed=1)
        v = torch.eye(shape[2]).expand(2, -1, -1)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(ours(q @ k.mT, None, 0.5, True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_on_which_kernels_go_wrong(dtype: torch.dtype) -> None:
    rows = {
        "NaN that is left out": ([NAN, 1.0, 2.0], [False, True, True], False),
        "NaN": ([NAN, 1.0, 2.0], [True, True, False], True),
        "NaN beside -inf alone": ([NAN, -INF, -INF], [True, True, True], True),
        "+inf that is left out": ([INF, 1.0, 2.0], [False, True, True], False),
        "+inf": ([INF, 1.0, 2.0], [True, True, True], True),
        "-inf": ([-INF, 1.0, 2.0], [True, True, True], False),
        "large": ([65504.0, 1.0, -65504.0], [True, True, True], False),
    }
    for name, (row, kept, is_nan) in rows.items():
        for sign in (1.0, -1.0):  # a negative NaN too
            x = torch.tensor([row] * 2, dtype=dtype)
            x = torch.where(x.isnan(), sign * x, x)
            y = ours(x, torch.tensor(kept), 1.0)
            assert bool(y.isnan().all()) == is_nan, name
            if not is_nan:
                torch.testing.assert_close(y, torchs(x, torch.tensor(kept), 1.0))
    assert ours(torch.full((2, 3), -INF, dtype=dtype)).eq(0).all()
    x = draw(4, 5, dtype=dtype)
    torch.testing.assert_close(ours(x, scale=-2.0), torch.softmax(-2 * x, -1))


def test_a_row_beside_a_spoilt_one_and_threads() -> None:
    before, x = torch.get_num_threads(), draw(300, 129)
    kept, found = flags(300, 129), []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        found.append(ours(x, kept))
    torch.set_num_threads(before)
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])
    assert same_bits(ours(x[7:8].clone(), kept[7:8]), found[0][7:8])


def test_layouts_and_empty_ones() -> None:
    x = draw(2, 37, 17, 3).permute(0, 3, 2, 1)
    kept = MASKS["over heads"]
    assert same_bits(ours(x, kept), ours(x.contiguous(), kept))
    wide = draw(2, 3, 17, 40)
    assert same_bits(ours(wide[..., :37], kept), ours(wide[..., :37].contiguous(), kept))
    for shape in ((0, 5), (3, 0)):
        x = torch.empty(shape, requires_grad=True)
        y = ours(x, torch.ones(shape[-1:], dtype=torch.bool))
        assert y.shape == shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


# Derivatives, transforms, compilation.


@pytest.mark.parametrize("what", ["boolean", "added"])
def test_derivatives(what: str) -> None:
    """By x, and by a mask that is added, as a learned bias is; rows of nothing among them."""
    x = draw(2, 3, 4, dtype=torch.float64).requires_grad_()
    kept = flags(3, 4)
    kept[1] = False
    leaves: tuple[Tensor, ...] = (x,)
    if what == "added":
        leaves = (x, draw(3, 4, dtype=torch.float64, seed=2).requires_grad_())

    def call(x: Tensor, added: Tensor | None = None) -> Tensor:
        return ours(x, kept if added is None else added, 0.7, is_causal=True)

    assert gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, leaves)
    (alone,) = torch.autograd.grad(call(*leaves).sin().sum(), leaves[-1])
    many = tuple(torch.stack([t, 2 * t]).detach() for t in leaves)
    looped = torch.stack([call(*each) for each in zip(*many, strict=True)])
    same(torch.vmap(call)(*many), looped)
    assert alone.shape == leaves[-1].shape


def test_one_graph_and_the_same_numbers() -> None:
    torch._dynamo.reset()
    x, added = draw(2, 5, 6).requires_grad_(), draw(5, 6, seed=1).requires_grad_()

    def function(x: Tensor, added: Tensor) -> Tensor:
        y = ours(x, added.detach() > 0, 0.5) + ours(x, added, 2.0, is_causal=True)
        return y.sin().sum()

    compiled = torch.compile(function, backend=aot_eager, fullgraph=True)
    found = [torch.autograd.grad(f(x, added), (x, added)) for f in (function, compiled)]
    same(*found)
    torch._dynamo.reset()


def test_ops_pass_opcheck() -> None:
    x, dy = draw(2, 3, 4).requires_grad_(), draw(2, 3, 4, seed=1)
    for given in (flags(3, 4), draw(3, 4, seed=2).requires_grad_()):
        torch.library.opcheck(torch.ops.fastopt.masked_softmax, (x, given, 0.5, True))
    args = (dy, ours(x.detach()), 0.5)
    torch.library.opcheck(torch.ops.fastopt.masked_softmax_backward, args)


# Errors.

X = draw(2, 3)
BAD: dict[str, tuple[type[Exception], tuple[Any, ...], tuple[str, ...]]] = {
    "integers": (RuntimeError, (X.int(),), ("int32", "float32", "bfloat16")),
    "a mask of integers": (RuntimeError, (X, X.int()), ("int32", "boolean")),
    "a mask that does not broadcast": (RuntimeError, (X, X[:, :2]), (r"\(2, 2\)", r"\(2, 3\)")),
    "a mask of more dims": (RuntimeError, (X, X[None]), (r"\(1, 2, 3\)", "broadcast")),
    "a mask elsewhere": (RuntimeError, (X, X.to("meta")), ("meta", "cpu")),
    "no tensor": (TypeError, ([1.0],), ("list",)),
    "a mask that is none": (TypeError, (X, [True]), ("mask", "list")),
    "causal of one dim": (RuntimeError, (X[0], None, 1.0, True), ("at least 2", "is_causal")),
    "a scalar": (RuntimeError, (X[0, 0],), ("at least 1",)),
}


@pytest.mark.parametrize("what", BAD)
def test_refused(what: str) -> None:
    kind, arguments, says = BAD[what]
    with pytest.raises(kind) as caught:
        ours(*arguments)
    for text in ("scaled_masked_softmax", *says):
        caught.match(text)


# Deliberately wrong candidates.

WRONG: dict[str, Softmax] = {
    "mask of the wrong sense": lambda x, mask, *args: ours(x, ~mask, *args),
    "rows of nothing are uniform": lambda x, mask, scale, causal: torch.softmax(
        (x * scale).masked_fill(~mask, -1e30), -1
    ),
    "scale forgotten": lambda x, mask, scale, causal: ours(x, mask, 1.0, causal),
    "gradient not scaled": lambda x, mask, scale, causal: ours(
        x.detach() * scale + (x - x.detach()), mask
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_candidate_is_refused(kind: str) -> None:
    with pytest.raises(AssertionError):
        check(WRONG[kind], draw(*SHAPE), MASKS["few left"])
