"""Kernels compiled ahead of time for a named GPU, without one, and what their machine code says.

What is compiled is what a launch launches, through Triton's own specialization of its arguments:
only the last call, into the driver, is left out.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from fastopt_kernels.gpu.base import device
from fastopt_kernels.gpu.rows import shared
from fastopt_kernels.gpu.step import launch, reduce

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# Triton keeps compiled kernels by device: numbers no real one has.
NO_DEVICE = 1000


class _Driver:
    """Answers what Triton asks before it launches: the target, and some device number."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self._target, self._device = target, device

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Launched:
    """A kernel as it was launched: its name, its constants and what it was compiled to."""

    name: str
    constants: dict[str, Any]
    compiled: Any

    @property
    def elements(self) -> int:
        """Elements a thread of the block, or the tile, that its program takes at a time."""
        known, target = self.constants, self.compiled.metadata.target
        if "LINES" in known:
            size = known["LINES"] * known["COLS"]
        else:
            size = known["BLOCK"] * known.get("UNROLL", 1)
        return max(1, size // (self.compiled.metadata.num_warps * target.warp_size))


class Launches(list[Launched]):
    """In the order they were launched."""

    def of(self, name: str) -> list[Launched]:
        """The launches of one kernel."""
        return [launched for launched in self if launched.name == name]


class _Recorder:
    """A kernel that compiles for its arguments, and keeps what came of it, where it is launched."""

    def __init__(self, name: str, kernel: Any, launched: Launches) -> None:
        self.name, self.kernel, self.launched = name, kernel, launched
        self.fn = kernel.fn

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **constants: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **constants)
            self.launched.append(Launched(self.name, constants, compiled))

        return compile_only


@contextmanager
def driving(target: str) -> Iterator[None]:
    """Triton's driver is that of a target inside."""
    drivers, active = triton.runtime.driver, triton.runtime.driver._active
    device.target.cache_clear()
    drivers.set_active(_Driver(TARGETS[target], NO_DEVICE + list(TARGETS).index(target)))
    try:
        yield
    finally:
        drivers._active = active
        device.target.cache_clear()


@contextmanager
def compiling(target: str) -> Iterator[Launches]:
    """Launches inside compile for a target and run nothing; yields them."""
    launched = Launches()

    def compile_only(kernel: Any, grid: Any, args: Sequence[Any], **constants: Any) -> None:
        options = device.register_options(constants["num_warps"])
        _Recorder(kernel.fn.__name__, kernel, launched)[grid](*args, **constants, **options)

    places: tuple[tuple[Any, str, Any], ...] = (
        *((module, name, None) for module, name in _ENGINES),
        (shared, "launch", compile_only),
    )
    kept = [(module, name, getattr(module, name)) for module, name, _ in places]
    try:
        for (module, name, instead), (*_, own) in zip(places, kept, strict=True):
            setattr(module, name, instead or _Recorder(name, own, launched))
        with driving(target):
            yield launched
    finally:
        for module, name, own in kept:
            setattr(module, name, own)


_ENGINES = ((launch, "update_kernel"), (launch, "scalars_kernel"), (reduce, "measure_kernel"))


@dataclass(frozen=True)
class Read:
    """The facts read from the machine code of one kernel."""

    registers: int
    spilled: int
    loads: int
    stores: int
    float64: int
    float32: int
    # As they are written, not as they are run: a loop's count once.
    instructions: int
    shared: int
    approximate: tuple[str, ...] = field(default=())


# All but what fills the code up, and the bytes of other sections.
_CUDA_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP|\.)\S", re.MULTILINE)
_HIP_INSTRUCTION = re.compile(
    r"^\t(?!s_nop|s_code_end)(?:[sv]|ds|global|flat|buffer|scratch)_", re.MULTILINE
)


@cache
def read(kernel: Any) -> Read:
    return _read_hip(kernel) if "amdgcn" in kernel.asm else _read_cuda(kernel)


