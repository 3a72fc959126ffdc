"""Tensor parallelism of a swapped transformer, and functions of DTensors, on two gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hostile import parallel
from tests.processes import run_ranks
from tests.rows.operands import CALLS

TIMEOUT = 240
# torch has no such function.
OWN = ("scaled_masked_softmax", "add_layer_norm", "add_rms_norm")
HOW = ("sharded", "whole", "mixed")
FUNCTIONS = [
    f"{name}, {how}" for name, call in CALLS.items() for how in HOW[: 2 + (len(call.tensors) > 1)]
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found; all in one pair of processes, which take long to start."""
    return run_ranks(parallel.work, tmp_path_factory.mktemp("ranks"), parallel.WORLD, TIMEOUT)


def check_trained(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Losses and gradients."""
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    losses = torch.stack(expected[: parallel.STEPS])
    assert losses.std() > 0.01


@pytest.mark.parametrize("plan", parallel.PLANS)
def test_tensor_parallelism_gives_torchs_losses(found: list[dict[str, Any]], plan: str) -> None:
    for rank in found:
        ours, torchs, alone, seen = rank["parallel"][plan]
        check_trained(ours, torchs)
        check_trained(ours, alone)
        assert {"halves": "AsyncCollectiveTensor", "sequence": "DTensor"}[plan] in seen


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_dtensors_are_torchs(found: list[dict[str, Any]], name: str) -> None:
    """Its values, or its exceptions."""
    for rank in found:
        ours, torchs, plain = rank["functions"][name]
        if isinstance(torchs, str):
            assert isinstance(ours, str)
            assert ours.startswith(torchs[:80])
            continue
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
        if "whole" in name or name.partition(",")[0] in OWN:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_functions_of_dtensors_are_most_of_them_right(found: list[dict[str, Any]]) -> None:
    """Where all are distributed, few are refused by torch."""
    refused = {
        name for name, (_, torchs, _) in found[0]["functions"].items() if type(torchs) is str
    }
    assert {name for name in refused if "mixed" not in name} <= {
        "instance_norm, sharded",
        "group_norm, sharded",
        "spectral_norm, sharded",
    }


def test_a_wrong_rank_would_be_noticed(found: list[dict[str, Any]]) -> None:
    ours, torchs, *_ = found[0]["parallel"]["halves"]
    with pytest.raises(AssertionError):
        check_trained([*ours[:-1], ours[-1] + 1e-3], torchs)
    with pytest.raises(AssertionError):
        check_trained([ours[0]] * len(ours), torchs)
