"""Which optimizer goes with which option, storage format and backend: each is tried.

    python -m bench.combinations --out bench/results

A combination is constructed on small bfloat16 parameters (float32 where that is asked for) and
takes two steps; it works where all parameters have moved and are finite. What is refused is
refused at construction. The GPU's kernels run in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastopt
from bench import machine
from bench.combination_cases import FORMATS, OPTIONS
from bench.gpu_interpret import route_cpu_to_triton
from bench.providers import HYPERPARAMETERS, OPTIMIZERS
from bench.render import conditions, markdown_table
from bench.sections import make_console, write

BACKENDS = ("cpu", "gpu")
SHAPES = ((300,), (7, 5))
Record = dict[str, Any]


def attempt(optimizer: str, format: Any, option: str, device: str) -> str:
    """ "yes", or why not."""
    params = [torch.nn.Parameter(torch.randn(s).bfloat16().to(device)) for s in SHAPES]
    options = HYPERPARAMETERS[optimizer] | OPTIONS[option] | {"lr": 0.1}
    try:
        made = getattr(fastopt.optim, optimizer)(params, state_dtype=format, **options)
    except ValueError as error:
        return f"refused: {error}"
    before = [p.detach().clone() for p in params]
    if option == "release_gradients":
        made.release_gradients()
    for _ in range(2):
        sum((p.float() * torch.randn(p.shape, device=device)).sum() for p in params).backward()
        made.step()
        made.zero_grad()
    moved = all(
        bool((p != was).any() and p.isfinite().all()) for p, was in zip(params, before, strict=True)
    )
    return "yes" if moved else "wrong: parameters have not moved, or are not finite"


def tried(backend: str) -> Iterator[Record]:
    """Every combination on this process's backend."""
    device = "cuda" if backend == "gpu" and torch.cuda.is_available() else "cpu"
    for optimizer in OPTIMIZERS:
        for name, format in FORMATS.items():
            torch.manual_seed(0)
            cells = {option: attempt(optimizer, format, option, device) for option in OPTIONS}
            yield {"optimizer": optimizer, "format": name, "backend": backend, "cells": cells}


def on_backend(backend: str) -> list[Record]:
    """The records of a backend, from a process of its own."""
    environment = dict(os.environ)
    if backend == "gpu" and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "bench.combinations", "--backend", backend]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def at_a_glance(report: Record) -> str:
    """A row for each optimizer and format: yes on both backends, on one, or no; for docs."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    reasons: dict[str, None] = {}
    for record in report["records"]:
        row = found.setdefault((record["optimizer"], record["format"]), {})
        for option, outcome in record["cells"].items():
            row.setdefault(option, []).append(record["backend"] if outcome == "yes" else "")
            if outcome != "yes":
                reasons[f"{record['optimizer']}, {record['format']}: {outcome}"] = None
    lines = [
        (*names, *(" ".join(filter(None, row[option])) or "no" for option in OPTIONS))
        for names, row in found.items()
    ]
    table = markdown_table(("optimizer", "state_dtype", *OPTIONS), lines)
    notes = "\n".join(f"- {reason}" for reason in reasons)
    return f"{table}\n\n{notes}\n\n{conditions(report)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.combinations", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--backend", choices=BACKENDS, help="try one, and print JSON lines")
    options = parser.parse_args()
    if options.backend:
        if options.backend == "gpu" and not torch.cuda.is_available():
            route_cpu_to_triton()
        for record in tried(options.backend):
            print(json.dumps(record), flush=True)
        return 0
    records = [record for backend in BACKENDS for record in on_backend(backend)]
    report = {
        "machine": machine.describe(),
        "quick": False,
        "copy_gb_per_s": None,
        "records": records,
    }
    text = f"# Combinations\n\n{at_a_glance(report)}"
    write(options.out, "combinations", report, text, make_console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
