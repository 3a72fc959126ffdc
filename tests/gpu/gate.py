"""The gate every GPU kernel passes before it meets a GPU: compiled ahead of time, and read.

Here are the updates: each rule and each scalars function of fastopt.optim for every combination of
dtypes. `clip_gate` has what clipping adds, `format_gate` states of 8 bits and telemetry, `row_gate`
the row kernels; `run_gate` compiles all of them for every target, the tests a sample. What is
compiled is what `Launch` launches, through Triton's own specialization of its arguments: only the
last call, into the driver, is left out. A kernel fails with

- a spill, a stack frame or local memory;
- an offset in 32 bits that may not fit them (`ranges`);
- fewer 128-bit loads or stores than its streams need, each loaded and written once (of codes a
  thread takes 4 or 8 bytes, as many elements as of the other streams; beside codes, 64 lanes take
  8 bytes of a 16-bit stream);
- float64 arithmetic in an update of anything but float64 parameters (the scalars' kernel computes
  in float64, and there float32 arithmetic fails; the one that measures gradients, and telemetry,
  add in float64);
- an approximate or denormal-flushing instruction in an update, or where gradients are measured.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch

import fastopt.optim
from fastopt.optim.update import Update
from fastopt_kernels.chunks import KAHAN, MASTER, NO_OPTIONS, STOCHASTIC, StepOptions, n_codes
from fastopt_kernels.gpu import machine_code
from fastopt_kernels.gpu.machine_code import Launched, compiling
from fastopt_kernels.gpu.step import engine
from fastopt_kernels.gpu.step.clip_result import ClipResult
from fastopt_kernels.gpu.step.launch import Launch
from tests.gpu.checked import Case, Checked, checked

TARGETS = machine_code.TARGETS
# p, g, every state.
KINDS = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "bf16", "bf16"),
    ("fp16", "fp16", "fp16"),
    ("fp64", "fp64", "fp64"),
    ("bf16", "bf16", "fp32"),
    ("fp32", "bf16", "fp32"),
    ("fp32", "fp32", "bf16"),
    ("fp64", "fp32", "bf16"),
)
ITEMSIZE = {"int8": 1, "uint8": 1, "int16": 2, "fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
CPU = torch.device("cpu")


def updates() -> dict[str, Update]:
    """Every update of fastopt.optim by the name of its rule: classes' own and modules'."""
    found = {}
    for info in pkgutil.iter_modules(fastopt.optim.__path__):
        module = importlib.import_module(f"fastopt.optim.{info.name}")
        for value in vars(module).values():
            update = value if isinstance(value, Update) else vars_update(value)
            if update is not None:
                found[update.rule.__name__] = update
    return found


def rule_functions() -> dict[str, Callable[..., Any]]:
    """Every rule and every scalars function in the modules of fastopt.optim, by name."""
    found = {}
    for info in pkgutil.iter_modules(fastopt.optim.__path__):
        module = importlib.import_module(f"fastopt.optim.{info.name}")
        for name, value in vars(module).items():
            first = value.__code__.co_varnames[:2] if isinstance(value, FunctionType) else ()
            if first == ("p", "g") or (first[:1] == ("step",) and name.endswith("_scalars")):
                found[name] = value
    return found


def vars_update(value: Any) -> Update | None:
    return getattr(value, "_update", None) if isinstance(value, type) else None


def needed(kinds: Sequence[str]) -> tuple[int, int]:
    """128-bit loads and stores of a thread for one block: each stream read, all but g written; of
    the target that is driven."""
    shape = engine.shape_of(tuple(kinds))
    streams = kinds[: len(kinds) - n_codes(tuple(kinds))]
    per_thread = [shape.block * ITEMSIZE[kind] // (16 * shape.threads) for kind in streams]
    return sum(per_thread), sum(per_thread) - per_thread[1]


def checked_update(launched: Launched, kinds: Sequence[str], watched: bool = False) -> Checked:
    """What keeps an update kernel from passing; watched: with telemetry."""
    found = checked(launched)
    found.wide(*needed(kinds))
    if kinds[0] != "fp64":
        if found.read.float64 and not watched:
            found.faults.append(f"{found.read.float64} float64 instructions")
        if found.read.approximate:
            found.faults.append(f"approximate: {' '.join(found.read.approximate)}")
    return found


def checked_scalars(launched: Launched) -> Checked:
    """What keeps a scalars kernel from passing."""
    found = checked(launched)
    if found.read.float32:
        found.faults.append(f"{found.read.float32} float32 instructions")
    return found


# With all options of the step.
ROUNDINGS = {0: "extras", STOCHASTIC: "by chance", KAHAN: "kahan", MASTER: "master"}


def launch_of(
    update: Update,
    kinds: Sequence[str],
    rule: Callable[..., Any],
    step_options: StepOptions = NO_OPTIONS,
) -> Launch:
    """A launch over one tensor of two chunks; nothing of it is ever read. Of states "8bit" are
    those that may be, the others float32."""
    p, g, state = kinds
    states = tuple(stored(update, name, state) for name in update.state_names)
    average = ("fp64" if p == "fp64" else "fp32",) if step_options.averaged else ()
    kept = {KAHAN: ("bf16",), MASTER: ("int16",)}.get(step_options.rounding, ())
    streams = (p, g, *states, *average, *kept, *["fp32"] * n_codes(states))
    n_scalars = update.n_scalars + 1 + step_options.n_scalars
    return Launch(rule, streams, [engine.CHUNK + 1], n_scalars, CPU, step_options)


def stored(update: Update, name: str, kind: str) -> str:
    """How a state lies in memory."""
    if kind != "8bit":
        return kind
    if name not in update.eight_bit:
        return "fp32"
    return "uint8" if name in update.nonnegative else "int8"


def check_update(
    update: Update,
    kinds: tuple[str, str, str],
    target: str,
    skip: bool = False,
    rule: Callable[..., Any] | None = None,
    step_options: StepOptions = NO_OPTIONS,
) -> Checked:
    """Compile the update as a host-counted launch has it, or (skip) as one with found_inf."""
    with compiling(target) as compiled:
        launch = launch_of(update, kinds, rule or update.rule, step_options)
        if skip:
            run_on_device(launch, update, scaled=True)
        else:
            launch.run(1)
        return checked_update(compiled.of("update_kernel")[0], launch.kinds, step_options.watched)


def check_scalars(
    update: Update,
    kinds: tuple[str, str, str],
    target: str,
    scaled: bool = True,
    step_options: StepOptions = NO_OPTIONS,
) -> Checked:
    """Compile the kernel that counts the steps; scaled: with GradScaler's scale and found_inf."""
    with compiling(target) as compiled:
        run_on_device(launch_of(update, kinds, update.rule, step_options), update, scaled)
        return checked_scalars(compiled.of("scalars_kernel")[0])


