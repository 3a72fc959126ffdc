"""Any strides, any rank: what torch gives for the same elements laid out plainly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.rows import cases, oracle
from tests.rows.cases import draw, problem, with_upstream
from tests.rows.problem import Problem
from tests.rows.subject import NAMES, NORMS, OURS, OVER_DIM, TORCH

# A tensor of the same elements in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "columns apart": lambda x: _among(x, -1),
    "rows apart": lambda x: _among(x, 0),
    "offset": lambda x: _offset(x),
    "dims reversed": lambda x: (
        x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])
    ),
}


def _among(x: Tensor, dim: int) -> Tensor:
    """Every other element along dim of a larger tensor of NaN."""
    doubled = torch.stack([x, torch.full_like(x, cases.NAN)], dim if dim >= 0 else x.dim())
    index: list[Any] = [slice(None)] * doubled.dim()
    index[dim if dim >= 0 else x.dim()] = 0
    if dim == 0:
        doubled = doubled.movedim(0, 1).contiguous().movedim(1, 0)
    return doubled[tuple(index)]


def _offset(x: Tensor) -> Tensor:
    """One element into its memory: aligned to nothing."""
    memory = torch.full((x.numel() + 3,), cases.NAN, dtype=x.dtype)
    view = memory[1 : 1 + x.numel()].view(x.shape)
    return view.copy_(x)


def laid(made: Problem, layout: str, upstream: str = "contiguous") -> Problem:
    inputs = {
        key: LAYOUTS[layout](x) if x is not None and x.dim() and x.is_floating_point() else x
        for key, x in made.inputs.items()
    }
    dy = made.upstream
    if dy is not None and dy.dim():
        dy = LAYOUTS[upstream](dy)
    return replace(made, inputs=inputs, upstream=dy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts_of_inputs_and_of_the_upstream(name: str, layout: str) -> None:
    for shape, dtype in itertools.product([(6, 11), (4, 5, 7)], (torch.float32, torch.bfloat16)):
        made = problem(name, draw(*shape, dtype=dtype))
        oracle.check(laid(made, layout))
        oracle.check(laid(made, "contiguous", layout))
        oracle.check(laid(made, layout, "transposed"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", range(6))
@pytest.mark.parametrize("name", OVER_DIM)
def test_every_dim_of_every_rank(name: str, rank: int, layout: str) -> None:
    x = draw(*(3, 4, 2, 5, 3)[:rank])
    for dim in [*range(rank), *range(-max(rank, 1), 0)]:
        made = problem(name, x, dim=dim)
        oracle.check(laid(made, layout if rank else "contiguous"))


@pytest.mark.parametrize("rank", range(1, 6))
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_every_rank(name: str, rank: int) -> None:
    x = draw(*(3, 4, 2, 5, 3)[:rank])
    for n, layout in itertools.product(range(1, rank + 1), LAYOUTS):
        oracle.check(laid(problem(name, x, normalized_shape=x.shape[-n:]), layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_expanded_inputs(name: str, dtype: torch.dtype) -> None:
    """Rows, or columns, that are all the same memory. Nothing is written to it."""
    for x in (draw(1, 11, dtype=dtype).expand(6, 11), draw(6, 1, dtype=dtype).expand(6, 11)):
        oracle.check(problem(name, x, **({"eps": 1e-3} if name in NORMS else {})))
    made = problem(name, draw(6, 11, dtype=dtype))
    if name in NORMS:
        weight = draw(1, dtype=dtype).expand(11)
        oracle.check(replace(made, inputs={**made.inputs, "weight": weight}))
    if name == "cross_entropy":
        inputs = {**made.inputs, "weight": torch.ones(1, dtype=dtype).expand(11)}
        oracle.check(replace(made, inputs=inputs))
        oracle.check(replace(made, inputs={**inputs, "target": torch.tensor([3]).expand(6)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_upstream_of_a_sum(name: str, dtype: torch.dtype) -> None:
    """One number, expanded: no strides at all."""
    for shape in [(6, 11), (4, 5, 7)]:
        made = problem(name, draw(*shape, dtype=dtype))
        assert made.upstream is not None
        ones = torch.ones((), dtype=dtype).expand(made.upstream.shape)
        oracle.check(replace(made, upstream=ones))
        some = draw(*made.upstream.shape[:1], *[1] * (made.upstream.dim() - 1), dtype=dtype)
        oracle.check(replace(made, upstream=some.expand(made.upstream.shape)))
        leaf = made.inputs["input"].clone().requires_grad_()  # type: ignore[union-attr]
        OURS[name](**{**made.inputs, "input": leaf}, **made.options).sum().backward()
        assert leaf.grad is not None
        plain = replace(made, upstream=ones).run(OURS[name])["grad input"]
        assert oracle.same_bits(leaf.grad, plain)


def test_targets_and_weights_with_gaps() -> None:
    made = problem("cross_entropy", draw(6, 11))
    target, weight = made.inputs["target"], draw(11).abs()
    assert target is not None
    gaps = torch.stack([target, torch.full_like(target, 10**6)], 1)[:, 0]
    apart = torch.stack([weight, torch.full_like(weight, cases.NAN)], 1)[:, 0]
    oracle.check(replace(made, inputs={**made.inputs, "target": gaps, "weight": apart}))
    x = draw(4, 5, 6, 7)
    made = problem("cross_entropy", x)
    target = made.inputs["target"]
    assert target is not None
    inputs = {
        "input": x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "target": target.transpose(1, 2).contiguous().transpose(1, 2),
    }
    oracle.check(replace(made, inputs=inputs))


@pytest.mark.parametrize("name", NAMES)
def test_channels_last(name: str) -> None:
    x = draw(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    oracle.check(problem(name, x, **({"dim": 1} if name in OVER_DIM else {})))


def test_a_cross_entropy_of_logits_that_are_a_view_of_more() -> None:
    """Shifted by a token, as language models do."""
    x = draw(2, 9, 13)
    target = torch.arange(16) % 13
    made = Problem("cross_entropy", {"input": x[:, :-1].reshape(-1, 13), "target": target})
    oracle.check(with_upstream(made))
    transposed = Problem(
        "cross_entropy", {"input": x[:, :-1].transpose(1, 2), "target": target.view(2, 8)}
    )
    oracle.check(with_upstream(transposed))


# Empty.

EMPTY = [(0,), (0, 5), (5, 0), (0, 0), (2, 0, 3), (0, 3, 2), (2, 3, 0), (1, 0, 2, 3)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("name", OVER_DIM)
def test_empty(name: str, shape: tuple[int, ...]) -> None:
    """logsumexp of nothing is -inf."""
    for dim, dtype in itertools.product(range(len(shape)), (torch.float32, torch.bfloat16)):
        oracle.check(problem(name, torch.empty(shape, dtype=dtype), dim=dim))


@pytest.mark.parametrize("name", OVER_DIM)
def test_empty_outputs_have_torchs_strides_and_graph(name: str) -> None:
    x = torch.empty(0, 5, requires_grad=True)
    found, expected = OURS[name](x, 1), TORCH[name](x, 1)
    assert found.stride() == expected.stride()
    assert found.requires_grad
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


# Whatever the layout.


@st.composite
def views(draw_: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset: dims in any order in memory, gaps, overlaps (stride 0)."""
    shape = tuple(draw_(st.integers(0, 6)) for _ in range(rank))
    strides = [0] * rank
    reach = draw_(st.integers(1, 2))
    for dim in draw_(st.permutations(range(rank))):
        strides[dim] = draw_(st.sampled_from([reach, reach, reach, 0]))
        reach = reach * max(shape[dim], 1) + draw_(st.sampled_from([0, 0, 1, 3]))
    return shape, tuple(strides), draw_(st.integers(0, 3))


