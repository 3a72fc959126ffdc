"""What a row function must give: torch's in float64, judged by torch's in the dtype under test.

    max e(ours) <= ratio max e(torch) + one rounding,  e(y) = |y - float64| / largest of its row
    rms e(ours) <= ratio rms e(torch) + a share of one rounding

for the output and every gradient. Errors are counted in the largest value of their row, so that
rows of small values are not hidden behind those of large ones. The largest of many errors is a
matter of luck, their root mean square is not: torch's own function on the same rows mirrored is
off by up to 1.2 times as much at its worst. Where torch is not finite, ours is the same kind of
not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.rows.problem import Problem, Values, computed, epsilon, plain
from tests.rows.subject import OURS, TORCH, Function


class Tolerance(NamedTuple):
    """How far ours may be from float64, in the largest value of a row."""

    ratio: float  # of the largest errors: in multiples of torch's,
    rounding: float  # and this much more, the spacing of the dtype,
    few: float  # or this much where there are few errors
    rms_ratio: float  # of the root mean square likewise
    rms_rounding: float
    smallest: float  # all of them or the spacing of the subnormals, where that is more


def _tolerance(dtype: torch.dtype, ratio: float, roundings: int, few: int) -> Tolerance:
    facts = torch.finfo(dtype)
    eps, smallest = facts.eps, facts.smallest_normal * facts.eps
    return Tolerance(ratio, roundings * eps, few * eps, 1.15, roundings / 4 * eps, smallest)


# float64 has no wider oracle: torch's is the oracle itself, and either is rounded some times.
TOLERANCES = {
    torch.float64: _tolerance(torch.float64, 1.0, roundings=8, few=8),
    torch.float32: _tolerance(torch.float32, 1.25, roundings=1, few=3),
    torch.float16: _tolerance(torch.float16, 1.0, roundings=1, few=1),
    torch.bfloat16: _tolerance(torch.bfloat16, 1.0, roundings=1, few=1),
}
FEW = 256


def check(
    problem: Problem,
    ours: Function | None = None,
    theirs: Problem | None = None,
    luck: float = 1.0,
) -> Values:
    """Run ours and hold all of it against float64 and torch's.

    ours: another candidate in its place; theirs: what to give torch where it does not take the
    problem as it is; luck: see `assert_not_worse`
    """
    given = [*problem.inputs.items(), ("upstream", problem.upstream)]
    before = [(key, x, plain(x)) for key, x in given if x is not None]
    mine = problem.run(ours or OURS[problem.name])
    for key, x, was in before:
        assert same_bits(x, was), f"{problem.name} wrote its {key}"
    torchs = (theirs or problem.cast(None)).run(TORCH[problem.name])
    compare(problem, mine, torchs, luck)
    return mine


def compare(problem: Problem, mine: Values, torchs: Values, luck: float = 1.0) -> None:
    """Output and gradients, by name: shape, dtype and how far from float64."""
    exact, terms = problem.exact(), problem.terms()
    assert list(mine) == list(exact)
    moved: Values = {}
    for key, value in mine.items():
        what = f"{problem.name} {key}"
        right, dtype = exact[key], _dtype(problem, key)
        assert value.shape == right.shape, f"{what}: shape {value.shape}, torch {right.shape}"
        assert value.dtype == dtype, f"{what}: {value.dtype}, torch has {dtype}"
        asked = problem.options.get("dtype") or dtype
        coarse = max(value.dtype, asked, computed(problem.inputs["input"]), key=epsilon)
        if coarse is torch.float64:
            moved = moved or problem.moved()
        bounds = Bounds(
            problem.row_dims(key), problem.floor(key), terms.get(key), moved.get(key), luck
        )
        assert_not_worse(what, value, torchs[key], right, coarse, bounds)


def _dtype(problem: Problem, key: str) -> torch.dtype:
    """Gradients are of the dtype of what they are of, the output of the input's."""
    x = problem.inputs[key.removeprefix("grad ") if key.startswith("grad") else "input"]
    assert x is not None
    return (problem.options.get("dtype") if key == "output" else None) or x.dtype


class Bounds(NamedTuple):
    """dims: those of one row, all of them where there are none; floor, terms: a row counts as no
    smaller than these, see `Problem.floor` and `Problem.terms`; moved: granted eight times, see
    `Problem.moved`; luck: torch's largest error is multiplied by this, where a row has one error
    in all its elements and the root mean square says more"""

    dims: Sequence[int] = ()
    floor: float = 0.0
    terms: Tensor | None = None
    moved: Tensor | None = None
    luck: float = 1.0


