"""z_loss and softcap of cross_entropy: against float64, and never less precise than torch's ops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.rows import oracle
from tests.rows.cases import INF, NAN, draw, probabilities, same, targets
from tests.rows.problem import Problem, Values
from tests.rows.subject import DTYPES, OURS

# torch's own forward derivatives are scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

TERMS: dict[str, dict[str, Any]] = {
    "z_loss": {"z_loss": 0.02},
    "softcap": {"softcap": 5.0},
    "both": {"z_loss": 0.02, "softcap": 5.0},
}


def reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """torch's operators, and z_loss by hand: whatever the classes weigh, its mean is over the rows
    that count."""
    dim = min(1, input.dim() - 1)
    x = input if softcap is None else softcap * torch.tanh(input / softcap)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(x, target, weight, reduction=reduction, **options)  # type: ignore[arg-type]
    if not z_loss:
        return loss
    squares = z_loss * torch.logsumexp(x, dim) ** 2
    if target.is_floating_point():
        counts = torch.ones_like(squares, dtype=torch.bool)
    else:
        counts = target != ignore_index
    squares = torch.where(counts, squares, 0.0)
    if reduction == "none":
        return loss + squares
    # Where nothing counts the gradient is 0, as torch's.
    return loss + squares.sum() / (counts.sum().clamp(min=1) if reduction == "mean" else 1.0)


class Extended(Problem):
    """A problem of cross_entropy with terms that torch has no argument for."""

    def exact(self) -> Values:
        return self.cast(torch.float64).run(reference)

    def check(self) -> Values:
        found = self.run(OURS["cross_entropy"])
        oracle.compare(self, found, self.run(reference))
        return found


def ask(
    x: Tensor,
    target: Tensor | None = None,
    weight: bool = False,
    seed: int = 0,
    **options: Any,
) -> Extended:
    at = min(1, x.dim() - 1)
    shape = x.shape[:at] + x.shape[at + 1 :]
    if target is None:
        target = targets(*shape, classes=x.shape[at], seed=seed)
        target.view(-1)[2::5] = -100
    inputs: dict[str, Tensor | None] = {"input": x, "target": target}
    if weight:
        inputs["weight"] = (draw(x.shape[at], seed=seed + 50).abs() + 0.5).to(x.dtype)
    upstream = draw(*(shape if options.get("reduction") == "none" else ()), seed=seed + 31)
    return Extended("cross_entropy", inputs, options, upstream.to(x.dtype))


@pytest.mark.parametrize(
    ("dtype", "terms"), [*zip(DTYPES, ["both"] * 4, strict=True), *[(DTYPES[0], t) for t in TERMS]]
)
def test_class_indices(dtype: torch.dtype, terms: str) -> None:
    for shape, reduction in (((37, 67), "mean"), ((300, 130), "none"), ((3, 17, 4), "sum")):
        x = draw(*shape, dtype=dtype, scale=4.0)
        ask(x, reduction=reduction, **TERMS[terms]).check()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classes_that_weigh_are_not_in_the_z_loss(smoothing: float, reduction: str) -> None:
    """Its mean is over the rows that count, and the weighted mean of losses beside it."""
    options = {"reduction": reduction, "label_smoothing": smoothing, **TERMS["both"]}
    for shape, dtype in (((37, 67), DTYPES[0]), ((3, 67, 5), DTYPES[0]), ((5, 67), DTYPES[1])):
        x = draw(*shape, dtype=dtype, scale=4.0)
        ask(x, weight=True, **options).check()
        ask(x, probabilities(x), weight=True, **options).check()


def test_a_mean_of_classes_that_weigh_nothing() -> None:
    """NaN, as with torch: there is nothing to divide by."""
    x, target = draw(5, 7), targets(5, classes=7)
    found = OURS["cross_entropy"](x, target, torch.zeros(7), z_loss=0.1)
    assert found.isnan()
    found = OURS["cross_entropy"](x, target, torch.zeros(7), reduction="sum", z_loss=0.1)
    torch.testing.assert_close(found, 0.1 * torch.logsumexp(x, 1).square().sum())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.3, 30.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cap_far_above_the_logits_and_far_below(dtype: torch.dtype, scale: float) -> None:
    x = draw(64, 67, dtype=dtype, scale=scale)
    ask(x, reduction="none", softcap=5.0).check()
    ask(x, x.argmax(1), reduction="none", softcap=5.0).check()


def test_what_is_not_finite() -> None:
    """A cap makes infinite logits finite; NaN stays."""
    x = draw(6, 67)
    x[0, 3], x[1, 5], x[2], x[3, 7] = INF, -INF, -INF, NAN
    target = torch.tensor([1, 1, 1, 1, 1, -100])
    found = ask(x, target, reduction="none", **TERMS["both"]).check()
    assert found["output"].isfinite().tolist() == [True, True, True, False, True, True]
    ask(x, target, reduction="none", z_loss=0.1).check()


@pytest.mark.parametrize("terms", TERMS)
def test_nothing_that_counts(terms: str) -> None:
    x = draw(4, 7)
    for reduction, value in (("mean", NAN), ("sum", 0.0)):
        made = ask(x, torch.full((4,), -100), reduction=reduction, **TERMS[terms])
        found = made.check()["output"]
        torch.testing.assert_close(found, torch.tensor(value), equal_nan=True)
    empty = OURS["cross_entropy"](x[:0], torch.empty(0).long(), reduction="sum", **TERMS[terms])
    assert float(empty) == 0.0


def test_terms_that_are_off_change_no_bit() -> None:
    x, target = draw(37, 67), targets(37, classes=67)
    plain = OURS["cross_entropy"](x, target)
    off = OURS["cross_entropy"](x, target, z_loss=0.0, softcap=None)
    assert oracle.same_bits(plain, off)


@pytest.mark.parametrize("terms", TERMS)
def test_derivatives_of_any_kind(terms: str) -> None:
    x, target = draw(4, 3, dtype=torch.float64), torch.tensor([2, 0, -100, 1])

    def mine(x: Tensor) -> Tensor:
        return OURS["cross_entropy"](x, target, **TERMS[terms])

    def right(x: Tensor) -> Tensor:
        return reference(x, target, **TERMS[terms])

    leaf = x.clone().requires_grad_()
    assert gradcheck(mine, leaf, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(mine, leaf)
    same(torch.func.hessian(mine)(x), torch.func.hessian(right)(x))
    many = torch.stack([x, 2 * x])
    same(torch.vmap(mine)(many), torch.vmap(right)(many))


def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(OURS["cross_entropy"], fullgraph=True, backend="aot_eager")
    made = ask(draw(5, 7), **TERMS["both"])
    torch.testing.assert_close(made.run(compiled), made.run(OURS["cross_entropy"]))


@pytest.mark.parametrize("reduce", [None, False])
def test_legacy_arguments(reduce: bool | None) -> None:
    x, target = draw(5, 7), targets(5, classes=7)
    with pytest.warns(UserWarning, match="size_average and reduce"):
        found = OURS["cross_entropy"](x, target, size_average=False, reduce=reduce, z_loss=0.1)
    reduction = "sum" if reduce is None else "none"
    torch.testing.assert_close(found, reference(x, target, reduction=reduction, z_loss=0.1))


@pytest.mark.parametrize(
    "bad",
    [{"z_loss": -1.0}, {"z_loss": NAN}, {"softcap": 0.0}, {"softcap": -30.0}, {"softcap": INF}],
)
def test_numbers_that_make_no_sense(bad: dict[str, float]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"{name} is {value}: it must be a positive number"):
        OURS["cross_entropy"](draw(5, 7), targets(5, classes=7), **bad)


# Deliberately wrong candidates.


def _no_slope(input: Tensor, target: Tensor, softcap: float, **options: Any) -> Tensor:
    """The cap forward, and nothing of it backward."""
    capped = input + (softcap * torch.tanh(input / softcap) - input).detach()
    return reference(capped, target, **options)


def _by_count(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Ignored rows squared too."""
    return (
        reference(input, target, **{**options, "z_loss": 0.0})
        + options["z_loss"] * torch.logsumexp(input, 1).square().mean()
    )


