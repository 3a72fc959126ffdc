"""The whole gate: every kernel there is, for every target, and the table of what it reads.

`make gate` takes hours of one core. What has been compiled is noted beside the table, so a run that
was stopped goes on where it was; a changed source begins anew.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fastopt.cli.shared.files import output_file, write_whole
from fastopt_kernels.gpu.machine_code import TARGETS
from tests.gpu import clip_gate, format_gate, gate, gate_table, row_gate
from tests.gpu.checked import Case

ROOT = Path(__file__).parents[2]
SOURCES = ("kernels/fastopt_kernels", "fastopt/optim", "tests/gpu")


def all_checks(targets: Sequence[str]) -> gate.Checks:
    """Every case of every gate."""
    modules = (gate, clip_gate, format_gate, row_gate)
    return itertools.chain.from_iterable(module.all_checks(targets) for module in modules)


def made_of() -> str:
    """A key of everything that a kernel, or what is said of it, depends on."""
    key = hashlib.sha256(gate_table.compilers().encode())
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.name.startswith(("test_", "conftest")) and "cpu" not in path.parts:
                key.update(path.read_bytes())
    return key.hexdigest()


class Run:
    """What has been found so far, kept in a file."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path, key = path, made_of()
        self.found: dict[Case, dict[str, Any]] = {}
        lines = path.read_text().splitlines() if path.exists() and not fresh else []
        lines = lines[1:] if lines[:1] == [key] else []
        # The last may have been cut off.
        lines = [line for line in lines if line.endswith("}")]
        for line in lines:
            self._take(json.loads(line))
        write_whole(path, "\n".join([key, *lines, ""]).encode())

    def _take(self, entry: dict[str, Any]) -> None:
        self.found[Case(*entry["case"])] = entry

    def add(self, entry: dict[str, Any]) -> None:
        self._take(entry)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def table(self, cases: Sequence[Case]) -> gate_table.Table:
        table: gate_table.Table = {}
        for case in cases:
            for key, cell in self.found[case]["rows"]:
                table.setdefault(tuple(key), {})[case.target] = cell
        return table


_checks: dict[Case, Any] = {}


def _prepare(targets: Sequence[str]) -> None:
    _checks.update(all_checks(targets))


def _check(case: Case) -> dict[str, Any]:
    """In a process of its own; a kernel that does not compile is a failed kernel."""
    try:
        found = _checks[case]()
        faults = [f"{each.kernel}: {fault}" for each in found for fault in each.faults]
        rows = gate_table.rows_of(case, found)
    except Exception as error:
        rows, faults = [], [f"{type(error).__name__}: {error}"]
    return {"case": case, "rows": rows, "faults": faults}


def checked(cases: Sequence[Case], n_processes: int) -> Iterator[dict[str, Any]]:
    """What is found of each case, in any order."""
    targets = sorted({case.target for case in cases})
    # Not forked: torch has threads.
    with ProcessPoolExecutor(n_processes, get_context("spawn"), _prepare, (targets,)) as pool:
        for done in as_completed([pool.submit(_check, case) for case in cases]):
            yield done.result()


def say(case: Case, entry: dict[str, Any]) -> None:
    print(f"{case!s:70} {'FAIL ' + '; '.join(entry['faults']) if entry['faults'] else 'ok'}")
    sys.stdout.flush()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all of them")
    parser.add_argument("--only", default="", help="cases whose line has this regular expression")
    parser.add_argument("-j", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--fresh", action="store_true", help="forget what a stopped run has found")
    parser.add_argument("--out", type=output_file(".tsv"), default=gate_table.PATH)
    return parser.parse_args()


def main() -> int:
    options = parse()
    targets = options.target or list(TARGETS)
    every = [case for case, _ in all_checks(targets)]
    cases = [case for case in every if re.search(options.only, str(case))]
    # What lies in Triton's cache was compiled by who knows whom.
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    run = Run(options.out.with_suffix(".part"), options.fresh)
    for case in cases:
        if case in run.found:
            say(case, run.found[case])
    rest = [case for case in cases if case not in run.found]
    for entry in checked(rest, options.j) if rest else ():
        run.add(entry)
        say(Case(*entry["case"]), entry)
    failed = [case for case in cases if run.found[case]["faults"]]
    print(f"{len(cases)} cases, {len(failed)} failed")
    for case in failed:
        say(case, run.found[case])
    if cases == [case for case, _ in all_checks(list(TARGETS))]:
        write_whole(options.out, gate_table.text_of(run.table(cases)).encode())
        run.path.unlink()
        print(f"wrote {options.out}")
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
