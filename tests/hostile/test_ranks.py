"""DistributedDataParallel, FullyShardedDataParallel, fully_shard and ZeroRedundancyOptimizer on two
gloo processes: every rank does the same, or says why not.

What is refused because a rank has only a part of it is in REFUSED: a norm over the process group
would make those tests compare numbers instead.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.hostile import in_backward, in_parts, ranks, worker
from tests.processes import run_ranks

TIMEOUT = 240
Found = dict[str, Any]
# Options that are about all gradients, and the words in which a refusal says what to do instead.
REFUSED = {"max_grad_norm": "clip_grad_norm_", "skip_nonfinite": "leave out step()"}
# Clipping by a tensor's own norm is rounded otherwise than torch's.
ROUNDED = {"ddp clipped": {"rtol": 1e-5, "atol": 1e-6}}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each rank found; all scenarios in one pair of processes, which take long to start."""
    return run_ranks(worker.main, tmp_path_factory.mktemp("ranks"), ranks.WORLD, TIMEOUT)


def check_replicas(found: Sequence[Found], key: str) -> None:
    """Steps in backward give what step() gives, and the same on all ranks."""
    tolerance = ROUNDED.get(key, {"rtol": 0.0, "atol": 0.0})
    released, plain = f"{key} released", f"{key} plain"
    for mine in found:
        assert list(mine[released]) == list(mine[plain])
        for name, value in mine[plain].items():
            torch.testing.assert_close(
                mine[released][name], value, **tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )
    first, second = (mine[released] for mine in found)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def check_refused(found: Sequence[Found], key: str, *words: str) -> None:
    for mine in found:
        assert all(word in mine[key] for word in words), mine[key] or f"{key}: not refused"


@pytest.mark.parametrize("case", in_backward.DDP_CASES)
def test_replicas_that_step_in_backward_stay_the_same(found: list[Found], case: str) -> None:
    check_replicas(found, f"ddp {case}")
    trained, start = found[0][f"ddp {case} released"], dict(ranks.make_net().named_parameters())
    moved = {name for name in trained if not torch.equal(trained[name], start.get(name, start))}
    frozen = {"frozen": {"a.weight", "a.bias"}, "one branch": set(trained) - {"b.weight", "b.bias"}}
    if case not in ("sparse", "clipped"):
        assert moved == set(trained) - frozen.get(case, set())


def test_shards_that_step_in_backward_are_those_of_step(found: list[Found]) -> None:
    """Also one that was frozen at first, and gradients that are summed over two backwards."""
    check_replicas(found, "fsdp")
    start = dict(ranks.make_model().named_parameters())
    assert not any(torch.equal(p, start[n]) for n, p in found[0]["fsdp released"].items())


@pytest.mark.parametrize(
    "case",
    [
        "ddp without model",
        "ddp by another model",
        "ddp by its module",
        "what is outside",
        "a group outside",
        "what ddp never reduces",
        "fsdp2 without model",
    ],
)
def test_gradients_of_one_rank_are_not_stepped_in_backward(found: list[Found], case: str) -> None:
    check_refused(found, f"release of {case}", "drift", "model=model", "local=True")


def test_each_rank_may_step_by_itself_where_it_is_asked_to(found: list[Found]) -> None:
    for rank, mine in enumerate(found):
        torch.testing.assert_close(mine["local step"], torch.full((3,), 1.0 - 0.1 * (rank + 1)))


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp1 original"])
def test_flat_parameters_are_not_stepped_in_backward(found: list[Found], kind: str) -> None:
    check_refused(found, f"release of {kind}", "fully_shard", "step()")


def test_step_leaves_what_no_sync_has_not_reduced(found: list[Found]) -> None:
    check_refused(found, "step of what is not reduced", "no_sync()", "zero_grad()")
    check_refused(found, "step of what never ends", "find_unused_parameters=True")


@pytest.mark.parametrize("key", ["ddp by torch", "ddp by fastopt", "fsdp2"])
def test_a_scaled_loss_of_parameters_stepped_in_backward_is_refused(
    found: list[Found], key: str
) -> None:
    check_refused(found, f"scale of {key}", "GradScaler", "remove()")