def assert_not_worse(
    what: str, ours: Tensor, theirs: Tensor, right: Tensor, dtype: torch.dtype, bounds: Bounds
) -> None:
    """The inequalities above, for one tensor."""
    if right.numel() == 0:
        return
    ours, theirs, right = (plain(x, torch.float64) for x in (ours, theirs, right))
    _assert_as_finite(what, ours, theirs, right, dtype)
    tolerance = TOLERANCES[dtype]
    mine, torchs, scale = errors(ours, theirs, right, bounds)
    few = right.numel() < FEW
    allowed = tolerance.ratio * bounds.luck * float(torchs.max())
    allowed += tolerance.few if few else tolerance.rounding
    beyond = mine * scale - torch.clamp(allowed * scale, min=tolerance.smallest)
    if bounds.moved is not None:
        beyond -= 8 * bounds.moved.amax(_over(bounds, right), keepdim=True)
    at = int(beyond.argmax())
    value, exact, size, error = (float(x.flatten()[at]) for x in (ours, right, scale, mine))
    eps = epsilon(dtype)
    assert float(beyond.flatten()[at]) <= 0, (
        f"{what} ({dtype}): off by {error / eps:.3g} roundings of its row's largest value "
        f"{size:.3g} at element {at} (ours {value:.9g}, float64 {exact:.9g}); torch is off by up "
        f"to {float(torchs.max()) / eps:.3g}, allowed is {allowed / eps:.3g}"
    )
    if few or bounds.moved is not None:
        return
    rms, torchs_rms = (float(x.square().mean().sqrt()) for x in (mine, torchs))
    smallest = tolerance.smallest / max(float(scale.max()), torch.finfo(torch.float64).tiny)
    allowed = max(tolerance.rms_ratio * torchs_rms + tolerance.rms_rounding, smallest)
    assert rms <= allowed, (
        f"{what} ({dtype}): off by {rms / eps:.3g} roundings of a row's largest value in the root "
        f"mean square; torch by {torchs_rms / eps:.3g}, allowed is {allowed / eps:.3g}"
    )


def errors(
    ours: Tensor, theirs: Tensor, right: Tensor, bounds: Bounds
) -> tuple[Tensor, Tensor, Tensor]:
    """The errors of both in the largest value of a row, and that value; 0 where any is not
    finite."""
    finite = torch.isfinite(ours) & torch.isfinite(theirs) & torch.isfinite(right)
    right = torch.where(finite, right, 0.0)
    size = right.abs()
    if bounds.terms is not None:
        terms = torch.where(torch.isfinite(bounds.terms), bounds.terms, 0.0)
        size = torch.maximum(size, terms.abs())
    scale = (
        size.amax(_over(bounds, right), keepdim=True).clamp(min=bounds.floor).expand(right.shape)
    )
    tiny = torch.finfo(torch.float64).tiny
    mine, torchs = (
        torch.where(finite, x - right, 0.0).abs() / scale.clamp(min=tiny) for x in (ours, theirs)
    )
    return mine, torchs, scale


def _over(bounds: Bounds, x: Tensor) -> tuple[int, ...]:
    return tuple(bounds.dims) or tuple(range(x.dim()))


def _assert_as_finite(
    what: str, ours: Tensor, theirs: Tensor, right: Tensor, dtype: torch.dtype
) -> None:
    """Not finite in the same way as torch's, or as float64's when that is cast."""
    rounded = plain(plain(right, dtype), torch.float64)
    same = kinds(ours) == kinds(theirs)
    right_too = kinds(ours) == kinds(rounded)
    wrong = ~(same | right_too)
    assert not bool(wrong.any()), (
        f"{what} ({dtype}): {float(ours[wrong][0])} where torch has {float(theirs[wrong][0])}, at "
        f"{int(wrong.sum())} of {wrong.numel()} elements"
    )


def kinds(x: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 infinite, 3 negatively so."""
    return torch.isnan(x) * 1 + torch.isposinf(x) * 2 + torch.isneginf(x) * 3


def same_bits(a: Any, b: Any) -> bool:
    """Bitwise equal: NaN equals NaN, and 0 is not -0."""
    a, b = plain(a), plain(b)
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )
