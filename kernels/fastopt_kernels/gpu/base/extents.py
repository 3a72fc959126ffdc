"""The extents that kernels count in 32 bits, and their limits: lines, channels, parts of a sum.

Offsets are of 64 bits, but an index within a line is of 32, which saves a register an element. A
block that begins before the end of a line must not wrap around, so extents end a block before
2^31. What the launches check here, the gate takes for given (`limits`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The widest block has 2^16 elements; another for the sum of two.
LONGEST = 2**31 - 2**17
# Arguments that come in units of VECTOR: always but for the constant that is named.
_IN_VECTORS = {"n_cols": "COLUMNS", "length": "PIXELS", "piece_size": "PIXELS"}
_AS_ELEMENTS = ("n_parts", "n_shares")


def counted(n: int, what: str) -> int:
    """n; refused where 32 bits do not count so many."""
    if n > LONGEST:
        raise ValueError(
            f"{what} has {n} elements, and the kernels for GPUs count up to {LONGEST} of them: "
            "split it, or take torch's own function"
        )
    return n


def limits(constants: Mapping[str, Any]) -> dict[str, int]:
    """The most that a kernel's arguments may be, by their names, where it has these constants."""
    vector = int(constants.get("VECTOR", 1))
    found = dict.fromkeys(_AS_ELEMENTS, LONGEST)
    for name, unless in _IN_VECTORS.items():
        found[name] = LONGEST if constants.get(unless) else LONGEST // vector
    found["n_channels"] = LONGEST // vector if constants.get("PIXELS") else LONGEST
    return found
