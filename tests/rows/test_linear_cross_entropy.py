"""linear_cross_entropy: chunks of tokens, and no trace of them in what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastopt.functional import linear_cross_entropy, logit_chunks
from tests.rows import oracle
from tests.rows.cases import draw, targets
from tests.rows.problem import Problem, Values
from tests.rows.subject import DTYPES
from tests.rows.test_determinism import threads
from tests.rows.test_loss_terms import reference

N, C, D = 37, 67, 19
WANTED = ("input", "linear_weight", "linear_bias")
BOTH: dict[str, Any] = {"z_loss": 0.02, "softcap": 5.0}


def unfused(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    **options: Any,
) -> Tensor:
    ignored = -100 if ignore_index is None else ignore_index
    logits = F.linear(input, linear_weight, linear_bias)
    return reference(logits, target, ignore_index=ignored, **options)


class Layer(Problem):
    """A call of linear_cross_entropy; errors count in the largest of a gradient."""

    def exact(self) -> Values:
        return self.cast(torch.float64).run(unfused)

    def terms(self) -> Values:
        return {}

    def row_dims(self, key: str) -> tuple[int, ...]:
        return ()

    def floor(self, key: str) -> float:
        return 1.0 if key == "output" else 0.0

    def check(self, luck: float = 1.5) -> Values:
        found = self.run(linear_cross_entropy)
        oracle.compare(self, found, self.run(unfused), luck)
        return found


def ask(
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    weight: bool = False,
    probabilities: bool = False,
    wanted: tuple[str, ...] = WANTED,
    n: int = N,
    **options: Any,
) -> Layer:
    target = targets(n, classes=C)
    target[2::5] = -100
    if probabilities:
        target = draw(n, C, scale=2.0).softmax(1).to(dtype)
    inputs: dict[str, Tensor | None] = {
        "input": draw(n, D, dtype=dtype, seed=1),
        "linear_weight": draw(C, D, dtype=dtype, seed=2, scale=0.7),
        "target": target,
        "linear_bias": draw(C, dtype=dtype, seed=3) if bias else None,
        "weight": (draw(C, seed=4).abs() + 0.5).to(dtype) if weight else None,
    }
    upstream = draw(*((n,) if options.get("reduction") == "none" else ()), dtype=dtype, seed=5)
    return Layer("linear_cross_entropy", inputs, options, upstream, wanted)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several, and a last one that is short."""
    monkeypatch.setitem(logit_chunks.CHUNK, "cpu", 8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_linear_and_cross_entropy(dtype: torch.dtype, reduction: str) -> None:
    ask(dtype, reduction=reduction).check()
    ask(dtype, bias=False, reduction=reduction, **BOTH).check()


@pytest.mark.parametrize("terms", [{}, BOTH], ids=["", "z_loss, softcap"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weight_smoothing_and_probabilities(reduction: str, terms: dict[str, Any]) -> None:
    options = {"reduction": reduction, "label_smoothing": 0.1, **terms}
    ask(torch.float32, weight=True, **options).check()
    ask(torch.bfloat16, probabilities=True, weight=bool(terms), **options).check()


@pytest.mark.parametrize("wanted", [("input",), ("linear_weight",), ("linear_bias",), WANTED[:2]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_alone(reduction: str, wanted: tuple[str, ...]) -> None:
    whole = ask(reduction=reduction).run(linear_cross_entropy)
    for key, value in ask(reduction=reduction, wanted=wanted).run(linear_cross_entropy).items():
        assert oracle.same_bits(value, whole[key]), key


def test_one_token_without_a_batch() -> None:
    x, w = draw(D, seed=1), draw(C, D, seed=2)
    for reduction in ("mean", "none"):
        found = linear_cross_entropy(x, w, torch.tensor(3), reduction=reduction)
        right = F.cross_entropy(F.linear(x, w), torch.tensor(3), reduction=reduction)
        assert found.shape == right.shape
        torch.testing.assert_close(found, right)


def test_classes_in_more_dimensions() -> None:
    x, w, b = draw(4, D), draw(C, 3, 2, D), draw(C, 3, 2)
    target = targets(4, 3, 2, classes=C)
    logits = torch.einsum("nd,cijd->ncij", x, w) + b
    found = linear_cross_entropy(x, w, target, linear_bias=b, reduction="none", softcap=5.0)
    torch.testing.assert_close(found, reference(logits, target, reduction="none", softcap=5.0))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")
@pytest.mark.parametrize("chunk", [None, 8])
def test_as_torchs_function(chunk: int | None) -> None:
    options = None if chunk is None else torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    made = ask(weight=True)
    found = made.run(lambda **given: linear_cross_entropy(**given, options=options))
    torch.testing.assert_close(found, made.run(F.linear_cross_entropy))


# Chunks.


def test_a_chunk_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    block = logit_chunks.Block
    monkeypatch.setattr(
        logit_chunks, "Block", lambda x, *rest: sizes.append(len(x)) or block(x, *rest)
    )
    x, w, t = draw(20, D), draw(C, D), targets(20, classes=C)
    linear_cross_entropy(x, w, t)
    assert sizes == [8, 8, 4]

    class Options:
        batch_chunk_size = 16

    linear_cross_entropy(x, w, t, options=Options())
    assert sizes[3:] == [16, 4]


def test_the_loss_of_a_token_does_not_depend_on_the_others() -> None:
    x, w, t = draw(24, D), draw(C, D), targets(24, classes=C)
    whole = linear_cross_entropy(x, w, t, reduction="none")
    assert oracle.same_bits(
        linear_cross_entropy(x[8:16], w, t[8:16], reduction="none"), whole[8:16]
    )


def test_the_gradient_of_linear_weight_is_summed_in_float32() -> None:
    """In bfloat16 a sum over 100 chunks stands still."""
    n, chunks = 800, 100
    x = torch.ones(n, 1, dtype=torch.bfloat16)
    w = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    t = torch.zeros(n, dtype=torch.int64)
    (dw,) = torch.autograd.grad(linear_cross_entropy(x, w, t, reduction="sum"), w)
    assert n // 8 == chunks
    assert dw.flatten().tolist() == [-400.0, 400.0]


def peak_elements(function: Any) -> int:
    """The elements of the largest tensor that is made."""
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found = func(*args, **(kwargs or {}))
            for x in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(x, Tensor):
                    largest[0] = max(largest[0], x.untyped_storage().nbytes() // x.itemsize)
            return found

    with Watch():
        function()
    return largest[0]


def test_the_logits_of_the_batch_are_never_made() -> None:
    x, w, t = draw(400, D), draw(C, D, scale=0.5), targets(400, classes=C)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    for reduction in ("mean", "none"):

        def run(function: Any, reduction: str = reduction) -> None:
            loss = function(x, w, t, reduction=reduction)
            torch.autograd.grad(loss, leaves, torch.ones_like(loss))

        assert peak_elements(lambda: run(linear_cross_entropy)) <= 400 * D
        assert peak_elements(lambda: run(unfused)) >= 400 * C


# What there is little of, and what does not fit.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens(reduction: str) -> None:
    ask(n=0, reduction=reduction).check()


def test_meta_tensors() -> None:
    x, w, t = (y.to("meta") for y in (draw(5, D), draw(C, D), targets(5, classes=C)))
    for reduction, shape in (("mean", ()), ("none", (5,))):
        found = linear_cross_entropy(x, w, t, reduction=reduction)
        assert found.is_meta
        assert found.shape == shape


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_targets_ignored(reduction: str) -> None:
    made = ask(reduction=reduction)
    made.inputs["target"].fill_(-100)  # type: ignore[union-attr]
    found = made.check()
    assert bool(found["output"].isnan()) == (reduction == "mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The product in bfloat16, the loss in float32, gradients in the parameters' dtype."""
    made = ask(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, right = made.run(linear_cross_entropy), made.run(unfused)
    assert found["output"].dtype is torch.float32
    for key in found:
        size = right[key].abs().max()
        torch.testing.assert_close(found[key] / size, right[key] / size, rtol=0.02, atol=0.02)


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products on one thread, whatever the others run on."""
    product = torch.addmm

    def alone(*args: Any, **kwargs: Any) -> Tensor:
        with threads(1):
            return product(*args, **kwargs)

    torch.addmm = alone  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.addmm = product


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bits_do_not_depend_on_the_run(reduction: str) -> None:
    """Nor on the threads, but for what the matrix products of torch's BLAS make of them."""
    made = ask(n=301, reduction=reduction, **BOTH)
    first = made.run(linear_cross_entropy)
    for key, value in made.run(linear_cross_entropy).items():
        assert oracle.same_bits(value, first[key]), key
    made = ask(n=4099, reduction=reduction, wanted=("linear_bias",))
    found = []
    for n in (1, 2):
        with threads(n), exact_products():
            found.append(made.run(linear_cross_entropy))
    for key, value in found[0].items():
        assert oracle.same_bits(value, found[1][key]), f"{key} depends on the threads"


X, W, T = draw(5, D), draw(C, D), targets(5, classes=C)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "input of three dims": ((X[None], W, T), {}, RuntimeError, "1 or 2, got 3.*flatten"),
    "weight of one dim": ((X, W[0], T), {}, RuntimeError, "at least 2, got 1"),
    "features": ((X, W[:, 1:], T), {}, RuntimeError, r"\(5, 19\) and linear_weight \(67, 18\)"),
    "bias": ((X, W, T), {"linear_bias": W[0]}, RuntimeError, r"\(67,\), got \(19,\)"),
    "target out of range": ((X, W, T + C), {}, IndexError, r"Target \d+ is out of bounds"),
    "negative target": ((X, W, T - C), {}, IndexError, r"Target -\d+ is out of bounds"),
    "target of another batch": ((X, W, T[1:]), {}, ValueError, "batch_size"),
    "dtypes": ((X, W.double(), T), {}, RuntimeError, "dtype"),
    "smoothing": ((X, W, T), {"label_smoothing": 2.0}, RuntimeError, "between 0.0 and 1.0"),
    "reduction": ((X, W, T), {"reduction": "avg"}, ValueError, "avg"),
    "cap": ((X, W, T), {"softcap": 0.0}, ValueError, "softcap is 0.0"),
    "ignore_index": (
        (X, W, draw(5, C).softmax(1)), {"ignore_index": 3}, RuntimeError, "cannot be specified",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what: str) -> None:
    arguments, options, error, says = BAD[what]
    with pytest.raises(error, match=says):
        linear_cross_entropy(*arguments, **options)


# Deliberately wrong candidates.


def _mean_of_means(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Each chunk's mean by itself: chunks with few targets that count weigh as much."""
    pairs = zip(input.split(8), target.split(8), strict=True)
    return torch.stack([unfused(x, linear_weight, t, **options) for x, t in pairs]).mean()


def _bf16_sum(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    return unfused(input, linear_weight.bfloat16().to(input.dtype), target, **options)


@pytest.mark.parametrize("candidate", [_mean_of_means, _bf16_sum])
def test_a_wrong_candidate_is_refused(candidate: Any) -> None:
    made = ask()
    with pytest.raises(AssertionError):
        oracle.compare(made, made.run(candidate), made.run(unfused), 1.5)
