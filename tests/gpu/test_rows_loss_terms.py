"""z_loss and softcap of cross entropy in the interpreter, against torch in float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from tests.gpu.row_launches import DTYPES, INF, same_bits, short_walks
from tests.gpu.test_rows_losses import BRANCHES, Problem, make

TERMS = {
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 5.0},
    "both": {"z_loss": 0.01, "softcap": 5.0},
}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("probs", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("what", BRANCHES)
def test_every_branch(what: str, probs: bool, terms: str) -> None:
    shape, walked = BRANCHES[what]
    for weighted in (False, True):
        problem = make(shape, probs=probs, weighted=weighted, **TERMS[terms])
        problem.smoothing = 0.1 if weighted else 0.0
        if weighted and not probs:
            problem.z_share = torch.tensor([0.7])
        with short_walks(shape[2] > 1) if walked else nullcontext():
            assert problem.wrong() == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    for walked in (False, True):
        with short_walks() if walked else nullcontext():
            assert make((4, 67, 1), dtype, **TERMS["both"]).wrong() == []


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.3, 30.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cap_far_above_the_logits_and_far_below(dtype: torch.dtype, scale: float) -> None:
    problem = make((4, 67, 1), dtype, softcap=3.0)
    problem.x *= scale
    assert problem.wrong() == []


def test_infinite_logits_are_at_the_cap() -> None:
    problem = make((4, 67, 1), softcap=3.0)
    problem.x[0, 3], problem.x[1, 5], problem.x[3] = INF, -INF, -INF
    assert problem.wrong() == []


@pytest.mark.parametrize("walked", [False, True])
def test_a_gradient_over_its_own_logits(walked: bool) -> None:
    problem = make((4, 67, 1), **TERMS["both"])
    with short_walks() if walked else nullcontext():
        apart = problem.run()["dx"]
        over = problem.run(in_place=True)["dx"]
    assert same_bits(apart, over)


def _no_slope(problem: Problem) -> Problem:
    z = problem.softcap * torch.tanh(problem.x / problem.softcap)
    return replace(problem, x=z, softcap=0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda problem: replace(problem, z_loss=0.0),
        lambda problem: replace(problem, z_loss=-problem.z_loss),
        lambda problem: replace(problem, softcap=0.0),
        lambda problem: replace(problem, z_share=torch.tensor([0.7])),
        _no_slope,
    ],
)
def test_a_wrong_candidate_is_refused(wrong) -> None:  # type: ignore[no-untyped-def]
    problem = make((4, 67, 1), **TERMS["both"])
    found = wrong(problem)
    found.exact = problem.exact
    assert found.wrong() != []
