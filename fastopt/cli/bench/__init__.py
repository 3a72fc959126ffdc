"""Compare two saved benchmark runs, by how many times as fast as torch fastopt was in each.

A run is a file that pytest-benchmark saved (pytest bench --benchmark-save NAME), or its name
under .benchmarks: 0001_base, 0001 or base. Ratios are taken within a run, so two machines, or a
machine that was busier the second time, can be compared.

The exit status is 1 where a case became slower by more than the spread of its times, 0 where none
did, and 2 where the runs cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastopt.cli.bench.comparison import (
    BUSY,
    FASTER,
    SLOWER,
    Change,
    NotARunError,
    Run,
    compare,
    find,
    load,
    mean_factor,
    saved_runs,
)
from fastopt.cli.shared import plain
from fastopt.cli.shared.names import did_you_mean

SAVED = Path(".benchmarks")
HEADER = ("case", "against", "A", "B", "change", "spread", "")
NUMBERS = (2, 3, 4, 5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compare",
        nargs=2,
        required=True,
        metavar=("A", "B"),
        help="the run before and the run after: files, or names of runs under .benchmarks",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the table; the status is 1 where fastopt became slower, 2 where nothing compares."""
    try:
        paths = [_path(name) for name in options.compare]
        before, after = map(load, paths)
        changes = compare(before, after)
        if not changes:
            raise NotARunError(
                "the two runs have no case in common in which fastopt and the same torch were "
                "timed: run both with the same -k"
            )
    except NotARunError as error:
        print(f"fastopt bench: {error}", file=sys.stderr)
        return 2
    _print(changes)
    for letter, path, one in zip("AB", paths, (before, after), strict=True):
        print(f"{letter}: {path} ({one.about})")
        if one.busy > BUSY:
            print(
                f"   {one.busy:.1f} processes wanted each core meanwhile: its ratios may mean "
                "little, run it again when the machine is quiet"
            )
    print(_left_out(before, after, len(changes)))
    slower = [change for change in changes if change.verdict == SLOWER]
    print(
        f"{len(slower)} of {len(changes)} cases slower beyond the spread; geometric mean of the "
        f"changes {mean_factor(changes):.3f}"
    )
    return 1 if slower else 0


def _path(name: str) -> Path:
    path = find(name, SAVED)
    if path is None:
        names = list(saved_runs(SAVED))
        have = f" (saved here: {', '.join(names)})" if names else f" (nothing is saved in {SAVED})"
        raise NotARunError(f"no run {name!r}{did_you_mean(name, names)}{have}")
    return path


def _left_out(before: Run, after: Run, n_compared: int) -> str:
    only = (before.cases.keys() - after.cases.keys(), after.cases.keys() - before.cases.keys())
    return (
        f"A and B are times as fast as torch. Left out: {len(only[0])} cases only in A, "
        f"{len(only[1])} only in B, "
        f"{len(before.cases.keys() & after.cases.keys()) - n_compared} without fastopt or torch."
    )


def _cells(change: Change) -> tuple[str, ...]:
    return (
        change.case,
        change.reference,
        f"{change.before:.2f}",
        f"{change.after:.2f}",
        f"{change.factor:.3f}",
        f"{change.spread:.3f}",
        change.verdict,
    )


def _print(changes: Sequence[Change]) -> None:
    rows = [_cells(change) for change in changes]
    if not plain.is_terminal():
        print("\n".join(plain.columns([HEADER, *rows], right=NUMBERS)) + "\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for i, title in enumerate(HEADER):
        table.add_column(title, justify="right" if i in NUMBERS else "left")
    styles = {SLOWER: "bold red", FASTER: "green"}
    for change, cells in zip(changes, rows, strict=True):
        table.add_row(*cells, style=styles.get(change.verdict))
    Console().print(table)
