"""The gate every GPU kernel passes before it meets a GPU: compiled ahead of time, and read.

`python -m tests.gpu.gate` compiles each rule and each scalars function of fastopt.optim for every
combination of dtypes and every target, then what clipping adds (`clip_gate`), states of 8 bits and
telemetry (`format_gate`), and the row kernels (`row_gate`), and prints a table; the tests take a
sample. What is compiled is what `Launch` launches, through Triton's own specialization of its
arguments: only the last call, into the driver, is left out. A kernel fails with

- a spill, a stack frame or local memory;
- fewer 128-bit loads or stores than its streams need, each loaded and written once (of codes a
  thread takes 4 or 8 bytes, as many elements as of the other streams; beside codes, 64 lanes take
  8 bytes of a 16-bit stream);
- float64 arithmetic in an update of anything but float64 parameters (the scalars' kernel computes
  in float64, and there float32 arithmetic fails; the one that measures gradients, and telemetry,
  add in float64);
- an approximate or denormal-flushing instruction in an update, or where gradients are measured.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

import fastopt.optim
from fastopt.optim.update import Update
from fastopt_kernels.chunks import KAHAN, MASTER, NO_EXTRAS, STOCHASTIC, Extras, n_codes
from fastopt_kernels.gpu import engine, measure

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
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
# Triton keeps compiled kernels by device: numbers no real one has.
NO_DEVICE = 1000


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


def vars_update(value: Any) -> Update | None:
    return getattr(value, "_update", None) if isinstance(value, type) else None


class _Driver:
    """What Triton asks of a driver before it launches: the target, and some device number."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self._target, self._device = target, device

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Recorder:
    """A kernel that compiles for its arguments, and keeps what came of it, where it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))

        return compile_only


@contextmanager
def driving(target: str, warp_size: Any) -> Iterator[None]:
    """Triton's driver is that of a target inside; warp_size: the cached function that asks it"""
    drivers, active = triton.runtime.driver, triton.runtime.driver._active
    warp_size.cache_clear()
    drivers.set_active(_Driver(TARGETS[target], NO_DEVICE + list(TARGETS).index(target)))
    try:
        yield
    finally:
        drivers._active = active
        warp_size.cache_clear()


@contextmanager
def compiling(target: str) -> Iterator[dict[str, list[Any]]]:
    """Launches inside compile for a target and run nothing; yields the compiled kernels."""
    places = {"update_kernel": engine, "scalars_kernel": engine, "measure_kernel": measure}
    kept = {name: getattr(module, name) for name, module in places.items()}
    recorders = {name: _Recorder(kernel) for name, kernel in kept.items()}
    try:
        for name, recorder in recorders.items():
            setattr(places[name], name, recorder)
        with driving(target, engine._warp_size):
            yield {name: recorder.compiled for name, recorder in recorders.items()}
    finally:
        for name, kernel in kept.items():
            setattr(places[name], name, kernel)


@dataclass
class Read:
    """What the machine code of one kernel says of itself."""

    registers: int
    spilled: int
    loads: int
    stores: int
    float64: int
    float32: int
    approximate: tuple[str, ...] = field(default=())


def read(kernel: Any) -> Read:
    return _read_hip(kernel) if "amdgcn" in kernel.asm else _read_cuda(kernel)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_cuda(kernel: Any) -> Read:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        sass = _run(_tool("nvdisasm"), file.name)
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups()
    )
    ptx = kernel.asm["ptx"]
    return Read(
        registers,
        stack + local + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        len(re.findall(r"\bLDG\.E\S*\.128\b", sass)),
        len(re.findall(r"\bSTG\.E\S*\.128\b", sass)),
        len(re.findall(r"\b(?:D(?:ADD|MUL|FMA|SETP|MNMX)|F2F\S*F64\S*|[IU]2F\S*F64)\b", sass)),
        _float32_arithmetic(kernel),
        tuple(sorted(set(re.findall(r"\b\S+\.(?:approx|ftz)\S*", ptx)))),
    )


