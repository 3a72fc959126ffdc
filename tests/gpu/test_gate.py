"""A sample of the ahead-of-time gate (`run_gate` runs all of it), and its teeth."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl

from fastopt_kernels.chunks import KAHAN, MASTER, NO_OPTIONS, STOCHASTIC, StepOptions
from fastopt_kernels.gpu.base import memory
from fastopt_kernels.gpu.machine_code import compiling
from fastopt_kernels.gpu.step import engine, reduce
from fastopt_kernels.gpu.step import launch as step_launch
from fastopt_kernels.gpu.step import update as kernels
from tests.gpu import clip_gate, format_gate, gate

UPDATES = gate.updates()
SCALARS = {update.scalars.__name__: update for update in UPDATES.values()}
FLOAT32, BFLOAT16 = gate.KINDS[0], gate.KINDS[1]
ADAM = UPDATES["adam"]
# Each rule once, with dtypes and targets taken in turn; Adam, whose kernel is the most used, on
# every target. A rule without states has only a parameter and a gradient to lie anywhere.
TURNS = list(
    zip(sorted(UPDATES), itertools.cycle(gate.KINDS), itertools.cycle(gate.TARGETS), strict=False)
)
SAMPLE = TURNS + [("adam", FLOAT32, target) for target in gate.TARGETS]


def test_the_gate_finds_every_rule_there_is() -> None:
    functions = gate.rule_functions()
    scalars = {name for name in functions if name.endswith("_scalars")}
    assert set(UPDATES) == functions.keys() - scalars
    assert set(SCALARS) == scalars


@pytest.mark.parametrize(("name", "kinds", "target"), SAMPLE)
def test_an_update_kernel_passes(name: str, kinds: tuple[str, str, str], target: str) -> None:
    faults = gate.check_update(UPDATES[name], kinds, target).faults
    assert faults == []


@pytest.mark.parametrize("kinds", [FLOAT32, BFLOAT16], ids="-".join)
def test_an_update_kernel_that_clips_and_averages_passes(kinds: tuple[str, str, str]) -> None:
    faults = gate.check_update(ADAM, kinds, "sm_90", step_options=StepOptions(True, True)).faults
    assert faults == []


@pytest.mark.parametrize("rounding", [STOCHASTIC, KAHAN, MASTER])
def test_an_update_kernel_that_rounds_passes(rounding: int) -> None:
    faults = gate.check_update(
        ADAM, BFLOAT16, "sm_90", step_options=StepOptions(rounding=rounding)
    ).faults
    assert faults == []


@pytest.mark.parametrize(
    ("name", "kinds", "target"),
    [
        ("adam", 0, "sm_90"),
        ("adam", 1, "gfx942"),
        ("sgd_momentum", 2, "sm_100"),
        ("rmsprop_centered_momentum", 1, "sm_80"),
    ],
)
def test_an_update_kernel_with_codes_passes(name: str, kinds: int, target: str) -> None:
    faults = gate.check_update(UPDATES[name], format_gate.KINDS[kinds], target).faults
    assert faults == []


@pytest.mark.parametrize("kinds", [FLOAT32, format_gate.KINDS[0]], ids="-".join)
def test_an_update_kernel_that_is_watched_passes(kinds: tuple[str, str, str]) -> None:
    found = gate.check_update(ADAM, kinds, "sm_90", step_options=StepOptions(watched=True))
    assert found.faults == []
    assert found.read.float64 > 0


def test_an_update_kernel_that_may_skip_passes() -> None:
    faults = gate.check_update(ADAM, BFLOAT16, "sm_90", skip=True).faults
    assert faults == []


@pytest.mark.parametrize(
    ("kinds", "target", "maximum"),
    [(FLOAT32, "sm_90", False), (BFLOAT16, "gfx942", True), (gate.KINDS[3], "sm_80", False)],
)
def test_the_kernels_of_a_clipped_step_pass(
    kinds: tuple[str, str, str], target: str, maximum: bool
) -> None:
    """Measure, count with every extra, update."""
    step_options = StepOptions(True, True, STOCHASTIC if kinds[0] == "bf16" else 0)
    found = clip_gate.check_clipped(ADAM, kinds, target, maximum, step_options)
    assert [each.faults for each in found] == [[]] * 4


@pytest.mark.parametrize(
    ("name", "target"), list(zip(sorted(SCALARS), itertools.cycle(gate.TARGETS), strict=False))
)
def test_a_scalars_kernel_passes(name: str, target: str) -> None:
    faults = gate.check_scalars(SCALARS[name], FLOAT32, target).faults
    assert faults == []


def test_adam_leaves_room_for_warps() -> None:
    """64 registers a thread or fewer let 32 warps run on a multiprocessor of sm_90."""
    found = gate.check_update(ADAM, FLOAT32, "sm_90")
    assert found.read.registers <= 64


def _with_a_double(p, g, weight_decay, lr):
    return (p - (lr.to(tl.float64) * 0.1 * g).to(p.dtype),)


def _approximate(p, g, weight_decay, lr):
    return (p - lr * tl.sqrt(g),)


@pytest.mark.parametrize(
    ("rule", "fault", "target"),
    [
        (_with_a_double, "float64", "sm_90"),
        (_with_a_double, "float64", "gfx942"),
        (_approximate, "approximate", "sm_90"),
    ],
)
def test_bad_arithmetic_fails(rule: Any, fault: str, target: str) -> None:
    faults = gate.check_update(UPDATES["sgd"], FLOAT32, target, rule=rule).faults
    assert any(fault in text for text in faults), faults


@pytest.mark.parametrize(
    ("name", "target"), [("adam", "sm_90"), ("rmsprop_centered_momentum", "gfx942")]
)
def test_a_kernel_that_spills_fails(
    name: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 elements a thread instead of 4: four streams for 255 registers, five for 512."""
    monkeypatch.setitem(engine.BLOCK, "fp32", 128 * engine.THREADS)
    # Of one block the compiler would know that there is no next.
    monkeypatch.setattr(engine, "CHUNK", 8 * 128 * engine.THREADS)
    faults = gate.check_update(UPDATES[name], FLOAT32, target).faults
    assert any("spills" in text for text in faults), faults


