"""What kernels are told of the device they are launched on."""

from __future__ import annotations

from functools import cache

import triton


@cache
def warp_size() -> int:
    """Threads a warp: 64 on AMD's CDNA. The interpreter has no device to ask."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)