def _read_hip(kernel: Any) -> Read:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

    # Scalar registers spill to lanes of a vector register, not to memory.
    spilled = ("vgpr_spill_count", "private_segment_fixed_size")
    return Read(
        number("vgpr_count"),
        sum(map(number, spilled)) + len(re.findall(r"\bscratch_(?:load|store)", text)),
        len(re.findall(r"\b(?:global|flat|buffer)_load_dwordx4\b", text)),
        len(re.findall(r"\b(?:global|flat|buffer)_store_dwordx4\b", text)),
        len(re.findall(r"\bv_\w+_f64\b", text)),
        _float32_arithmetic(kernel),
    )


def _float32_arithmetic(kernel: Any) -> int:
    """In Triton's own IR: later, LLVM turns a sum that is stored as float32 into one of those."""
    lines = (line.partition(" loc(")[0] for line in kernel.asm["ttir"].splitlines())
    arithmetic = re.compile(r"= (?:arith\.(?:add|sub|mul|div)f|math\.\w+) .*f32\b")
    return sum(arithmetic.search(line) is not None for line in lines)


def needed(kinds: Sequence[str]) -> tuple[int, int]:
    """128-bit loads and stores of a thread for one block: each stream read, all but g written; of
    the target that is driven."""
    shape = engine.shape_of(tuple(kinds))
    streams = kinds[: len(kinds) - n_codes(tuple(kinds))]
    per_thread = [shape.block * ITEMSIZE[kind] // (16 * shape.threads) for kind in streams]
    return sum(per_thread), sum(per_thread) - per_thread[1]


def update_faults(
    kernel: Any, kinds: Sequence[str], watched: bool = False
) -> tuple[Read, list[str]]:
    """What keeps an update kernel from passing; watched: with telemetry."""
    found = read(kernel)
    loads, stores = needed(kinds)
    faults = []
    if found.spilled:
        faults.append(f"spills: {found.spilled} (stack, local memory, instructions)")
    if found.loads < loads:
        faults.append(f"{found.loads} loads of 128 bits, {loads} needed")
    if found.stores < stores:
        faults.append(f"{found.stores} stores of 128 bits, {stores} needed")
    if kinds[0] != "fp64":
        if found.float64 and not watched:
            faults.append(f"{found.float64} float64 instructions")
        if found.approximate:
            faults.append(f"approximate: {' '.join(found.approximate)}")
    return found, faults


def scalars_faults(kernel: Any) -> tuple[Read, list[str]]:
    """What keeps a scalars kernel from passing."""
    found = read(kernel)
    faults = []
    if found.spilled:
        faults.append(f"spills: {found.spilled} (stack, local memory, instructions)")
    if found.float32:
        faults.append(f"{found.float32} float32 instructions")
    return found, faults


# With all extras around the update.
ROUNDINGS = {0: "extras", STOCHASTIC: "by chance", KAHAN: "kahan", MASTER: "master"}


def launch_of(
    update: Update,
    kinds: Sequence[str],
    rule: Callable[..., Any],
    extras: Extras = NO_EXTRAS,
) -> engine.Launch:
    """A launch over one tensor of two chunks; nothing of it is ever read. Of states "8bit" are
    those that may be, the others float32."""
    p, g, state = kinds
    states = tuple(stored(update, name, state) for name in update.state_names)
    average = ("fp64" if p == "fp64" else "fp32",) if extras.averaged else ()
    kept = {KAHAN: ("bf16",), MASTER: ("int16",)}.get(extras.rounding, ())
    streams = (p, g, *states, *average, *kept, *["fp32"] * n_codes(states))
    n_scalars = update.n_scalars + 1 + extras.n_scalars
    return engine.Launch(rule, streams, [engine.CHUNK + 1], n_scalars, CPU, extras)


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
    extras: Extras = NO_EXTRAS,
) -> tuple[Read, list[str]]:
    """Compile the update as a host-counted launch has it, or (skip) as one with found_inf."""
    with compiling(target) as compiled:
        launch = launch_of(update, kinds, rule or update.rule, extras)
        if skip:
            run_on_device(launch, update, scaled=True)
        else:
            launch.run(1)
        return update_faults(compiled["update_kernel"][0], launch.kinds, extras.watched)


