"""The benchmark under test: what it times is what it says, and a step that does nothing fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench import allocator, limit, measure, models, render, test_functions, timed, timing
from bench.cases import LIMIT, TORCH_BEST, Case, Goal
from bench.function_report import cases
from bench.providers import FASTOPT, FUSED, LOOP, PROVIDERS, STATES, Provider, traffic
from bench.report import judged
from bench.row_ops import check
from bench.row_providers import ATEN
from fastopt.cli import main

MLP = Case("AdamW", "mlp", (Goal(FUSED, 2.0, stretch=3.0), Goal(LIMIT, 0.5)))


def test_gpt2_is_gpt2() -> None:
    assert len(models.SHAPES["gpt2"]) == 148
    assert models.n_elements("gpt2") == 124_439_808


def test_adamw_moves_28_bytes_an_element() -> None:
    assert traffic("AdamW", torch.float32) == 28
    assert traffic("AdamW", torch.bfloat16) == 14


def test_rebound_gradients_are_new_objects_at_new_addresses() -> None:
    params = models.make_parameters("mlp", torch.float32)
    bind = models.Gradients("mlp", torch.float32, "rebound").binder(params)
    bind()
    first = [param.grad for param in params]
    bind()
    for old, param in zip(first, params, strict=True):
        assert param.grad is not old
        assert param.grad.data_ptr() != old.data_ptr()


def test_flat_gradients_stay_views_of_one_buffer() -> None:
    params = models.make_parameters("mlp", torch.float32)
    bind = models.Gradients("mlp", torch.float32, "flat").binder(params)
    first = [param.grad for param in params]
    bind()
    assert all(param.grad is grad for param, grad in zip(params, first, strict=True))
    assert len({grad.untyped_storage().data_ptr() for grad in first}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("written", limit.KERNELS)
def test_limit_kernels_write_every_element_of_every_stream(written: int, dtype) -> None:
    n = 2 * limit.CHUNK + 37
    for name, kernel in limit.KERNELS[written].items():
        g, *streams = (limit.make_stream(n, dtype) for _ in range(1 + written))
        for i, stream in enumerate(streams):
            stream[:] = 10 * (2 + i)
        before = [stream.copy() for stream in streams]
        kernel(g, *streams)
        assert np.all(g == 1), name
        for stream, old in zip(streams, before, strict=True):
            assert np.all(stream != old), name


def test_each_optimizer_has_the_states_the_traffic_counts() -> None:
    for optimizer, n_states in STATES.items():
        params = models.make_parameters("mlp", torch.float32)
        models.Gradients("mlp", torch.float32, "flat").binder(params)
        step = PROVIDERS[LOOP].make(optimizer, params)
        step()
        state = step.__self__.state[params[0]]
        shaped = [x for x in state.values() if getattr(x, "shape", None) == params[0].shape]
        assert len(shaped) == n_states, optimizer


def test_interleaved_ratio_of_two_known_times() -> None:
    subjects = {
        "slow": timing.Subject(lambda: time.sleep(0.04)),
        "fast": timing.Subject(lambda: time.sleep(0.02)),
    }
    timings = timing.interleave(subjects, seconds=0.1)
    ratio = timing.Ratio.of(timings["slow"], timings["fast"])
    assert len(timings["slow"].rounds) == len(timings["fast"].rounds) >= timing.MIN_ROUNDS
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.median == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("state", allocator.ALLOCATORS)
def test_allocator_is_in_the_state_it_says(state: str) -> None:
    code = "from bench import allocator; print(allocator.is_warm())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=allocator.environment(state),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(state == allocator.WARM)


def test_a_measured_case_becomes_a_row_for_each_goal() -> None:
    record = judged(measure.measure(MLP, (FASTOPT, FUSED, LOOP), seconds=0.05), MLP)
    assert set(record["ratios"]) == {FUSED, LOOP, TORCH_BEST, LIMIT}
    assert record["difference"] <= measure.TOLERANCE["fp32"]
    rows = list(render.rows([record]))
    assert [len(row.cells) for row in rows] == [len(render.COLUMNS)] * len(MLP.goals)


def _sign_flipped(optimizer, params):
    return torch.optim.AdamW(params, maximize=True).step


@pytest.mark.parametrize(
    "make", [lambda optimizer, params: lambda: None, _sign_flipped], ids=["no-op", "wrong sign"]
)
def test_a_step_that_is_not_the_step_has_no_time(monkeypatch, make) -> None:
    monkeypatch.setitem(PROVIDERS, FASTOPT, Provider(FASTOPT, make))
    with pytest.raises(RuntimeError, match="means nothing"):
        measure.measure(MLP, (FASTOPT, LOOP), seconds=0.05)


def _saved(*arguments: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Runs pytest on bench with these arguments; extra_info by the name of the benchmark."""
    path = folder / "run.json"
    subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, f"--benchmark-json={path}"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        check=True,
    )
    saved = json.loads(path.read_text())["benchmarks"]
    return {benchmark["name"]: benchmark for benchmark in saved}


