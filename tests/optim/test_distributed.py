"""DistributedDataParallel, ZeRO and sharded parameters (DTensor) on two gloo processes: what
torch.optim gives there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.optim import workers
from tests.optim.pairs import TOLERANCE
from tests.processes import run_ranks

TIMEOUT = 120


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found; all scenarios in one pair of processes, which take long to start."""
    folder = tmp_path_factory.mktemp("ranks")
    found = run_ranks(workers.distributed_worker, folder, workers.WORLD, TIMEOUT)
    assert not [(key, value) for key, value in found[0].items() if key.startswith("error")]
    return found


def check_scenario(results: list[dict[str, Any]], scenario: str) -> None:
    for rank, found in enumerate(results):
        ours, theirs = found[f"{scenario} fastopt"], found[f"{scenario} torch"]
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(
                ours[name],
                value,
                **TOLERANCE,
                msg=lambda text, where=(rank, name): f"{scenario}, rank and name {where}: {text}",
            )
            assert value.is_floating_point()
    # Every rank has the whole, or the same replica.
    first, second = (found[f"{scenario} fastopt"] for found in results)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("case", workers.DDP_CASES)
def test_ddp_with_gradients_apart_and_in_buckets(
    results: list[dict[str, Any]], case: str, as_view: bool
) -> None:
    check_scenario(results, f"ddp {case} {as_view}")
    trained = results[0][f"ddp {case} {as_view} fastopt"]["0.weight"]
    assert not torch.allclose(trained, workers.make_model()[0].weight, atol=1e-3)


def test_zero_redundancy_optimizer_takes_our_class(results: list[dict[str, Any]]) -> None:
    check_scenario(results, "zero")


@pytest.mark.parametrize("case", workers.SHARDED_CASES)
def test_parameters_sharded_by_fsdp(results: list[dict[str, Any]], case: str) -> None:
    check_scenario(results, f"fsdp {case}")


def test_dtensors_sharded_and_replicated(results: list[dict[str, Any]]) -> None:
    """And gradients that are placed otherwise than their parameter."""
    check_scenario(results, "placed")


@pytest.mark.parametrize("option", ["max_grad_norm", "skip_nonfinite"])
def test_what_is_about_whole_gradients_is_refused_for_shards(
    results: list[dict[str, Any]], option: str
) -> None:
    for found in results:
        assert "clip_grad_norm_" in found[f"shard {option} refused"]
        assert torch.equal(found[f"shard {option}"], torch.ones(6))
        assert f"replica {option} refused" not in found
        grad = torch.arange(6.0)
        factor = 0.5 / (grad.norm() + 1e-6) if option == "max_grad_norm" else 1.0
        torch.testing.assert_close(found[f"replica {option}"], 1.0 - factor * grad)


def test_these_checks_see_a_wrong_optimizer(results: list[dict[str, Any]]) -> None:
    """Ranks that step half of what they should."""
    for scenario in ("ddp AdamW True", "fsdp AdamW", "placed"):
        wrong = [dict(found) for found in results]
        for found in wrong:
            ours = dict(found[f"{scenario} fastopt"])
            name = next(iter(ours))
            ours[name] = ours[name] + 1e-3
            found[f"{scenario} fastopt"] = ours
        with pytest.raises(AssertionError):
            check_scenario(wrong, scenario)