def check_scalars(
    update: Update,
    kinds: tuple[str, str, str],
    target: str,
    scaled: bool = True,
    extras: Extras = NO_EXTRAS,
) -> tuple[Read, list[str]]:
    """Compile the kernel that counts the steps; scaled: with GradScaler's scale and found_inf."""
    with compiling(target) as compiled:
        run_on_device(launch_of(update, kinds, update.rule, extras), update, scaled)
        return scalars_faults(compiled["scalars_kernel"][0])


def run_on_device(
    launch: engine.Launch, update: Update, scaled: bool, verdict: measure.Verdict | None = None
) -> None:
    one = torch.ones(1) if scaled else None
    numbers = np.zeros((1, 1 + len(update.carried)), dtype=np.int64)
    groups = np.zeros(1, dtype=np.int64)
    row = [1.0] * (1 + len(update.hyper_names) + launch.extras.n_hypers)
    bases = groups if launch.draws else None
    launch.run_on_device(update.scalars, numbers, groups, [row], one, one, verdict, bases)


def all_checks(targets: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every kernel there is, by name."""
    counted = {update.scalars: update for update in updates().values()}
    for target, (name, update) in itertools.product(targets, updates().items()):
        kinds_here = KINDS if update.state_names else {(p, g, g) for p, g, _ in KINDS}
        for kinds, skip in itertools.product(sorted(kinds_here), (False, True)):
            label = f"{target:7} {name:26} {'-'.join(kinds):15} {'skip' if skip else '':5}"
            yield label, lambda u=update, k=kinds, t=target, s=skip: check_update(u, k, t, s)
        for kinds, rounding in itertools.product(sorted(kinds_here), ROUNDINGS):
            if rounding and kinds[0] != "bf16":
                continue
            extras = Extras(clipped=True, averaged=True, rounding=rounding)
            label = f"{target:7} {name:26} {'-'.join(kinds):15} {ROUNDINGS[rounding]}"
            yield (
                label,
                lambda u=update, k=kinds, t=target, e=extras: check_update(u, k, t, extras=e),
            )
        if counted[update.scalars] is not update:
            continue
        for kinds, scaled in itertools.product((KINDS[0], KINDS[3]), (False, True)):
            flag = "amp" if scaled else ""
            label = f"{target:7} {update.scalars.__name__:26} {kinds[0]:15} {flag}"
            yield label, lambda u=update, k=kinds, t=target, s=scaled: check_scalars(u, k, t, s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all of them")
    options = parser.parse_args()
    # It reads kernels with what stands above.
    from tests.gpu import clip_gate, format_gate, row_gate

    targets = options.target or list(TARGETS)
    kernels = (m.all_checks for m in (sys.modules[__name__], clip_gate, format_gate, row_gate))
    return report(itertools.chain.from_iterable(checks(targets) for checks in kernels))


def report(checks: Iterable[tuple[str, Callable[[], Any]]]) -> int:
    """Run the checks and print a line for each; the exit status."""
    print(f"triton {triton.__version__}")
    print(f"{'':57} registers 128-bit loads stores float64")
    results = []
    for label, check in checks:
        try:
            found, faults = check()
            numbers = f"{found.registers:9} {found.loads:13} {found.stores:6} {found.float64:7}"
        except Exception as error:  # a kernel that does not compile is a failed kernel
            numbers, faults = f"{'':38}", [f"{type(error).__name__}: {error}"]
        results.append(bool(faults))
        print(f"{label:57} {numbers} {'FAIL ' + '; '.join(faults) if faults else 'ok'}", flush=True)
    print(f"{len(results)} kernels, {sum(results)} failed")
    return 1 if any(results) or not results else 0


if __name__ == "__main__":
    sys.exit(main())