def nvidia_tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _of_cubin(kernel: Any, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return _run(nvidia_tool(tool), *options, file.name)


def _sass(kernel: Any) -> str:
    # Without its data flow analysis: the same text sooner.
    return _of_cubin(kernel, "nvdisasm", "-ndf")


def _read_cuda(kernel: Any) -> Read:
    usage, sass = _of_cubin(kernel, "cuobjdump", "-res-usage"), _sass(kernel)
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
        len(_CUDA_INSTRUCTION.findall(sass)),
        kernel.metadata.shared,
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
        len(_HIP_INSTRUCTION.findall(text)),
        kernel.metadata.shared,
    )


def _float32_arithmetic(kernel: Any) -> int:
    """In Triton's own IR: later, LLVM turns a sum that is stored as float32 into one of those."""
    lines = (line.partition(" loc(")[0] for line in kernel.asm["ttir"].splitlines())
    arithmetic = re.compile(r"= (?:arith\.(?:add|sub|mul|div)f|math\.\w+) .*f32\b")
    return sum(arithmetic.search(line) is not None for line in lines)


# Bits of one access in NVIDIA's and AMD's machine code; 32 where the instruction says nothing else.
_CUDA_ACCESS = re.compile(r"\b(LDG|STG)\.E(\.\S*)?")
_HIP_ACCESS = re.compile(r"\b(?:global|flat|buffer)_(load|store)_(\w+)")
_HIP_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "b128": 128, "b64": 64}
_CUDA_BITS = (("128", 128), ("64", 64), ("U8", 8), ("S8", 8), ("U16", 16), ("S16", 16))


def access_bits(kernel: Any) -> tuple[Counter[int], Counter[int]]:
    """The numbers of loads and of stores of global memory, by their width in bits."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    if "amdgcn" in kernel.asm:
        for what, width in _HIP_ACCESS.findall(kernel.asm["amdgcn"]):
            bits = _HIP_BITS.get(width, 16 if "short" in width or "16" in width else 8)
            (loads if what == "load" else stores)[bits] += 1
        return loads, stores
    for what, width in _CUDA_ACCESS.findall(_sass(kernel)):
        marks = width.split(".")
        bits = next((n for mark, n in _CUDA_BITS if mark in marks), 32)
        (loads if what == "LDG" else stores)[bits] += 1
    return loads, stores


@dataclass(frozen=True)
class Unit:
    """The resources of a multiprocessor (a compute unit) of a target for the programs on it."""

    warps: int
    blocks: int
    registers: int
    shared: int


# Registers of 32 bits. CUDA programming guide, table of compute capabilities; AMD's CDNA3 and
# CDNA4 guides: 8 waves for each of 4 SIMDs, 512 vector registers a lane.
UNITS = {
    "sm_80": Unit(64, 32, 65536, 164 << 10),
    "sm_90": Unit(64, 32, 65536, 228 << 10),
    "sm_100": Unit(64, 32, 65536, 228 << 10),
    "sm_120": Unit(48, 24, 65536, 100 << 10),
    "gfx942": Unit(32, 32, 4 * 512 * 64, 64 << 10),
    "gfx950": Unit(32, 32, 4 * 512 * 64, 160 << 10),
}


def occupancy(target: str, registers: int, shared: int, n_warps: int) -> float:
    """Warps that fit a multiprocessor at once, as a share of those it has room for.

    Registers are given out in eights a thread; CUDA keeps 1 KiB of shared memory a program.
    """
    unit, width = UNITS[target], TARGETS[target].warp_size
    of_program = -(-max(registers, 1) // 8) * 8 * width * n_warps
    own = 1024 if TARGETS[target].backend == "cuda" else 0
    limits = [unit.blocks, unit.warps // n_warps, unit.registers // of_program]
    if shared + own:
        limits.append(unit.shared // (shared + own))
    return min(limits) * n_warps / unit.warps
