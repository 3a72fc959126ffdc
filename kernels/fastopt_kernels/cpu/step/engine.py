"""One launch for every tensor of a model: p, g and the states of all of them, in place.

    for each chunk (tensor, first, last) of the table, in parallel:
        p, *states = rule(p, g_scale * g, *states, *scalars)        for each element

Where `step_options` say so, the gradient is clamped to a limit before the rule, and the parameter
goes into its running average after it.

The addresses of a chunk are read before its loop: a load from the table inside the loop may alias
the stores, and nothing would vectorize (35 against 13 ms at 33M elements).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.core.errors import NumbaError

from fastopt_kernels.chunks import (
    BLOCK_8BIT,
    CODES_8BIT,
    KAHAN,
    MASTER,
    STOCHASTIC,
    StepOptions,
    n_codes,
)
from fastopt_kernels.cpu.base import cache as disk
from fastopt_kernels.cpu.base import memory
from fastopt_kernels.cpu.base import xp as cpu_xp
from fastopt_kernels.cpu.step import eight_bit, rounding, telemetry
from fastopt_kernels.xp import rebind, uncompilable


def _make_apply_rule(rule, kinds, step_options, tag):
    """apply_rule(x, row, i, key): the rule and the step's options on element i of each stream;
    the options' streams and scalars are the last. Gives what is stored, and its telemetry."""
    update = njit(disk.named(rebind(rule, cpu_xp), tag), **cpu_xp.JIT)
    clipped, averaged, rounded, watched = step_options
    by_chance, kahan, master = (rounded == k for k in (STOCHASTIC, KAHAN, MASTER))
    rounded_param, rounded_kept = map(memory.make_rounded, (kinds[0], "bf16"))

    def apply_rule(x, row, i, key):
        p, g, states, scalars = x[0], row[0] * x[1], x[2:], row[1:]
        if kahan:
            p, states = p + states[-1], states[:-1]
        if master:
            p, states = rounding.join(p, states[-1]), states[:-1]
        before = p
        if averaged:
            average, states = states[-1], states[:-1]
            weight, scalars = scalars[-1], scalars[:-1]
        if clipped:
            limit, scalars = scalars[-1], scalars[:-1]
            g = -limit if g < -limit else g
            g = limit if g > limit else g
        new = update(p, g, *(states + scalars))
        p, new = new[0], new[1:]
        if averaged:
            new = new + (cpu_xp.lerp(average, p, weight),)  # noqa: RUF005 (Numba)
        exact = after = p
        if by_chance:
            p = after = rounding.stochastic(p, i, key)
        elif kahan:
            p = rounding.upper(after)
            left = rounding.rest(after, p)
            new, after = new + (left,), p + rounded_kept(left)  # noqa: RUF005
        elif master:
            p = rounding.upper(after)
            new = new + (rounding.lower(after, p),)  # noqa: RUF005
        elif watched:
            after = rounded_param(after)
        if watched:
            return ((p,) + new, telemetry.see(x[1], before, exact, after))  # noqa: RUF005
        return ((p,) + new, ())  # noqa: RUF005

    return njit(disk.named(apply_rule, tag), **cpu_xp.JIT)


def _make_chunk(rule, kinds, n_scalars, step_options, tag):
    """update_chunk(tensors, chunks, index, scalars, keys, c): the loop over one chunk."""
    compute = memory.compute_type(kinds[0])
    # A parameter that is rounded here need not be rounded again.
    stored = ("top16", *kinds[1:]) if step_options.rounding else kinds
    apply_rule = _make_apply_rule(rule, kinds, step_options, tag)
    coded = n_codes(kinds)
    update = (
        _make_blocks(apply_rule, kinds[:-coded], stored[:-coded], step_options, tag)
        if coded
        else _make_loop(apply_rule, kinds, stored, step_options, tag)
    )
    int64_triple = memory.make_row(types.int64, 3)
    int64_row = memory.make_row(types.int64, len(kinds))
    int64_single = memory.make_row(types.int64, 1)
    scalar_row = memory.make_row(compute, n_scalars)

    nothing, _, write = telemetry.make_sums(step_options.watched)

    def update_chunk(tensors, chunks, index, scalars, keys, seen, c):
        tensor, first, last = int64_triple(chunks, c)
        addresses = int64_row(tensors, tensor)
        row = scalar_row(scalars, int64_single(index, tensor)[0])
        key = rounding.key_of_chunk(int64_single(keys, tensor)[0], first)
        write(seen, c, update(addresses, row, key, first, last, nothing))

    return njit(disk.named(update_chunk, tag), **cpu_xp.JIT)


