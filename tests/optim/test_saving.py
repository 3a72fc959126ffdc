"""State dicts are of plain values, and torch refuses those it cannot read."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from fastopt.optim.state import formats
from tests.optim.pairs import give_grads, make_params
from tests.optim.test_formats import EIGHT, SERVED, make, run

SHAPES = ((517,), (7, 41), ())


def saved_of(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An optimizer after three steps, and its parameters."""
    params = make_params(SHAPES, dtype)
    optimizer = make(name, params, **options)
    run(optimizer, params, range(3))
    return optimizer, params


def copied(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def differing(a: Any, p: list[torch.nn.Parameter], b: Any, q: list[torch.nn.Parameter]) -> set[str]:
    """The names of what is not the same bits in two optimizers after two more steps of both."""
    for optimizer, params in ((a, p), (b, q)):
        run(optimizer, params, range(3, 5))
    found = {"param" for x, y in zip(p, q, strict=True) if not torch.equal(x, y)}
    for x, y in zip(p, q, strict=True):
        mine, theirs = a.state.get(x, {}), b.state.get(y, {})
        found |= mine.keys() ^ theirs.keys()
        for name in mine.keys() & theirs.keys():
            if not torch.equal(mine[name], theirs[name]):
                found.add(name)
    return found


# torch's classes.


def check_torch_refuses(name: str, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
    """torch's class raises for the state_dict, and has changed nothing; nor does any of its names
    stand for codes."""
    others = copied(params)
    theirs = getattr(torch.optim, name)(others, lr=0.5, **SERVED[name])
    give_grads(others, 0)
    theirs.step()
    torchs_names = set(theirs.state[others[0]]) - {"step", "mu_product"}
    before = copy.deepcopy(theirs.state_dict())
    saved = optimizer.state_dict()
    assert all(not torchs_names & state.keys() for state in saved["state"].values())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        theirs.load_state_dict(copy.deepcopy(saved))
    after = theirs.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(after["state"][key][k], v) for k, v in state.items())


@pytest.mark.parametrize("name", SERVED)
def test_torch_refuses_codes_and_takes_what_is_saved_for_it(name: str) -> None:
    optimizer, params = saved_of(name, state_dtype=EIGHT)
    check_torch_refuses(name, optimizer, params)
    theirs = getattr(torch.optim, name)(copied(params), lr=1e-2, **SERVED[name])
    theirs.load_state_dict(optimizer.torch_state_dict())
    for param, state in zip(params, theirs.state.values(), strict=True):
        for key, value in state.items():
            if key not in ("step", "mu_product"):
                assert torch.equal(value, formats.value_in(optimizer.state[param], key))


class InTorchsNames(fastopt.optim.AdamW):
    """Wrong: saves codes as the state itself."""

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        for key, state in saved["state"].items():
            names = {name: name.removesuffix("_codes") for name in state}
            saved["state"][key] = {names[name]: value for name, value in state.items()}
        return saved


def test_codes_under_torchs_names_would_be_noticed() -> None:
    params = make_params(SHAPES)
    optimizer = InTorchsNames(params, state_dtype=EIGHT)
    run(optimizer, params, range(1))
    with pytest.raises(AssertionError):
        check_torch_refuses("AdamW", optimizer, params)


@pytest.mark.parametrize("options", [{"param_rounding": "master"}, {"ema_decay": 0.9}], ids=str)
def test_what_torch_has_cast_is_not_misread(options: dict[str, Any]) -> None:
    """torch casts what it does not know to the parameter's dtype: low bits are then no bits."""
    optimizer, params = saved_of("SGD", torch.bfloat16, **options)
    theirs = torch.optim.SGD(copied(params), lr=1e-2, momentum=0.9)
    theirs.load_state_dict(optimizer.state_dict())
    back, others = saved_of("SGD", torch.bfloat16, **options)
    if "ema_decay" not in options:
        with pytest.raises(ValueError, match=r"'low_bits' must be torch\.int16"):
            back.load_state_dict(theirs.state_dict())
        return
    back.load_state_dict(theirs.state_dict())
    run(back, others, range(1))
    assert all(state["averaged"].dtype == torch.float32 for state in back.state.values())


# Version 1.


def as_version_1(saved: dict[str, Any]) -> dict[str, Any]:
    """Codes under the state's own name, dtypes in groups, no count of SGD's steps."""
    groups = [dict(group) for group in saved["param_groups"] if group["params"]]
    for group in groups:
        if isinstance(wanted := group.get("state_dtype"), str):
            group["state_dtype"] = getattr(torch, wanted, wanted)
    states = {
        key: {k.removesuffix("_codes"): v for k, v in state.items() if k != "fastopt_step"}
        for key, state in saved["state"].items()
    }
    return {"state": states, "param_groups": groups, "fastopt_version": 1}


@pytest.mark.parametrize("stamped", [True, False])
@pytest.mark.parametrize("wanted", [EIGHT, torch.bfloat16, {"exp_avg": EIGHT}], ids=str)
def test_the_form_of_version_1_is_read(wanted: Any, stamped: bool) -> None:
    optimizer, params = saved_of("AdamW", torch.bfloat16, state_dtype=wanted)
    old = as_version_1(copy.deepcopy(optimizer.state_dict()))
    if not stamped:  # as get_optimizer_state_dict leaves it
        del old["fastopt_version"]
    others = copied(params)
    again = make("AdamW", others, state_dtype=wanted)
    again.load_state_dict(old)
    assert differing(optimizer, params, again, others) == set()


def test_an_optimizer_pickled_in_version_1_goes_on() -> None:
    optimizer, params = saved_of("AdamW", state_dtype=EIGHT)
    again, others = pickle.loads(pickle.dumps((optimizer, params)))
    old = as_version_1({"state": again.state, "param_groups": again.param_groups})
    again.__setstate__({key: old[key] for key in ("state", "param_groups")})
    assert differing(optimizer, params, again, others) == set()


# Files, and torch.distributed.checkpoint.

EVERY: dict[str, tuple[str, dict[str, Any]]] = {
    "8bit": ("AdamW", {"state_dtype": EIGHT, "param_rounding": "stochastic"}),
    "8bit momentum": ("SGD", {"momentum": 0.9, "state_dtype": EIGHT}),
    "bfloat16": ("AdamW", {"state_dtype": torch.bfloat16, "param_rounding": "master"}),
    "by state": (
        "NAdam",
        {"state_dtype": {"exp_avg": EIGHT, "exp_avg_sq": torch.float32}, "ema_decay": 0.9},
    ),
}


def plain_values(value: Any) -> bool:
    """True for values of the types that every tool of torch's takes."""
    if isinstance(value, dict):
        return all(isinstance(k, (str, int)) and plain_values(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain_values, value))
    return value is None or isinstance(value, (Tensor, int, float, str))


def through_a_file(saved: dict[str, Any], _: Path, __: Any) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_dcp(saved: dict[str, Any], path: Path, target: Any) -> dict[str, Any]:
    """As torch.distributed.checkpoint loads: into the tensors of a state_dict that is there."""
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a process alone
        checkpoint.save({"optim": saved}, checkpoint_id=path)
        there = {"optim": target()}
        checkpoint.load(there, checkpoint_id=path)
    return there["optim"]


WAYS = [
    {},
    {"full_state_dict": True, "cpu_offload": True},
    {"flatten_optimizer_state_dict": True},
]


@pytest.mark.parametrize("carry", [through_a_file, through_dcp])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way), "nested"))
@pytest.mark.parametrize("case", EVERY)
def test_a_run_goes_on_through_get_optimizer_state_dict(
    case: str, way: dict[str, bool], carry: Any, tmp_path: Path
) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    name, wanted = EVERY[case]

    def make_model() -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 3))
        model.to(torch.bfloat16)
        return model, getattr(fastopt.optim, name)(model.parameters(), lr=1e-2, **wanted)

    model, optimizer = make_model()
    params = list(model.parameters())
    run(optimizer, params, range(3))
    options = dcp.StateDictOptions(**way)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    assert plain_values(saved)
    other, again = make_model()

    def target() -> Any:
        return dcp.get_optimizer_state_dict(other, again, options=options)

    saved = carry(copy.deepcopy(saved), tmp_path, target)
    dcp.set_optimizer_state_dict(other, again, saved, options=options)
    for param, value in zip(other.parameters(), params, strict=True):
        param.data.copy_(value)
    assert differing(optimizer, params, again, list(other.parameters())) == set()


