"""One launch on a CPU: the tables of what it updates, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastopt_kernels import launches
from fastopt_kernels.chunks import (
    NO_OPTIONS,
    STOCHASTIC,
    TELEMETRY,
    StepOptions,
    chunk_table,
    n_codes,
)
from fastopt_kernels.cpu.base import data_ptrs
from fastopt_kernels.cpu.base.threads import run_parallel, worth_it
from fastopt_kernels.cpu.step import engine
from fastopt_kernels.cpu.step.reduce import Measured, measure

# Elements a chunk, by the size of the launch: small chunks divide a small launch evenly (22 against
# 32 us at 100K elements on two threads), large ones keep the table small.
CHUNK = ((262_144, 2048), (1 << 62, 16384))


def _call(entry: Any, args: tuple[Any, ...], n_threads: int) -> None:
    if n_threads > 1:
        run_parallel(entry, args, n_threads)
    else:
        entry(*args)


class Launch:
    """The tables of one launch; the caller keeps `tensors` filled with live addresses.

    tensors: (n, 2 + states) int64, the addresses of p, g and each state
    index:   (n,) int64, the row of scalars each tensor takes
    scalars: (n, n_scalars) float32 (float64 for float64 parameters); column 0 scales the gradient
    keys:    (n,) int64, what chance depends on beside the element (stochastic rounding)
    name:    what a profiler shows it as
    """

    def __init__(
        self,
        rule: Callable[..., Any],
        kinds: tuple[str, ...],
        numels: list[int],
        n_scalars: int,
        device: object = None,
        step_options: StepOptions = NO_OPTIONS,
    ) -> None:
        n = len(numels)
        self.rule, self.kinds, self.name = rule, kinds, rule.__name__
        self.n_scalars, self.step_options = n_scalars, step_options
        self.numels = np.asarray(numels, dtype=np.int64)
        self.tensors = np.zeros((n, len(kinds)), dtype=np.int64)
        self.index = np.zeros(n, dtype=np.int64)
        self.keys = np.zeros(n, dtype=np.int64)
        dtype = np.float64 if kinds[0] == "fp64" else np.float32
        self.scalars = np.zeros((n, n_scalars), dtype=dtype)
        total = int(self.numels.sum())
        size = next(size for limit, size in CHUNK if total < limit)
        self._all_chunks = chunk_table(self.numels, size)
        self._addresses = (self.tensors.ctypes.data, self.index.ctypes.data)
        self._scalars_address = self.scalars.ctypes.data
        self.select(None)

    @property
    def walk(self) -> Any:
        """A compiled walk over a list of tensors, which finds their addresses."""
        return data_ptrs.compiled()

    @property
    def draws(self) -> bool:
        """True where anything is rounded by chance, so that `keys` count."""
        return self.step_options.rounding == STOCHASTIC or n_codes(self.kinds) > 0

    def select(self, active: np.ndarray | None) -> None:
        """Restrict the launch to the tensors where `active` holds; None takes all."""
        chunks = self._all_chunks
        if active is not None:
            chunks = np.ascontiguousarray(chunks[active[chunks[:, 0]]])
        self.chunks = chunks
        tensors, index = self._addresses
        # Where `tensors` and `chunks` lie: asking numpy takes 0.4 us.
        self.where = (tensors, chunks.ctypes.data)
        self._seen = np.zeros((len(chunks) if self.step_options.watched else 0, len(TELEMETRY)))
        row_of = (index, self._scalars_address, self.keys.ctypes.data)
        self._args = (*self.where, *row_of, self._seen.ctypes.data, len(chunks))
        self.n_elements = int((chunks[:, 2] - chunks[:, 1]).sum())

    def prepare(self, n_threads: int) -> None:
        """Compile what `run` will call, so that a failure comes before anything is written."""
        if len(self.chunks):
            self._entry(n_threads)

    def run(self, n_threads: int) -> None:
        """Update every selected tensor, on at most `n_threads` threads."""
        if not len(self.chunks):
            return
        entry, parallel = self._entry(n_threads)
        if launches.unprofiled():
            _call(entry, self._args, n_threads if parallel else 1)
            return
        n, idle = n_threads if parallel else 1, (*self._args[:-1], 0)
        key = engine.key_of(self.rule, self.kinds, self.n_scalars, self.step_options, parallel)
        with launches.profiled(self.name, key, lambda: _call(entry, idle, n)):
            _call(entry, self._args, n)

    def measure(self, maximum: bool) -> Measured:
        """sum g^2 or max |g| of every selected tensor's gradient, and its non-finite elements."""
        return measure(self, maximum)

    def telemetry(self) -> np.ndarray:
        """(n, len(TELEMETRY)) float64: telemetry of each tensor in the last run."""
        found = np.zeros((len(self.tensors), len(TELEMETRY)))
        np.add.at(found, self.chunks[:, 0], self._seen)
        return found

    def _entry(self, n_threads: int) -> tuple[Any, bool]:
        parallel = worth_it(n_threads, self.n_elements)
        compiled = engine.compiled(
            self.rule, self.kinds, self.n_scalars, self.step_options, parallel
        )
        return compiled.entry_point, parallel
