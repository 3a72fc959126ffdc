"""What holds for any model: torch's trajectory, and the same bits however the work is cut up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1},
    "RMSprop": {"centered": True, "weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1},
    "NAdam": {"weight_decay": 0.1},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]


@st.composite
def views(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset of a tensor without overlap: dimensions in any order in memory,
    gaps between them or none."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    strides = [0] * len(shape)
    reach = draw(st.integers(1, 2))
    for dim in order:
        strides[dim] = reach
        reach = reach * max(shape[dim], 1) + draw(st.sampled_from([0, 0, 1, 3]))
    return shape, tuple(strides), draw(st.integers(0, 3))


def place(view: tuple[Any, Any, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A tensor of that view, the memory around it filled too."""
    shape, strides, offset = view
    reach = offset + 1 + sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))
    memory = torch.randn(reach + 3, generator=generator, dtype=torch.float64).to(dtype)
    return memory.as_strided(shape, strides, offset)


@st.composite
def models(
    draw: Any, dtypes: list[torch.dtype] = DTYPES
) -> tuple[list[Tensor], list[list[Any]], list[int]]:
    """Parameters, their gradients for each step, and the group of each."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = draw(st.integers(1, 5))
    placed = [draw(views()) for _ in range(n)]
    params = [place(view, draw(st.sampled_from(dtypes)), generator) for view in placed]
    grads: list[list[Any]] = []
    for _ in range(7):
        row: list[Any] = []
        for param in params:
            kind = draw(st.sampled_from(["like", "like", "contiguous", "gaps", None, "frozen"]))
            shape, strides = tuple(param.shape), param.stride()
            if kind == "frozen" or kind is None:
                row.append(oracle.FROZEN if kind else None)
                continue
            dense = torch.empty(shape).stride()
            layout = {"like": strides, "contiguous": dense, "gaps": [2 * s for s in dense]}
            view = (shape, tuple(layout[kind]), draw(st.integers(0, 3)))
            row.append(place(view, param.dtype, generator))
        grads.append(row)
    return params, grads, [draw(st.integers(0, 2)) for _ in range(n)]


def _split(groups: list[int]) -> Any:
    """Parameters as up to three groups with learning rates of their own."""

    def split(params: list[Tensor]) -> list[dict[str, Any]]:
        return [
            {"params": [p for p, g in zip(params, groups, strict=True) if g == k], "lr": lr}
            for k, lr in enumerate((0.05, 0.2, 0.01))
        ]

    return split


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_model_follows_torch(name: str, data: Any) -> None:
    """Shapes, strides, dtypes, groups, missing and frozen gradients: torch's trajectory, and the
    memory around each parameter untouched."""
    # NAdam's mu_product is float32, torch's too: no measure for float64.
    dtypes = [dtype for dtype in DTYPES if name != "NAdam" or dtype is not torch.float64]
    params, grads, groups = data.draw(models(dtypes))
    memory = [storage_of(param) for param in params]
    before = [m.clone() for m in memory]
    start = [oracle.plain(param) for param in params]
    oracle.check(name, OPTIONS[name] | {"lr": 0.05}, params, grads, split=_split(groups))
    for param, m, was, value in zip(params, memory, before, start, strict=True):
        with torch.no_grad():
            param.copy_(value)
        assert oracle.same_bits(m, was), "wrote outside a parameter"


def storage_of(tensor: Tensor) -> Tensor:
    """All the memory behind a tensor, flat."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())  # type: ignore[no-any-return]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(model=models())
def test_an_optimizer_that_ignores_its_groups_is_noticed(model: Any) -> None:
    """Teeth: whatever the model, one that steps at a tenth of the rate is refused where there is
    anything to step."""
    params, grads, groups = model
    moved = any(
        isinstance(grad, Tensor) and grad.numel() and param.dtype is not torch.bfloat16
        for row in grads
        for grad, param in zip(row, params, strict=True)
    )
    slow = oracle.fused("AdamW", lr=0.005)
    if moved:
        with pytest.raises(AssertionError, match="param of parameter"):
            oracle.check("AdamW", {"lr": 0.05}, params, grads, ours=slow, split=_split(groups))


# The same bits however the work is cut up.

RULES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adagrad", {}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Adadelta", {}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
    ("Adamax", {}),
    ("NAdam", {}),
    ("RAdam", {"betas": (0.5, 0.9)}),
]
# 32768 elements or more in all, so that two threads share them; the sizes leave remainders to
# every vector width.
LARGE = [(20_011,), (131, 157), (3,)]


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _end(name: str, options: dict[str, Any], params: list[Tensor], grads: Any) -> list[Any]:
    copies = [oracle.plain(param) for param in params]
    make = oracle.fused(name, lr=0.05, weight_decay=0.1, **options)
    last = oracle.run(make, copies, grads, states_from=0, watch_from=len(grads) - 1)[-1]
    return [last[key] for key in sorted(last)]


@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
def test_bits_do_not_depend_on_threads_or_on_the_run(name: str, options: dict[str, Any]) -> None:
    """One thread is the serial kernel, two or four (more than there may be) the parallel one."""
    params, grads = oracle.inputs(LARGE, steps=7)
    ends = []
    for n in (1, 2, 4, 2, 1):
        with threads(n):
            ends.append(_end(name, options, params, grads))
    for end in ends[1:]:
        assert all(map(oracle.same_bits, end, ends[0]))


def test_thread_count_may_change_between_steps() -> None:
    params, grads = oracle.inputs(LARGE, steps=7)

    def change(optimizer: torch.optim.Optimizer, step: int) -> None:
        torch.set_num_threads(1 + step % 3)

    with threads(2):
        oracle.check("AdamW", {"lr": 0.05}, params, grads, edit=change)


@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
def test_an_element_is_stepped_alike_wherever_it_lies(name: str, options: dict[str, Any]) -> None:
    """In one tensor or cut into many, in vectors or in the remainder of a loop: the same bits."""
    params, grads = oracle.inputs([(997,)], steps=7, gaps=False)
    whole = _end(name, options, params, grads)
    cuts = [1, 2, 4, 13, 31, 64, 882]
    pieces = list(params[0].split(cuts))
    rows = [list(row[0].split(cuts)) for row in grads]
    make = oracle.fused(name, lr=0.05, weight_decay=0.1, **options)
    last = oracle.run(make, [p.clone() for p in pieces], rows, states_from=0)[-1]
    for (_, key), one in zip(sorted(k for k in last if k[0] == 0), whole, strict=True):
        joined = [last[k, key] for k in range(len(cuts))]
        if joined[0].dim():
            assert oracle.same_bits(torch.cat(joined), one), key


def test_another_order_of_arithmetic_would_be_noticed() -> None:
    """Teeth: torch's loop and its foreach differ in the last bit, and this comparison sees it."""
    params, grads = oracle.inputs([(5000,)], steps=7, gaps=False)
    ends = []
    for flags in ({"foreach": False}, {"foreach": True}):
        copies = [oracle.plain(param) for param in params]
        optimizer = torch.optim.NAdam(copies, lr=0.05, **flags)
        for row in grads:
            oracle.give(copies, row)
            optimizer.step()
        ends.append(copies[0])
    torch.testing.assert_close(*ends)
    assert not oracle.same_bits(*ends)