@pytest.mark.parametrize("wanted", [EIGHT, torch.float32], ids=str)
@pytest.mark.parametrize("saver", ["torch", "8bit", "8bit of version 1"])
def test_a_full_state_dict_of_another_format_is_what_was_saved(saver: str, wanted: Any) -> None:
    """set_optimizer_state_dict then adds the zeros that the optimizer begins with."""
    from torch.distributed.checkpoint import state_dict as dcp

    def make_model(package: Any = fastopt, **options: Any) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Linear(20, 30)
        return model, package.optim.AdamW(model.parameters(), lr=1e-2, **options)

    own = {"state_dtype": EIGHT} if saver != "torch" else {}
    model, optimizer = make_model(torch if saver == "torch" else fastopt, **own)
    run(optimizer, list(model.parameters()), range(3))
    options = dcp.StateDictOptions(full_state_dict=True)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    plain = copy.deepcopy(optimizer.state_dict())
    if saver == "8bit of version 1":
        saved, plain = as_version_1(saved), as_version_1(plain)
    sides = []
    for load in (
        lambda other, each: dcp.set_optimizer_state_dict(other, each, saved, options=options),
        lambda _, each: each.load_state_dict(plain),
    ):
        other, each = make_model(state_dtype=wanted)
        load(other, each)
        sides += [each, list(other.parameters())]
    assert differing(*sides) == set()


