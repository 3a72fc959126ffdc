"""The measured limit of this machine: how fast the bytes of a step can move at all.

A step reads g, p and the states and writes p and the states. The limit is the fastest of several
kernels that do just that with trivial arithmetic, in the chunk order of the engine, timed in the
same process and the same rounds as the optimizers. AdamW in float32: 28 bytes an element.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from numba import literal_unroll, njit, prange

from bench.providers import STATES

# As the engine has it: 16 Ki elements, 64 KiB of each float32 stream.
CHUNK = 16384
Array = np.ndarray
Kernel = Callable[..., None]

JIT = {"nogil": True, "error_model": "numpy"}


@njit(**JIT)
def _add(x, g):
    return x + g


@njit(**JIT)
def _subtract(x, g):
    return g - x


def _walk_1(op):
    """p <- op(p, g). Slices, so that indices start at 0 and the loop vectorizes."""

    @njit(parallel=True, **JIT)
    def kernel(g, p):
        for c in prange((len(g) + CHUNK - 1) // CHUNK):
            first, last = c * CHUNK, min((c + 1) * CHUNK, len(g))
            g_c, p_c = g[first:last], p[first:last]
            for i in range(last - first):
                p_c[i] = op(p_c[i], g_c[i])

    return kernel


def _walk_2(op):
    """p, s <- op(p, g), op(s, g)."""

    @njit(parallel=True, **JIT)
    def kernel(g, p, s):
        for c in prange((len(g) + CHUNK - 1) // CHUNK):
            first, last = c * CHUNK, min((c + 1) * CHUNK, len(g))
            g_c, p_c, s_c = g[first:last], p[first:last], s[first:last]
            for i in range(last - first):
                p_c[i], s_c[i] = op(p_c[i], g_c[i]), op(s_c[i], g_c[i])

    return kernel


def _walk_3(op):
    """p, s, t <- op(p, g), op(s, g), op(t, g)."""

    @njit(parallel=True, **JIT)
    def kernel(g, p, s, t):
        for c in prange((len(g) + CHUNK - 1) // CHUNK):
            first, last = c * CHUNK, min((c + 1) * CHUNK, len(g))
            g_c, p_c, s_c, t_c = g[first:last], p[first:last], s[first:last], t[first:last]
            for i in range(last - first):
                g_i = g_c[i]
                p_c[i], s_c[i], t_c[i] = op(p_c[i], g_i), op(s_c[i], g_i), op(t_c[i], g_i)

    return kernel


@njit(parallel=True, **JIT)
def _rotate_2(g, p, s):
    """p, s <- s, p + g: every store takes another stream than its own load."""
    for c in prange((len(g) + CHUNK - 1) // CHUNK):
        first, last = c * CHUNK, min((c + 1) * CHUNK, len(g))
        g_c, p_c, s_c = g[first:last], p[first:last], s[first:last]
        for i in range(last - first):
            p_c[i], s_c[i] = s_c[i], p_c[i] + g_c[i]


@njit(parallel=True, **JIT)
def _rotate_3(g, p, s, t):
    """p, s, t <- s, t, p + g."""
    for c in prange((len(g) + CHUNK - 1) // CHUNK):
        first, last = c * CHUNK, min((c + 1) * CHUNK, len(g))
        g_c, p_c, s_c, t_c = g[first:last], p[first:last], s[first:last], t[first:last]
        for i in range(last - first):
            p_c[i], s_c[i], t_c[i] = s_c[i], t_c[i], p_c[i] + g_c[i]


@njit(parallel=True, **JIT)
def _flip_each(g, p, states):
    """p <- p + g, then the states one after the other: s <- s ^ 1. Integers throughout."""
    for c in prange((len(g) + CHUNK - 1) // CHUNK):
        first, last = c * CHUNK, min((c + 1) * CHUNK, len(g))
        g_c, p_c = g[first:last], p[first:last]
        for i in range(last - first):
            p_c[i] = p_c[i] + g_c[i]
        for s in literal_unroll(states):
            s_c = s[first:last]
            for i in range(last - first):
                s_c[i] = s_c[i] ^ 1


@njit(parallel=True, **JIT)
def _flip_together(g, p, states):
    """The same, a piece of 256 elements of each stream at a time."""
    for c in prange((len(g) + CHUNK - 1) // CHUNK):
        for start in range(c * CHUNK, min((c + 1) * CHUNK, len(g)), 256):
            g_c, p_c = g[start : start + 256], p[start : start + 256]
            for i in range(len(g_c)):
                p_c[i] = p_c[i] + g_c[i]
            for s in literal_unroll(states):
                s_c = s[start : start + 256]
                for i in range(len(s_c)):
                    s_c[i] = s_c[i] ^ 1


@njit(parallel=True, **JIT)
def _copy(x, y):
    """y <- x: 8 bytes an element in float32."""
    for c in prange((len(x) + CHUNK - 1) // CHUNK):
        first, last = c * CHUNK, min((c + 1) * CHUNK, len(x))
        x_c, y_c = x[first:last], y[first:last]
        for i in range(last - first):
            y_c[i] = x_c[i]


# By the number of streams written (the parameter and its states): the candidates for the limit.
KERNELS: dict[int, dict[str, Kernel]] = {
    1: {"add": _walk_1(_add), "subtract": _walk_1(_subtract)},
    2: {"add": _walk_2(_add), "subtract": _walk_2(_subtract), "rotate": _rotate_2},
    3: {"add": _walk_3(_add), "subtract": _walk_3(_subtract), "rotate": _rotate_3},
}


def make_stream(n_elements: int, dtype: torch.dtype) -> Array:
    """One stream, written once so that its pages exist, aligned as torch's own tensors are.

    16-bit formats go as integers: NumPy and Numba have no bfloat16, and the bytes are the same.
    """
    dtype = torch.int16 if dtype.itemsize == 2 else dtype
    array: Array = torch.ones(n_elements, dtype=dtype).numpy()
    return array


def candidates(
    optimizer: str, n_elements: int, dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    """A step of each kernel that moves what this optimizer moves, over streams of their own."""
    written = 1 + STATES[optimizer]
    streams = [make_stream(n_elements, dtype) for _ in range(1 + written)]
    _take_torchs_threads()
    return {
        f"{name} kernel": lambda kernel=kernel: kernel(*streams)
        for name, kernel in KERNELS[written].items()
    }


def mixed(n_elements: int, dtypes: tuple[torch.dtype, ...]) -> dict[str, Callable[[], None]]:
    """A step of each kernel that moves streams of these dtypes: g, p and states."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    g, p, *states = (make_stream(n_elements, integers[d.itemsize]) for d in dtypes)
    _take_torchs_threads()
    kernels = {"flip each": _flip_each, "flip together": _flip_together}
    return {
        name: lambda kernel=kernel: kernel(g, p, tuple(states)) for name, kernel in kernels.items()
    }


def copies(n_elements: int) -> dict[str, Callable[[], None]]:
    """A plain float32 copy, by our kernel and by torch's: 8 bytes an element."""
    _take_torchs_threads()
    x, y = (make_stream(n_elements, torch.float32) for _ in range(2))
    source, target = torch.from_numpy(x), torch.from_numpy(y)
    return {"copy kernel": lambda: _copy(x, y), "torch copy_": lambda: target.copy_(source)}


def _take_torchs_threads() -> None:
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