def place(view: tuple[Any, Any, int], dtype: torch.dtype, seed: int) -> Tensor:
    shape, strides, offset = view
    reach = offset + 4 + sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))
    return draw(reach, dtype=dtype, seed=seed, scale=2.0).as_strided(shape, strides, offset)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_layout_gives_what_torch_gives(name: str, data: Any) -> None:
    """Input and upstream in any two layouts, dims and options drawn."""
    rank = data.draw(st.integers(1 if name in NORMS or name == "cross_entropy" else 0, 5))
    seed = data.draw(st.integers(0, 1000))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    x = place(data.draw(views(rank)), dtype, seed)
    options: dict[str, Any] = {}
    if name in OVER_DIM:
        options["dim"] = data.draw(st.integers(-max(rank, 1), max(rank, 1) - 1))
    elif name in NORMS:
        options["normalized_shape"] = tuple(x.shape[-data.draw(st.integers(1, rank)) :])
        options["eps"] = 1e-2
    elif x.shape[min(1, rank - 1)] == 0:
        return
    if name == "cross_entropy":
        options["reduction"] = data.draw(st.sampled_from(["none", "sum"]))
        options["label_smoothing"] = data.draw(st.sampled_from([0.0, 0.1]))
    made = problem(name, x, seed, **options)
    assert made.upstream is not None
    strides = [data.draw(st.sampled_from([0, 1, 2, 7])) for _ in made.upstream.shape]
    view = (tuple(made.upstream.shape), tuple(strides), data.draw(st.integers(0, 2)))
    oracle.check(replace(made, upstream=place(view, made.upstream.dtype, seed + 1)))


# Deliberately wrong candidates.


def _by_memory(input: Tensor, **options: Any) -> Tensor:
    """Reads the memory of its input in order."""
    plain = torch.empty(input.shape, dtype=input.dtype)
    return F.softmax(input.as_strided(input.shape, plain.stride()), **options)


def test_a_candidate_that_ignores_strides_is_refused() -> None:
    made = problem("softmax", draw(6, 11))
    oracle.check(made, ours=_by_memory)
    for layout in ("transposed", "columns apart", "dims reversed"):
        with pytest.raises((AssertionError, RuntimeError)):
            oracle.check(laid(made, layout), ours=_by_memory)


class _UpstreamMemory(torch.autograd.Function):
    """Reads the memory of the upstream gradient in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        storage = dy.untyped_storage()
        memory = torch.empty(0, dtype=dy.dtype).set_(storage)
        return memory.repeat(dy.numel())[: dy.numel()].view(dy.shape)


def test_a_candidate_that_ignores_the_strides_of_the_upstream_is_refused() -> None:
    def candidate(input: Tensor, **options: Any) -> Tensor:
        return _UpstreamMemory.apply(F.softmax(input, **options))  # type: ignore[no-any-return]

    made = problem("softmax", draw(6, 11))
    oracle.check(made, ours=candidate)
    with pytest.raises(AssertionError, match="grad input"):
        oracle.check(laid(made, "contiguous", "transposed"), ours=candidate)
