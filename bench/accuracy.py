"""How far softmax, the loss and the norms are from float64, ours beside torch's, on a CPU.

For each op and dtype, on random rows and on adversarial ones: the largest error of the output and
of every gradient in roundings (spacings of the dtype at the largest value of its row), and the
root mean square of the error over that of the values.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine, render
from fastopt.cli.shared.files import write_whole
from tests.rows import cases, oracle
from tests.rows.oracle import Bounds
from tests.rows.problem import Problem
from tests.rows.subject import DTYPES, NAMES, OURS, OVER_DIM, TORCH

Record = dict[str, Any]

ROWS, COLUMNS = 512, 1000
ADVERSARIAL = tuple(what for what in cases.PACK if what not in ("one element", "one column"))
HEADER = (
    "op", "tensor", "dtype", "data", "largest, fastopt", "largest, torch", "rms, fastopt",
    "rms, torch",
)  # fmt: skip
NOTES = (
    "largest: the largest error, in roundings: spacings of the dtype at the largest value of the "
    "element's row (of the whole tensor for losses, logsumexp and the gradients of weight and "
    "bias). 0.5 is what storing the exact result costs.",
    "rms: root mean square of the error over root mean square of the exact values.",
    "The exact values are torch's in float64, so float64 itself is not in the tables.",
    f"random: normal numbers, {ROWS} rows of {COLUMNS}; adversarial: the case in which fastopt's "
    "largest error is farthest beyond torch's; elements that are not finite in any of the three "
    "are left out. All cases are in the JSON file.",
    "cross_entropy: class indices and weight, of probabilities where it says so; "
    'reduction="none" and a random gradient of each loss.',
)


def problems() -> Iterable[tuple[str, str, Problem]]:
    """(op, data, call), the calls in float32."""
    for name in NAMES:
        yield name, "random", _problem(name, cases.draw(ROWS, COLUMNS))
        if name in OVER_DIM:
            x = cases.draw(COLUMNS, ROWS)
            yield f"{name}, dim 0", "random", cases.problem(name, x, dim=0)
        if name == "cross_entropy":
            yield f"{name}, probabilities", "random", _of_probabilities(cases.draw(ROWS, COLUMNS))
        for what in ADVERSARIAL:
            yield name, what, _problem(name, cases.pack(what, torch.float64))


def _problem(name: str, x: Tensor) -> Problem:
    made = cases.problem(name, x)
    if name == "cross_entropy":
        weight = 1 + cases.draw(x.shape[1], dtype=x.dtype, seed=3).abs()
        made = replace(made, inputs={**made.inputs, "weight": weight})
    return made


def _of_probabilities(x: Tensor) -> Problem:
    made = _problem("cross_entropy", x)
    inputs = {**made.inputs, "target": cases.probabilities(x)}
    return cases.with_upstream(replace(made, inputs=inputs))


def measure(op: str, data: str, made: Problem, dtype: torch.dtype) -> list[Record]:
    """One record for the output and for each gradient."""
    made = made.cast(dtype)
    exact, floors = made.exact(), made.terms()
    mine, torchs = made.run(OURS[made.name]), made.run(TORCH[made.name])
    found = []
    for key, right in exact.items():
        bounds = Bounds(made.row_dims(key), made.floor(key), floors.get(key))
        errors = oracle.errors(mine[key].double(), torchs[key].double(), right, bounds)
        finite = errors[2].isfinite()
        size = float(torch.where(right.isfinite(), right, 0.0).square().mean().sqrt())
        record: Record = {
            "op": op, "tensor": key, "dtype": str(dtype).removeprefix("torch."), "data": data,
        }  # fmt: skip
        for who, error in zip(("fastopt", "torch"), errors, strict=False):
            absolute = torch.where(finite, error * errors[2], 0.0)
            rms = float(absolute.square().mean().sqrt())
            record[who] = {
                "largest": float(error.max()) / torch.finfo(dtype).eps,
                "rms": rms / size if size and math.isfinite(size) else 0.0,
            }
        found.append(record)
    return found


def run() -> Record:
    records = [
        record
        for op, data, made in problems()
        for dtype in DTYPES
        if dtype is not torch.float64
        for record in measure(op, data, made, dtype)
    ]
    return {"machine": machine.describe(), "rows": ROWS, "columns": COLUMNS, "cases": records}


def worst(records: list[Record]) -> list[Record]:
    """Of the adversarial cases, for each op, tensor and dtype the one that is worst for us."""
    found: dict[tuple[str, str, str], Record] = {}
    for record in records:
        key = (record["op"], record["tensor"], record["dtype"])
        if record["data"] != "random":
            beyond = record["fastopt"]["largest"] - record["torch"]["largest"]
            best = found.get(key)
            if best is None or beyond > best["fastopt"]["largest"] - best["torch"]["largest"]:
                found[key] = record
    return list(found.values())


def _cells(record: Record) -> tuple[str, ...]:
    figures = [f"{record[who]['largest']:.2f}" for who in ("fastopt", "torch")]
    figures += [f"{record[who]['rms']:.1e}" for who in ("fastopt", "torch")]
    return (record["op"], record["tensor"], record["dtype"], record["data"], *figures)


def at_a_glance(report: Record) -> str:
    """Random rows, then adversarial ones, and on what machine: for the docs."""
    return "\n\n".join(_tables(report)) + "\n"


def _tables(report: Record) -> list[str]:
    records = report["cases"]
    return [
        _table([record for record in records if record["data"] == "random"]),
        "Adversarial rows, the worst for fastopt:",
        _table(worst(records)),
        render.conditions({**report, "copy_gb_per_s": None, "quick": False}),
    ]


def markdown(report: Record) -> str:
    notes = ["## What the columns mean", "\n".join(f"- {note}" for note in NOTES)]
    return "\n\n".join(["# Accuracy on a CPU", *_tables(report), *notes]) + "\n"


def _table(records: Iterable[Record]) -> str:
    return render.markdown_table(HEADER, map(_cells, records))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    report = run()
    text = markdown(report)
    if not options.out:
        print(text)
        return 0
    write_whole(options.out / "cpu_accuracy.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(options.out / "cpu_accuracy.md", text.encode())
    print(f"Written: {options.out / 'cpu_accuracy.json'} and cpu_accuracy.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
