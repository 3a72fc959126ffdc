"""One launch for every tensor of a model: p, g and the states of all of them, in place.

One program takes one chunk (tensor, first, last): it reads the addresses of its tensor from a
table, and walks the chunk in blocks. Full blocks of a tensor on a 16-byte boundary take 128-bit
accesses; the tail, and a tensor that is not (a view into a DDP bucket), a masked loop, without
holding back the others.

Where the host may not know the step (GradScaler's found_inf, graph capture), a small float64 kernel
before it counts the steps and computes the scalars on the device (`scalars`). Where the gradients
are looked at first (`measure`), their factors are read from where that left them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.compiler import CompilationError

from fastopt_kernels import launches
from fastopt_kernels.chunks import NO_EXTRAS, STOCHASTIC, Extras, chunk_table, n_codes
from fastopt_kernels.gpu import memory, rounding
from fastopt_kernels.gpu import xp as gpu_xp
from fastopt_kernels.gpu.rounding import BY_CHANCE, WITH_LOW, WITH_REST
from fastopt_kernels.gpu.scalars import scalars_kernel
from fastopt_kernels.gpu.tables import Tables
from fastopt_kernels.xp import rebind, uncompilable

if TYPE_CHECKING:
    from fastopt_kernels.gpu.measure import Verdict

# Elements a program updates. Small enough that 20 tensors of 1M fill 132 multiprocessors several
# times over, large enough that the table stays under 0.2 % of the traffic of AdamW.
CHUNK = 4096
THREADS = 128
# Elements a block: 16 bytes a thread of the narrowest stream, so each access is one of 128 bits.
# Twice that took 153 registers instead of 40 on sm_90 (AdamW, float32) and a third of the warps.
BLOCK = {"fp64": 256, "fp32": 512, "bf16": 1024, "fp16": 1024, "int16": 1024}
SCALARS_BLOCK = 128


@triton.jit
def _update_block(
    pointers,
    offsets,
    mask,
    scalars,
    place,
    RULE: tl.constexpr,
    COMPUTE: tl.constexpr,
    EXTRAS: tl.constexpr,
):
    """The rule on a block of every stream, with the extras (chunks.Extras).

    place: where the chunk begins, and what chance depends on beside the element
    """
    clipped: tl.constexpr = EXTRAS[0]
    averaged: tl.constexpr = EXTRAS[1]
    rounded: tl.constexpr = EXTRAS[2]
    values = ()
    for k in tl.static_range(len(pointers)):
        values += (tl.load(pointers[k] + offsets, mask=mask).to(COMPUTE),)
    g = scalars[0] * values[1]
    # The extras are the last of the scalars, and of the streams.
    own: tl.constexpr = len(scalars) - clipped - averaged
    kept: tl.constexpr = len(pointers) - (rounded >= WITH_REST)
    states: tl.constexpr = kept - averaged
    p = values[0]
    if rounded == WITH_REST:
        p += values[kept]
    if rounded == WITH_LOW:
        p = rounding.join(p, values[kept])
    if clipped:
        g = tl.where(g < -scalars[own], -scalars[own], g)
        g = tl.where(g > scalars[own], scalars[own], g)
    new = RULE(p, g, *values[2:states], *scalars[1:own])
    p = new[0]
    new = new[1:]
    if averaged:
        new += (gpu_xp.lerp(values[states], p, scalars[own + clipped]),)
    if rounded == BY_CHANCE:
        p = rounding.stochastic(p, place[0] + offsets, place[1])
    if rounded == WITH_REST:
        high = rounding.upper(p)
        new += (rounding.rest(p, high),)
        p = high
    if rounded == WITH_LOW:
        high = rounding.upper(p)
        new += (rounding.lower(p, high),)
        p = high
    # What is stored is computed before the first store: nothing may hang on the order of aliases.
    tl.store(pointers[0] + offsets, p.to(pointers[0].dtype.element_ty), mask=mask)
    for k in tl.static_range(len(new)):
        tl.store(pointers[k + 2] + offsets, new[k].to(pointers[k + 2].dtype.element_ty), mask=mask)


@triton.jit
def update_kernel(
    tensors_ptr,
    chunks_ptr,
    index_ptr,
    scalars_ptr,
    keys_ptr,
    skip_ptr,
    factors_ptr,
    owners_ptr,
    RULE: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    N_SCALARS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXTRAS: tl.constexpr,
):
    """p, *states = RULE(p, g_scale * g, *states, *scalars) for the chunk of this program.

    tensors_ptr: (n, len(DTYPES)) int64 addresses; chunks_ptr: (programs, 3) int64;
    index_ptr: (n,) int64 row of scalars_ptr; keys_ptr: (n,) int64, for chance; skip_ptr: (1,)
    float, nothing is written where not 0; factors_ptr: of g_scale, owners_ptr: (n,) int64, whose
    """
    chunk_ptr = chunks_ptr + tl.program_id(0).to(tl.int64) * 3
    tensor, first = tl.load(chunk_ptr), tl.load(chunk_ptr + 1)
    n = tl.load(chunk_ptr + 2) - first
    if HAS_SKIP:
        n = tl.where(tl.load(skip_ptr) != 0, 0, n)

    scalar_ptr = scalars_ptr + tl.load(index_ptr + tensor) * N_SCALARS
    g_scale = tl.load(scalar_ptr)
    if HAS_FACTORS:
        g_scale *= tl.load(factors_ptr + tl.load(owners_ptr + tensor))
    scalars = (g_scale,)
    for k in tl.static_range(1, N_SCALARS):
        scalars += (tl.load(scalar_ptr + k),)

    address_ptr = tensors_ptr + tensor * len(DTYPES)
    aligned_ptrs = ()
    any_ptrs = ()
    bits = tensor * 0
    for k in tl.static_range(len(DTYPES)):
        address = tl.load(address_ptr + k)
        bits = bits | address
        aligned_ptrs += (memory.pointer(address, first, DTYPES[k], True),)
        any_ptrs += (memory.pointer(address, first, DTYPES[k], False),)

    key = tensor
    if EXTRAS[2] == BY_CHANCE:
        key = rounding.key_of_chunk(tl.load(keys_ptr + tensor), first)
    place = (first, key)
    lanes = tl.arange(0, BLOCK)
    full = tl.where(bits % 16 == 0, n // BLOCK, 0)
    for block in range(full):
        offsets = block * BLOCK + lanes
        _update_block(aligned_ptrs, offsets, None, scalars, place, RULE, COMPUTE, EXTRAS)
    for start in range(full * BLOCK, n, BLOCK):
        offsets = start + lanes
        _update_block(any_ptrs, offsets, offsets < n, scalars, place, RULE, COMPUTE, EXTRAS)


def block_size(kinds: tuple[str, ...]) -> int:
    """Elements a block of a launch over these streams."""
    return max(BLOCK[kind] for kind in kinds)


@cache
def _warp_size() -> int:
    """Threads a warp: 64 on AMD's CDNA. The interpreter has no device to ask."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


