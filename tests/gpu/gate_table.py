"""The table of everything the gate compiles: text that shows in review what a change has done.

A line is one kernel of one case, a column a target. In a cell stand

    registers / spilled / instructions an element / 128-bit loads / 128-bit stores / shared bytes

Registers are those of a thread; spilled, all of stack, local memory and instructions that reach it;
instructions, the length of the code by the elements that a thread has of its tile: as they are
written, a loop's once, so that the number compares a kernel with itself.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import triton

from fastopt_kernels.gpu import machine_code
from fastopt_kernels.gpu.machine_code import TARGETS
from tests.gpu.checked import Case, Checked

PATH = Path(__file__).parents[2] / "bench" / "results" / "gate.tsv"
CELL = "registers/spilled/instructions an element/128-bit loads/128-bit stores/shared bytes"
COLUMNS = ("subject", "dtypes", "what", "kernel", *TARGETS)

# (subject, dtypes, what, kernel) -> target -> cell
Key = tuple[str, str, str, str]
Table = dict[Key, dict[str, str]]


def compilers() -> str:
    """What the numbers depend on beside the kernels."""
    names = ("ptxas", "ptxas-blackwell")
    found = [f"triton {triton.__version__}"]
    for name in names:
        said = subprocess.run(
            [machine_code.nvidia_tool(name), "--version"], capture_output=True, text=True
        )
        found.append(f"{name} {said.stdout.split()[-1]}")
    return ", ".join(found)


def cell(checked: Checked) -> str:
    read = checked.read
    each = f"{read.instructions / checked.elements:.4g}"
    return "/".join(
        map(str, (read.registers, read.spilled, each, read.loads, read.stores, read.shared))
    )


def rows_of(case: Case, found: Sequence[Checked]) -> list[tuple[Key, str]]:
    """The lines of one case; kernels of one name that differ are told apart by a number."""
    rows: dict[Key, str] = {}
    for checked in found:
        name, text, n = checked.kernel.removesuffix("_kernel"), cell(checked), 1
        key = (*case[1:], name)
        while rows.get(key, text) != text:
            n += 1
            key = (*case[1:], f"{name} {n}")
        rows[key] = text
    return list(rows.items())


def text_of(table: Table) -> str:
    lines = [
        f"# Written by `make gate`, with {compilers()}.",
        f"# {CELL}",
        "\t".join(COLUMNS),
        *(
            "\t".join((*key, *(row.get(t, "") for t in TARGETS)))
            for key, row in sorted(table.items())
        ),
    ]
    return "\n".join(lines) + "\n"


def made_with(text: str) -> str:
    """The compilers that a table was written with."""
    return text.partition("\n")[0].partition(", with ")[2].rstrip(".")


def table_of(text: str) -> Table:
    table: Table = {}
    for line in text.splitlines()[3:]:
        (*key,) = line.split("\t")
        table[key[0], key[1], key[2], key[3]] = {
            target: cell for target, cell in zip(TARGETS, key[4:], strict=True) if cell
        }
    return table


def changes(table: Table, target: str, rows: Iterable[tuple[Key, str]]) -> list[str]:
    """Where kernels are not what the table has of them."""
    return [
        f"{' '.join(filter(None, key))} on {target}: {before or 'nothing'} has become {now}"
        for key, now in rows
        if (before := table.get(key, {}).get(target)) != now
    ]
