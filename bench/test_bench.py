"""The benchmark under test: what it times is what it says, and a step that does nothing fails."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from bench import allocator, limit, measure, models, render, timing
from bench.cases import LIMIT, TORCH_BEST, Case, Goal
from bench.providers import FASTOPT, FUSED, LOOP, PROVIDERS, STATES, Provider, traffic
from bench.report import judged

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
