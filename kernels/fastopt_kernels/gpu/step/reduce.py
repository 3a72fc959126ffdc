"""Reduces all gradients before an update, in one pass over them: `cpu/step/reduce.py`.

    factor = min(1, limit / (norm + 1e-6)) / scale      for each parameter group
    norm = |1 / scale| sqrt(sum g^2), or |1 / scale| max |g|

Each program takes a span of chunks and leaves two numbers, sum g^2 (or max |g|) and how many
elements are not finite. The last one to end adds them, in an order that the shapes fix, and writes
the factors to where the update reads them: no launch in between, and the host waits for nothing.

Sums are in float64, the one exception among update kernels beside the scalars': no square of a
float32 overflows or vanishes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from fastopt_kernels import launches
from fastopt_kernels.gpu.base import memory
from fastopt_kernels.gpu.base import xp as gpu_xp
from fastopt_kernels.gpu.base.device import register_options, warp_size
from fastopt_kernels.gpu.step import engine
from fastopt_kernels.gpu.step.clip_result import HEAD, ClipResult
from fastopt_kernels.gpu.step.launch import Launch
from fastopt_kernels.gpu.step.tables import Tables, copy_device_values, here, host_value

# Elements a load of all threads: 16 bytes each; UNROLL of them are under way at once.
BLOCK = {"fp64": 256, "fp32": 512, "bf16": 1024, "fp16": 1024}
UNROLL = {"fp64": 8, "fp32": 4, "bf16": 4, "fp16": 4}
# Programs of a launch, about: what two rounds of a large device take, and few enough to add up.
PROGRAMS = 4096
# What the last program adds up at once (with 1024 it is the one that needs the registers, 117 for
# 48 on sm_90), and for how many parameter groups.
PARTS, GROUPS = 512, 128


@triton.jit
def _taken(total, n_bad, x, MAXIMUM: tl.constexpr):
    """The sums of a span with a block of gradients (float32, or float64) taken in."""
    if MAXIMUM:
        total = gpu_xp.maximum(tl.abs(x), total)
    else:
        wide = x.to(tl.float64)
        total += wide * wide
    return total, n_bad + (x - x != 0).to(tl.int32)


@triton.jit
def _merged(total, MAXIMUM: tl.constexpr):
    """One number out of a block: the sum, or the largest, which is NaN where one is."""
    if MAXIMUM:
        n_nan = tl.sum((total != total).to(tl.int32), 0)
        largest = tl.max(tl.where(total == total, total, 0.0), 0)
        one = tl.where(n_nan > 0, float("nan"), largest)
    else:
        one = tl.sum(total, 0)
    return one.to(tl.float64)


@triton.jit
def _of_norm_group(
    parts_ptr, firsts_ptr, others_ptr, f, n_norm_groups, n_others, MAXIMUM: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The reduction of the parameters under one norm, on this device and on others, and the
    number of their elements that are not finite."""
    first, last = tl.load(firsts_ptr + f), tl.load(firsts_ptr + f + 1)
    lanes = tl.arange(0, PARTS)
    total = tl.zeros((PARTS,), tl.float64)
    n_bad = tl.zeros((PARTS,), tl.float64)
    for start in range(first, last, PARTS):
        part_ptr = parts_ptr + 2 * (start + lanes)
        inside = start + lanes < last
        # Other programs wrote these: past the cache of this multiprocessor.
        part = tl.load(part_ptr, mask=inside, other=0.0, cache_modifier=".cg")
        total = gpu_xp.maximum(part, total) if MAXIMUM else total + part
        n_bad += tl.load(part_ptr + 1, mask=inside, other=0.0, cache_modifier=".cg")
    one, bad = _merged(total, MAXIMUM), tl.sum(n_bad, 0)
    for d in range(n_others):
        other_ptr = others_ptr + 2 * (d * n_norm_groups + f)
        part = tl.load(other_ptr)
        one = gpu_xp.maximum(part, one) if MAXIMUM else one + part
        bad += tl.load(other_ptr + 1)
    return one, bad


