"""The simulation of what few bits lose: its codes are the kernels', and it sees what it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import storage_report
from bench.storage_report import CODECS, STEPS, Codec, moved, octaves, powers, tracked
from fastopt.optim.state import formats
from fastopt_kernels.chunks import SHIFT, value_of

NEAREST, BY_CHANCE = CODECS[:2]


def test_the_levels_are_those_of_the_kernels() -> None:
    levels = np.array([value_of(code) for code in range(256)])
    np.testing.assert_allclose(octaves(SHIFT), levels / levels[-1], rtol=1e-7)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(octaves(SHIFT - 1), levels / levels[-1], rtol=1e-7)


def test_the_nearest_code_is_that_of_the_optimizers() -> None:
    """But for 0, which a step never keeps."""
    x = torch.rand(256).square() + 1e-5
    x[0] = 1.0
    codes = torch.empty(256, dtype=torch.uint8)
    kept = formats.decode(codes, formats.encode(x, codes))
    ours = NEAREST.keep(x.double().numpy(), np.random.default_rng(0))
    np.testing.assert_allclose(ours, kept.numpy(), rtol=1e-5)


@pytest.mark.parametrize("levels", [lambda: octaves(SHIFT), lambda: powers(2)])
def test_chance_is_right_on_average(levels: object) -> None:
    random, x = np.random.default_rng(0), np.full(200_000, 0.3)
    means = [Codec("", levels, how).keep(x, random).mean() for how in (False, True)]  # type: ignore[arg-type]
    assert abs(means[1] - 0.3) < 1e-4
    assert abs(means[0] - 0.3) > 1e-4


def test_errors_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearest codes lag behind, and coarser ones are worse."""
    monkeypatch.setattr(storage_report, "BLOCKS", 2)
    coarse = Codec("", lambda: octaves(SHIFT + 1), True)
    fine, nearest, coarser = (tracked(c, 0.0, STEPS) for c in (BY_CHANCE, NEAREST, coarse))
    assert 0.01 < fine < nearest
    assert fine < coarser


def test_a_parameter_moves_as_its_rounding_lets_it() -> None:
    assert moved("nearest", 1e-3) == 0.0
    assert moved("master", 1e-3) == pytest.approx(1.0, abs=1e-3)
    assert moved("stochastic", 1e-3) == pytest.approx(1.0, abs=0.02)
