"""Where a GPU report falls short: bandwidth beside a copy's, and time beside anybody else's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Record = dict[str, Any]

# Of a device copy, from so many bytes on; below them a launch is most of the time.
SHARE, FROM_BYTES = 0.92, 64 * 2**20
# Two that are as fast differ by so much from run to run.
NOISE = 0.02
# What a matrix product bounds, not memory.
BOUND_BY_PRODUCTS = ("linear_cross_entropy",)


def cells(rows: Sequence[Record]) -> Iterator[tuple[str, Record]]:
    """Every case that was timed, with its pass: the times of all who took turns."""
    for row in rows:
        data = row.get("data") or {}
        if "providers" in data:
            yield row["row"], data
        for which, found in data.get("passes", {}).items():
            yield f"{row['row']}, {which}", found


def shortfalls(rows: Sequence[Record]) -> list[str]:
    """One line for each case that misses an aim."""
    lines = []
    for name, data in cells(rows):
        why = []
        share = data["providers"]["fastopt"].get("share")
        bound = not name.startswith(BOUND_BY_PRODUCTS)
        if bound and data["bytes"] >= FROM_BYTES and share is not None and share < SHARE:
            why.append(f"{100 * share:.0f} % of a copy ({100 * SHARE:.0f} %)")
        for other, ratio in data["times_as_fast_as"].items():
            if ratio < 1.0 - NOISE:
                why.append(f"{ratio:.2f} times as fast as {other}")
        if why:
            lines.append(f"{name}: {', '.join(why)}")
    return lines
