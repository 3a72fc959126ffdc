"""The properties of the device that kernels are launched on."""

from __future__ import annotations

from functools import cache

import triton
from triton.backends.compiler import GPUTarget

# Compute capabilities for which ptxas would rather spill a register than lose a warp.
CROWDED = (8, 12)
# Registers of a multiprocessor, and the most of a thread (CUDA).
REGISTERS, OF_A_THREAD = 65536, 255


@cache
def target() -> GPUTarget | None:
    """The target kernels are compiled for; None in the interpreter, which has no device."""
    if triton.knobs.runtime.interpret:
        return None
    return triton.runtime.driver.active.get_current_target()


def warp_size() -> int:
    """Threads a warp: 64 on AMD's CDNA."""
    here = target()
    return 32 if here is None else int(here.warp_size)


def register_options(n_warps: int, many: bool = False) -> dict[str, int]:
    """The options that let a kernel have as many registers as there are, where that must be said.

    many: it needs so many that no target has room for many warps
    """
    here = target()
    if here is None or here.backend != "cuda":
        return {}
    if not many and here.arch // 10 not in CROWDED:
        return {}
    return {"maxnreg": min(OF_A_THREAD, REGISTERS // (n_warps * warp_size()))}
