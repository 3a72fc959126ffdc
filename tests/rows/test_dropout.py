"""The dropout inside fused functions: which elements it keeps, and what its seed says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import functional
from fastopt.functional.dropout import mask, odds
from tests.rows.cases import draw
from tests.rows.oracle import same_bits

SEED = torch.tensor(7)


def test_the_mask_is_the_kernels() -> None:
    x = torch.ones(37, 781)
    kept = functional.add_rms_norm(x, torch.zeros_like(x), (781,), dropout_p=0.3, seed=7)[1] != 0
    assert torch.equal(kept, mask(SEED, 37, 781, 0.3))
    strided = torch.ones(37, 800)[:, :781]
    again = functional.add_rms_norm(strided, torch.zeros_like(x), (781,), dropout_p=0.3, seed=7)[1]
    assert torch.equal(again != 0, kept)


def test_chance_is_even_and_independent() -> None:
    """Share, neighbours in row and column, rows and seeds: within 5 standard deviations."""
    n = 1000
    for p in (0.1, 0.5, 0.9):
        kept = [mask(torch.tensor(seed), n, n, p).double() - (1 - p) for seed in (0, 1, 2**40)]
        spread = p * (1 - p)
        assert abs(float(kept[0].mean())) < 5 * (spread / n**2) ** 0.5
        pairs = [(k[:, d:], k[:, : n - d]) for k in kept for d in (1, 2, 16)]
        pairs += [(k[d:], k[: n - d]) for k in kept for d in (1, 2, 16)]
        pairs += [(kept[0], kept[1]), (kept[0], kept[2]), (kept[1], kept[2])]
        for a, b in pairs:
            assert abs(float((a * b).mean())) < 5 * spread / n
        for over in (0, 1):
            sums = kept[0].sum(over) / (n * spread) ** 0.5
            assert 0.8 < float(sums.square().mean()) < 1.2
    assert odds(0.5) == (2**31, 2.0)
    assert odds(1.0) == (0, 0.0)


def test_seeds() -> None:
    """None follows torch's generator; an int and a tensor say the same; others differ."""

    def drawn(seed: Any = None) -> Tensor:
        x = torch.ones(8, 67)
        options = {"dropout_p": 0.5, "seed": seed}
        return functional.add_layer_norm(x, torch.zeros_like(x), (67,), **options)[1]

    torch.manual_seed(3)
    first, second = drawn(), drawn()
    torch.manual_seed(3)
    assert torch.equal(first, drawn())
    assert not torch.equal(first, second)
    assert torch.equal(drawn(-5), drawn(torch.tensor([-5])))
    assert not torch.equal(drawn(5), drawn(5 + 2**32))
    state = torch.get_rng_state()
    drawn(5)
    x = torch.ones(2, 67)
    functional.add_layer_norm(x, x, (67,), dropout_p=0.5, training=False)
    functional.add_layer_norm(x, x, (67,))
    assert torch.equal(state, torch.get_rng_state())


def test_all_dropped_and_not_training() -> None:
    """What is dropped is 0 even where it was NaN; outside of training nothing is."""
    x, residual = draw(9, 67), draw(9, 67, seed=1)
    x[3, 5] = torch.nan
    leaf = x.clone().requires_grad_()
    y, total = functional.add_rms_norm(leaf, residual, (67,), dropout_p=1.0)
    assert same_bits(total, residual)
    (dx,) = torch.autograd.grad((y, total), leaf, (draw(9, 67), draw(9, 67)))
    assert dx.eq(0).all()
    total = functional.add_rms_norm(x, residual, (67,), dropout_p=0.5, training=False)[1]
    assert same_bits(total, x + residual)


# A deliberately wrong candidate.


def _xored(seed: Tensor, n_rows: int, n_cols: int, p: float) -> Tensor:
    """Seed and index together before they are hashed: seeds permute one another's masks."""
    index = torch.arange(n_rows * n_cols).view(n_rows, n_cols)
    return ((index ^ seed) * 0x9E3779B1 & 0xFFFFFFFF) < odds(p)[0]


def test_a_hash_that_is_not_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "mask", _xored)
    with pytest.raises(AssertionError):
        test_chance_is_even_and_independent()
