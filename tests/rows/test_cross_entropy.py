"""cross_entropy: every kind of target, weight and reduction, never less precise than torch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tests.rows import cases, oracle
from tests.rows.cases import draw, probabilities, targets, with_upstream
from tests.rows.problem import Problem
from tests.rows.subject import DTYPES, MODULES, OURS, Function

REDUCTIONS = ("mean", "sum", "none")
# (C,), (N, C), (N, C, d1), (N, C, d1, d2); rows and columns of the kernels.
SHAPES = [(7,), (1, 7), (37, 67), (5, 130), (3, 7, 5), (3, 17, 4, 6), (2, 5, 1, 3, 2)]
WHATS: list[dict[str, Any]] = [
    {},
    {"weight": True},
    {"label_smoothing": 0.1},
    {"weight": True, "label_smoothing": 0.3},
    {"label_smoothing": 1.0},
]
NAMES_OF_WHATS = ["plain", "weight", "smoothing", "weight and smoothing", "smoothing 1"]


def ask(
    x: Tensor,
    target: Tensor | None = None,
    weight: bool = False,
    wanted: tuple[str, ...] = ("input",),
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A problem with a random upstream gradient; targets are class indices unless given."""
    at = min(1, x.dim() - 1)
    if target is None:
        shape = x.shape[:at] + x.shape[at + 1 :]
        target = targets(*shape, classes=x.shape[at], seed=seed)
    inputs: dict[str, Tensor | None] = {"input": x, "target": target}
    if weight:
        generator = torch.Generator().manual_seed(seed + 50)
        inputs["weight"] = (torch.rand(x.shape[at], generator=generator) + 0.5).to(x.dtype)
    return with_upstream(Problem("cross_entropy", inputs, options, wanted=wanted), seed)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("what", WHATS, ids=NAMES_OF_WHATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_indices(dtype: torch.dtype, what: dict[str, Any], reduction: str) -> None:
    for shape in SHAPES:
        x = draw(*shape, dtype=dtype, scale=3.0, seed=len(shape))
        oracle.check(ask(x, reduction=reduction, **what))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("what", WHATS, ids=NAMES_OF_WHATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities(dtype: torch.dtype, what: dict[str, Any], reduction: str) -> None:
    for shape in SHAPES:
        x = draw(*shape, dtype=dtype, scale=3.0, seed=len(shape))
        target = probabilities(x, min(1, x.dim() - 1))
        oracle.check(ask(x, target, reduction=reduction, **what))


@pytest.mark.parametrize(
    "wanted", [("target",), ("weight",), ("input", "target", "weight")], ids=str
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_probabilities_and_of_their_weight(
    reduction: str, smoothing: float, wanted: tuple[str, ...]
) -> None:
    for shape, dtype in itertools.product([(37, 11), (3, 5, 7), (6,)], DTYPES):
        x = draw(*shape, dtype=dtype)
        target = probabilities(x, min(1, x.dim() - 1))
        made = ask(x, target, True, wanted, reduction=reduction, label_smoothing=smoothing)
        oracle.check(made)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_precision_over_many_elements(dtype: torch.dtype, scale: float) -> None:
    """Logits of every size; the target is the largest of its row in half of them, so that the
    loss is what cancels."""
    x = draw(256, 129, dtype=dtype, scale=scale)
    target = torch.where(torch.arange(256) % 2 == 0, x.argmax(1), targets(256, classes=129))
    for what in WHATS[:4]:
        oracle.check(ask(x, target, reduction="none", **what))
    oracle.check(ask(x, x.argmax(1), reduction="none"))
    columns = x.view(4, 64, 129).transpose(1, 2).contiguous()
    oracle.check(ask(columns, target.view(4, 64), reduction="none"))


# ignore_index


@pytest.mark.parametrize("ignored", [-100, -1, 0, 3, 6, 1000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignore_index(reduction: str, ignored: int) -> None:
    """Negative, inside the range of the classes, beyond it."""
    for dtype, what in itertools.product(DTYPES, WHATS[:4]):
        x = draw(3, 7, 5, dtype=dtype)
        target = targets(3, 5, classes=7)
        target[1:, ::2] = ignored
        oracle.check(ask(x, target, reduction=reduction, ignore_index=ignored, **what))


@pytest.mark.parametrize("what", WHATS, ids=NAMES_OF_WHATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_targets_ignored(dtype: torch.dtype, reduction: str, what: dict[str, Any]) -> None:
    """The mean is 0 / 0: NaN, as torch has it; others give 0."""
    for shape in [(5, 7), (7,), (2, 7, 3)]:
        x = draw(*shape, dtype=dtype)
        made = ask(x, reduction=reduction, **what)
        target = torch.full_like(made.inputs["target"], -100)  # type: ignore[arg-type]
        made = with_upstream(replace(made, inputs={**made.inputs, "target": target}))
        found = oracle.check(made)
        assert bool(found["output"].isnan().all()) == (reduction == "mean")


def test_weights_that_sum_to_nothing() -> None:
    x = draw(4, 3)
    made = ask(x, reduction="mean")
    made = replace(made, inputs={**made.inputs, "weight": torch.zeros(3)})
    oracle.check(made)


def test_rows_that_are_ignored_get_no_gradient() -> None:
    """Exactly 0, also where the row's logits are large."""
    x = draw(6, 9, scale=50.0)
    target = torch.tensor([-100, 2, -100, 3, 4, -100])
    found = OURS["cross_entropy"](x.requires_grad_(), target, reduction="sum")
    (dx,) = torch.autograd.grad(found, x)
    assert dx[target == -100].eq(0).all()
    assert dx[target != -100].ne(0).any(1).all()


# The adversarial pack.


@pytest.mark.parametrize("what", cases.PACK)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_rows(dtype: torch.dtype, what: str) -> None:
    """Each with its first class, its last and its largest as the target, and with
    probabilities."""
    x = cases.pack(what, dtype)
    rows, classes = x.shape
    for target in (torch.zeros(rows).long(), torch.full((rows,), classes - 1), x.argmax(1)):
        oracle.check(ask(x, target, reduction="none"))
        oracle.check(ask(x, target, True, reduction="mean", label_smoothing=0.1))
    oracle.check(ask(x.t()[None].contiguous(), x.argmax(1)[None], reduction="none"))
    oracle.check(ask(x, probabilities(x), reduction="none"))


@pytest.mark.parametrize("what", ["1000, 990, 980", "one column", "1e30", "65504 of either sign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_near_zero_are_not_lost(dtype: torch.dtype, what: str) -> None:
    """lse - x_t in the dtype of x: at logits of 1000 a loss of 4.5e-5 comes out as 6.1e-5, and the
    gradient with it."""
    x = cases.pack(what, dtype)
    target = x.argmax(1)
    made = ask(x, target, reduction="none")
    found = made.run(OURS["cross_entropy"])
    torchs = made.run(F.cross_entropy)
    # One class cannot be told from none by a rounding: 1 is the size of what cancels.
    close = {"rtol": 0.0, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found["output"], torchs["output"], **close)
    size = made.upstream.abs().max()  # type: ignore[union-attr]
    torch.testing.assert_close(found["grad input"] / size, torchs["grad input"] / size, **close)


@pytest.mark.parametrize("shape", [(1, 1_000_000), (1_000_000, 1)], ids=str)
def test_a_million(shape: tuple[int, int]) -> None:
    oracle.check(ask(draw(*shape), reduction="none"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
def test_empty_batch(shape: tuple[int, ...], reduction: str) -> None:
    for dtype, what in itertools.product(DTYPES, WHATS):
        x = torch.empty(shape, dtype=dtype)
        oracle.check(ask(x, reduction=reduction, **what))
        oracle.check(ask(x, x.clone(), reduction=reduction, **what))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_classes(reduction: str) -> None:
    """There is no target but an ignored one."""
    x, target = torch.empty(3, 0), torch.full((3,), -100)
    oracle.check(ask(x, target, reduction=reduction))


# Other arguments.


def test_targets_of_bytes() -> None:
    x, target = draw(9, 7), targets(9, classes=7)
    made = ask(x, target, reduction="none")
    oracle.check(replace(made, inputs={"input": x, "target": target.to(torch.uint8)}))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_another_dtype(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """torch promotes: the loss is of the wider dtype, the gradient of the input's."""
    x = draw(5, 7, dtype=x_dtype)
    target = probabilities(x).to(dtype)
    sides = []
    for function in (OURS["cross_entropy"], F.cross_entropy):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, target)
        loss.backward()
        sides.append((loss.detach(), leaf.grad))
    (mine, dx), (torchs, dx_torch) = sides
    assert mine.dtype == torchs.dtype
    eps = torch.finfo(max(x_dtype, dtype, key=lambda d: torch.finfo(d).eps)).eps
    torch.testing.assert_close(mine, torchs, rtol=4 * eps, atol=eps)
    torch.testing.assert_close(dx, dx_torch, rtol=4 * eps, atol=eps)


@pytest.mark.parametrize("smoothing", [-0.5, float("nan")])
def test_smoothing_that_torch_takes_for_none(smoothing: float) -> None:
    x = draw(5, 7)
    made = ask(x, reduction="mean")
    expected = F.cross_entropy(x, made.inputs["target"], label_smoothing=smoothing)
    found = OURS["cross_entropy"](x, made.inputs["target"], label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_arguments(size_average: bool | None, reduce: bool | None) -> None:
    x, target = draw(5, 7), targets(5, classes=7)
    legacy = {"size_average": size_average, "reduce": reduce}
    if size_average is None and reduce is None:
        torch.testing.assert_close(
            OURS["cross_entropy"](x, target, **legacy), F.cross_entropy(x, target, **legacy)
        )
        return
    with pytest.warns(UserWarning, match="size_average and reduce"):
        expected = F.cross_entropy(x, target, **legacy)
    with pytest.warns(UserWarning, match="size_average and reduce"):
        found = OURS["cross_entropy"](x, target, **legacy)
    torch.testing.assert_close(found, expected)


def test_arguments_by_position() -> None:
    x, target, weight = draw(9, 7), targets(9, classes=7), draw(7).abs()
    rest = (weight, None, 3, None, "sum", 0.1)
    torch.testing.assert_close(
        OURS["cross_entropy"](x, target, *rest), F.cross_entropy(x, target, *rest)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_module(reduction: str) -> None:
    x, target, weight = draw(9, 7), targets(9, classes=7), draw(7).abs()
    arguments: dict[str, Any] = {
        "weight": weight, "ignore_index": 2, "reduction": reduction, "label_smoothing": 0.1,
    }  # fmt: skip
    ours = MODULES["CrossEntropyLoss"](**arguments)
    theirs = torch.nn.CrossEntropyLoss(**arguments)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(x, target), theirs(x, target))


# Bugs that others had.


def test_every_row_has_its_own_upstream_with_reduction_none() -> None:
    """Others scale all rows by the first row's gradient."""
    oracle.check(ask(draw(6, 9), reduction="none"))
    x = draw(6, 9).requires_grad_()
    loss = OURS["cross_entropy"](x, targets(6, classes=9), reduction="none")
    (dx,) = torch.autograd.grad(loss, x, torch.tensor([0.0, 1, 0, 2, 0, 0]))
    assert dx.abs().sum(1).ne(0).tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_is_the_same_as_once(reduction: str) -> None:
    """Where the gradient is made in place of the logits, the second backward is three times the
    first."""
    for weight in (False, True):
        made = ask(draw(6, 33), weight=weight, reduction=reduction)
        x = made.inputs["input"].clone().requires_grad_()  # type: ignore[union-attr]
        rest = {key: value for key, value in made.inputs.items() if key != "input"}
        loss = OURS["cross_entropy"](x, **rest, **made.options)
        first, second = (
            torch.autograd.grad(loss, x, made.upstream, retain_graph=True)[0] for _ in range(2)
        )
        assert oracle.same_bits(first, second)
        assert oracle.same_bits(x, made.inputs["input"])


def kept_for_backward(function: Function, x: Tensor, target: Tensor) -> int:
    """Elements that forward keeps beside the logits."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x, target)
    kept.pop(x.data_ptr(), None)
    return sum(kept.values())


def test_the_softmax_is_never_materialized() -> None:
    """A few numbers a row are kept beside the logits; torch keeps log_softmax."""
    x, target = draw(8, 5000).requires_grad_(), targets(8, classes=5000)
    assert kept_for_backward(OURS["cross_entropy"], x, target) < 100
    assert kept_for_backward(F.cross_entropy, x, target) >= 40_000


# Deliberately wrong candidates.


def _by_lse(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """lse - x_t, all of it rounded."""
    return torch.logsumexp(input, 1) - input.gather(1, target[:, None])[:, 0]


def _first_upstream(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    loss = F.cross_entropy(input, target, reduction="none")
    loss.register_hook(lambda grad: grad[:1].expand_as(grad))
    return loss


def _opposite(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    loss = F.cross_entropy(input, target, reduction=reduction)
    return 2 * loss.detach() - loss


def _zero_for_nan(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(input, target, reduction=reduction).nan_to_num()


def _counts_ignored(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(input, target, reduction="sum") / len(target)


def _no_smoothing(input: Tensor, target: Tensor, reduction: str, label_smoothing: float) -> Tensor:
    return F.cross_entropy(input, target, reduction=reduction)


_LARGE = cases.pack("1000, 990, 980", torch.float32)
_SOME = torch.tensor([1, -100, 2, -100])
WRONG: dict[str, tuple[Function, Problem]] = {
    "no-op": (lambda input, target, reduction: input[:, 0], ask(draw(9, 7), reduction="none")),
    "lse - x_t": (_by_lse, ask(_LARGE, _LARGE.argmax(1), reduction="none")),
    "one upstream for all": (_first_upstream, ask(draw(9, 7), reduction="none")),
    "sign of the gradient": (_opposite, ask(draw(9, 7), reduction="none")),
    "0 where all are ignored": (
        _zero_for_nan, ask(draw(4, 7), torch.full((4,), -100), reduction="mean"),
    ),
    "the mean counts ignored rows": (_counts_ignored, ask(draw(4, 7), _SOME, reduction="mean")),
    "smoothing forgotten": (
        _no_smoothing, ask(draw(9, 7), reduction="mean", label_smoothing=0.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_candidate_is_refused(kind: str) -> None:
    candidate, made = WRONG[kind]
    with pytest.raises(AssertionError):
        oracle.check(made, ours=candidate)