def _weighted(input: Tensor, target: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """z_loss times the weight of the target's class."""
    z_loss = options.pop("z_loss")
    weights = weight[target.clamp(min=0)] * (target != -100)
    squares = (weights * torch.logsumexp(input, 1).square()).sum() / weights.sum()
    return reference(input, target, weight, **options) + z_loss * squares


def test_a_z_loss_of_weights_is_refused() -> None:
    made = ask(draw(37, 67, scale=4.0), weight=True, reduction="mean", **TERMS["z_loss"])
    with pytest.raises(AssertionError):
        oracle.compare(made, made.run(_weighted), made.run(reference))


@pytest.mark.parametrize(
    ("candidate", "terms"),
    [
        (lambda input, target, **o: reference(input, target, o["reduction"]), "z_loss"),
        (
            lambda input, target, z_loss, **o: reference(input, target, z_loss=-z_loss, **o),
            "z_loss",
        ),
        (_by_count, "z_loss"),
        (_no_slope, "softcap"),
    ],
)
def test_a_wrong_candidate_is_refused(candidate: Any, terms: str) -> None:
    made = ask(draw(37, 67, scale=4.0), reduction="mean", **TERMS[terms])
    with pytest.raises((AssertionError, TypeError, AttributeError)):
        oracle.compare(made, made.run(candidate), made.run(reference))


def test_the_oracle_is_torchs_where_there_are_no_terms() -> None:
    made = ask(draw(37, 67), weight=True, label_smoothing=0.1)
    torch.testing.assert_close(
        made.exact()["output"], replace(made).cast(torch.float64).run(F.cross_entropy)["output"]
    )