@triton.jit
def _finalize(
    parts_ptr, firsts_ptr, others_ptr, norm_groups_ptr, limits_ptr, scale_ptr, found_ptr, wide_ptr,
    narrow_ptr, n_norm_groups, n_groups, n_others, MAXIMUM: tl.constexpr, SKIPS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_FOUND: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Out of the parts, everything that `ClipResult` holds."""
    n_norm_groups, n_others = n_norm_groups.to(tl.int64), n_others.to(tl.int64)
    n_groups = n_groups.to(tl.int64)
    inverse = tl.full((), 1.0, tl.float64)
    if HAS_SCALE:
        inverse = inverse / tl.load(scale_ptr).to(tl.float64)
    # One more than there are groups: the last is all of them.
    for start in range(0, n_groups + 1, GROUPS):
        group = start + tl.arange(0, GROUPS)
        inside = group < n_groups
        norm_group = tl.load(norm_groups_ptr + group, mask=inside, other=-1)
        own = tl.zeros((GROUPS,), tl.float64)
        bad = tl.full((), 0.0, tl.float64)
        for f in range(n_norm_groups):
            part, n_bad = _of_norm_group(
                parts_ptr, firsts_ptr, others_ptr, f, n_norm_groups, n_others, MAXIMUM, PARTS
            )
            both = gpu_xp.maximum(part, own) if MAXIMUM else own + part
            own = tl.where((norm_group == f) | (group == n_groups), both, own)
            bad += n_bad
            sums_ptr = wide_ptr + HEAD + 2 * n_groups + 2 * f
            tl.store(sums_ptr, part)
            tl.store(sums_ptr + 1, n_bad)
        norm = tl.abs(inverse) * (own if MAXIMUM else gpu_xp.sqrt(own))
        limit = tl.load(limits_ptr + group, mask=inside, other=0.0)
        coefficient = limit / (norm + tl.full((), 1e-6, tl.float64))
        # NaN stays, as in torch; a limit of 0 is none.
        coefficient = tl.where((limit > 0.0) & ~(coefficient > 1.0), coefficient, 1.0)
        factor = inverse * coefficient
        tl.store(wide_ptr + HEAD + group, factor, mask=inside)
        tl.store(wide_ptr + HEAD + n_groups + group, coefficient, mask=inside)
        tl.store(narrow_ptr + HEAD + group, factor.to(tl.float32), mask=inside)
        tl.store(wide_ptr + group * 0, norm, mask=group == n_groups)
        tl.store(wide_ptr + 1, bad)
        skip = ((bad > 0.0) & SKIPS).to(tl.float32)
        if HAS_FOUND:
            skip = tl.where(tl.load(found_ptr) != 0, 1.0, skip)
        tl.store(narrow_ptr, skip)


# The tables of several launches lie behind one another, aligned or not as their lengths are.
@triton.jit(
    do_not_specialize=["n_programs", "n_norm_groups", "n_groups", "n_others"],
    do_not_specialize_on_alignment=["chunks_ptr", "spans_ptr"],
)
def measure_kernel(
    grads_ptr, chunks_ptr, spans_ptr, parts_ptr, counter_ptr, firsts_ptr, others_ptr,
    norm_groups_ptr, limits_ptr, scale_ptr, found_ptr, wide_ptr, narrow_ptr, n_programs,
    n_norm_groups, n_groups, n_others, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    MAXIMUM: tl.constexpr, SKIPS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
    PARTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Measure the chunks of this program's span; the last program of all launches judges.

    grads_ptr: (n,) int64 addresses; chunks_ptr: (chunks, 3) int64; spans_ptr: (programs, 3) int64
    first and last chunk, and the slot in parts_ptr: (slots, 2) float64; counter_ptr: int32, 0;
    firsts_ptr: (n_norm_groups + 1,) int64 slots; others_ptr: (n_others, n_norm_groups, 2) float64,
    what other devices have measured; norm_groups_ptr: (n_groups,) int64; limits_ptr: (n_groups,)
    float64
    """
    span_ptr = spans_ptr + tl.program_id(0).to(tl.int64) * 3
    lanes = tl.arange(0, BLOCK)
    if MAXIMUM:
        total = tl.zeros((BLOCK,), COMPUTE)
    else:
        total = tl.zeros((BLOCK,), tl.float64)
    n_bad = tl.zeros((BLOCK,), tl.int32)
    for chunk in range(tl.load(span_ptr), tl.load(span_ptr + 1)):
        chunk_ptr = chunks_ptr + chunk * 3
        first = tl.load(chunk_ptr + 1)
        n = tl.load(chunk_ptr + 2) - first
        address = tl.load(grads_ptr + tl.load(chunk_ptr))
        aligned_ptr = memory.pointer(address, first, DTYPE, 16)
        any_ptr = memory.pointer(address, first, DTYPE, 0)
        full = tl.where(address % 16 == 0, n // (UNROLL * BLOCK), 0)
        for block in range(full):
            blocks = ()
            for k in tl.static_range(UNROLL):
                offsets = (block * UNROLL + k) * BLOCK + lanes
                blocks += (tl.load(aligned_ptr + offsets).to(COMPUTE),)
            for k in tl.static_range(UNROLL):
                total, n_bad = _taken(total, n_bad, blocks[k], MAXIMUM)
        for start in range(full * UNROLL * BLOCK, n, BLOCK):
            offsets = start + lanes
            x = tl.load(any_ptr + offsets, mask=offsets < n, other=0.0).to(COMPUTE)
            total, n_bad = _taken(total, n_bad, x, MAXIMUM)
    part_ptr = parts_ptr + 2 * tl.load(span_ptr + 2)
    tl.store(part_ptr, _merged(total, MAXIMUM))
    tl.store(part_ptr + 1, tl.sum(n_bad, 0).to(tl.float64))
    # Every thread's stores come before the count, which one thread adds to.
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == n_programs - 1:
        _finalize(
            parts_ptr, firsts_ptr, others_ptr, norm_groups_ptr, limits_ptr, scale_ptr, found_ptr,
            wide_ptr, narrow_ptr, n_norm_groups, n_groups, n_others, MAXIMUM, SKIPS, HAS_SCALE,
            HAS_FOUND, HEAD, PARTS, GROUPS,
        )  # fmt: skip


class GradNorm:
    """All launches of one device, whose gradients are measured together."""

    def __init__(self, device: torch.device, launches: Sequence[Launch]) -> None:
        self.device, self.launches = device, launches
        self._tables = Tables(device, np.zeros(0, dtype=np.int64))
        # What the spans were made for: the chunks of each launch, and the norm_groups.
        self._made_for: tuple[list[np.ndarray], np.ndarray] | None = None

    def _plan(self, norm_groups: np.ndarray) -> None:
        """Cut the chunks into spans of one norm group, with slots in the order of the groups."""
        chunks = [launch.chunks for launch in self.launches]
        if self._made_for is not None:
            before, same = self._made_for
            if all(a is b for a, b in zip(chunks, before, strict=True)) and np.array_equal(
                norm_groups, same
            ):
                return
        length = max(1, -(-sum(map(len, chunks)) // PROGRAMS))
        spans, owners = [], []
        for table, launch in zip(chunks, self.launches, strict=True):
            owner = norm_groups[launch.owners[table[:, 0]]]
            change = np.flatnonzero(np.diff(owner, prepend=-1))
            run = np.cumsum(np.diff(owner, prepend=-1) != 0) - 1
            within = np.arange(len(owner)) - change[run]
            starts = np.flatnonzero(within % length == 0)
            ends = np.append(starts[1:], len(owner))[: len(starts)]
            spans.append(np.stack([starts, ends, starts], axis=1))
            owners.append(owner[starts])
        if not sum(map(len, spans)):
            # One program has to finalize.
            spans[0], owners[0] = np.zeros((1, 3), dtype=np.int64), np.zeros(1, dtype=np.int64)
        owner = np.concatenate(owners)
        order = np.argsort(owner, kind="stable")
        slots = np.empty_like(order)
        slots[order] = np.arange(len(order))
        last = np.cumsum([len(span) for span in spans])
        for span, end in zip(spans, last, strict=True):
            span[:, 2] = slots[end - len(span) : end]
        n_norm_groups = int(norm_groups.max()) + 1
        self._firsts = np.searchsorted(owner[order], np.arange(n_norm_groups + 1)).astype(np.int64)
        self._n_spans = [len(span) for span in spans]
        self._made_for = chunks, norm_groups
        self._tables.replace(np.concatenate([x.reshape(-1) for x in (*chunks, *spans)]))

    def run(
        self,
        norm_groups: np.ndarray,
        limits: Sequence[Any],
        maximum: bool,
        skips: bool,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        others: Sequence[torch.Tensor] = (),
    ) -> ClipResult:
        """Measure the gradients at the addresses the launches hold, and clip.

        norm_groups: (groups,) int64, equal where groups share a norm, from 0 on
        limits:   one a group, tensors or floats; 0 for none
        skips:    true where an element that is not finite skips the step
        others:   `measured` of other devices
        """
        self._plan(norm_groups)
        known = np.asarray([host_value(x) for x in limits], dtype=np.float64)
        grads = [np.ascontiguousarray(launch.tensors[:, 1]) for launch in self.launches]
        arrays = [
            np.zeros(1, dtype=np.int32), self._firsts, norm_groups, known, *grads
        ]  # fmt: skip
        n_groups, n_norm_groups = len(norm_groups), len(self._firsts) - 1
        real = self.device.type != "cpu"  # Triton's interpreter runs on the CPU
        with torch.cuda.device(self.device) if real else nullcontext():
            tables, lasting = self._tables.send(arrays)
            counter, firsts, norm_group_table, limit_table, *addresses = tables
            copy_device_values([limits], limit_table[None])
            wide = torch.empty(
                HEAD + 2 * n_groups + 2 * n_norm_groups, dtype=torch.float64, device=self.device
            )
            narrow = torch.empty(HEAD + n_groups, dtype=torch.float32, device=self.device)
            judged = (
                torch.empty(2 * sum(self._n_spans), dtype=torch.float64, device=self.device),
                counter,
                firsts,
                # Where there are no others it is not read.
                _joined(others, self.device) if others else wide,
                norm_group_table,
                limit_table,
                here(grad_scale, self.device),
                here(found_inf, self.device),
                wide,
                narrow,
                sum(self._n_spans),
                n_norm_groups,
                n_groups,
                len(others),
            )
            self._launch(lasting, addresses, judged, maximum, skips)
            self._tables.keep_spare([*arrays, self._tables.lasting])
        return ClipResult(wide, narrow, n_groups, skips or found_inf is not None)

    def _launch(
        self,
        lasting: torch.Tensor,
        addresses: Sequence[torch.Tensor],
        judged: tuple[Any, ...],
        maximum: bool,
        skips: bool,
    ) -> None:
        """One kernel for each launch that has something to measure."""
        sizes = [len(launch.chunks) for launch in self.launches] + self._n_spans
        tables = lasting.split([3 * size for size in sizes])
        chunks, spans = tables[: len(self.launches)], tables[len(self.launches) :]
        n_warps = engine.THREADS // warp_size()
        for k, launch in enumerate(self.launches):
            if not self._n_spans[k]:
                continue
            kind = launch.kinds[1]
            launches.start(
                measure_kernel,
                (self._n_spans[k],),
                addresses[k],
                chunks[k],
                spans[k],
                *judged,
                DTYPE=memory.DTYPES[kind],
                COMPUTE=memory.compute_dtype(kind),
                MAXIMUM=maximum,
                SKIPS=skips,
                HAS_SCALE=judged[6] is not None,
                HAS_FOUND=judged[7] is not None,
                HEAD=HEAD,
                BLOCK=BLOCK[kind],
                UNROLL=UNROLL[kind],
                PARTS=PARTS,
                GROUPS=GROUPS,
                num_warps=n_warps,
                **register_options(n_warps),
                enable_fp_fusion=True,
                name="measure",
            )


def _joined(others: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.cat([x.to(device, non_blocking=True) for x in others])
