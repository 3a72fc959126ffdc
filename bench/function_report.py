"""Functions beside torch's own, forward and forward + backward: every case that a module has.

    python -m bench.function_report --out bench/results

Cases come from `CASES` of the modules bench/*_cases.py. Providers take turns, all memory they need
is kept by the allocator, and a ratio is the median over rounds. The peak memory of
linear_cross_entropy is that of resident pages, in processes of their own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bench
from bench import machine, timing
from bench.allocator import WARM, environment, is_warm
from bench.function_cases import FunctionCase
from bench.linear_cases import peak_bytes
from bench.measure import copy_gb_per_s
from bench.render import conditions, markdown_table, ms, spread, yes
from bench.sections import make_console, write
from bench.timing import Ratio, Subject

PASSES = ("forward", "forward + backward")
# linear_cross_entropy: at most this share of the unfused peak.
MEMORY = 0.1
Record = dict[str, Any]


def cases() -> list[FunctionCase]:
    """Those of every module of this folder that has some."""
    found: list[FunctionCase] = []
    for info in pkgutil.iter_modules(bench.__path__):
        if info.name.endswith("_cases"):
            found += getattr(importlib.import_module(f"bench.{info.name}"), "CASES", [])
    return found


def _subject(case: FunctionCase, function: Callable[..., Tensor], backward: bool) -> Subject:
    inputs = case.inputs()
    leaves = [x for x in inputs if x.requires_grad]
    with torch.no_grad():
        dy = torch.ones_like(function(*inputs))

    def both() -> None:
        torch.autograd.grad(function(*inputs), leaves, dy)

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    return Subject(both if backward else forward)


def measure(case: FunctionCase, seconds: float) -> Iterator[Record]:
    """Forward, then forward + backward."""
    for backward, name in enumerate(PASSES):
        subjects = {
            "fastopt": _subject(case, case.ours, bool(backward)),
            "torch": _subject(case, case.theirs, bool(backward)),
        }
        for subject in subjects.values():
            subject.warm()
        timings = timing.interleave(subjects, seconds)
        ratio = Ratio.of(timings["torch"], timings["fastopt"])
        n_bytes = case.bytes_moved[backward]
        yield {
            "case": case.name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "pass": name,
            "times": {who: taken.record(n_bytes) for who, taken in timings.items()},
            "ratio": asdict(ratio),
            "goal": case.goal[backward],
            "met": ratio.median >= case.goal[backward],
        }


def memory() -> Iterator[Record]:
    """Peaks of forward + backward of the loss of a linear layer."""
    for dtype in ("float32", "bfloat16"):
        ours, theirs = (peak_bytes("linear_cross_entropy", k, dtype) for k in ("ours", "theirs"))
        yield {"dtype": dtype, "ours": ours, "theirs": theirs, "met": ours <= MEMORY * theirs}


def at_a_glance(report: Record) -> str:
    """The cases, the peaks and the machine: for docs."""
    lines = [
        (
            record["case"],
            record["dtype"],
            record["pass"],
            ms(record["times"]["fastopt"]["ms"]),
            ms(record["times"]["torch"]["ms"]),
            spread(record["ratio"]),
            f"{record['goal']:g}",
            yes(record["met"]),
        )
        for record in report["records"]
    ]
    head = ("case", "dtype", "pass", "fastopt ms", "torch ms", "times as fast", "at least", "met")
    peaks = [
        f"Peak of linear_cross_entropy, {record['dtype']}, forward + backward: "
        f"{record['ours'] / 2**20:.0f} MiB, unfused {record['theirs'] / 2**20:.0f} MiB "
        f"({record['ours'] / record['theirs']:.1%}, at most {MEMORY:.0%}: {yes(record['met'])})."
        for record in report["memory"]
    ]
    return "\n\n".join((markdown_table(head, lines), *peaks, conditions(report))) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.function_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case and pass")
    parser.add_argument("--only", default="", help="cases whose names begin so; nothing is written")
    parser.add_argument("--peaks", action="store_true", help="the peaks again, and keep the rest")
    options = parser.parse_args()
    if not is_warm():
        command = [sys.executable, "-m", "bench.function_report", *sys.argv[1:]]
        return subprocess.run(command, env=environment(WARM), check=False).returncode
    # First: a child begins with the peak of the process that started it.
    peaks = [] if options.only else [*memory()]
    if options.peaks:
        report = json.loads((options.out / "cpu_functions.json").read_text()) | {"memory": peaks}
        write(options.out, "cpu_functions", report, _text(report), make_console())
        return 0
    chosen = [case for case in cases() if case.name.startswith(options.only)]
    report = {
        "machine": machine.describe(),
        "quick": False,
        "copy_gb_per_s": copy_gb_per_s(),
        "records": [record for case in chosen for record in measure(case, options.seconds)],
        "memory": peaks,
    }
    console = make_console()
    console.print(_text(report))
    if not options.only:
        write(options.out, "cpu_functions", report, _text(report), console)
    return 0


def _text(report: Record) -> str:
    return f"# Functions\n\n{at_a_glance(report)}"


if __name__ == "__main__":
    sys.exit(main())
