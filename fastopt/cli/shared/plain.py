"""Text for a terminal and for everything else: colors in the one, aligned columns in the other."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

Row = Sequence[str]


def is_terminal() -> bool:
    """True where output is printed with rich: it is an extra, and a pipe wants plain text."""
    return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


def columns(rows: Sequence[Row], right: Sequence[int] = ()) -> list[str]:
    """One line a row, cells padded to the widest of their column; `right`: columns set flush."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
