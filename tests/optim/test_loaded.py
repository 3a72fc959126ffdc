"""Loading takes hyper-parameters and states; options stay as the optimizer was constructed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import fastopt
from tests.optim.pairs import construct, give_grads, make_params
from tests.optim.test_loading import SHAPES, check_refused, stepped


def test_hooks_see_the_state_dict_first_and_the_states_last() -> None:
    """A pre-hook's result is checked and loaded; a post-hook sees codes as they are kept."""
    optimizer, other = stepped("AdamW", state_dtype="8bit"), stepped("AdamW", 4, state_dtype="8bit")
    saved, seen = other.state_dict(), []

    def repair(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        given["param_groups"] = saved["param_groups"]
        return given | {"state": saved["state"]}

    def look(given: Any) -> None:
        state = next(iter(given.state.values()))
        seen.append((state["exp_avg_codes"].dtype, float(state["step"]), given.param_groups[0]))

    handles = [
        optimizer.register_load_state_dict_pre_hook(repair),
        optimizer.register_load_state_dict_post_hook(look),
    ]
    broken = copy.deepcopy(saved)
    broken["param_groups"][0]["lr"] = broken["state"][0]["step"] = -1.0
    optimizer.load_state_dict(broken)
    assert [found[:2] for found in seen] == [(torch.int8, 4.0)]
    assert seen[0][2]["state_dtype"] == "8bit"
    handles[0].remove()
    optimizer.register_load_state_dict_pre_hook(lambda _, given: given["state"][0].update(step=-1))
    check_refused(optimizer, copy.deepcopy(saved), "'step' is -1")
    assert len(seen) == 1


def test_what_torch_has_saved_since_long_ago_is_taken() -> None:
    """Steps of one element (torch 1.12, capturable) or whole numbers, no state for some."""
    for name in ("Adam", "NAdam", "RMSprop-both"):
        theirs = construct(torch, name, make_params(SHAPES), lr=torch.tensor(0.01))
        params = theirs.param_groups[0]["params"]
        for seed in range(3):
            give_grads(params, seed)
            theirs.step()
        saved = copy.deepcopy(theirs.state_dict())
        saved["state"][0]["step"] = saved["state"][0]["step"].long()
        saved["state"][1]["step"] = saved["state"][1]["step"].reshape(1)
        del saved["state"][2], theirs.state[params[2]]
        values = [p.detach().clone() for p in params]
        ours = construct(fastopt, name, [torch.nn.Parameter(value) for value in values])
        ours.load_state_dict(saved)
        for owned, optimizer in ((params, theirs), (ours.param_groups[0]["params"], ours)):
            give_grads(owned, 9)
            optimizer.step()
        for p, q in zip(params, ours.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-5, atol=1e-6)
        steps = [float(state["step"]) for state in ours.state.values()]
        assert sorted(steps) == [1.0, 4.0, 4.0]


def test_a_sparse_buffer_of_torchs_sgd_is_taken() -> None:
    def run(package: Any, saved: Any = None) -> Any:
        layer = torch.nn.Embedding(9, 3, sparse=True)
        torch.nn.init.ones_(layer.weight)
        optimizer = package.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        if saved is not None:
            optimizer.load_state_dict(saved)
        for rows in ([1, 2], [2, 5]):
            optimizer.zero_grad()
            layer(torch.tensor(rows)).sum().backward()
            optimizer.step()
        return optimizer

    saved = run(torch).state_dict()
    assert saved["state"][0]["momentum_buffer"].layout is torch.sparse_coo
    theirs, ours = (run(package, copy.deepcopy(saved)) for package in (torch, fastopt))
    weights = [optimizer.param_groups[0]["params"][0].detach() for optimizer in (theirs, ours)]
    torch.testing.assert_close(weights[1], weights[0])


OWN: list[dict[str, Any]] = [
    {"max_grad_norm": 0.1, "norm_type": math.inf},
    {"ema_decay": 0.9, "ema_warmup": 3},
    {"clip_value": 0.5},
    {"skip_nonfinite": True, "telemetry": True},
    {"state_dtype": "bfloat16", "param_rounding": "kahan", "rounding_seed": 3},
    {},
]


HYPERS = {"lr": 0.7, "momentum": 0.8, "weight_decay": 0.01}


def check_own_options(saver: str, ours: Any = fastopt.optim.SGD) -> None:
    """Of each group; lr, momentum and the like are the checkpoint's."""
    params = make_params(tuple((3, k + 1) for k in range(len(OWN))))

    def grouped(own: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"params": [p], **options} for p, options in zip(params, own, strict=True)]

    if saver == "torch":
        saved = torch.optim.SGD(grouped([{}] * len(OWN)), **HYPERS)
    else:
        rolled = [*OWN[1:], OWN[0]] if saver == "ours, with others" else OWN
        saved = fastopt.optim.SGD(grouped(rolled), **HYPERS)
    optimizer = ours(grouped(OWN), lr=0.1)

    def own_of(group: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in group.items() if k not in ("params", *HYPERS)}

    expected = list(map(own_of, optimizer.param_groups))
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert list(map(own_of, optimizer.param_groups)) == expected
    for group in optimizer.param_groups:
        assert {k: group[k] for k in HYPERS} == HYPERS


@pytest.mark.parametrize("saver", ["torch", "ours", "ours, with others"])
def test_how_groups_step_is_what_they_were_constructed_with(saver: str) -> None:
    check_own_options(saver)


class AsTorch(fastopt.optim.SGD):
    """Wrong: takes groups as they were saved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.optim.Optimizer.load_state_dict(self, state_dict)


@pytest.mark.parametrize("saver", ["torch", "ours, with others"])
def test_options_that_are_lost_would_be_noticed(saver: str) -> None:
    with pytest.raises(AssertionError):
        check_own_options(saver, AsTorch)


def test_an_option_torchs_class_has_not_stays_with_its_group() -> None:
    params = make_params(SHAPES)
    groups = [{"params": params[:1], "capturable": True}, {"params": params[1:]}]
    ours = fastopt.optim.SGD(groups, lr=0.1)
    theirs = torch.optim.SGD([{**g, "params": list(g["params"])} for g in groups], lr=0.2)
    saved = theirs.state_dict()
    del saved["param_groups"][0]["capturable"]
    ours.load_state_dict(saved)
    assert [group.get("capturable", False) for group in ours.param_groups] == [True, False]


def test_a_limit_of_the_checkpoint_is_not_added_to_one_of_another_kind() -> None:
    params = make_params(SHAPES)
    ours = fastopt.optim.SGD(params, lr=0.1, clip_value=0.5)
    ours.load_state_dict(fastopt.optim.SGD(make_params(SHAPES), max_grad_norm=1.0).state_dict())
    assert ours.param_groups[0].get("max_grad_norm") is None
    give_grads(params, 0)
    before = [p.detach().clone() for p in params]
    ours.step()
    for param, was in zip(params, before, strict=True):
        assert param.grad is not None
        expected = was - 1e-3 * param.grad.clamp(-0.5, 0.5)
        torch.testing.assert_close(param.detach(), expected)


def test_a_limit_that_is_a_tensor_stays_the_users_tensor() -> None:
    limit = torch.tensor(1.0)
    optimizer = fastopt.optim.SGD(make_params(SHAPES), max_grad_norm=limit)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["max_grad_norm"] is limit
