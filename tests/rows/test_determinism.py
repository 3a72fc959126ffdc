"""The same bits in every run, for any thread count, and whatever other rows there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tests.rows import cases, oracle
from tests.rows.cases import draw, probabilities, problem, with_upstream
from tests.rows.problem import Problem, Values
from tests.rows.subject import NAMES, NORMS, OURS, OVER_DIM, Function

# Odd, and enough for every thread to get some; wide, tall, and short of a block.
SHAPES = [(1823, 781), (3, 30_001), (20_001, 5), (5, 7)]
DTYPES = [torch.float32, torch.bfloat16]


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ask(kind: str, x: Tensor) -> Problem:
    """The problem of that name; of some ops there are two kinds."""
    name, _, what = kind.partition(" ")
    if what == "columns":
        return problem(name, x, dim=0)
    made = problem(name, x)
    if what == "mean":
        return with_upstream(replace(made, options={"reduction": "mean", "label_smoothing": 0.1}))
    if what == "probabilities":
        inputs = {**made.inputs, "target": probabilities(x)}
        return with_upstream(replace(made, inputs=inputs, options={"reduction": "sum"}))
    return made


KINDS = [
    *NAMES,
    *[f"{name} columns" for name in OVER_DIM],
    "cross_entropy mean",
    "cross_entropy probabilities",
]


def assert_same_bits(label: str, first: Values, other: Values) -> None:
    assert list(first) == list(other)
    for key, value in first.items():
        assert oracle.same_bits(value, other[key]), f"{label}: {key} has other bits"


def check_threads(made: Problem, function: Function) -> None:
    """One thread, two, two again, more than there may be, one."""
    with threads(1):
        first = made.run(function)
    for n in (2, 2, 5, 1):
        with threads(n):
            assert_same_bits(f"{made.name} with {n} threads", first, made.run(function))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads_or_on_the_run(
    kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    made = ask(kind, draw(*shape, dtype=dtype))
    check_threads(made, OURS[made.name])


@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes_are_the_same_and_right(kind: str) -> None:
    """1823 x 781, float32 and bfloat16 in turn."""
    dtype = DTYPES[KINDS.index(kind) % 2]
    made = ask(kind, draw(*SHAPES[0], dtype=dtype))
    found = []
    for n in (1, 2):
        with threads(n):
            found.append(made.run(OURS[made.name]))
    assert_same_bits(kind, *found)
    oracle.compare(made, found[0], made.run(F.__dict__.get(made.name, torch.logsumexp)))


def row_of(made: Problem, rows: slice) -> Problem:
    """The same call on some of the rows."""
    per_row = ("input", "target")
    inputs = {
        key: x[rows].clone() if key in per_row and x is not None else x
        for key, x in made.inputs.items()
    }
    upstream = None if made.upstream is None else made.upstream[rows].clone()
    return replace(made, inputs=inputs, upstream=upstream)


ROWWISE = [*NAMES, "cross_entropy probabilities"]


def check_rows(made: Problem, function: Function, rows: list[slice]) -> None:
    """Outputs and input gradients of a row alone are those of the row among others."""
    whole = made.run(function)
    for some in rows:
        alone = row_of(made, some).run(function)
        for key in ("output", "grad input"):
            assert oracle.same_bits(alone[key], whole[key][some]), f"{made.name} {key}, {some}"


def rowwise(kind: str, x: Tensor) -> Problem:
    made = ask(kind, x)
    if made.name == "cross_entropy":
        made = with_upstream(replace(made, options={"reduction": "none"}))
    return made


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ROWWISE)
def test_a_row_alone_equals_the_row_in_a_batch(kind: str, dtype: torch.dtype) -> None:
    for shape in [(37, 781), (300, 19), (9, 5001)]:
        made = rowwise(kind, draw(*shape, dtype=dtype))
        n = shape[0]
        rows = [slice(0, 1), slice(n // 2, n // 2 + 1), slice(n - 1, n), slice(1, n - 1)]
        check_rows(made, OURS[made.name], rows)


@pytest.mark.parametrize("kind", ROWWISE)
def test_a_row_beside_nan_is_left_alone(kind: str) -> None:
    made = rowwise(kind, draw(6, 67))
    whole = made.run(OURS[made.name])
    x = made.inputs["input"]
    assert x is not None
    x[2], x[4, 0] = cases.NAN, cases.INF
    spoilt = made.run(OURS[made.name])
    for key in ("output", "grad input"):
        for row in (0, 1, 3, 5):
            assert oracle.same_bits(spoilt[key][row], whole[key][row]), f"{key} of row {row}"


@pytest.mark.parametrize("name", OVER_DIM)
def test_a_column_alone_equals_the_column_among_others(name: str) -> None:
    """Along a dim that is not the last, at least among as many neighbours as there may be."""
    x = draw(3, 130, 37)
    made = problem(name, x, dim=1)
    whole = made.run(OURS[name])
    for some in (slice(0, 1), slice(1, 3)):
        alone = row_of(made, some).run(OURS[name])
        for key, value in alone.items():
            assert oracle.same_bits(value, whole[key][some]), f"{key} of {some}"


@pytest.mark.parametrize("name", NORMS)
def test_weight_gradients_do_not_depend_on_what_else_is_asked_for(name: str) -> None:
    made = problem(name, draw(301, 67))
    whole = made.run(OURS[name])
    for wanted in [("weight",), ("input",), ("weight", "bias")[: 1 + (name == "layer_norm")]]:
        some = replace(made, wanted=wanted).run(OURS[name])
        for key, value in some.items():
            assert oracle.same_bits(value, whole[key]), key


# Deliberately wrong candidates.


def _by_thread(input: Tensor, normalized_shape: Any, weight: Tensor, bias: Tensor) -> Tensor:
    """A weight gradient that is summed in as many parts as there are threads."""
    parts = input.tensor_split(torch.get_num_threads())
    return torch.cat([F.layer_norm(part, normalized_shape, weight, bias) for part in parts])


def _by_batch(input: Tensor, dim: int) -> Tensor:
    """The largest of the whole batch taken off each row."""
    e = (input - input.detach().max()).exp()
    return e / e.sum(dim, keepdim=True)


def test_a_candidate_that_depends_on_threads_is_refused() -> None:
    with pytest.raises(AssertionError, match="grad weight has other bits"):
        check_threads(problem("layer_norm", draw(301, 67)), _by_thread)


def test_a_candidate_that_depends_on_other_rows_is_refused() -> None:
    with pytest.raises(AssertionError, match="softmax output"):
        check_rows(problem("softmax", draw(37, 67)), _by_batch, [slice(0, 1)])
