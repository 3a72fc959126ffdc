"""BatchNorm, InstanceNorm and GroupNorm in the interpreter, against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastopt import functional
from fastopt_kernels.gpu.rows import channel_norms, channel_tiles
from tests.gpu.row_launches import all_wrong, draw, recorded, same_bits

Values = dict[str, Tensor]
# Of f, x, weight, bias, running mean and variance.
CALLS: dict[str, Callable[..., Tensor]] = {
    "batch_norm": lambda f, x, w, b, m, v: f.batch_norm(x, m, v, w, b, True),
    "batch_norm eval": lambda f, x, w, b, m, v: f.batch_norm(x, m, v, w, b, False),
    "instance_norm": lambda f, x, w, b, m, v: f.instance_norm(x, m, v, w, b),
    "group_norm": lambda f, x, w, b, m, v: f.group_norm(x, {9: 3}.get(x.shape[1], 4), w, b),
}
# Odd extents, whole vectors of 16 bytes, several pieces of a channel, one element of it.
SHAPES = [(2, 12, 7, 5), (2, 16, 4, 4), (1, 9, 66, 63), (35, 32)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "planes": lambda x: x,
    "pixels": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}


def make(x: Tensor) -> list[Tensor]:
    n, dtype = x.shape[1], x.dtype
    weight, bias, mean = (draw(n, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    return [x, weight, bias, mean, draw(n, seed=5).abs().to(dtype) + 0.5]


def run(name: str, f: Any, given: list[Tensor], dtype: torch.dtype, wanted: str = "xwb") -> Values:
    cast = [t.to(dtype, copy=True) for t in given]
    leaves = {k: t.requires_grad_() for k, t in zip("xwb", cast[:3], strict=True) if k in wanted}
    y = CALLS[name](f, *cast)
    dy = draw(*given[0].shape, dtype=given[0].dtype, seed=1).to(dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    found = {"y": y.detach(), "mean": cast[3].detach(), "var": cast[4].detach()}
    return found | {f"d{key}": grad for key, grad in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "shape"),
    [(n, s) for n in CALLS for s in SHAPES if (n, len(s)) != ("instance_norm", 2)],
    ids=str,
)
def test_norms(name: str, shape: tuple[int, ...], layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = make(LAYOUTS[layout](draw(*shape, dtype=dtype) + 1))
        with recorded() as launched:
            found = run(name, functional, given, dtype)
        # Sums over so many cancel, and down a tile the interpreter adds one by one.
        least = {"dw": 2 * given[0][:, 0].numel() ** 0.5}
        assert all_wrong(found, run(name, F, given, torch.float64), **least) == []
        assert launched[-1].name == "channel_dx_kernel"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    given = make(draw(3, 12, 5, 5, dtype=dtype))
    assert all_wrong(run(name, functional, given, dtype), run(name, F, given, torch.float64)) == []


@pytest.mark.parametrize("wanted", ["x", "w", "b"])
@pytest.mark.parametrize("name", CALLS)
def test_only_what_is_wanted_is_computed(name: str, wanted: str) -> None:
    given = make(draw(3, 12, 5, 5))
    whole, some = (run(name, functional, given, torch.float32, w) for w in ("xwb", wanted))
    assert set(some) == {"y", "mean", "var", f"d{wanted}"}
    assert all(same_bits(value, whole[key]) for key, value in some.items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm", "group_norm"])
def test_mean_1e4_and_standard_deviation_1(name: str, layout: str) -> None:
    """The mean in float32 is off by 1e-3 there: torch's output is too, ours is not."""
    given = make(LAYOUTS[layout](draw(3, 12, 9, 9) + 1e4))
    found, right = run(name, functional, given, torch.float32), run(name, F, given, torch.float64)
    assert all_wrong({"y": found["y"]}, right) == []


def test_sums_over_more_parts_than_a_tile_has() -> None:
    kept = channel_tiles.SUM_TILE
    channel_tiles.SUM_TILE = (4, 4)
    try:
        for layout in LAYOUTS.values():
            given = make(layout(draw(9, 12, 5, 5)))
            for name in ("batch_norm", "group_norm"):
                found = run(name, functional, given, torch.float32)
                assert all_wrong(found, run(name, F, given, torch.float64)) == []
    finally:
        channel_tiles.SUM_TILE = kept


def _biased(x: Tensor, *rest: Any) -> None:
    """The kernels' output, of a variance that is a twentieth too small."""
    kept(x, *rest)
    rest[2].mul_(1.05)


kept = channel_norms.channel_norm


def test_a_variance_that_is_off_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_norms, "channel_norm", _biased)
    given = make(draw(3, 12, 5, 5))
    found = run("group_norm", functional, given, torch.float32)
    assert all_wrong(found, run("group_norm", F, given, torch.float64)) != []
