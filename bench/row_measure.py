"""Measure the row functions in one section, in a process of its own.

Prints JSON objects, one a line: the copy bandwidth, then each case; all else goes to stderr.
`bench.row_report` starts it, with the environment that keeps the allocator warm.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch

from bench import limit, row_cases, timing
from bench.allocator import WARM, is_warm
from bench.measure import copy_gb_per_s, warm
from bench.models import DTYPES
from bench.providers import FASTOPT, NoStepError
from bench.row_cases import Case
from bench.row_ops import OPS, PEERS_TOLERANCE, TOLERANCE, Function, Shape, Workload, check
from bench.row_providers import ATEN, PROVIDERS
from bench.sections import emit, records_file
from bench.timing import Ratio, Subject, Timing

Record = dict[str, Any]

# Read and written by a copy for each of its float32 elements.
COPY_BYTES = 8


def measure(case: Case, providers: tuple[str, ...], seconds: float) -> Record:
    """Every provider on this case, interleaved with plain copies of as many bytes: the floor."""
    work, oracle = _workload(case.op.name, case.sizes, case.dtype)
    functions, skipped = _functions(case.op.function, providers)
    differences = {}
    subjects: dict[str, Subject] = {}
    for name, function in functions.items():
        try:
            differences[name] = check(
                work.results(function, case.backward), oracle, allowed(name, case.dtype)
            )
            subjects[name] = Subject(work.step(function, case.backward))
            subjects[name].warm()
        except Exception as error:
            if name in (FASTOPT, ATEN):
                raise
            skipped[name] = f"failed: {type(error).__name__}: {error}"
            subjects.pop(name, None)
    copies = {} if case.is_tiny else warm(limit.copies(case.n_bytes // COPY_BYTES))
    timings = timing.interleave({**subjects, **copies}, seconds)
    return {
        **_facts(case),
        "elements": work.n_elements,
        "bytes": case.n_bytes,
        "rounds": len(timings[FASTOPT].rounds),
        "differences": differences,
        "times": {name: taken.record(case.n_bytes) for name, taken in timings.items()},
        "skipped": skipped,
        "copies": list(copies),
        **_comparisons(timings, list(subjects), list(copies)),
    }


@lru_cache(maxsize=1)
def _workload(op: str, shape: Shape, dtype: str) -> tuple[Workload, dict[str, torch.Tensor]]:
    """The input and what torch makes of it in float32."""
    work = Workload(OPS[op], shape, DTYPES[dtype])
    return work, work.oracle(torch.float32)


def _functions(
    function: str, providers: tuple[str, ...]
) -> tuple[dict[str, Function], dict[str, str]]:
    """Those who have this function, and why the others have none."""
    functions, skipped = {}, {}
    for name in providers:
        try:
            functions[name] = PROVIDERS[name](function)
        except NoStepError as reason:
            if name == FASTOPT:
                raise
            skipped[name] = str(reason)
    return functions, skipped


def allowed(name: str, dtype: str) -> float:
    """The difference that rounding explains; what others are held against may have any."""
    return {FASTOPT: TOLERANCE[dtype], ATEN: math.inf, "torch": math.inf}.get(name, PEERS_TOLERANCE)


def _facts(case: Case) -> Record:
    return {
        "case": case.name,
        "op": case.op.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "pass": case.which,
        "tiny": case.is_tiny,
        "allocator": case.allocator,
    }


def _comparisons(timings: dict[str, Timing], names: list[str], copies: list[str]) -> Record:
    """fastopt against the others, in microseconds against ATen, everybody against the copy."""
    ours = timings[FASTOPT]
    found: Record = {
        "ratios": {
            name: asdict(Ratio.of(timings[name], ours)) for name in names if name != FASTOPT
        },
        "us_behind": 1e6 * (ours.median - timings[ATEN].median),
    }
    if copies:
        floor = min(copies, key=lambda name: timings[name].median)
        found["floor"] = floor
        found["times_the_floor"] = {
            name: asdict(Ratio.of(timings[name], timings[floor])) for name in names
        }
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.row_measure", description=__doc__)
    parser.add_argument("section", choices=row_cases.SECTIONS)
    parser.add_argument("--allocator", choices=(WARM,), default=WARM)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, rough figures")
    parser.add_argument("--peers", action="store_true", help="torch.compile in every shape")
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    records = records_file()
    if not is_warm():
        print("the memory allocator of this process does not keep freed memory", file=sys.stderr)
        return 1
    providers = row_cases.providers(options.section, options.quick, options.peers)
    seconds = row_cases.seconds(options.section, options.quick)
    print(json.dumps({"copy_gb_per_s": copy_gb_per_s()}), file=records)
    here = row_cases.SECTIONS[options.section]
    emit(records, here, lambda case: measure(case, providers, seconds), _facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