@pytest.mark.parametrize("wanted", [torch.bfloat16, {"exp_avg": torch.float32}], ids=str)
def test_groups_hold_names_of_dtypes(wanted: Any) -> None:
    (param, other) = make_params(((9,), (9,)))
    for optimizer in (
        fastopt.optim.AdamW([param], state_dtype=wanted),
        fastopt.optim.AdamW([{"params": [param], "state_dtype": wanted}]),
        fastopt.optim.AdamW([param], state_dtype=formats.named(wanted)),
    ):
        optimizer.add_param_group({"params": [other], "state_dtype": wanted})
        for group in optimizer.param_groups:
            assert group["state_dtype"] == formats.named(wanted)
            assert plain_values(group["state_dtype"])
        give_grads([param, other], 0)
        optimizer.step()
        expected = torch.float32 if isinstance(wanted, dict) else torch.bfloat16
        assert optimizer.state[other]["exp_avg"].dtype == expected
        optimizer.param_groups[0]["state_dtype"] = torch.float32
        assert optimizer.state_dict()["param_groups"][0]["state_dtype"] == "float32"


# Hooks.


@pytest.mark.parametrize("state_dtype", [None, EIGHT])
@pytest.mark.parametrize("junk", [3, None, "a run", [1, 2], torch.ones(3), {1: 2}], ids=type)
def test_anything_may_stand_in_state_beside_the_parameters(junk: Any, state_dtype: Any) -> None:
    optimizer, params = saved_of("AdamW", state_dtype=state_dtype)

    def note(optimizer: Any) -> None:
        optimizer.state["note"] = junk

    optimizer.register_state_dict_pre_hook(note)
    saved = optimizer.state_dict()
    assert saved["state"]["note"] is junk
    again = optimizer.torch_state_dict()["state"]["note"]
    assert again is junk or again == junk
    others = copied(params)
    other = make("AdamW", others, state_dtype=state_dtype)
    other.load_state_dict(copy.deepcopy(saved))
    assert differing(optimizer, params, other, others) == set()


def test_a_post_hook_may_return_something_else() -> None:
    optimizer, _ = saved_of("AdamW", state_dtype=EIGHT)
    optimizer.register_state_dict_post_hook(lambda _, saved: {"mine": saved})
    saved = optimizer.state_dict()
    assert list(saved) == ["mine"]
