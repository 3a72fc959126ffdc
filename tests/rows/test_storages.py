"""Tensors whose data is not all there, or is on another device: they are refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import functional
from tests.rows.cases import draw
from tests.rows.operands import CALLS, OPERANDS
from tests.rows.test_memory import Passing

# Storages that shrank.

SIZES = {"nothing": lambda x: 0, "less": lambda x: x.nbytes - x.itemsize}


def shrink(x: Tensor, size: str) -> None:
    x.untyped_storage().resize_(SIZES[size](x))


def check_refused(what: Callable[[], Any], shape: torch.Size) -> None:
    with pytest.raises(RuntimeError, match="resized") as caught:
        what()
    assert str(tuple(shape)) in str(caught.value)


@pytest.mark.parametrize("mode", [nullcontext, Passing, torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "operand"), OPERANDS)
def test_storages_that_shrank_are_refused(name: str, operand: str, size: str, mode: Any) -> None:
    """By name, and before anything is written."""
    call = CALLS[name]
    tensors = {k: x.clone() for k, x in call.tensors.items()}
    for key in call.differentiable():
        tensors[key].requires_grad_(mode is torch.enable_grad)
    shrink(tensors[operand], size)
    with mode(), pytest.raises(RuntimeError, match="resized") as caught:
        call(**tensors)
    assert operand in str(caught.value)
    assert str(tuple(tensors[operand].shape)) in str(caught.value)
    for key in set(call.written) - {operand}:
        torch.testing.assert_close(tensors[key], call.tensors[key])


def test_views_are_refused_where_they_end_behind_their_storage() -> None:
    base = draw(8, 16)
    rows, columns, every = base[4:], base[:, :8], base.t()[::2]
    base.untyped_storage().resize_(rows.nbytes)
    for x in (rows, columns, every):
        check_refused(lambda x=x: functional.softmax(x, -1), x.shape)
    torch.testing.assert_close(functional.softmax(base[:4], -1), draw(8, 16)[:4].softmax(-1))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"spectral_norm"}))
def test_backward_refuses_what_shrank_since(name: str, size: str, create_graph: bool) -> None:
    """Each saved tensor in turn: it is refused, or it is not needed."""
    call, n_refused, k = CALLS[name], 0, 0
    while True:
        tensors = {key: x.clone() for key, x in call.tensors.items()}
        leaves = [tensors[key].requires_grad_() for key in call.differentiable()]
        results = call(**tensors)
        upstream = [draw(*y.shape, seed=9 + i) for i, y in enumerate(results)]
        expected = torch.autograd.grad(results, leaves, upstream, retain_graph=True)
        saved = [x for x in results[0].grad_fn.saved_tensors if x is not None]
        if k == len(saved):
            break
        shrink(saved[k], size)
        refused = ""
        try:
            found = torch.autograd.grad(results, leaves, upstream, create_graph=create_graph)
            torch.testing.assert_close(found, expected)
        except RuntimeError as error:
            refused = str(error)
        assert not refused or f"{tuple(saved[k].shape)}" in refused.partition("resized")[0]
        n_refused += bool(refused)
        k += 1
    assert n_refused


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"spectral_norm"}))
def test_gradients_that_shrank_are_refused(name: str, size: str) -> None:
    call = CALLS[name]
    upstream = [draw(*y.shape) for y in call()]
    shrink(upstream[0], size)
    check_refused(lambda: call.run(upstream), upstream[0].shape)


@pytest.mark.parametrize("size", SIZES)
def test_ops_refuse_them_too(size: str) -> None:
    x, weight = draw(4, 6), draw(6)
    shrink(weight, size)
    with pytest.raises(RuntimeError, match=r"fastopt\.layer_norm got weight \(6,\)"):
        torch.ops.fastopt.layer_norm(x, weight, None, 1, 1e-5)


# Devices.


@pytest.mark.parametrize("other", ["meta", "cpu"])
@pytest.mark.parametrize(("name", "operand"), OPERANDS)
def test_operands_on_two_devices_are_refused(name: str, operand: str, other: str) -> None:
    """By name, and before anything is written."""
    call = CALLS[name]
    if operand == "seed":
        pytest.skip("it is brought to the device")
    if len(call.tensors) == 1:
        pytest.skip("there is no other")
    here = "cpu" if other == "meta" else "meta"
    tensors = {k: x.to(other if k == operand else here, copy=True) for k, x in call.tensors.items()}
    with pytest.raises(RuntimeError, match="on the same device") as caught:
        call(**tensors)
    assert operand in str(caught.value)
    assert "meta" in str(caught.value)
    for key in call.written:
        if not tensors[key].is_meta:
            torch.testing.assert_close(tensors[key], call.tensors[key])


@pytest.mark.parametrize("name", CALLS)
def test_all_on_meta_give_shapes(name: str) -> None:
    call = CALLS[name]
    found = call(**{k: x.to("meta") for k, x in call.tensors.items()})
    for y, expected in zip(found, call(), strict=True):
        assert y.is_meta
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype)


def test_ops_refuse_two_devices() -> None:
    x, weight = draw(4, 6), draw(6)
    for args in ((x, weight.to("meta")), (x.to("meta"), weight)):
        with pytest.raises(RuntimeError, match="on the same device"):
            torch.ops.fastopt.layer_norm(*args, None, 1, 1e-5)


# A deliberately wrong candidate.


def test_a_function_that_takes_what_shrank_would_be_noticed() -> None:
    with pytest.raises(pytest.fail.Exception):
        check_refused(lambda: functional.softmax(draw(4, 6), -1), torch.Size([4, 6]))