@triton.jit
def _promises_nothing(address, first, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # noqa: N803
    return address.to(tl.pointer_type(DTYPE)) + first


@pytest.mark.usefixtures("kept_apart")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kinds", [FLOAT32, BFLOAT16], ids="-".join)
def test_a_kernel_without_the_promise_of_alignment_fails(
    kinds: tuple[str, str, str], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "pointer", _promises_nothing)
    # Triton remembers a kernel by the source of what it calls: a fresh one sees the replacement.
    monkeypatch.setattr(kernels, "_streams_of", triton.jit(kernels._streams_of.fn))
    monkeypatch.setattr(step_launch, "update_kernel", triton.jit(step_launch.update_kernel.fn))
    faults = gate.check_update(ADAM, kinds, target).faults
    assert [text.split(" of ")[0].split(maxsplit=1)[1] for text in faults] == ["loads", "stores"]


@pytest.mark.usefixtures("kept_apart")
def test_measuring_without_the_promise_of_alignment_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "pointer", _promises_nothing)
    own = reduce.measure_kernel
    fresh = triton.jit(own.fn, do_not_specialize=own.do_not_specialize)
    monkeypatch.setattr(reduce, "measure_kernel", fresh)
    with compiling("sm_90") as compiled:
        look = reduce.GradNorm(gate.CPU, [gate.launch_of(ADAM, FLOAT32, ADAM.rule, NO_OPTIONS)])
        look.run(np.zeros(1, dtype=np.int64), [1.0], False, True, None, None)
    found = clip_gate.checked_measure(compiled.of("measure_kernel")[0], "fp32")
    assert [text.split(" of ")[0].split(maxsplit=1)[1] for text in found.faults] == ["loads"]


def test_scalars_in_float32_fail() -> None:
    def scalars(step, lr, weight_decay):
        return weight_decay, (lr.to(tl.float32) * 0.5).to(tl.float64)

    narrow = copy.copy(UPDATES["sgd"])
    narrow.scalars = scalars
    faults = gate.check_scalars(narrow, FLOAT32, "sm_90").faults
    assert any("float32" in text for text in faults), faults


def test_rules_of_one_name_are_different_kernels() -> None:
    def compiled(rule: Any) -> str:
        with compiling("sm_90") as kernels:
            gate.launch_of(UPDATES["sgd"], FLOAT32, rule).run(1)
            return kernels.of("update_kernel")[0].compiled.asm["ptx"]

    def rule(p, g, weight_decay, lr):
        return (p - lr * g,)

    first = compiled(rule)

    def rule(p, g, weight_decay, lr):
        return (p + lr * g,)

    assert compiled(rule) != first