def run_on_device(
    launch: Launch, update: Update, scaled: bool, clip: ClipResult | None = None
) -> None:
    one = torch.ones(1) if scaled else None
    n_numbers = 1 + len(update.carried) + launch.step_options.averaged
    numbers = np.zeros((1, n_numbers), dtype=np.int64)
    groups = np.zeros(1, dtype=np.int64)
    row = [1.0] * (1 + len(update.hyper_names) + launch.step_options.n_hypers)
    bases = groups if launch.draws else None
    launch.run_on_device(update.scalars, numbers, groups, [row], one, one, clip, bases)


# What is compiled, by its name.
Checks = Iterator[tuple[Case, Callable[[], Sequence[Checked]]]]


def all_checks(targets: Sequence[str]) -> Checks:
    """Every update, as the host counts its steps and (skip) as the device does, and with options;
    every scalars kernel."""
    counted = {update.scalars: update for update in updates().values()}
    for target, (name, update) in itertools.product(targets, updates().items()):
        kinds_here = KINDS if update.state_names else {(p, g, g) for p, g, _ in KINDS}
        for kinds, skip in itertools.product(sorted(kinds_here), (False, True)):
            case = Case(target, name, "-".join(kinds), "skip" if skip else "")
            yield case, lambda u=update, k=kinds, t=target, s=skip: [check_update(u, k, t, s)]
        for kinds, rounding in itertools.product(sorted(kinds_here), ROUNDINGS):
            if rounding and kinds[0] != "bf16":
                continue
            step_options = StepOptions(clipped=True, averaged=True, rounding=rounding)
            case = Case(target, name, "-".join(kinds), ROUNDINGS[rounding])
            yield (
                case,
                lambda u=update, k=kinds, t=target, e=step_options: [
                    check_update(u, k, t, step_options=e)
                ],
            )
        if counted[update.scalars] is not update:
            continue
        for kinds, scaled in itertools.product((KINDS[0], KINDS[3]), (False, True)):
            case = Case(target, update.scalars.__name__, kinds[0], "amp" if scaled else "")
            yield case, lambda u=update, k=kinds, t=target, s=scaled: [check_scalars(u, k, t, s)]
