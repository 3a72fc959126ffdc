"""Tensors whose data is not what lies at their address."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastopt import functional
from tests.rows.cases import draw
from tests.rows.operands import CALLS, OPERANDS, Call

Kind = Callable[[Tensor], Tensor]


def negated(x: Tensor) -> Tensor:
    """A view with a pending sign, of the same numbers."""
    return torch._neg_view(-x)


def imaginary(x: Tensor) -> Tensor:
    """Another, as complex numbers give one; not contiguous."""
    if not x.is_floating_point():
        return negated(x)
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def zeros(x: Tensor) -> Tensor:
    """Zeros without memory."""
    return torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)


def collected(x: Tensor) -> Tensor:
    """What a collective hands on, as long as nothing has used it."""
    return AsyncCollectiveTensor(x)


class Quiet(Tensor):
    """Of a class that takes nothing over: its memory is its own."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def of_a_class(x: Tensor) -> Tensor:
    return x.as_subclass(Quiet)


KINDS: dict[str, Kind] = {
    "of a class": of_a_class,
    "negated": negated,
    "imaginary": imaginary,
    "zeros": zeros,
    "collected": collected,
}


class Passing(TorchDispatchMode):
    """Listens, so that functions run as ops."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_memory(x: Tensor) -> Tensor:
    """The same numbers, where they are expected."""
    return torch.empty(x.shape, dtype=x.dtype).copy_(x.detach())


def check_kind(call: Call, operand: str, kind: Kind, mode: Any = nullcontext) -> None:
    """Results, what was written and gradients are those of the same numbers in memory."""
    odd = kind(call.tensors[operand].clone())
    expected = call.run(**{operand: in_memory(odd)})
    with mode():
        found = call.run(**{operand: odd})
    plain = {k: in_memory(x) for k, x in found.items()}
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("mode", [nullcontext, Passing])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "operand"), OPERANDS)
def test_what_is_not_at_its_address_is_resolved(
    name: str, operand: str, kind: str, mode: Any
) -> None:
    if kind in ("zeros", "collected") and operand in CALLS[name].written:
        pytest.skip("torch writes neither")
    if kind == "zeros" and name == "spectral_norm":
        pytest.skip("of its zeros torch makes other zeros without memory")
    check_kind(CALLS[name], operand, KINDS[kind], mode)


def expanded(x: Tensor) -> Tensor:
    """One number, as backward of a sum gives it."""
    return x.flatten()[0].expand(x.shape)


UPSTREAM: dict[str, Kind] = {**KINDS, "expanded": expanded}


@pytest.mark.parametrize("kind", UPSTREAM)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_that_arrive_are_resolved(name: str, kind: str) -> None:
    call = CALLS[name]
    odd = [UPSTREAM[kind](draw(*y.shape, seed=k)) for k, y in enumerate(call())]
    expected = call.run([in_memory(dy) for dy in odd])
    torch.testing.assert_close(call.run(odd), expected, rtol=1e-5, atol=1e-6)


# What only torch's operators know.


@pytest.mark.parametrize("name", CALLS)
def test_wrappers_take_torchs_operators(name: str) -> None:
    """Of a class that knows none of ours; it is kept, and each half is right."""
    call = CALLS[name]
    pairs = {k: TwoTensor(x.clone(), x.clone()) for k, x in call.tensors.items()}
    seen: list[str] = []

    class Pair(TwoTensor):
        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return super().__torch_dispatch__(func, types, args, kwargs)

    pairs = {k: Pair(x.clone(), x.clone()) for k, x in call.tensors.items()}
    for y, expected in zip(call(**pairs), call(), strict=True):
        torch.testing.assert_close(y.a, expected)
        torch.testing.assert_close(y.b, expected)
    assert seen
    assert not [func for func in seen if "fastopt" in func]


def functional_tensor(x: Tensor) -> Tensor:
    """Where functionalization is; of the class Tensor, and with no memory."""
    return torch._to_functional_tensor(x)


@pytest.mark.parametrize("name", ["softmax", "cross_entropy", "layer_norm", "batch_norm"])
def test_functional_tensors(name: str) -> None:
    call = CALLS[name]
    given = {k: functional_tensor(x.clone()) for k, x in call.tensors.items()}
    torch._enable_functionalization(reapply_views=True)
    try:
        found = call(**given)
    finally:
        torch._disable_functionalization()
    torch.testing.assert_close(tuple(map(torch._from_functional_tensor, found)), call())


def test_other_layouts_are_torchs() -> None:
    x = draw(4, 6)
    torch.testing.assert_close(functional.softmax(x.to_mkldnn(), -1).to_dense(), x.softmax(-1))
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        functional.softmax(x.to_sparse(), -1)


# Deliberately wrong candidates.


def test_a_function_that_reads_what_lies_there_would_be_noticed() -> None:
    def wrong(input: Tensor, dim: int) -> Tensor:
        return torch.softmax(-input if input.is_neg() else input, dim)

    with pytest.raises(AssertionError):
        check_kind(CALLS["softmax"]._replace(function=wrong), "input", negated)
