"""Norms of residual sums on the GPU kernels, interpreted, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastopt import functional
from fastopt.functional.dropout import dropped, mask
from fastopt_kernels.gpu.rows import layer_norm_gradients
from tests.gpu.row_launches import DTYPES, all_wrong, draw, recorded, same_bits, short_walks

SEED = torch.tensor(-7)
P = 0.3
# Rows and columns: several rows a program, one, and vectors of 16 bytes.
SHAPES = {"short": (21, 67), "short vectors": (9, 64), "row": (2, 781), "one column": (40, 1)}
CASES = [
    (what, dtype, rms, p)
    for i, what in enumerate(SHAPES)
    for j, dtype in enumerate(DTYPES)
    for rms, p in (((i + j) % 2 == 0, P * (j // 2 == i % 2)),)
]
Values = dict[str, Tensor]


def names(rms: bool) -> tuple[str, ...]:
    return ("x", "residual", "weight") if rms else ("x", "residual", "weight", "bias")


def run(rms: bool, p: float, given: tuple[Tensor, ...], upstream: Any, **more: Any) -> Values:
    """Ours: y, sum and all gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    function = functional.add_rms_norm if rms else functional.add_layer_norm
    shape = given[0].shape[-1:]
    y, total = function(*leaves[:2], shape, *leaves[2:], dropout_p=p, seed=SEED, **more)
    grads = torch.autograd.grad((y, total), leaves, upstream)
    found = {f"d{name}": grad for name, grad in zip(names(rms), grads, strict=True)}
    return {"y": y.detach(), "sum": total.detach()} | found


def exact(
    rms: bool, p: float, given: tuple[Tensor, ...], upstream: Any, stored: Tensor, offset: float = 0
) -> Values:
    """torch's in float64, y of the sum that is stored."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in given]
    x, residual, weight, *bias = leaves
    total = dropped(x, SEED if p else None, x.shape[-1], p) + residual
    of, shape = total + (stored.double() - total).detach(), x.shape[-1:]
    eps = torch.finfo(torch.float64 if given[0].dtype is torch.float64 else torch.float32).eps
    y = (
        F.rms_norm(of, shape, weight + offset, eps)
        if rms
        else F.layer_norm(of, shape, weight, *bias)
    )
    grads = torch.autograd.grad((y, total), leaves, [t.double() for t in upstream])
    found = {f"d{name}": grad for name, grad in zip(names(rms), grads, strict=True)}
    return {"y": y.detach(), "sum": total.detach()} | found


def draw_all(shape: tuple[int, int], dtype: torch.dtype, rms: bool) -> tuple[Any, Any]:
    given = [draw(*shape, dtype=dtype, seed=seed) for seed in (0, 1)]
    given += [draw(shape[1], dtype=dtype, seed=seed) for seed in (2, 3)[: 2 - rms]]
    return tuple(given), [draw(*shape, dtype=dtype, seed=seed) for seed in (4, 5)]


# What cancels in a gradient was larger; sums of truncated bfloat16 are off by more than their own.
LEAST = {"dx": 2.0, "dresidual": 2.0, "dweight": 4.0, "dbias": 4.0, "y": 1.0, "sum": 4.0}


@pytest.mark.parametrize(("what", "dtype", "rms", "p"), CASES)
def test_forward_and_backward(what: str, dtype: torch.dtype, rms: bool, p: float) -> None:
    given, upstream = draw_all(SHAPES[what], dtype, rms)
    with recorded() as launched:
        found = run(rms, p, given, upstream)
    assert all_wrong(found, exact(rms, p, given, upstream, found["sum"]), **LEAST) == []
    kernels = ["add_norm_kernel", "norm_backward_kernel", "norm_sum_kernel"]
    assert [each.name for each in launched] == kernels
    assert (launched[0].constants["VECTOR"] > 1) == ("vectors" in what)


@pytest.mark.parametrize(("rms", "p"), [(False, P), (True, 0.0)])
def test_rows_that_are_walked(rms: bool, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same values: the mask does not know of tiles."""
    given, upstream = draw_all((5, 67), torch.float32, rms)
    whole = run(rms, p, given, upstream)
    monkeypatch.setattr(
        layer_norm_gradients, "WIDEST", dict.fromkeys(layer_norm_gradients.WIDEST, 32)
    )
    with short_walks(), recorded() as launched:
        found = run(rms, p, given, upstream)
    assert not launched[0].constants["WHOLE"]
    assert "norm_dx_kernel" in [each.name for each in launched]
    assert same_bits(found["sum"], whole["sum"])
    assert all_wrong(found, exact(rms, p, given, upstream, found["sum"]), **LEAST) == []


def test_the_mask_is_that_of_the_cpu() -> None:
    """The hash of torch's operators, which the CPU's kernels are held against as well."""
    for seed in (0, 1, -1, 2**62 + 12345):
        for p in (0.1, 0.75, 1.0):
            x = torch.ones(9, 67)
            options = {"dropout_p": p, "seed": seed}
            total = functional.add_rms_norm(x, torch.zeros_like(x), (67,), **options)[1]
            assert torch.equal(total != 0, mask(torch.tensor(seed), 9, 67, p))


def test_another_dtype_of_the_residual_and_an_offset() -> None:
    given, upstream = draw_all((9, 67), torch.float32, True)
    low = (given[0].half(), *given[1:])
    found = run(True, 0.0, low, upstream, weight_offset=1.0)
    right = exact(True, 0.0, low, upstream, found["sum"], 1.0)
    assert found["dx"].dtype is torch.float16
    assert found["sum"].dtype is found["dresidual"].dtype is torch.float32
    assert all_wrong(found, right, **LEAST) == []


def test_wrong_results_do_not_pass() -> None:
    given, upstream = draw_all((9, 67), torch.float32, False)
    found = run(False, P, given, upstream)
    right = exact(False, P, given, upstream, found["sum"])
    for name, value in found.items():
        for bad in (-value, torch.zeros_like(value), value.roll(1, 0)):
            assert all_wrong({name: bad}, right, **LEAST) != []
    other = exact(False, 0.0, given, upstream, found["sum"])
    assert all_wrong({"dx": found["dx"]}, other, **LEAST) != []
