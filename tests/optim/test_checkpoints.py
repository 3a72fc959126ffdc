"""What a state_dict holds, and which ones are taken: ours, torch's, older ones, partial ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastopt
from tests.optim.pairs import (
    CASES,
    ONE_EACH,
    Pair,
    assert_params_close,
    assert_states_close,
    construct,
    give_grads,
    make_params,
)


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def check_format(case: str, ours: type | None = None, **more: Any) -> None:
    """Keys, their order, dtypes and shapes as torch has them, before, at and after the first step,
    with parameters that have no state yet."""
    pair = Pair(case, ours=ours, **more)
    pair.check()
    for missing in [(1,), (1, 3), ()]:
        pair.step(missing)
        pair.check()


@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_is_torchs_at_every_point(case: str) -> None:
    check_format(case)


class OwnKeys(fastopt.optim.Adam):
    """Wrong: says its states otherwise than torch."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for entry in state["state"].values():
            entry["step"] = entry["step"].reshape(1)
        return state


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError):
        check_format("Adam", OwnKeys)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("case", ["Adam", "NAdam", "RMSprop-both", "Adagrad"])
def test_step_counts_follow_the_default_dtype_as_torchs_do(case: str) -> None:
    check_format(case, dtype=torch.float32)


@pytest.mark.parametrize("case", ["Adam", "NAdam", "SGD-momentum"])
def test_states_of_a_bfloat16_parameter_are_stored_as_torch_stores_them(case: str) -> None:
    pair = Pair(case, dtype=torch.bfloat16).run(1)
    ours, theirs = (optimizer.state_dict()["state"][0] for optimizer in (pair.ours, pair.theirs))
    kinds = {name: (value.dtype, value.shape) for name, value in ours.items()}
    assert kinds == {name: (value.dtype, value.shape) for name, value in theirs.items()}


def test_step_tensors_are_distinct_where_torch_counts_them_in_place() -> None:
    """One tensor shared by all would advance once for each parameter once torch has it."""
    for missing in [(), (2,)]:
        pair = Pair("AdamW")
        give_grads(pair.our_params, 0)
        pair.ours.step()
        state = pair.ours.state_dict()
        for foreach in (False, True):
            params = make_params()
            optimizer = torch.optim.AdamW(params, foreach=foreach)
            optimizer.load_state_dict(copy.deepcopy(state))
            give_grads(params, 0, missing)
            optimizer.step()
            steps = [float(optimizer.state[param]["step"]) for param in params]
            assert steps == [1.0 if k in missing else 2.0 for k in range(len(params))]


def test_a_state_dict_goes_on_describing_the_optimizer_as_torchs_does() -> None:
    """torch's holds the live tensors: who saves it later saves one moment, not two."""
    pair = Pair("NAdam")
    pair.step(missing=(0,))
    pair.step(missing=(0,))
    kept = [optimizer.state_dict()["state"] for optimizer, _ in pair.sides]
    for optimizer, params in pair.sides:
        late = make_params([(2, 2)], seed=7)
        optimizer.add_param_group({"params": late})
        params.extend(late)
    pair.step()
    pair.step(missing=(1,))
    for position in (1, 2, 3):
        for name in ("step", "mu_product", "exp_avg"):
            theirs, ours = (state[position][name] for state in kept)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=f"{position} {name}")


def test_a_deepcopied_state_dict_stays_as_it_was() -> None:
    pair = Pair("AdamW").run(2)
    kept = copy.deepcopy(pair.ours.state_dict())
    again = copy.deepcopy(kept)
    pair.run(2)
    assert_states_close(kept, again)
    assert float(kept["state"][0]["step"]) == 2.0


def test_states_a_user_adds_are_kept_and_saved() -> None:
    pair = Pair("Adam").run(1)
    for optimizer, params in pair.sides:
        for param in params:
            optimizer.state[param]["slow"] = param.detach().clone()
        optimizer.state["note"] = {"run": 3}
    pair.run(2)
    ours, theirs = pair.ours.state_dict(), pair.theirs.state_dict()
    assert ours["state"].pop("note") == theirs["state"].pop("note")
    assert_states_close(ours, theirs)


# Group keys a checkpoint of an older torch, or one of torch's own, does not have.
MISSING_KEYS = ("maximize", "foreach", "capturable", "differentiable", "fused", "amsgrad",
                "decoupled_weight_decay", "nesterov")  # fmt: skip


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_checkpoint_without_newer_group_keys_gets_their_defaults(case: str) -> None:
    pair = Pair(case).run(2)
    plain = {"SGD-momentum": "SGD", "AdamW-amsgrad": "AdamW"}.get(case, case)
    saved = copy.deepcopy(
        (pair.theirs if plain == case else Pair(plain).run(2).theirs).state_dict()
    )
    for group in saved["param_groups"]:
        for key in MISSING_KEYS:
            group.pop(key, None)
    pair = Pair(plain)
    for optimizer, _ in pair.sides:
        optimizer.load_state_dict(copy.deepcopy(saved))
    pair.run(2).check()


