"""Flags and tensor hyper-parameters: honoured, or refused where and as torch refuses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastopt
from tests.optim.pairs import (
    CASES,
    NAMES,
    ONE_EACH,
    Pair,
    assert_params_close,
    construct,
    give_grads,
    make_params,
)

FUSED_IN_TORCH = ["SGD-momentum", "SGD-nesterov", "Adagrad", "Adam", "AdamW", "AdamW-amsgrad"]


def refusal(action: Any) -> tuple[type[BaseException], str] | None:
    try:
        action()
    except Exception as error:
        return type(error), str(error)
    return None


def check_refused_alike(case: str, ours: Any = fastopt, **options: Any) -> None:
    """torch refuses these options when constructed or in the first step: so does ours, no later,
    with the same exception and a message that begins with torch's; nothing has changed then."""
    outcomes = []
    for package in (torch, ours):
        params = make_params()
        give_grads(params, 0)
        values = [param.detach().clone() for param in params]
        optimizer: list[torch.optim.Optimizer] = []
        built = refusal(
            lambda p=package, q=params, o=optimizer: o.append(construct(p, case, q, **options))
        )
        outcomes.append(built or refusal(optimizer[0].step))
        if package is not torch:
            assert all(torch.equal(a, b) for a, b in zip(params, values, strict=True))
            assert not optimizer or not any(
                state.get("exp_avg") is not None for state in optimizer[0].state.values()
            )
    theirs, mine = outcomes
    assert theirs is not None
    assert mine is not None
    assert mine[0] is theirs[0]
    beginning = theirs[1].partition("[")[0].rstrip(".")
    assert mine[1].startswith(beginning)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    *((case, {"foreach": True, "fused": True}) for case in FUSED_IN_TORCH),
    *((case, {"differentiable": True, "fused": True}) for case in FUSED_IN_TORCH),
    *((case, {"capturable": True}) for case in CASES if "SGD" not in case and case != "Adagrad"),
    ("Adam", {"lr": torch.tensor(0.02), "foreach": True}),
    ("AdamW", {"lr": torch.tensor(0.02), "foreach": True}),
    ("Adam", {"lr": torch.tensor([0.02, 0.03])}),
    ("SGD", {"lr": torch.tensor([0.02, 0.03])}),
    ("RMSprop-both", {"lr": torch.tensor([0.02, 0.03])}),
    ("Adam", {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True}),
    ("Adam", {"betas": (torch.tensor(0.9), 0.99)}),
    ("Adam", {"betas": (torch.tensor([0.9, 0.8]), torch.tensor([0.9, 0.8]))}),
    ("SGD-nesterov", {"dampening": 0.1}),
    ("AdamW", {"lr": -1.0}),
    ("NAdam", {"momentum_decay": -1.0}),
    ("Adadelta", {"rho": 1.5}),
]


@pytest.mark.parametrize(("case", "options"), REFUSED)
def test_what_torch_refuses_is_refused_with_its_words(case: str, options: dict[str, Any]) -> None:
    check_refused_alike(case, **options)


class Permissive(fastopt.optim.AdamW):
    """Wrong: takes what torch refuses."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, lr=options["lr"])


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError):
        check_refused_alike("AdamW", Permissive, foreach=True, fused=True)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_capturable_is_refused_on_a_cpu_where_only_ours_has_it(name: str) -> None:
    """After torch's words for the classes that have the option, before anything is written."""
    params = make_params()
    give_grads(params, 0)
    optimizer = getattr(fastopt.optim, name)(params, capturable=True)
    assert optimizer.param_groups[0]["capturable"]
    with pytest.raises(
        AssertionError,
        match=r"^If capturable=True, params and state_steps must be on supported devices",
    ):
        optimizer.step()
    assert_params_close(params, make_params())
    optimizer.param_groups[0]["capturable"] = False
    optimizer.step()
    assert not torch.equal(params[0], make_params()[0])


@pytest.mark.parametrize("name", NAMES)
def test_capturable_is_keyword_only_and_absent_from_groups_unless_set(name: str) -> None:
    cls = getattr(fastopt.optim, name)
    assert cls(make_params(), capturable=True).param_groups[0]["capturable"] is True
    torchs = getattr(torch.optim, name)(make_params()).param_groups[0]
    assert list(cls(make_params()).param_groups[0]) == list(torchs)


@pytest.mark.parametrize("case", ONE_EACH)
@pytest.mark.parametrize("foreach", [True, False])
def test_foreach_is_a_hint(case: str, foreach: bool) -> None:
    Pair(case, foreach=foreach).run(4).check()


@pytest.mark.parametrize("case", FUSED_IN_TORCH)
def test_fused_as_torch_has_it(case: str) -> None:
    """The same trajectory and states; and only then does GradScaler leave unscaling to the step."""
    pair = Pair(case, fused=True).run(4)
    pair.check()
    assert pair.ours._step_supports_amp_scaling
    assert not hasattr(Pair(case).ours, "_step_supports_amp_scaling")


@pytest.mark.parametrize("case", ["Adam", "SGD-momentum"])
def test_fused_in_one_group_alone(case: str) -> None:
    sides = []
    for package in (torch, fastopt):
        params = make_params()
        groups = [{"params": params[:2], "fused": True}, {"params": params[2:]}]
        optimizer = construct(package, case, groups)
        for seed in range(3):
            give_grads(params, seed)
            optimizer.step()
        sides.append(params)
    assert_params_close(sides[1], sides[0])


TENSOR_LR = [case for case in ONE_EACH if case != "Adagrad"] + ["Adagrad", "SGD", "Adam-amsgrad"]


@pytest.mark.parametrize("case", dict.fromkeys(TENSOR_LR))
def test_a_tensor_learning_rate_changed_in_place_is_followed(case: str) -> None:
    pair = Pair(case, lr=torch.tensor(0.02))
    pair.step()
    for optimizer, _ in pair.sides:
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"].clone()
        optimizer.param_groups[0]["lr"].fill_(0.3)
    pair.step()
    pair.step()
    pair.check()


@pytest.mark.parametrize("case", ["Adam", "AdamW-amsgrad"])
def test_tensor_betas_changed_in_place_are_followed(case: str) -> None:
    pair = Pair(case, betas=(torch.tensor(0.9), torch.tensor(0.99)), lr=torch.tensor([0.02]))
    pair.step()
    for optimizer, _ in pair.sides:
        betas = tuple(beta.clone() for beta in optimizer.param_groups[0]["betas"])
        betas[0].fill_(0.5)
        optimizer.param_groups[0]["betas"] = betas
    pair.step()
    pair.step()
    assert_params_close(pair.our_params, pair.their_params)


def test_a_tensor_weight_decay_of_sgd() -> None:
    pair = Pair("SGD-momentum", weight_decay=torch.tensor(0.1)).run(3)
    assert_params_close(pair.our_params, pair.their_params)


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
def test_a_learning_rate_that_requires_grad_is_read_without_a_warning(case: str) -> None:
    """float() of such a tensor warns, and a warning is an error here; torch's step does not."""
    Pair(case, lr=torch.tensor(0.02, requires_grad=True)).run(2).check()


@pytest.mark.parametrize("name", ["RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam"])
def test_fused_is_no_argument_where_torch_has_none(name: str) -> None:
    for package in (torch, fastopt):
        with pytest.raises(TypeError, match="unexpected keyword argument 'fused'"):
            getattr(package.optim, name)(make_params(), fused=True)
