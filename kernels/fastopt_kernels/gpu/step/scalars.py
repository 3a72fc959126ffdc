"""The scalars of a step whose number only the device knows: counted and computed there, in float64.

GradScaler's found_inf, a look at the gradients that may say to skip, a captured graph: the host
does not see whether a step happens. One small launch before the update reads the step counts where
they lie.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt_kernels.gpu.step import rounding


@triton.jit
def _store_option_scalars(
    scalar_ptr, hyper_ptr, averaged, mask, CLIPPED: tl.constexpr, AVERAGED: tl.constexpr
):  # fmt: skip
    """The limit of a gradient's elements, and what the parameter weighs in its average.

    averaged: steps in the average, with this one; the first sets it to the parameter
    """
    compute = scalar_ptr.dtype.element_ty
    if CLIPPED:
        limit = tl.load(hyper_ptr, mask=mask, other=0)
        tl.store(scalar_ptr, limit.to(compute), mask=mask)
    if AVERAGED:
        decay = tl.load(hyper_ptr + CLIPPED, mask=mask, other=0)
        early = averaged <= tl.load(hyper_ptr + CLIPPED + 1, mask=mask, other=0)
        warming = (averaged + 1.0) / (averaged + 10.0)
        decay = tl.where(early & (warming < decay), warming, decay)
        decay = tl.where(averaged == 1.0, 0.0, decay)
        tl.store(scalar_ptr + CLIPPED, (1.0 - decay).to(compute), mask=mask)


@triton.jit(do_not_specialize=["n"])
def scalars_kernel(
    numbers_ptr, group_ptr, hypers_ptr, scale_ptr, skip_ptr, factors_ptr, owners_ptr, bases_ptr,
    scalars_ptr, keys_ptr, n, SCALARS: tl.constexpr, N_CARRIED: tl.constexpr,
    N_HYPERS: tl.constexpr, N_SCALARS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_FACTORS: tl.constexpr, HAS_KEYS: tl.constexpr,
    STEP_OPTIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count a step of every parameter and compute its row of scalars, in float64.

    numbers_ptr: (n, 1 + N_CARRIED) int64, addresses of float32 step and carried numbers, and with
    averages one more, of the steps in one; group_ptr: (n,) int64 row of hypers_ptr; hypers_ptr:
    (groups, 1 + N_HYPERS + those of STEP_OPTIONS) float64, first the gradient's sign; factors_ptr:
    float64, and owners_ptr: (n,) int64, which of them; bases_ptr: (n,) int64
    (`rounding.key_of_step`); scalars_ptr: (n, N_SCALARS), first the gradient's scale; keys_ptr:
    (n,) int64. With skip_ptr not 0 nothing is stored, nor for a parameter whose step has the
    address 0.
    """
    clipped: tl.constexpr = STEP_OPTIONS[0]
    averaged: tl.constexpr = STEP_OPTIONS[1]
    if HAS_SKIP:
        n = tl.where(tl.load(skip_ptr) != 0, 0, n)
    member = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number_ptr = numbers_ptr + member * (1 + N_CARRIED + averaged)
    mask = member < n
    mask = mask & (tl.load(number_ptr, mask=mask, other=0) != 0)
    number_ptrs = ()
    numbers = ()
    for k in tl.static_range(1 + N_CARRIED + averaged):
        address = tl.load(number_ptr + k, mask=mask, other=0)
        number_ptrs += (address.to(tl.pointer_type(tl.float32)),)
        numbers += (tl.load(number_ptrs[k], mask=mask, other=0).to(tl.float64),)
    columns: tl.constexpr = 1 + N_HYPERS + clipped + 2 * averaged
    hyper_ptr = hypers_ptr + tl.load(group_ptr + member, mask=mask, other=0) * columns
    g_scale = tl.load(hyper_ptr, mask=mask, other=0)
    if HAS_SCALE:
        g_scale = g_scale / tl.load(scale_ptr).to(tl.float64)
    if HAS_FACTORS:
        owner = tl.load(owners_ptr + member, mask=mask, other=0)
        g_scale = g_scale * tl.load(factors_ptr + owner, mask=mask, other=0)

    row_ptr = scalars_ptr + member * N_SCALARS
    compute = scalars_ptr.dtype.element_ty
    tl.store(row_ptr, g_scale.to(compute), mask=mask)

    hypers = ()
    for k in tl.static_range(N_HYPERS):
        hypers += (tl.load(hyper_ptr + 1 + k, mask=mask, other=0),)

    step = numbers[0] + 1.0
    values = SCALARS(step, *numbers[1 : 1 + N_CARRIED], *hypers)
    n_own: tl.constexpr = N_SCALARS - 1 - clipped - averaged
    for k in tl.static_range(n_own):
        tl.store(row_ptr + 1 + k, values[k].to(compute), mask=mask)
    count = numbers[N_CARRIED + averaged] + 1.0
    _store_option_scalars(
        row_ptr + 1 + n_own, hyper_ptr + 1 + N_HYPERS, count, mask, clipped, averaged
    )
    if HAS_KEYS:
        base = tl.load(bases_ptr + member, mask=mask, other=0)
        tl.store(keys_ptr + member, rounding.key_of_step(base, step), mask=mask)
    tl.store(number_ptrs[0], step.to(tl.float32), mask=mask)
    if averaged:
        tl.store(number_ptrs[1 + N_CARRIED], count.to(tl.float32), mask=mask)
    for k in tl.static_range(N_CARRIED):
        carried = values[n_own + k]
        tl.store(number_ptrs[1 + k], carried.to(tl.float32), mask=mask)