def test_a_checkpoint_of_torch_restores_an_option_only_ours_has() -> None:
    """Torch's SGD has no capturable: after its checkpoint ours still says what it was given."""
    params = make_params()
    optimizer = fastopt.optim.SGD(params, lr=0.1, capturable=True)
    optimizer.load_state_dict(torch.optim.SGD(make_params(), lr=0.1).state_dict())
    assert optimizer.param_groups[0]["capturable"] is True


@pytest.mark.parametrize("case", [case for case in ONE_EACH if case != "SGD-momentum"])
def test_step_counts_that_are_python_numbers_are_taken(case: str) -> None:
    """Checkpoints of torch before 1.12 have them; NAdam's mu_product was a number too."""
    pair = Pair(case).run(3)
    saved = copy.deepcopy(pair.theirs.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
        if "mu_product" in state:
            state["mu_product"] = float(state["mu_product"])
    values = [param.detach().clone() for param in pair.their_params]
    pair = Pair(case)
    for optimizer, params in pair.sides:
        optimizer.load_state_dict(copy.deepcopy(saved))
        for param, value in zip(params, values, strict=True):
            param.data.copy_(value)
    pair.run(2).check()
    assert all(isinstance(s["step"], torch.Tensor) for s in pair.ours.state.values())


def test_a_missing_momentum_buffer_of_an_older_checkpoint_begins_anew() -> None:
    pair = Pair("SGD-momentum").run(2)
    saved = copy.deepcopy(pair.theirs.state_dict())
    saved["state"][1]["momentum_buffer"] = None
    del saved["state"][2]
    values = [param.detach().clone() for param in pair.their_params]
    for optimizer, params in pair.sides:
        optimizer.load_state_dict(copy.deepcopy(saved))
        for param, value in zip(params, values, strict=True):
            param.data.copy_(value)
    pair.run(2).check()


def test_mu_product_keeps_its_precision_beside_bfloat16_parameters() -> None:
    """torch's load casts every state but "step" to the parameter's dtype; a product in bfloat16
    is off by up to 0.4 %, and the bias correction with it."""
    params = make_params(dtype=torch.bfloat16)
    optimizer = construct(fastopt, "NAdam", params)
    for seed in range(3):
        give_grads(params, seed)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    exact = saved["state"][0]["mu_product"]
    assert exact.dtype is torch.float32
    assert exact != exact.to(torch.bfloat16)

    again = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = construct(fastopt, "NAdam", again)
    resumed.load_state_dict(saved)
    assert resumed.state_dict()["state"][0]["mu_product"].dtype is torch.float32
    assert resumed.state_dict()["state"][0]["mu_product"] == exact
    for optimizer_, params_ in ((optimizer, params), (resumed, again)):
        give_grads(params_, 9)
        optimizer_.step()
    assert all(torch.equal(a, b) for a, b in zip(again, params, strict=True))


def test_a_load_state_dict_hook_may_hand_over_another_state_dict() -> None:
    """mu_product is read from what was loaded, not from what was passed."""
    pair = Pair("NAdam").run(2)
    saved = copy.deepcopy(pair.theirs.state_dict())
    other = Pair("NAdam")
    for optimizer, params in other.sides:
        optimizer.register_load_state_dict_pre_hook(lambda _, given: copy.deepcopy(saved))
        optimizer.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
        for param, value in zip(params, pair.their_params, strict=True):
            param.data.copy_(value.data)
    other.run(2).check()


def test_what_does_not_fit_is_refused_as_by_torch_and_changes_nothing() -> None:
    pair = Pair("AdamW").run(2)
    wrong = [construct(torch, "AdamW", [{"params": p} for p in make_params()]).state_dict()]
    wrong.append(construct(torch, "AdamW", make_params()[:2]).state_dict())
    for saved in wrong:
        with pytest.raises(ValueError, match="loaded state dict"):
            pair.ours.load_state_dict(saved)
    pair.run(2).check()


@pytest.mark.parametrize("case", ["AdamW", "SGD-momentum"])
def test_distributed_checkpoint_reads_and_writes_ours_as_torchs(case: str) -> None:
    """torch.distributed.checkpoint makes the states by a step with lr 0, and loads by name."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def train(package: Any, state: Any = None) -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
        optimizer = construct(package, case, model.parameters())
        if state is not None:
            set_optimizer_state_dict(model, optimizer, copy.deepcopy(state))
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(2, 5)).square().sum().backward()
            optimizer.step()
        return model, optimizer

    theirs, ours = (get_optimizer_state_dict(*train(package)) for package in (torch, fastopt))
    assert list(ours["state"]) == list(theirs["state"])
    for name, state in theirs["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(ours["state"][name][key], value, rtol=1e-5, atol=1e-6)
    resumed = [train(package, theirs) for package in (torch, fastopt)]
    assert_params_close(resumed[1][0].parameters(), resumed[0][0].parameters())
    assert_states_close(resumed[1][1].state_dict(), resumed[0][1].state_dict())
