"""The softmax of masked scores on the GPU kernels, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastopt import functional
from fastopt.functional.masked_softmax import composed
from tests.gpu.row_launches import DTYPES, INF, NAN, all_wrong, draw, recorded, short_walks

ours = functional.scaled_masked_softmax
SHAPE, VECTORS = (2, 3, 5, 37), (2, 3, 5, 64)


def flags(*shape: int, share: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) < share


MASKS: dict[str, Tensor | None] = {
    "none": None,
    "over heads": flags(2, 1, 5, 37),
    "of keys": flags(2, 1, 1, 37),
    "of heads": flags(3, 1, 1),
    "few left": flags(*SHAPE, share=0.03),
    "added": draw(2, 1, 5, 37, seed=3),
    "added, half precision": draw(5, 37, seed=3).half(),
}


def check(x: Tensor, mask: Tensor | None, is_causal: bool, scale: float = 0.3) -> list[str]:
    """What is wrong of the result and its gradient."""
    sides, dy = [], draw(*x.shape, dtype=x.dtype, seed=1)
    for function, dtype in ((ours, x.dtype), (composed, torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        y = function(leaf, mask, scale, is_causal)
        sides.append({"y": y.detach(), "dx": torch.autograd.grad(y, leaf, dy.to(dtype))[0]})
    return all_wrong(*sides, y=1.0, dx=1.0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("what", MASKS)
def test_masks(what: str, is_causal: bool) -> None:
    assert check(draw(*SHAPE, scale=3.0), MASKS[what], is_causal) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_vectors(dtype: torch.dtype) -> None:
    with recorded() as launched:
        assert check(draw(*VECTORS, dtype=dtype), flags(2, 1, 5, 64), True) == []
    assert launched[0].constants["VECTOR"] == 16 // dtype.itemsize


@pytest.mark.parametrize("what", ["none", "over heads", "few left", "added"])
def test_rows_that_are_walked(what: str) -> None:
    with short_walks(), recorded() as launched:
        assert check(draw(*SHAPE, scale=3.0), MASKS[what], what == "none") == []
    assert not launched[0].constants["WHOLE"]


@pytest.mark.parametrize("walked", [False, True], ids=["whole", "walked"])
def test_rows_on_which_kernels_go_wrong(walked: bool) -> None:
    def call(row: list[float], left_out: int, scale: float = 1.0) -> Tensor:
        x = torch.tensor([(row * 23)[:67]])
        kept = torch.ones(67, dtype=torch.bool)
        kept[left_out::3] = False
        if not walked:
            return ours(x, kept, scale)
        with short_walks():
            return ours(x, kept, scale)

    for bad in (NAN, INF):
        assert call([bad, 1.0, 2.0], 1).isnan().all()
        assert call([bad, 1.0, 2.0], 0).isfinite().all()
    assert call([-INF, -INF, 2.0], 2).eq(0).all()
    assert call([-INF, 1.0, 2.0], 1, -1.0).isnan().all()
    assert call([-1e30, 1e30, 0.0], 2).sum().isclose(torch.tensor(1.0))


def test_wrong_results_do_not_pass() -> None:
    x, kept = draw(*SHAPE), MASKS["over heads"]
    y = ours(x, kept)
    right = {"y": composed(x.double(), kept, 1.0, False)}
    assert all_wrong({"y": y}, right, y=1.0) == []
    assert kept is not None
    for bad in (torch.zeros_like(y), ours(x, ~kept), ours(x), ours(x, kept, 1.001)):
        assert all_wrong({"y": bad}, right, y=1.0) != []
