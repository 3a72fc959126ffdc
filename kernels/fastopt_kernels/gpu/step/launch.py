"""One launch on a GPU: the tables of what it updates, and the kernels that are started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import triton
from triton.compiler import CompilationError

from fastopt_kernels import launches
from fastopt_kernels.chunks import NO_OPTIONS, STOCHASTIC, StepOptions, chunk_table, n_codes
from fastopt_kernels.gpu.base import memory
from fastopt_kernels.gpu.base.device import register_options, warp_size
from fastopt_kernels.gpu.step import engine, telemetry
from fastopt_kernels.gpu.step.clip_result import ClipResult
from fastopt_kernels.gpu.step.scalars import scalars_kernel
from fastopt_kernels.gpu.step.tables import Tables, copy_device_values, here, host_value
from fastopt_kernels.gpu.step.update import update_kernel
from fastopt_kernels.xp import uncompilable

SCALARS_BLOCK = 128


class Launch:
    """The tables of one launch; the caller keeps `tensors` filled with live addresses.

    tensors: (n, 2 + states) int64, the addresses of p, g and each state
    index:   (n,) int64, the row of scalars each tensor takes
    scalars: (n, n_scalars) float32 (float64 for float64 parameters); column 0 scales the gradient
    keys:    (n,) int64, what chance depends on beside the element (stochastic rounding)
    owners:  (n,) int64, the parameter group of each tensor; read where a clip result is given
    name:    what a profiler shows it as
    """

    def __init__(
        self,
        rule: Callable[..., Any],
        kinds: tuple[str, ...],
        numels: list[int],
        n_scalars: int,
        device: torch.device,
        step_options: StepOptions = NO_OPTIONS,
    ) -> None:
        n = len(numels)
        self.rule, self.kinds, self.n_scalars, self.device = rule, kinds, n_scalars, device
        self.step_options, self.name = step_options, rule.__name__
        self.keys, self.owners = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self.tensors = np.zeros((n, len(kinds)), dtype=np.int64)
        self.index = np.zeros(n, dtype=np.int64)
        self.scalars = np.zeros((n, n_scalars), dtype=np.float64 if self._wide else np.float32)
        self._all_chunks = chunk_table(np.asarray(numels, dtype=np.int64), engine.CHUNK)
        self._tables = Tables(device, self._all_chunks)
        self._seen = telemetry.Seen(self._tables)

    @property
    def _wide(self) -> bool:
        return self.kinds[0] == "fp64"

    @property
    def draws(self) -> bool:
        """True where anything is rounded by chance, so that `keys` count."""
        return self.step_options.rounding == STOCHASTIC or n_codes(self.kinds) > 0

    def select(self, active: np.ndarray | None) -> None:
        """Restrict the launch to the tensors where `active` holds; None takes all."""
        chunks = self._all_chunks
        if active is not None:
            chunks = np.ascontiguousarray(chunks[active[chunks[:, 0]]])
        self._tables.replace(chunks)
        self._seen.forget()

    def _register_options(self, n_warps: int, may_skip: bool) -> dict[str, int]:
        """A plain update leaves them to the compiler. Many take those that decode and encode, round
        with care, or have numbers of two registers."""
        step_options = self.step_options
        many = n_codes(self.kinds) > 0 or step_options.rounding != 0 or self.kinds[0] == "fp64"
        # One that is watched and may be skipped has a loop for either (sgd in bf16 on sm_80).
        if (
            many
            or step_options.clipped
            or step_options.averaged
            or (step_options.watched and may_skip)
        ):
            return register_options(n_warps, many)
        return {}

    def keep_if_captured(self, tensors: Sequence[torch.Tensor]) -> None:
        """Of this launch, where it is being captured (`Tables`)."""
        self._tables.keep_if_captured(tensors)

    def prepare(self, n_threads: int) -> None:
        """Triton compiles at the first launch; a rule it cannot take is refused there."""

    @property
    def chunks(self) -> np.ndarray:
        """(chunks, 3) int64, of the selected tensors."""
        return self._tables.lasting

    def telemetry(self) -> np.ndarray:
        """(n, len(TELEMETRY)) float64: telemetry of each tensor in the last run, without the scale
        that only the device knew. Waits for the device."""
        return self._seen.merged(len(self.tensors))

    def run(
        self,
        n_threads: int,
        clip: ClipResult | None = None,
        grad_scale: torch.Tensor | None = None,
    ) -> None:
        """Update every selected tensor, with the scalars the host has filled in.

        grad_scale: what gradients are told of without; they are unscaled by the clip result
        """
        if len(self.chunks):
            with self._on_device():
                arrays = [self.tensors, self.index, self.scalars]
                if self.draws:
                    arrays.append(self.keys)
                if clip is not None:
                    arrays.append(self.owners)
                tables, chunks = self._tables.send(arrays)
                factors = clip and (clip.factors(self._wide), tables.pop())
                self._update(*tables[:3], chunks, *tables[3:], factors=factors, scale=grad_scale)

    def run_on_device(
        self,
        scalars: Callable[..., Any],
        numbers: np.ndarray,
        groups: np.ndarray,
        hypers: Sequence[Sequence[Any]],
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
        clip: ClipResult | None = None,
        bases: np.ndarray | None = None,
    ) -> None:
        """Count the steps and compute the scalars on the device, then update.

        numbers: (n, 1 + carried) int64 addresses of float32 step and carried numbers, 0 for none,
                 and with an average one more, of the steps in it
        groups:  (n,) int64 row of `hypers`
        hypers:  for each group the gradient's sign, the hyper-parameters and the options'
                 (a limit; a decay, and how long it is warmed up), tensors or floats
        clip: in place of found_inf and, but for telemetry, of grad_scale
        bases:   (n,) int64, what chance depends on beside the step and the element
        """
        known = np.asarray([[host_value(x) for x in row] for row in hypers], dtype=np.float64)
        arrays = [self.tensors, np.arange(len(self.index)), numbers, groups, known]
        places = [x for x in (clip and self.owners, bases) if x is not None]
        with self._on_device():
            sent, chunks = self._tables.send([*arrays, *places])
            tensors, index, number_table, group_table, hyper_table, *placed = sent
            copy_device_values(hypers, hyper_table)
            grad_scale, found_inf = (here(x, self.device) for x in (grad_scale, found_inf))
            if clip is not None and clip.skips:
                found_inf = clip.skip
            table = torch.empty_like(torch.from_numpy(self.scalars), device=self.device)
            keys = None if bases is None else torch.empty_like(placed[-1])
            launches.start(
                scalars_kernel,
                (triton.cdiv(len(groups), SCALARS_BLOCK),),
                number_table,
                group_table,
                hyper_table,
                grad_scale if clip is None else None,
                found_inf,
                clip and clip.factors(True),
                clip and placed[0],
                None if bases is None else placed[-1],
                table,
                keys,
                len(groups),
                SCALARS=engine.compiled_rule(scalars),
                N_CARRIED=numbers.shape[1] - 1 - int(self.step_options.averaged),
                N_HYPERS=known.shape[1] - 1 - self.step_options.n_hypers,
                N_SCALARS=self.n_scalars,
                HAS_SCALE=clip is None and grad_scale is not None,
                HAS_SKIP=found_inf is not None,
                HAS_FACTORS=clip is not None,
                HAS_KEYS=bases is not None,
                STEP_OPTIONS=tuple(map(int, self.step_options)),
                BLOCK=SCALARS_BLOCK,
                num_warps=engine.THREADS // warp_size(),
                enable_fp_fusion=True,
                name="scalars",
            )
            if len(self.chunks):
                self._update(tensors, index, table, chunks, keys, found_inf, scale=grad_scale)
            self._tables.keep_spare([*arrays, *places, self._all_chunks])

    def _update(
        self,
        tensors: torch.Tensor,
        index: torch.Tensor,
        scalars: torch.Tensor,
        chunks: torch.Tensor,
        keys: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
        factors: tuple[torch.Tensor, torch.Tensor] | None = None,
        scale: torch.Tensor | None = None,
    ) -> None:
        shape, watched = engine.shape_of(self.kinds), self.step_options.watched
        scale = here(scale, self.device) if watched else None
        n_warps = shape.threads // warp_size()
        launches.start(
            update_kernel,
            (len(chunks) * shape.parts,),
            tensors,
            chunks,
            index,
            scalars,
            keys,
            found_inf,
            *(factors or (None, None)),
            scale,
            self._seen.room(shape.parts) if watched else None,
            RULE=engine.compiled_rule(self.rule),
            DTYPES=tuple(memory.DTYPES[kind] for kind in self.kinds),
            SCALES=engine.scale_columns(self.kinds),
            COMPUTE=memory.compute_dtype(self.kinds[0]),
            N_SCALARS=self.n_scalars,
            HAS_SKIP=found_inf is not None,
            HAS_FACTORS=factors is not None,
            HAS_SCALE=scale is not None,
            BLOCK=shape.block,
            PARTS=shape.parts,
            SPAN=engine.CHUNK // shape.parts,
            LANES=shape.threads,
            WIDTH=shape.width,
            STEP_OPTIONS=tuple(map(int, self.step_options)),
            num_warps=n_warps,
            **self._register_options(n_warps, found_inf is not None),
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