@pytest.mark.parametrize(
    ("where", "which", "name", "group"),
    [
        ("test_optim.py", "adamw-mlp-{}", "test_step[adamw-mlp-{}]", "AdamW mlp"),
        (
            "test_rows.py",
            "softmax-8x16-fp32-forward-{}",
            "test_row_function[softmax-8x16-fp32-forward-{}]",
            "softmax 8x16",
        ),
        (
            "test_functions.py",
            "weight_norm-512x256x7-dim-0-fp32-forward-{}",
            "test_function[weight_norm-512x256x7-dim-0-fp32-forward-{}]",
            "weight_norm 512 x 256 x 7, dim 0",
        ),
    ],
)
def test_a_saved_run_has_what_a_comparison_needs(
    where: str, which: str, name: str, group: str, tmp_path: Path, capsys
) -> None:
    providers = {
        "test_optim.py": (FASTOPT, FUSED),
        "test_rows.py": (FASTOPT, ATEN),
        "test_functions.py": (FASTOPT, "torch"),
    }[where]
    wanted = " or ".join(which.format(timed.slug(provider)) for provider in providers)
    saved = _saved(f"bench/{where}", "-k", wanted, folder=tmp_path)
    for provider in providers:
        benchmark = saved[name.format(timed.slug(provider))]
        info = benchmark["extra_info"]
        assert benchmark["group"] == group
        assert benchmark["params"]["provider"] == info["provider"] == provider
        assert benchmark["params"]["dtype"] == info["dtype"] == "fp32"
        assert info["bytes"] > 0
        rate = info["bytes"] / benchmark["stats"]["median"] / 1e9
        assert info["gb_per_s"] == pytest.approx(rate)
        assert info["share_of_copy"] == pytest.approx(rate / info["copy_gb_per_s"])
        assert 0 <= info["error"] <= 1e-5
        assert info["versions"]["torch"] == torch.__version__
        assert info["threads"] == torch.get_num_threads()
        assert info["cpu"]
    path = str(tmp_path / "run.json")
    assert main(["bench", "--compare", path, path]) == 0
    assert "0 of 1 cases slower" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "NAdam"])
def test_the_error_of_a_step_is_rounding(optimizer: str) -> None:
    for provider in (FASTOPT, LOOP):
        assert measure.error(optimizer, torch.float32, provider) < measure.TOLERANCE["fp32"]


def test_the_error_of_a_step_that_does_nothing_is_1(monkeypatch) -> None:
    nothing = Provider(FASTOPT, lambda optimizer, params: lambda: None)
    monkeypatch.setitem(PROVIDERS, FASTOPT, nothing)
    assert measure.error("AdamW", torch.float32, FASTOPT) == pytest.approx(1)
    wrong = Provider(FASTOPT, _sign_flipped)
    monkeypatch.setitem(PROVIDERS, FASTOPT, wrong)
    assert measure.error("AdamW", torch.float32, FASTOPT) > 1


def test_the_functions_are_those_of_every_module_of_cases() -> None:
    names = {function.partition(" ")[0] for function, _ in test_functions.CASES}
    assert {"batch_norm", "add_rms_norm", "linear_cross_entropy"} <= names
    assert len(test_functions.CASES) == len(cases())


@pytest.mark.parametrize("provider", test_functions.PROVIDERS)
def test_functions_are_held_against_float64(provider: str) -> None:
    key = ("weight_norm 512 x 256 x 7, dim 0", "fp32")
    case, oracle = test_functions.CASES[key], test_functions._oracle(*key)
    assert oracle is not None
    right = test_functions._results(test_functions._function(case, provider), case.inputs())
    assert check(right, oracle, 1e-5) <= 1e-5
    with pytest.raises(RuntimeError, match="means nothing"):
        check(right | {"d0": -right["d0"]}, oracle, 1e-5)


def test_a_function_that_draws_has_no_error() -> None:
    drawing = [key for key in test_functions.CASES if "dropout" in key[0]]
    case = test_functions.CASES[drawing[0]]
    small = replace(
        case, inputs=lambda: [torch.ones(64, requires_grad=True)], theirs=nn.functional.dropout
    )
    key = ("drawn", "fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(test_functions.CASES, key, small)
        assert test_functions._oracle(*key) is None