@pytest.mark.parametrize("moment", ["constructed", "set later", "group"])
@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("wrapper", ranks.WRAPPERS)
def test_norms_and_skips_of_a_part_are_refused(
    found: list[Found], wrapper: str, option: str, moment: str
) -> None:
    key = f"norm {wrapper}"
    check_refused(found, f"{key} {option} {moment}", "whole gradients", *REFUSED.values())
    check_refused(found, f"{key} {option} {moment}", of_wrapper(wrapper))
    assert [mine[f"{key} without"] for mine in found] == ["", ""]


def test_the_norm_of_flat_parameters_that_are_not_sharded_is_taken(found: list[Found]) -> None:
    norms = [mine["norm of the whole found"] for mine in found]
    assert [mine["norm of the whole"] for mine in found] == ["", ""]
    for taken, norm in norms:
        torch.testing.assert_close(taken, norm)
    assert norms[0] == norms[1]


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("wrapper", ["fsdp1 original", "fsdp2", "zero"])
def test_norms_and_skips_of_a_model_that_is_sharded_later_are_refused(
    found: list[Found], wrapper: str, option: str
) -> None:
    key = f"norm {wrapper} {option} wrapped later"
    check_refused(found, key, "whole gradients", *REFUSED.values(), of_wrapper(wrapper))


def of_wrapper(wrapper: str) -> str:
    if wrapper == "zero":
        return "ZeroRedundancyOptimizer gives this rank a part"
    return "DTensors" if wrapper == "fsdp2" else "FullyShardedDataParallel"


@pytest.mark.parametrize(("wrapper", "option"), in_parts.KEPT)
def test_what_is_about_elements_is_that_of_the_part(
    found: list[Found], wrapper: str, option: str
) -> None:
    key = f"kept {wrapper} {option}"
    for mine in found:
        assert len(mine[f"{key} sharded"]) > 0
        assert all(map(torch.equal, mine[f"{key} sharded"], mine[f"{key} plain"]))


@pytest.mark.parametrize("wrapper", ranks.WRAPPERS)
def test_telemetry_says_of_what_this_rank_has_a_part(found: list[Found], wrapper: str) -> None:
    whole = wrapper == "zero"
    for mine in found:
        shards = mine[f"kept {wrapper} telemetry shards"]
        assert set(shards.values()) == {not whole}
        lines = mine[f"kept {wrapper} telemetry table"].splitlines()[1:]
        assert len(lines) == len(shards)
        assert all(("(this rank's part)" in line) != whole for line in lines)


@pytest.mark.parametrize("options", ["plain", "clip_value", "fused"])
@pytest.mark.parametrize("wrapper", ["fsdp1", "fsdp1 original", "fsdp2"])
def test_an_infinity_of_one_rank_is_skipped_by_all(
    found: list[Found], wrapper: str, options: str
) -> None:
    key = f"scaler {wrapper} {options}"
    assert [mine[key] for mine in found] == [(0, 4.0)] * ranks.WORLD
    if wrapper != "fsdp2":
        check_refused(found, f"{key} ours", "ShardedGradScaler")


def test_an_infinity_is_skipped_by_all_where_the_model_is_sharded_later(found: list[Found]) -> None:
    assert [mine["scaler wrapped later"] for mine in found] == [(0, 4.0)] * ranks.WORLD


def test_these_checks_see_ranks_that_drift(found: list[Found]) -> None:
    """A rank that has stepped a little further, and one that was not refused."""
    wrong = [copy.deepcopy(mine) for mine in found]
    wrong[1]["ddp plain released"]["last.bias"] += 1e-7
    with pytest.raises(AssertionError):
        check_replicas(wrong, "ddp plain")
    wrong[1]["norm zero max_grad_norm constructed"] = ""
    with pytest.raises(AssertionError, match="not refused"):
        check_refused(wrong, "norm zero max_grad_norm constructed", "whole gradients")
