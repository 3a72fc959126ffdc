"""What is known of tensors between steps, by torch's guards and the compiled walk or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from fastopt.optim.step import tensor_guards
from fastopt.optim.step.tensor_guards import CollectDataPtrs, TensorGuards
from fastopt_kernels.cpu.base.data_ptrs import LOW, MOVED, compiled


@pytest.fixture(params=["guards and walk", "guards", "questions"])
def walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CollectDataPtrs | None:
    """As torch is here, and as it is where it tells us less."""
    if request.param == "guards and walk":
        assert tensor_guards._address_of is not None, "this torch has the function the walk calls"
        return compiled()  # type: ignore[no-any-return]
    if request.param == "questions":
        monkeypatch.setattr(tensor_guards, "_guards", None)
    return None


def make() -> list[Tensor]:
    return [torch.randn(4, 4), nn.Parameter(torch.randn(4, 4)), torch.randn(5)]


def test_addresses_are_those_of_the_tensors_seen_last(walk: CollectDataPtrs | None) -> None:
    first, second = make(), make()
    known = TensorGuards(first, walk)
    assert known.unmoved(first)
    assert known.take(second)
    assert known.addresses.tolist() == [tensor.data_ptr() for tensor in second]
    assert known.unmoved(second)
    assert not known.unmoved(first)


def test_one_moved_tensor_among_a_thousand_is_seen(walk: CollectDataPtrs | None) -> None:
    tensors = [torch.randn(3) for _ in range(1000)]
    known = TensorGuards(tensors, walk)
    tensors[617].data = torch.randn(3)
    assert not known.unmoved(tensors)
    assert known.unmoved(tensors)


def _sparse(x: Tensor) -> Tensor:
    return x.to_sparse()


def _conjugate(x: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack([x, x], dim=-1)).conj()


def _fake(x: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(x)


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "missing": lambda x: None,
    "sparse": _sparse,
    "another dtype": lambda x: x.double(),
    "another shape": lambda x: x.reshape(2, 8),
    "transposed": lambda x: x.t(),
    "a slice": lambda x: torch.cat([x, x], dim=1)[:, ::2],
    "conjugate": _conjugate,
    "negative": lambda x: torch._neg_view(x),
    "meta": lambda x: x.to("meta"),
    "fake": _fake,
    "a subclass": lambda x: TwoTensor(x, x),
    "a parameter": nn.Parameter,
    "zero": torch._efficientzerotensor,
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_kind_of_tensor_may_not_stand_there(
    walk: CollectDataPtrs | None, other: str
) -> None:
    tensors: list[Any] = make()
    known = TensorGuards(tensors, walk)
    before = known.addresses.tolist()
    replaced = tensors[0].clone()
    make_other = OTHERS[other]
    tensors[0] = make_other((4, 4)) if other == "zero" else make_other(replaced)
    assert not known.unmoved(tensors)
    assert not known.take(tensors)
    assert known.addresses.tolist() == before


def test_what_a_kernel_does_not_see_may_change(walk: CollectDataPtrs | None) -> None:
    tensors = make()
    known = TensorGuards(tensors, walk)
    tensors[0].requires_grad_()
    assert known.unmoved(tensors)
    with torch.inference_mode():
        assert known.unmoved(tensors)
    assert known.unmoved(tensors)


def test_the_walk_reads_every_item_and_says_whether_one_is_new() -> None:
    import numpy as np

    into = np.zeros(3, dtype=np.int64)

    def walked(tensors: list[Tensor], lowest: int = 0) -> int:
        arguments = (id(tensors), len(tensors), tensor_guards._address_of, into.ctypes.data, lowest)
        return int(compiled()(*arguments))

    tensors = make()
    assert walked(tensors) == MOVED
    assert into.tolist() == [tensor.data_ptr() for tensor in tensors]
    assert walked(tensors) == 0
    into[2] += 8
    assert walked(tensors) == MOVED
    assert walked(tensors, lowest=into.max() + 1) == LOW
    assert walked([]) == 0
