"""Problems for every op: random ones, and the rows on which kernels go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.rows.problem import Problem
from tests.rows.subject import NORMS, OVER_DIM

INF, NAN = float("inf"), float("nan")


def draw(
    *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Normal numbers of that size."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def targets(*shape: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(0, classes, shape, generator=generator)


def probabilities(x: Tensor, dim: int = 1, seed: int = 0) -> Tensor:
    """As many distributions over dim as x has, of its dtype."""
    return draw(*x.shape, seed=200 + seed, scale=2.0).softmax(dim).to(x.dtype)


def problem(name: str, x: Tensor, seed: int = 0, **options: Any) -> Problem:
    """A call of that op on x, with all arguments an op may have and a random upstream gradient.

    Over the last dim (cross_entropy: over the classes, with indices) unless options say otherwise.
    """
    inputs: dict[str, Tensor | None] = {"input": x}
    if name in OVER_DIM:
        options = {"dim": -1} | options
    elif name in NORMS:
        options = {"normalized_shape": x.shape[-1:]} | options
        for k, key in enumerate(("weight", "bias")[: 1 + (name == "layer_norm")]):
            shift = draw(*options["normalized_shape"], seed=seed + 11 + k, scale=0.5)
            inputs[key] = (shift + (k == 0)).to(x.dtype)
    else:
        options = {"reduction": "none"} | options
        at = min(1, x.dim() - 1)
        shape = x.shape[:at] + x.shape[at + 1 :]
        inputs["target"] = targets(*shape, classes=x.shape[at], seed=seed)
    made = Problem(name, inputs, options)
    return with_upstream(made, seed)


def with_upstream(made: Problem, seed: int = 0) -> Problem:
    """The same with a random gradient of its output's shape."""
    shape, dtype = output_like(made)
    return Problem(
        made.name,
        made.inputs,
        made.options,
        draw(*shape, dtype=dtype, seed=seed + 31),
        made.wanted,
    )


def output_like(made: Problem) -> tuple[torch.Size, torch.dtype]:
    x = made.inputs["input"]
    assert x is not None
    with torch.no_grad():
        shape = Problem(made.name, made.inputs, made.options).exact()["output"].shape
    return shape, made.options.get("dtype") or x.dtype


def _among_others(row: list[float]) -> Callable[[], Tensor]:
    """The row between ordinary ones, all of 67 elements."""

    def make() -> Tensor:
        x = draw(5, 67, dtype=torch.float64, seed=5)
        x[1] = torch.tensor(row, dtype=torch.float64).repeat(67)[:67]
        x[3, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return x

    return make


def _signs(n: int) -> Tensor:
    return torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0).double()


# Rows in float64, to be cast: a name, and what makes them.
PACK: dict[str, Callable[[], Tensor]] = {
    "1000, 990, 980": lambda: torch.tensor([[1000.0, 990, 980], [980, 1000, 990]] * 20).double(),
    "all equal": lambda: torch.full((9, 67), 3.3, dtype=torch.float64),
    "all equal and large": lambda: torch.full((9, 67), -12345.0, dtype=torch.float64),
    "all zero": lambda: torch.zeros(9, 67, dtype=torch.float64),
    "a row of -inf": _among_others([-INF]),
    "some -inf": _among_others([1.0, -INF, 0.5]),
    "one +inf": _among_others([INF, *[0.25] * 66]),
    "two +inf": _among_others([INF, INF, -1.0]),
    "+inf and -inf": _among_others([INF, -INF]),
    "NaN": _among_others([NAN, *[1.5] * 66]),
    "NaN and infinities": _among_others([NAN, INF, -INF, 1.0]),
    "65504": lambda: torch.full((9, 67), 65504.0, dtype=torch.float64),
    "65504 of either sign": lambda: 65504.0 * _signs(201).view(3, 67),
    "1e30": lambda: 1e30 * draw(9, 67, dtype=torch.float64),
    "1e-30": lambda: 1e-30 * draw(9, 67, dtype=torch.float64),
    "1e30 and 1e-30": lambda: 10.0 ** (30 * _signs(201).view(3, 67)),
    "denormals": lambda: draw(9, 67, dtype=torch.float64),
    "mean 1e4": lambda: 1e4 + draw(64, 67, dtype=torch.float64),
    "one column": lambda: draw(300, 1, dtype=torch.float64, scale=5.0),
    "two columns": lambda: draw(300, 2, dtype=torch.float64, scale=5.0),
    "one element": lambda: torch.full((1, 1), 0.7, dtype=torch.float64),
}


def pack(what: str, dtype: torch.dtype) -> Tensor:
    x = PACK[what]()
    if what == "denormals":
        x *= torch.finfo(dtype).smallest_normal / 8
    return x.to(dtype)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
