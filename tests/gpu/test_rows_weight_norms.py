"""Weight normalization in the interpreter, against torch in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt_kernels.gpu.rows import weight_norm
from tests.gpu.row_launches import (
    DTYPES,
    draw,
    recorded,
    same_bits,
    short_walks,
    unwritten,
    wide,
    wrong,
)

# (n_outer, n_kept, n_inner), and whether it is walked.
BRANCHES = {
    "rows": ((1, 9, 67), False),
    "row vectors": ((1, 3, 2048), False),
    "rows walked": ((1, 4, 67), True),
    "columns": ((17, 5, 1), False),
    "columns walked": ((97, 5, 1), True),
    "one row": ((1, 1, 300), False),
    "one each": ((1, 7, 1), False),
}
Given = tuple[Tensor, Tensor, Tensor]


def make(sizes: tuple[int, int, int], dtype: torch.dtype) -> Given:
    """v, g, dy"""
    return (
        draw(*sizes, dtype=dtype),
        draw(sizes[1], dtype=dtype, seed=1),
        draw(*sizes, dtype=dtype, seed=2),
    )


def run(given: Given, in_place: bool = False) -> dict[str, Tensor]:
    v, g, dy = given
    y, dv = (unwritten(*v.shape, dtype=v.dtype) for _ in range(2))
    dg, norms = unwritten(*g.shape, dtype=v.dtype), unwritten(*g.shape, dtype=wide(v.dtype))
    weight_norm.weight_norm(v, g, y, norms, tuple(v.shape))
    weight_norm.weight_norm_backward(dy, v, g, norms, dv, dg, tuple(v.shape))
    return {"y": y, "norms": norms, "dv": dv, "dg": dg}


def faults(found: dict[str, Tensor], given: Given) -> list[str]:
    v, g, dy = (x.double() for x in given)
    leaves = [x.clone().requires_grad_() for x in (v, g)]
    norms = leaves[0].square().sum((0, 2)).sqrt()
    y = leaves[0] * (leaves[1] / norms)[:, None]
    dv, dg = torch.autograd.grad(y, leaves, dy)
    exact = {"y": y.detach(), "norms": norms.detach(), "dv": dv, "dg": dg}
    # What is subtracted to make dv, and added to make dg, may be larger than what is left.
    size = float((g / norms.detach()).abs().max() * dy.abs().max() * 2)
    least = {"dv": size, "dg": float(dy.abs().max())}
    return [
        text for k, x in found.items() for text in wrong(k, x, exact[k], least=least.get(k, 0.0))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", BRANCHES)
def test_forward_and_backward(what: str, dtype: torch.dtype) -> None:
    sizes, walked = BRANCHES[what]
    given = make(sizes, dtype)
    with recorded() as launched, short_walks(sizes[2] == 1) if walked else nullcontext():
        assert faults(run(given), given) == []
    for each in launched:
        assert each.constants["WHOLE"] != walked
        assert each.constants["COLUMNS"] == (sizes[2] == 1)


@pytest.mark.parametrize("n", [1, 67, 2048])
def test_unit_vectors(n: int) -> None:
    x = draw(n, scale=3.0)
    out = x.clone()
    weight_norm.unit(out, out, 1e-12)
    assert wrong("unit", out, x.double() / x.double().norm()) == []
    weight_norm.unit(x, out, 1e3)
    assert wrong("unit", out, x.double() / 1e3) == []


def test_a_row_alone_is_the_row_among_others() -> None:
    v, g, dy = make((1, 9, 67), torch.float32)
    some = (v[:, 2:4].contiguous(), g[2:4], dy[:, 2:4].contiguous())
    whole, part = run((v, g, dy)), run(some)
    assert same_bits(part["dv"], whole["dv"][:, 2:4])
    assert same_bits(part["y"], whole["y"][:, 2:4])


def _no_g(found: dict[str, Tensor], given: Given) -> dict[str, Any]:
    return {**found, "y": found["y"] / given[1][:, None]}


def _constant_norm(found: dict[str, Tensor], given: Given) -> dict[str, Any]:
    return {**found, "dv": given[2] * (given[1] / found["norms"])[:, None]}


def _wrong_sign(found: dict[str, Tensor], given: Given) -> dict[str, Any]:
    return {**found, "dg": -found["dg"]}


@pytest.mark.parametrize("candidate", [_no_g, _constant_norm, _wrong_sign])
def test_a_wrong_candidate_is_refused(candidate: Any) -> None:
    given = make((1, 9, 67), torch.float32)
    assert faults(candidate(run(given), given), given) != []
