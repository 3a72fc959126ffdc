"""The update of one chunk: what every program of a launch does.

    p, *states = rule(p, g_scale * g, *states, *scalars)        for each element

A program reads the addresses of its tensor from a table, and walks its chunk in blocks. Full blocks
of a tensor on a 16-byte boundary take 128-bit accesses; the tail, and a tensor that is not (a view
into a DDP bucket), a masked loop, without holding back the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt_kernels.gpu.base import memory
from fastopt_kernels.gpu.base import xp as gpu_xp
from fastopt_kernels.gpu.step import eight_bit, rounding, telemetry
from fastopt_kernels.gpu.step.rounding import BY_CHANCE, WITH_LOW, WITH_REST


@triton.jit
def _whole(p, kept, ROUNDED: tl.constexpr):
    """A parameter with what its rounding keeps beside it."""
    if ROUNDED == WITH_REST:
        p += kept
    if ROUNDED == WITH_LOW:
        p = rounding.join(p, kept)
    return p


@triton.jit
def _apply_rule(
    values,
    offsets,
    scalars,
    place,
    RULE: tl.constexpr,
    DTYPE: tl.constexpr,
    STEP_OPTIONS: tl.constexpr,
):
    """The rule and the step's options (chunks.StepOptions) on a block of every stream: what is
    stored of the streams but g, and the parameter before the rule, as the rule has it, and as it is
    stored.

    place: where the chunk begins (its low 32 bits), and what chance depends on beside the element
    """
    clipped: tl.constexpr = STEP_OPTIONS[0]
    averaged: tl.constexpr = STEP_OPTIONS[1]
    rounded: tl.constexpr = STEP_OPTIONS[2]
    g = scalars[0] * values[1]
    # Those of the options are the last of the scalars, and of the streams.
    own: tl.constexpr = len(scalars) - clipped - averaged
    kept: tl.constexpr = len(values) - (rounded >= WITH_REST)
    states: tl.constexpr = kept - averaged
    before = _whole(values[0], values[len(values) - 1], rounded)
    if clipped:
        g = tl.where(g < -scalars[own], -scalars[own], g)
        g = tl.where(g > scalars[own], scalars[own], g)
    new = RULE(before, g, *values[2:states], *scalars[1:own])
    exact = new[0]
    new = new[1:]
    if averaged:
        new += (gpu_xp.lerp(values[states], exact, scalars[own + clipped]),)
    p = exact
    after = exact
    if rounded == BY_CHANCE:
        p = rounding.stochastic(exact, place[0] + offsets.to(tl.uint32), place[1])
        after = p
    elif rounded == WITH_REST:
        p = rounding.upper(exact)
        left = rounding.rest(exact, p)
        new += (left,)
        after = p + left.to(DTYPE).to(p.dtype)
    elif rounded == WITH_LOW:
        p = rounding.upper(exact)
        new += (rounding.lower(exact, p),)
    else:
        after = exact.to(DTYPE).to(exact.dtype)
    return (p,) + new, (before, exact, after)  # noqa: RUF005 (Triton)


@triton.jit
def _update_block(
    pointers,
    offsets,
    mask,
    scale_ptrs,
    scalars,
    place,
    sums,
    RULE: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALES: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP_OPTIONS: tl.constexpr,
):
    """Load, update, store: a block of every stream; scale_ptrs: of its scales, where there are."""
    values = ()
    for k in tl.static_range(len(pointers)):
        x = tl.load(pointers[k] + offsets, mask=mask)
        if SCALES[k]:
            values += (eight_bit.decode(x, tl.load(scale_ptrs[k])),)
        else:
            values += (x.to(COMPUTE),)
    dtype: tl.constexpr = pointers[0].dtype.element_ty
    new, seen = _apply_rule(values, offsets, scalars, place, RULE, dtype, STEP_OPTIONS)
    # All loads come before the first store: nothing may hang on the order of aliases.
    tl.store(pointers[0] + offsets, new[0].to(dtype), mask=mask)
    for k in tl.static_range(2, len(pointers)):
        if SCALES[k]:
            drawn = eight_bit.draw(place[0] + offsets.to(tl.uint32), place[1])
            x, scale = eight_bit.encode(new[k - 1], mask, drawn, pointers[k].dtype.element_ty)
            tl.store(scale_ptrs[k], scale)
        else:
            x = new[k - 1].to(pointers[k].dtype.element_ty)
        tl.store(pointers[k] + offsets, x, mask=mask)
    if STEP_OPTIONS[3]:
        # Or what is seen is computed between the stores, and spills (sm_100, codes by chance).
        tl.debug_barrier()
        sums = telemetry.see(sums, values[1], *seen, mask, WIDTH)
    return sums


@triton.jit
def _see_block(
    pointers, offsets, mask, sums, COMPUTE: tl.constexpr, WIDTH: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """The sums with a block of a step that is skipped: its parameter and its gradient."""
    p = tl.load(pointers[0] + offsets, mask=mask).to(COMPUTE)
    g = tl.load(pointers[1] + offsets, mask=mask).to(COMPUTE)
    if ROUNDED >= WITH_REST:
        kept = tl.load(pointers[len(pointers) - 1] + offsets, mask=mask).to(COMPUTE)
        p = _whole(p, kept, ROUNDED)
    return telemetry.see_skipped(sums, g, p, mask, WIDTH)


@triton.jit
def _of_block(scale_ptrs, block):
    """The addresses of the scales of a block, one a stream."""
    places = ()
    for k in tl.static_range(len(scale_ptrs)):
        places += (scale_ptrs[k] + block,)
    return places


@triton.jit
def _scalars_of(
    tensor, scalars_ptr, index_ptr, factors_ptr, owners_ptr, N_SCALARS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
):  # fmt: skip
    """The row of scalars of a tensor; the first of them scales its gradient."""
    scalar_ptr = scalars_ptr + tl.load(index_ptr + tensor) * N_SCALARS
    g_scale = tl.load(scalar_ptr)
    if HAS_FACTORS:
        g_scale *= tl.load(factors_ptr + tl.load(owners_ptr + tensor))
    scalars = (g_scale,)
    for k in tl.static_range(1, N_SCALARS):
        scalars += (tl.load(scalar_ptr + k),)
    return scalars


@triton.jit
def _streams_of(
    address_ptr, first, DTYPES: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Pointers to element `first` of every stream, on a promise of alignment and without, and to
    its scales; whether the promise holds."""
    aligned_ptrs = ()
    any_ptrs = ()
    scale_ptrs = ()
    bits = first * 0
    for k in tl.static_range(len(SCALES)):
        address = tl.load(address_ptr + k)
        bits = bits | address
        # Of codes no thread takes more than of the other streams: their layouts are one.
        aligned_ptrs += (memory.pointer(address, first, DTYPES[k], WIDTH if SCALES[k] else 16),)
        any_ptrs += (memory.pointer(address, first, DTYPES[k], 0),)
        scales = tl.load(address_ptr + SCALES[k])
        scale_ptrs += (memory.pointer(scales, first // BLOCK, tl.float32, 0),)
    return aligned_ptrs, any_ptrs, scale_ptrs, bits % 16 == 0


@triton.jit
def update_kernel(
    tensors_ptr, chunks_ptr, index_ptr, scalars_ptr, keys_ptr, skip_ptr, factors_ptr, owners_ptr,
    grad_scale_ptr, seen_ptr, RULE: tl.constexpr, DTYPES: tl.constexpr, SCALES: tl.constexpr,
    COMPUTE: tl.constexpr, N_SCALARS: tl.constexpr, HAS_SKIP: tl.constexpr,
    HAS_FACTORS: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    SPAN: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEP_OPTIONS: tl.constexpr,
):  # fmt: skip
    """Update what this program has of a chunk.

    tensors_ptr: (n, len(DTYPES)) int64 addresses; chunks_ptr: (programs / PARTS, 3) int64;
    index_ptr: (n,) int64 row of scalars_ptr; keys_ptr: (n,) int64, for chance; skip_ptr: (1,)
    float, nothing is written where not 0; factors_ptr: of g_scale, owners_ptr: (n,) int64, whose;
    where it is watched, seen_ptr: (programs, len(TELEMETRY)) float64, and grad_scale_ptr: what
    gradients are told of without. SCALES: column of each stream's scales, 0 for none; PARTS:
    programs of a chunk, of SPAN elements each; LANES: threads; WIDTH: elements of a thread that lie
    side by side
    """
    chunk_ptr = chunks_ptr + (tl.program_id(0) // PARTS).to(tl.int64) * 3
    tensor, first = tl.load(chunk_ptr), tl.load(chunk_ptr + 1)
    n = tl.load(chunk_ptr + 2) - first
    if PARTS > 1:
        begin = tl.program_id(0) % PARTS * SPAN
        first += begin
        n -= begin
    # A chunk has no more: so 32 bits hold it.
    n = tl.maximum(tl.minimum(n, SPAN), 0)
    if BLOCK >= 8 * LANES:
        # 125 registers became 86 on sm_90 (Adam, bfloat16); with 4 a thread, 40 would be 54.
        n = n.to(tl.int32)
    n_all = n
    if HAS_SKIP:
        n = tl.where(tl.load(skip_ptr) != 0, 0, n)

    scalars = _scalars_of(
        tensor, scalars_ptr, index_ptr, factors_ptr, owners_ptr, N_SCALARS, HAS_FACTORS
    )
    aligned_ptrs, any_ptrs, scale_ptrs, aligned = _streams_of(
        tensors_ptr + tensor * len(DTYPES), first, DTYPES, SCALES, BLOCK, WIDTH
    )
    key = tensor
    if STEP_OPTIONS[2] == BY_CHANCE or len(DTYPES) > len(SCALES):
        key = rounding.key_of_chunk(tl.load(keys_ptr + tensor), first)
    place = (first.to(tl.uint32), key)
    lanes = tl.arange(0, BLOCK)
    sums = telemetry.nothing(STEP_OPTIONS[3], LANES)
    full = tl.where(aligned, n // BLOCK, 0)
    for block in range(full):
        sums = _update_block(
            aligned_ptrs, block * BLOCK + lanes, None, _of_block(scale_ptrs, block), scalars, place,
            sums, RULE, COMPUTE, SCALES, WIDTH, STEP_OPTIONS,
        )  # fmt: skip
    # Once a chunk at most: what this alone needs is not kept in registers from before (sm_100).
    for block in tl.range(full, tl.cdiv(n, BLOCK), disable_licm=True):
        offsets = block * BLOCK + lanes
        sums = _update_block(
            any_ptrs, offsets, offsets < n, _of_block(scale_ptrs, block), scalars, place, sums,
            RULE, COMPUTE, SCALES, WIDTH, STEP_OPTIONS,
        )  # fmt: skip
    if STEP_OPTIONS[3]:
        if HAS_SKIP:
            # All of them where the step is skipped, else none.
            for block in tl.range(tl.cdiv(n, BLOCK), tl.cdiv(n_all, BLOCK), disable_licm=True):
                offsets = block * BLOCK + lanes
                sums = _see_block(
                    any_ptrs, offsets, offsets < n_all, sums, COMPUTE, WIDTH, STEP_OPTIONS[2]
                )
        telemetry.write(seen_ptr, sums, grad_scale_ptr, HAS_SCALE)
