"""Bad input: torch's exception type, and a message that says what came and what is supported."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rows.cases import draw, targets
from tests.rows.subject import DIFFERENTIABLE, MODULES, NAMES, NORMS, OURS, OVER_DIM, TORCH

X = draw(2, 3)
T = torch.tensor([0, 1])
LONG = torch.ones(2, 3, dtype=torch.int64)

# A call, and what the message must hold.
Call = tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]


def call(*arguments: Any, says: tuple[str, ...] = (), **options: Any) -> Call:
    return arguments, options, says


RANGE = ("Dimension out of range", r"\[-2, 1\]", "5")
UNSUPPORTED = ("float32", "bfloat16", "float16", "float64")
BAD: dict[str, dict[str, Call]] = {
    "softmax": {
        "dim out of range": call(X, 5, says=RANGE),
        "dim below range": call(X, -3, says=("Dimension out of range", "-3")),
        "dim of a scalar": call(torch.tensor(1.0), 1, says=("Dimension out of range",)),
        "dim no integer": call(X, 1.0, says=("dim", "float")),
        "integers": call(LONG, 1, says=("int64", *UNSUPPORTED)),
        "booleans": call(LONG.bool(), 1, says=("bool", *UNSUPPORTED)),
        "complex": call(X.to(torch.complex64), 1, says=("complex64", *UNSUPPORTED)),
        "float8": call(X.to(torch.float8_e4m3fn), 1, says=("float8_e4m3fn", *UNSUPPORTED)),
        "dtype of integers": call(X, 1, dtype=torch.int64, says=("int64", *UNSUPPORTED)),
    },
    "logsumexp": {
        "dim out of range": call(X, 5, says=RANGE),
        "one dim out of range": call(X, (0, 5), says=RANGE),
        "dim twice": call(X, (0, 0), says=("dim 0 appears multiple times",)),
        "dim twice, negative": call(X, (1, -1), says=("dim 1 appears multiple times",)),
        "no dim": call(X, None, says=("dim",)),
        "float8": call(X.to(torch.float8_e4m3fn), 1, says=("float8_e4m3fn", *UNSUPPORTED)),
    },
    "cross_entropy": {
        "target beyond the classes": call(X, torch.tensor([0, 3]), says=("Target 3 is out of",)),
        "negative target": call(X, torch.tensor([0, -1]), says=("Target -1 is out of",)),
        "target beyond, smoothed": call(
            X, torch.tensor([7, 3]), label_smoothing=0.1, says=("Target 7 is out of",)
        ),
        "ignored by default only": call(
            X, torch.tensor([0, -100]), ignore_index=1, says=("Target -100 is out of",)
        ),
        "no classes": call(torch.ones(2, 0), torch.tensor([0, 0]), says=("Target 0 is out of",)),
        "target of floats": call(X, torch.ones(2), says=("float32|Float", "int64|Long")),
        "target of int32": call(X, T.int(), says=("int32|Int", "int64|Long")),
        "target of another batch": call(
            X, torch.tensor([0, 1, 2]), says=(r"batch_size \(2\)", r"batch_size \(3\)")
        ),
        "target with a dim of classes": call(
            X, torch.ones(2, 1, dtype=torch.int64), says=("multi-target", r"2, 1|\(2, 1\)")
        ),
        "classes as probabilities": call(X, LONG, says=("floating point", "Long|int64")),
        "target of another size": call(
            draw(2, 3, 4), torch.ones(2, 3, dtype=torch.int64), says=(r"\[2, 4\]", r"\[2, 3\]")
        ),
        "a scalar": call(torch.tensor(1.0), torch.tensor(0)),
        "weight of another size": call(X, T, torch.ones(2), says=("all 3 classes", r"\[2\]")),
        "weight of two dims": call(X, T, torch.ones(1, 3), says=("all 3 classes", r"\[1, 3\]")),
        "weight of probabilities": call(
            X, X.softmax(1), torch.ones(2), says=("all 3 classes", r"\[2\]")
        ),
        "smoothing above 1": call(X, T, label_smoothing=2.0, says=("between 0.0 and 1.0", "2")),
        "reduction unknown": call(X, T, reduction="avg", says=("avg",)),
        "ignore_index of probabilities": call(
            X, X.softmax(1), ignore_index=1, says=("ignore_index",)
        ),
        "integers": call(LONG, T, says=("int64", *UNSUPPORTED)),
        "complex": call(X.to(torch.complex64), T),
    },
    "layer_norm": {
        "another shape": call(X, (4,), says=(r"\[4\]", r"\[2, 3\]")),
        "more dims than there are": call(X, (1, 2, 3), says=(r"\[1, 2, 3\]", r"\[2, 3\]")),
        "no dims": call(X, (), says=("at least 1-dimensional",)),
        "shape an integer": call(X, 3, says=("normalized_shape", "int")),
        "weight of another shape": call(
            X, (3,), torch.ones(4), says=("weight", r"\[4\]", r"\[3\]")
        ),
        "weight of more dims": call(X, (3,), torch.ones(1, 3), says=("weight", r"\[1, 3\]")),
        "bias of another shape": call(
            X, (3,), None, torch.ones(4), says=("bias", r"\[4\]", r"\[3\]")
        ),
        "integers": call(LONG, (3,), says=("int64", *UNSUPPORTED)),
        "complex": call(X.to(torch.complex64), (3,), says=("complex64", *UNSUPPORTED)),
        "float8": call(X.to(torch.float8_e4m3fn), (3,), says=("float8_e4m3fn", *UNSUPPORTED)),
        "eps a string": call(X, (3,), None, None, "small", says=("eps", "str")),
        "weight on another device": call(
            X, (3,), torch.ones(3, device="meta"), says=("meta", "cpu")
        ),
    },
    "rms_norm": {
        "another shape": call(X, (4,), says=(r"\[4\]", r"\[2, 3\]")),
        "no dims": call(X, (), says=("at least 1-dimensional",)),
        "shape an integer": call(X, 3, says=("normalized_shape", "int")),
        "weight of another shape": call(
            X, (3,), torch.ones(4), says=("weight", r"\[4\]", r"\[3\]")
        ),
        "integers": call(LONG, (3,), says=("int64", *UNSUPPORTED)),
        "float8": call(X.to(torch.float8_e4m3fn), (3,), says=("float8_e4m3fn", *UNSUPPORTED)),
    },
}  # fmt: skip
BAD["log_softmax"] = BAD["softmax"]
CASES = [(name, what) for name in NAMES for what in BAD[name]]


def raised(function: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    return caught.value


def check_refused(name: str, ours: Callable[..., Any], this: Call) -> None:
    """torch's type, and all of what the message must hold; nothing is written."""
    arguments, options, says = this
    tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    theirs = raised(lambda: TORCH[name](*arguments, **options))
    mine = raised(lambda: ours(*arguments, **options))
    assert type(mine) is type(theirs), f"{mine!r}, where torch has {theirs!r}"
    for text in says:
        assert re.search(text, str(mine)), f"{text!r} is not in {str(mine)!r}"
    for x, was in zip(tensors, before, strict=True):
        if x.device.type == "cpu":
            assert torch.equal(x.reshape(-1).view(torch.uint8), was.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(("name", "what"), CASES)
def test_refused_with_torchs_type(name: str, what: str) -> None:
    check_refused(name, OURS[name], BAD[name][what])


@pytest.mark.parametrize(("name", "what"), CASES)
def test_refused_where_a_gradient_is_wanted_too(name: str, what: str) -> None:
    """Another path to the kernel."""
    arguments, options, says = BAD[name][what]
    first = arguments[0]
    if first.is_floating_point() and first.dtype is not torch.float8_e4m3fn:
        first = first.clone().requires_grad_()
    check_refused(name, OURS[name], ((first, *arguments[1:]), options, says))


@pytest.mark.parametrize("name", OVER_DIM)
def test_what_is_no_tensor(name: str) -> None:
    for x in ([1.0, 2.0], 3.0, None):
        with pytest.raises((TypeError, AttributeError)):
            OURS[name](x, 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_logsumexp_of_dtypes_that_torch_takes(dtype: torch.dtype) -> None:
    """Integers are summed as float32, complex numbers as they are."""
    x = torch.tensor([[1, 0, 2], [0, 1, 1]]).to(dtype)
    torch.testing.assert_close(OURS["logsumexp"](x, 1), torch.logsumexp(x, 1))


def test_a_target_out_of_range_writes_no_gradient() -> None:
    """An index beyond the row is found before anything is read or written there."""
    x = draw(64, 5).requires_grad_()
    target = targets(64, classes=5)
    target[63] = 5
    for reduction in ("mean", "none"):
        with pytest.raises(IndexError, match="Target 5 is out of bounds"):
            OURS["cross_entropy"](x, target, reduction=reduction)
    assert x.grad is None
    target[63] = 2**62
    with pytest.raises(IndexError, match=str(2**62)):
        OURS["cross_entropy"](x, target)


def test_a_weight_that_requires_a_gradient_with_class_indices() -> None:
    """torch has no derivative by it and says so; a gradient of None would be silent."""
    weight = torch.ones(3, requires_grad=True)
    for options in ({}, {"label_smoothing": 0.1}):
        theirs = raised(lambda o=options: TORCH["cross_entropy"](X, T, weight, **o))
        mine = raised(lambda o=options: OURS["cross_entropy"](X, T, weight, **o))
        assert type(mine) is type(theirs) is RuntimeError
        assert "weight" in str(mine)


def test_a_weight_of_another_dtype_than_the_logits() -> None:
    """torch's CPU refuses it for class indices. Ours may take it, rightly, or refuse it too."""
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    expected = TORCH["cross_entropy"](X, T, weight.float())
    try:
        found = OURS["cross_entropy"](X, T, weight)
    except RuntimeError as error:
        if not re.search("float64|Double", str(error)):
            raise
    else:
        torch.testing.assert_close(found.float(), expected)


@pytest.mark.parametrize("name", NORMS)
def test_a_negative_eps_is_torchs_nan(name: str) -> None:
    torch.testing.assert_close(
        OURS[name](X, (3,), eps=-100.0), TORCH[name](X, (3,), eps=-100.0), equal_nan=True
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("CrossEntropyLoss", {"reduction": "avg"}),
        ("CrossEntropyLoss", {"label_smoothing": 3.0}),
    ],
)
def test_modules_refuse_what_torchs_do(name: str, arguments: dict[str, Any]) -> None:
    theirs = raised(lambda: getattr(torch.nn, name)(**arguments)(X, T))
    mine = raised(lambda: MODULES[name](**arguments)(X, T))
    assert type(mine) is type(theirs)


def test_meta_tensors_of_the_wrong_shape_are_refused_too() -> None:
    """A dry run finds what a run would."""
    x = torch.empty(2, 3, device="meta")
    for name in NORMS:
        with pytest.raises(RuntimeError, match="normalized_shape"):
            OURS[name](x, (4,))


# Deliberately wrong candidates.


def test_a_candidate_that_takes_anything_is_refused() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_refused("softmax", lambda x, dim: x, BAD["softmax"]["dim out of range"])


def test_a_candidate_with_another_type_or_message_is_refused() -> None:
    def vague(x: Tensor, dim: int) -> Tensor:
        raise IndexError("bad input")

    def other(x: Tensor, dim: int) -> Tensor:
        raise ValueError("Dimension out of range (expected to be in range of [-2, 1], but got 5)")

    for candidate in (vague, other):
        with pytest.raises(AssertionError):
            check_refused("softmax", candidate, BAD["softmax"]["dim out of range"])


def test_every_op_has_its_errors() -> None:
    assert set(BAD) == set(DIFFERENTIABLE) == set(NAMES)
