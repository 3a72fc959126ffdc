"""What the tests of the row kernels share: launches recorded, errors in roundings of a dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastopt_kernels.gpu.rows import shared

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Roundings of the dtype, in the largest value of a line. The interpreter truncates what it stores
# as bfloat16; float64 is held against sums of torch's in another order.
TOLERANCES = {torch.float32: 4.0, torch.bfloat16: 1.01, torch.float16: 0.51, torch.float64: 40.0}

# (n_outer, n_cols, n_inner) and the branch it takes. Odd extents, and whole vectors of 16 bytes.
SHAPES = {
    "one column": (300, 1, 1),
    "short": (17, 67, 1),
    "short vectors": (33, 64, 1),
    "row": (3, 781, 1),
    "row vectors": (3, 2048, 1),
    "walked": (1, 16901, 1),
    "walked vectors": (1, 16896, 1),
    "long": (1, 65601, 1),
    "columns": (3, 17, 5),
    "columns vectors": (2, 20, 64),
    "columns walked": (1, 301, 19),
    "columns walked vectors": (1, 600, 24),
}
# Each shape in each dtype, and one flag with either of them somewhere; float32 with both.
CASES = [
    (what, dtype, flag)
    for i, what in enumerate(SHAPES)
    for j, dtype in enumerate(DTYPES)
    for flag in ((False, True) if j == 0 else (bool((i + j) % 2),))
    if what != "long" or j < 2
]


@contextmanager
def short_walks(columns: bool = False) -> Iterator[None]:
    """Tables with which a row of 67 is walked in tiles of 32, and a few columns likewise."""
    kept = shared.WIDEST, shared.STEP
    shared.WIDEST = dict.fromkeys(shared.WIDEST, 32)
    shared.STEP = dict.fromkeys(shared.STEP, 256 if columns else 32)
    try:
        yield
    finally:
        shared.WIDEST, shared.STEP = kept


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel's name, its grid and its constants."""

    name: str
    grid: tuple[int, ...]
    constants: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """The launches of row kernels inside, which run."""
    kept, launched = shared.launch, []

    def launch(kernel: Any, grid: tuple[int], args: Any, **constants: Any) -> None:
        launched.append(Launched(kernel.fn.__name__, grid, constants))
        kept(kernel, grid, args, **constants)

    shared.launch = launch
    try:
        yield launched
    finally:
        shared.launch = kept


def assert_branch(launched: list[Launched], what: str, dtype: torch.dtype) -> None:
    """The launch took the branch that the shape is there for."""
    (launch,) = launched
    constants = launch.constants
    assert constants["COLUMNS"] == what.startswith("columns")
    assert constants["WHOLE"] == ("walked" not in what and what != "long")
    assert (constants["VECTOR"] > 1) == ("vectors" in what)
    if "short" in what or what == "one column":
        assert constants["LINES"] > 1
    if what == "long":
        walked = shared.STEP[shared.COMPUTE[dtype]]
        assert constants["COLS"] in (walked, 2 * walked)
        assert constants["num_warps"] == 16


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def draw(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1
) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, dtype=torch.float64, generator=random) * scale).to(dtype)


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    """Output memory; what is not written is wrong by far."""
    return torch.full(shape, -12345.0, dtype=dtype)


def contiguous(shape: tuple[int, int, int]) -> tuple[int, int]:
    return shape[1] * shape[2], shape[2]


def wrong(
    name: str,
    ours: Tensor,
    right: Tensor,
    dim: int | None = None,
    dtype: torch.dtype | None = None,
    least: float = 0.0,
) -> list[str]:
    """Where ours is not right, in words; dim: that of a line, None: all is one.

    dtype: whose roundings are counted; least: the least a line counts as large
    """
    dtype = dtype or ours.dtype
    rounded = right.to(ours.dtype)
    ours, right = ours.double(), torch.where(torch.isinf(rounded), rounded, right).double()
    kinds = [
        torch.isnan(x) * 1 + torch.isposinf(x) * 2 + torch.isneginf(x) * 3 for x in (ours, right)
    ]
    if not torch.equal(*kinds):
        return [f"{name}: not finite elsewhere than torch"]
    finite = torch.isfinite(right)
    ours, right = (torch.where(finite, x, 0.0) for x in (ours, right))
    size = right.abs()
    if right.numel() and dim is not None:
        size = size.amax(dim, keepdim=True)
    elif right.numel():
        size = size.max()
    facts = torch.finfo(dtype)
    size = size.clamp(min=max(least, facts.smallest_normal))
    error = (ours - right).abs() / (size * facts.eps)
    worst = float(error.max()) if right.numel() else 0.0
    return [f"{name}: off by {worst:.3g} roundings"] if worst > TOLERANCES[dtype] else []


def all_wrong(found: dict[str, Tensor], right: dict[str, Tensor], **least: float) -> list[str]:
    """What is wrong of the tensors by their names; those called d... count in their largest."""
    return [
        text
        for name, ours in found.items()
        for text in wrong(name, ours, right[name], least=least.get(name, 0.0))
    ]


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous().flatten(), b.contiguous().flatten()
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