def _make_loop(apply_rule, kinds, stored, step_options, tag):
    """update(addresses, row, key, first, last, sums): element by element; sums of what is seen."""
    compute = memory.compute_type(kinds[0])
    load, store = memory.make_load(kinds, compute), memory.make_store(stored, compute)
    _, add_all, _ = telemetry.make_sums(step_options.watched)

    def loop(addresses, row, key, first, last, sums):
        for i in range(first, last):
            new, seen = apply_rule(load(addresses, i), row, i, key)
            store(addresses, i, new)
            sums = add_all(sums, seen)
        return sums

    return njit(disk.named(loop, tag), **cpu_xp.JIT)


def _make_blocks(apply_rule, kinds, stored, step_options, tag):
    """The same, block by block: 8-bit states go to scratch until the largest of a block is known.

    kinds, stored: without the scales, which are the last of the addresses
    """
    compute, where = types.float32, [k for k, kind in enumerate(kinds) if kind in CODES_8BIT]
    n, n_own = len(where), len(kinds)
    streams, in_scratch = list(range(n_own)), list(stored)
    for j, k in enumerate(where):
        streams[k], in_scratch[k] = eight_bit.SCRATCH + j, "fp32"
    load = memory.make_load(kinds, compute, apart=True)
    store = memory.make_store(tuple(in_scratch), compute, tuple(streams))
    decode, targets = eight_bit.make_decode(kinds), eight_bit.make_targets(kinds)
    pick, units, grow = (
        eight_bit.make_pick(kinds),
        eight_bit.make_units(n),
        eight_bit.make_grow((kinds[0], *kinds[2:])),
    )
    coded = tuple(kinds[k] for k in where)
    settle, encode = eight_bit.make_settle(coded), eight_bit.make_encode(coded, tuple(where))
    _, add_all, _ = telemetry.make_sums(step_options.watched)
    make_room, nothing = eight_bit.make_scratch(n), (np.int32(0),) * n

    def blocks(addresses, row, key, first, last, sums):
        own, scales = addresses[:n_own], addresses[n_own:]
        codes, scratch, seed = pick(own), make_room(), np.uint32(key)
        for start in range(first, last, BLOCK_8BIT):
            end = min(start + BLOCK_8BIT, last)
            block, spare = start // BLOCK_8BIT, scratch - 4 * start
            unit, to, largest = units(scales, block), targets(own, spare), nothing
            for i in range(start, end):
                new, seen = apply_rule(decode(load(own, i), unit), row, i, key)
                store(to, i, new)
                sums = add_all(sums, seen)
                largest = grow(largest, new)
            inverses = settle(scales, spare, largest, block, start, end)
            chance = eight_bit.chance_of(start, seed)
            for i in range(start, end):
                encode(codes, spare, inverses, i, eight_bit.draw(chance))
                chance = eight_bit.next_chance(chance)
        return sums

    return njit(disk.named(blocks, tag), **cpu_xp.JIT)


def _make_kernel(rule, kinds, n_scalars, step_options, parallel, tag):
    update_chunk = _make_chunk(rule, kinds, n_scalars, step_options, tag)
    chunk_range = prange if parallel else range

    def kernel(tensors, chunks, index, scalars, keys, seen, n_chunks):
        for c in chunk_range(n_chunks):
            update_chunk(tensors, chunks, index, scalars, keys, seen, c)

    signature = types.void(*[types.int64] * 7)
    jitted = njit(signature, parallel=parallel, **cpu_xp.JIT)(disk.named(kernel, tag))
    return next(iter(jitted.overloads.values()))


@cache
def compiled(
    rule: Callable[..., Any],
    kinds: tuple[str, ...],
    n_scalars: int,
    step_options: StepOptions,
    parallel: bool,
) -> Any:
    """The compile result for a rule and specialization, from disk where it has been made before."""

    def make(tag: str) -> Any:
        try:
            return _make_kernel(rule, kinds, n_scalars, step_options, parallel, tag)
        except NumbaError as error:
            raise uncompilable(rule, "Numba", error) from error

    return disk.obtain(key_of(rule, kinds, n_scalars, step_options, parallel), make)


@cache
def key_of(
    rule: Callable[..., Any],
    kinds: tuple[str, ...],
    n_scalars: int,
    step_options: StepOptions,
    parallel: bool,
) -> str:
    """The key that the kernel is kept under on disk."""
    # By a function of this module its sources, and all that it imports, are in the key.
    return disk.key(rule, _make_chunk, kinds, n_scalars, tuple(step_options), parallel)
