"""Calls of the norms over channels, layouts of their input, and how they are held against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastopt import functional
from tests.rows import oracle
from tests.rows.cases import draw

Values = dict[str, Tensor]
# Of f, x, weight, bias, running mean and variance, and what else there is.
CALLS: dict[str, Callable[..., Tensor]] = {
    "batch_norm": lambda f, x, w, b, m, v, **o: f.batch_norm(x, m, v, w, b, True, **o),
    "batch_norm eval": lambda f, x, w, b, m, v, **o: f.batch_norm(x, m, v, w, b, False, **o),
    "instance_norm": lambda f, x, w, b, m, v, **o: f.instance_norm(x, m, v, w, b, True, **o),
    "instance_norm eval": lambda f, x, w, b, m, v, **o: f.instance_norm(x, m, v, w, b, False, **o),
    "group_norm 1": lambda f, x, w, b, m, v, **o: f.group_norm(x, 1, w, b, **o),
    "group_norm 3": lambda f, x, w, b, m, v, **o: f.group_norm(x, 3, w, b, **o),
}
OWN = ("batch_norm", "instance_norm", "group_norm 1", "group_norm 3")
# A tensor of the same elements in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "planes": lambda x: x,
    "pixels": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "some channels of planes": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : -x.shape[1]],
    "some channels of pixels": lambda x: (
        torch.cat([x, x, x], 1).movedim(1, -1).contiguous().movedim(-1, 1)
    )[:, x.shape[1] : -x.shape[1]],
    "every other image": lambda x: x.repeat_interleave(2, 0)[::2],
    "elements apart": lambda x: torch.stack([x, x], -1)[..., 0],
}


def run(name: str, f: Any, given: list[Tensor | None], dy: Tensor, **options: Any) -> Values:
    """Output, gradients and running statistics; given: x, weight, bias, mean and variance"""
    leaves = [None if t is None else t.detach().requires_grad_() for t in given[:3]]
    running = [None if t is None else t.clone() for t in given[3:]]
    y = CALLS[name](f, *leaves, *running, **options)
    wanted = [t for t in leaves if t is not None]
    names = [n for n, t in zip(("x", "weight", "bias"), leaves, strict=True) if t is not None]
    found = dict(zip(names, torch.autograd.grad(y, wanted, dy), strict=True))
    moved = zip(("running mean", "running var"), running, strict=True)
    return {"y": y.detach(), **found, **{n: t for n, t in moved if t is not None}}


def make(x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """x with weight, bias and running statistics."""
    n, dtype = x.shape[1], dtype or x.dtype
    weight, bias, mean = (draw(n, dtype=dtype, seed=seed, scale=0.5) for seed in (11, 12, 13))
    return [x, weight + 1, bias, mean, draw(n, seed=14).abs().to(dtype) + 0.5]


def check(
    name: str,
    given: list[Tensor | None],
    dy: Tensor | None = None,
    f: Any = functional,
    luck: float = 1.0,
    **options: Any,
) -> Values:
    x = given[0]
    assert x is not None
    dy = draw(*x.shape, dtype=x.dtype, seed=31) if dy is None else dy
    before = [None if t is None else oracle.plain(t) for t in given]
    mine = run(name, f, given, dy, **options)
    for t, was in zip(given, before, strict=True):
        assert t is None or oracle.same_bits(t, was)
    torchs = run(name, F, [oracle.plain(t) for t in given], dy, **options)
    wide = [oracle.plain(t, torch.float64) for t in given]
    exact = run(name, F, wide, dy.double(), **options)
    for key, right in exact.items():
        what = f"{name} {key}"
        assert mine[key].shape == right.shape, what
        assert mine[key].dtype == torchs[key].dtype, what
        bounds = oracle.Bounds((), 0.0, None, None, luck)
        oracle.assert_not_worse(what, mine[key], torchs[key], right, mine[key].dtype, bounds)
    return mine
