"""Time every optimizer step beside torch's, and print and write the table of results.

    python -m bench.report --out bench/results          everything, under eight minutes on two cores
    python -m bench.report --quick                      the same in a minute or two, rough figures
    python -m bench.report --only small-model first-step

Each section runs in a process of its own, one for each state of the allocator. With --out it
writes cpu_optim.json and cpu_optim.md, each whole or not at all. The exit status is 1 if a case
could not be measured; a goal that is missed is marked in the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench import cases, first_step, machine, render
from bench.allocator import DEFAULT
from bench.sections import make_console, write
from bench.sections import run as measured

MEASURE = "bench.measure"
FIRST_STEP = "first-step"
SECTIONS = (*cases.SECTIONS, FIRST_STEP)

Record = dict[str, Any]


def _processes(sections: list[str]) -> list[tuple[str, str, list[cases.Case]]]:
    """(section, allocator, its cases): what runs in one process."""
    found = []
    for section in sections:
        here = cases.SECTIONS.get(section, [])
        for allocator in dict.fromkeys(case.allocator for case in here):
            found.append((section, allocator, [c for c in here if c.allocator == allocator]))
    return found


def judged(record: Record, case: cases.Case) -> Record:
    """The record with what it had to reach and whether it did."""
    if "error" in record:
        return record
    goals = []
    for goal in case.goals:
        ratio = record["ratios"][goal.against]["median"]
        goals.append({**asdict(goal), "met": ratio >= goal.at_least})
    return {**record, "goals": goals}


def _first_step(quick: bool) -> Iterator[Record]:
    try:
        for record in first_step.measure(quick):
            yield {**record, "met": record["beyond_s"] <= record["at_most_s"]}
    except RuntimeError as error:
        yield {"case": FIRST_STEP, "allocator": DEFAULT, "error": str(error)}


def run(sections: list[str], quick: bool, peers: bool, console: Console) -> Record:
    """Measure the sections and return the report."""
    # First: a long run should not take a commit made meanwhile for what it measured.
    described = machine.describe()
    flags = ["--quick"] * quick + ["--peers"] * peers
    processes = _processes(sections)
    total = sum(len(here) for _, _, here in processes)
    total += len(first_step.GOALS) if FIRST_STEP in sections else 0
    records, copies = [], []
    # No refreshing thread: it would take time from what is measured.
    with Progress(console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=total)

        def note(record: Record) -> None:
            records.append(record)
            progress.update(task, advance=1, description=record["case"], refresh=True)

        for section, allocator, here in processes:
            for record in measured(MEASURE, section, allocator, here, flags, judged):
                if "copy_gb_per_s" in record:
                    copies.append(record["copy_gb_per_s"])
                else:
                    note(record)
        if FIRST_STEP in sections:
            for record in _first_step(quick):
                note(record)
    return {
        "machine": described,
        "quick": quick,
        "sections": sections,
        "copy_gb_per_s": statistics.median(copies) if copies else None,
        "cases": records,
    }


def _arguments() -> argparse.Namespace:
    summary, _, description = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=f"{summary}\n{description}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION",
                        help=f"of {', '.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, rough figures")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also torch.compile and the peers that are installed; some compile for minutes",
    )
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    if options.out:
        # Before the work: a folder that cannot be made is known at once.
        options.out.mkdir(parents=True, exist_ok=True)
    console = make_console()
    try:
        report = run(list(options.only), options.quick, options.peers, console)
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was written.")
        return 130
    render.print_report(console, report)
    if options.out:
        write(options.out, "cpu_optim", report, render.markdown(report), console)
    return int(any("error" in record for record in report["cases"]))


if __name__ == "__main__":
    sys.exit(main())
