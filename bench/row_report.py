"""Time every row function beside torch's, and print and write the table of results.

    python -m bench.row_report --out bench/results      everything, about six minutes on two cores
    python -m bench.row_report --quick                  the same in a minute or two, rough figures
    python -m bench.row_report --only 256x1024 tiny

Each section, the cases of one shape, runs in a process of its own with a warm allocator. With --out
it writes cpu_rows.json and cpu_rows.md, each whole or not at all. The exit status is 1 if a case
could not be measured or gave a wrong result; a goal that is missed is marked in the tables.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench import machine, row_cases, row_render, sections
from bench.allocator import WARM
from bench.providers import FASTOPT
from bench.row_cases import BEHIND, FLOOR, GEOMETRIC_MEAN, PASSES, RATIO, Case
from bench.row_providers import ATEN

MEASURE = "bench.row_measure"

Record = dict[str, Any]


def judged(record: Record, case: Case) -> Record:
    """The record with what it had to reach and whether it did."""
    if "error" in record:
        return record
    values = {RATIO: record["ratios"][ATEN]["median"], BEHIND: record["us_behind"]}
    if "times_the_floor" in record:
        values[FLOOR] = record["times_the_floor"][FASTOPT]["median"]
    goals = [
        {**asdict(goal), "value": values[goal.what], "met": goal.met(values[goal.what])}
        for goal in case.goals
    ]
    return {**record, "goals": goals}


def geometric_mean(records: list[Record]) -> Record | None:
    """How many times as fast as ATen over every case but the tiny ones, and for each pass."""
    measured = [record for record in records if "ratios" in record and not record["tiny"]]
    if not measured:
        return None
    everything = [case for here in row_cases.SECTIONS.values() for case in here if not case.is_tiny]
    value = _mean(measured)
    by_pass = {which: _mean([r for r in measured if r["pass"] == which]) for which in PASSES}
    return {
        "value": value,
        **by_pass,
        "cases": len(measured),
        "of": len(everything),
        "at_least": GEOMETRIC_MEAN,
        "met": value >= GEOMETRIC_MEAN,
    }


def _mean(records: list[Record]) -> float:
    return statistics.geometric_mean(record["ratios"][ATEN]["median"] for record in records)


def run(chosen: list[str], quick: bool, peers: bool, console: Console) -> Record:
    """Measure the sections and return the report."""
    # First: a long run should not take a commit made meanwhile for what it measured.
    described = machine.describe()
    flags = ["--quick"] * quick + ["--peers"] * peers
    records, copies = [], []
    # No refreshing thread: it would take time from what is measured.
    with Progress(console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=sum(len(row_cases.SECTIONS[name]) for name in chosen))
        for section in chosen:
            here = row_cases.SECTIONS[section]
            for record in sections.run(MEASURE, section, WARM, here, flags, judged):
                if "copy_gb_per_s" in record:
                    copies.append(record["copy_gb_per_s"])
                    continue
                records.append(record)
                progress.update(task, advance=1, description=record["case"], refresh=True)
    return {
        "machine": described,
        "quick": quick,
        "sections": chosen,
        "copy_gb_per_s": statistics.median(copies) if copies else None,
        "geometric_mean": geometric_mean(records),
        "cases": records,
    }


def _arguments() -> argparse.Namespace:
    summary, _, description = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.row_report",
        description=f"{summary}\n{description}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = tuple(row_cases.SECTIONS)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION",
                        help=f"of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, rough figures")
    parser.add_argument(
        "--peers", action="store_true", help="torch.compile in every shape; compiles for minutes"
    )
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    if options.out:
        # Before the work: a folder that cannot be made is known at once.
        options.out.mkdir(parents=True, exist_ok=True)
    console = sections.make_console()
    try:
        report = run(list(options.only), options.quick, options.peers, console)
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was written.")
        return 130
    row_render.print_report(console, report)
    if options.out:
        sections.write(options.out, "cpu_rows", report, row_render.markdown(report), console)
    return int(any("error" in record for record in report["cases"]))


if __name__ == "__main__":
    sys.exit(main())