@cache
def compiled_rule(rule: Callable[..., Any]) -> Any:
    """A rule or scalars function as Triton sees it: the same source, with Triton's `xp`."""
    function = rebind(rule, gpu_xp)
    function.__globals__["tl"] = tl  # Triton's interpreter looks for it in every function
    function.__globals__["bool"] = tl.int1  # its compiler reads annotations, and knows no bool
    for name in rule.__code__.co_names:
        if isinstance(value := rule.__globals__.get(name), (int, float)):
            function.__globals__[name] = tl.constexpr(value)
    return triton.jit(function)


class Launch:
    """The tables of one launch; the caller keeps `tensors` filled with live addresses.

    tensors: (n, 2 + states) int64, the addresses of p, g and each state
    index:   (n,) int64, the row of scalars each tensor takes
    scalars: (n, n_scalars) float32 (float64 for float64 parameters); column 0 scales the gradient
    keys:    (n,) int64, what chance depends on beside the element (stochastic rounding)
    owners:  (n,) int64, the parameter group of each tensor; read where a verdict is given
    name:    what a profiler shows it as
    """

    def __init__(
        self,
        rule: Callable[..., Any],
        kinds: tuple[str, ...],
        numels: list[int],
        n_scalars: int,
        device: torch.device,
        extras: Extras = NO_EXTRAS,
    ) -> None:
        n = len(numels)
        self.rule, self.kinds, self.n_scalars, self.device = rule, kinds, n_scalars, device
        self.extras, self.name = extras, rule.__name__
        self.keys, self.owners = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self.tensors = np.zeros((n, len(kinds)), dtype=np.int64)
        self.index = np.zeros(n, dtype=np.int64)
        self.scalars = np.zeros((n, n_scalars), dtype=np.float64 if self._wide else np.float32)
        self._all_chunks = chunk_table(np.asarray(numels, dtype=np.int64), CHUNK)
        self._tables = Tables(device, self._all_chunks)

    @property
    def _wide(self) -> bool:
        return self.kinds[0] == "fp64"

    @property
    def draws(self) -> bool:
        """Whether anything is rounded by chance, so that `keys` count."""
        return self.extras.rounding == STOCHASTIC or n_codes(self.kinds) > 0

    def select(self, active: np.ndarray | None) -> None:
        """Restrict the launch to the tensors where `active` holds; None takes all."""
        chunks = self._all_chunks
        if active is not None:
            chunks = np.ascontiguousarray(chunks[active[chunks[:, 0]]])
        self._tables.replace(chunks)

    def prepare(self, n_threads: int) -> None:
        """Triton compiles at the first launch; a rule it cannot take is refused there."""

    @property
    def chunks(self) -> np.ndarray:
        """(chunks, 3) int64, of the selected tensors."""
        return self._tables.lasting

    def run(self, n_threads: int, verdict: Verdict | None = None) -> None:
        """Update every selected tensor, with the scalars the host has filled in."""
        if len(self.chunks):
            with self._on_device():
                arrays = [self.tensors, self.index, self.scalars]
                if self.draws:
                    arrays.append(self.keys)
                if verdict is not None:
                    arrays.append(self.owners)
                tables, chunks = self._tables.send(arrays)
                factors = verdict and (verdict.factors(self._wide), tables.pop())
                self._update(*tables[:3], chunks, None, *tables[3:], factors=factors)

    def run_on_device(
        self,
        scalars: Callable[..., Any],
        numbers: np.ndarray,
        groups: np.ndarray,
        hypers: Sequence[Sequence[Any]],
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
        verdict: Verdict | None = None,
        bases: np.ndarray | None = None,
    ) -> None:
        """Count the steps and compute the scalars on the device, then update.

        numbers: (n, 1 + carried) int64 addresses of float32 step and carried numbers, 0 for none
        groups:  (n,) int64 row of `hypers`
        hypers:  for each group the gradient's sign, the hyper-parameters and those of the extras
                 (a limit; a decay, and how long it is warmed up), tensors or floats
        verdict: in place of grad_scale and found_inf
        bases:   (n,) int64, what chance depends on beside the step and the element
        """
        known = np.asarray([[host_value(x) for x in row] for row in hypers], dtype=np.float64)
        arrays = [self.tensors, np.arange(len(self.index)), numbers, groups, known]
        places = [x for x in (verdict and self.owners, bases) if x is not None]
        with self._on_device():
            sent, chunks = self._tables.send([*arrays, *places])
            tensors, index, number_table, group_table, hyper_table, *placed = sent
            copy_device_values(hypers, hyper_table)
            grad_scale, found_inf = (here(x, self.device) for x in (grad_scale, found_inf))
            if verdict is not None and verdict.skips:
                found_inf = verdict.skip
            table = torch.empty_like(torch.from_numpy(self.scalars), device=self.device)
            keys = None if bases is None else torch.empty_like(placed[-1])
            launches.start(
                scalars_kernel,
                (triton.cdiv(len(groups), SCALARS_BLOCK),),
                number_table,
                group_table,
                hyper_table,
                grad_scale,
                found_inf,
                verdict and verdict.factors(True),
                verdict and placed[0],
                None if bases is None else placed[-1],
                table,
                keys,
                len(groups),
                SCALARS=compiled_rule(scalars),
                N_CARRIED=numbers.shape[1] - 1,
                N_HYPERS=known.shape[1] - 1 - self.extras.n_hypers,
                N_SCALARS=self.n_scalars,
                HAS_SCALE=grad_scale is not None,
                HAS_SKIP=found_inf is not None,
                HAS_FACTORS=verdict is not None,
                HAS_KEYS=bases is not None,
                EXTRAS=tuple(map(int, self.extras)),
                BLOCK=SCALARS_BLOCK,
                num_warps=THREADS // _warp_size(),
                enable_fp_fusion=True,
                name="scalars",
            )
            if len(self.chunks):
                self._update(tensors, index, table, chunks, found_inf, keys)
            self._tables.keep_spare([*arrays, *places, self._all_chunks])

    def _update(
        self,
        tensors: torch.Tensor,
        index: torch.Tensor,
        scalars: torch.Tensor,
        chunks: torch.Tensor,
        found_inf: torch.Tensor | None,
        keys: torch.Tensor | None = None,
        factors: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        launches.start(
            update_kernel,
            (len(chunks),),
            tensors,
            chunks,
            index,
            scalars,
            keys,
            found_inf,
            *(factors or (None, None)),
            RULE=compiled_rule(self.rule),
            DTYPES=tuple(memory.DTYPES[kind] for kind in self.kinds),
            COMPUTE=memory.compute_dtype(self.kinds[0]),
            N_SCALARS=self.n_scalars,
            HAS_SKIP=found_inf is not None,
            HAS_FACTORS=factors is not None,
            BLOCK=block_size(self.kinds),
            EXTRAS=tuple(map(int, self.extras)),
            num_warps=THREADS // _warp_size(),
            enable_fp_fusion=True,
            name=self.name,
        )

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """The launch's device made current, and a rule Triton cannot take refused by its name."""
        real = self.device.type != "cpu"  # Triton's interpreter runs on the CPU
        try:
            with torch.cuda.device(self.device) if real else nullcontext():
                yield
        except CompilationError as error:
            raise uncompilable(self.rule, "Triton", error) from error


def host_value(x: Any) -> float:
    """A hyper-parameter as far as the host knows it; one on a device is copied there."""
    if isinstance(x, torch.Tensor):
        return x.detach().item() if x.device.type == "cpu" else 0.0
    return float(x)


def here(x: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A tensor, if there is one, on a device, without waiting for it."""
    return None if x is None else x.to(device, non_blocking=True)


def copy_device_values(values: Sequence[Sequence[Any]], table: torch.Tensor) -> None:
    """Those that are on a device, to their places in a table there."""
    for row, of_row in enumerate(values):
        for column, value in enumerate(of_row):
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                table[row, column].copy_(value.reshape(()), non_blocking=True)
