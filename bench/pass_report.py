"""What stands around an update, inside the step and in passes of its own.

    python -m bench.pass_report --out bench/results

fastopt: fastopt.GradScaler's step of an AdamW with max_grad_norm and ema_decay. torch: unscale_,
clip_grad_norm_ (foreach), GradScaler.step of a fused AdamW, and a foreach average. All memory that
a step needs is kept by the allocator. Beside them what clipping adds to a plain step, in times of
reading the gradients once; then AdamW by how parameters and states are stored.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

import fastopt
from bench import format_measure, limit, machine, timing
from bench.allocator import WARM, environment, is_warm
from bench.measure import copy_gb_per_s
from bench.models import Gradients, make_parameters, n_elements
from bench.render import conditions, markdown_table, ms, spread, yes
from bench.sections import publish
from bench.timing import Ratio, Subject

LIMIT, DECAY = 1.0, 0.999
# Model, and at least so many times as fast.
GOALS = {"gpt2": 1.4, "1000x1000": 10.0}
# Clipping alone: at most so many times reading the gradients.
CLIPPING = 1.25
# Bytes an element that no such step can leave out, in float32: the gradient twice; parameter, two
# moments and the average read and written.
BYTES = 4 * (2 + 2 * 4)
Record = dict[str, Any]


def _scaler(cls: type[torch.amp.GradScaler]) -> torch.amp.GradScaler:
    # 1: torch unscales gradients in place, and the same ones come back.
    scaler = cls("cpu", init_scale=1.0, growth_interval=1 << 30)
    scaler.scale(torch.ones(()))
    return scaler


def _ours(model: str) -> Subject:
    params, scaler = make_parameters(model, torch.float32), _scaler(fastopt.GradScaler)
    optimizer = fastopt.optim.AdamW(params, max_grad_norm=LIMIT, ema_decay=DECAY)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return Subject(step, Gradients(model, torch.float32, "rebound").binder(params))


def _theirs(model: str) -> Subject:
    params, scaler = make_parameters(model, torch.float32), _scaler(torch.amp.GradScaler)
    optimizer = torch.optim.AdamW(params, fused=True)
    averages: list[Tensor] = [p.detach().clone() for p in params]
    values = [p.detach() for p in params]

    def step() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, LIMIT, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        torch._foreach_lerp_(averages, values, 1.0 - DECAY)

    return Subject(step, Gradients(model, torch.float32, "rebound").binder(params))


def whole_step(model: str, seconds: float) -> Record:
    """Unscale, clip, AdamW and average."""
    subjects = {"fastopt": _ours(model), "torch": _theirs(model)}
    for subject in subjects.values():
        subject.warm()
    timings = timing.interleave(subjects, seconds)
    n_bytes = BYTES * n_elements(model)
    ratio = Ratio.of(timings["torch"], timings["fastopt"])
    return {
        "case": f"unscale + clip + AdamW + EMA, {model}",
        "bytes": n_bytes,
        "times": {name: taken.record(n_bytes) for name, taken in timings.items()},
        "ratio": asdict(ratio),
        "goal": GOALS[model],
        "met": ratio.median >= GOALS[model],
    }


@njit(parallel=True, nogil=True, error_model="numpy", fastmath={"reassoc"})
def _read(g: Any) -> float:
    total = np.float32(0)
    for i in prange(len(g)):
        total += g[i]
    return total


def clipping(seconds: float) -> Record:
    """What max_grad_norm adds to AdamW at 33M, beside reading the gradients once."""
    subjects: dict[str, Subject] = {}
    for name, options in (("plain", {}), ("clipped", {"max_grad_norm": LIMIT})):
        params = make_parameters("33m", torch.float32)
        optimizer = fastopt.optim.AdamW(params, **options)
        prepare = Gradients("33m", torch.float32, "rebound").binder(params)
        subjects[name] = Subject(optimizer.step, prepare)
    grads = limit.make_stream(n_elements("33m"), torch.float32)
    subjects["read"] = Subject(lambda: _read(grads))
    for subject in subjects.values():
        subject.warm()
    timings = timing.interleave(subjects, seconds)
    rounds = zip(*(timings[name].rounds for name in ("clipped", "plain", "read")), strict=True)
    shares = sorted((clipped - plain) / read for clipped, plain, read in rounds)
    low, median, high = (shares[len(shares) * k // 4] for k in (1, 2, 3))
    return {
        "case": "clipping alone, 33m, in times of reading the gradients",
        "bytes": 4 * n_elements("33m"),
        "times": {name: taken.record(4 * n_elements("33m")) for name, taken in timings.items()},
        "ratio": {"median": median, "low": low, "high": high},
        "goal": CLIPPING,
        "met": median <= CLIPPING,
    }


def at_a_glance(report: Record) -> str:
    """The cases and the machine: for README."""
    lines, absent = [], []
    for record in (*report["records"], *report["peers"]):
        if "error" in record:
            absent.append(f"Not measured: {record['case']}: {record['error']}")
            continue
        times = ", ".join(f"{name} {ms(t['ms'])}" for name, t in record["times"].items())
        most = "alone" in record["case"]
        goal = f"{'at most' if most else 'at least'} {record['goal']}" if record["goal"] else ""
        gb, met = f"{record['bytes'] / 1e9:.3f}", yes(record["met"]) if record["goal"] else ""
        share = _share(record, "share", "at least")
        lines.append((record["case"], gb, times, spread(record["ratio"]), goal, met, share))
        if "beyond" in record:
            beyond = spread(record["beyond"])
            aim, held = f"at most {record['beyond_goal']}", yes(record["beyond_met"])
            name = f"{record['case']}, in times of the plain step"
            lines.append((name, gb, "", beyond, aim, held, ""))
    head = ("case", "GB to move", "ms", "times", "goal", "met", "share of the limit")
    return "\n\n".join((markdown_table(head, lines), *absent, conditions(report))) + "\n"


def _share(record: Record, name: str, aim: str) -> str:
    if name not in record:
        return ""
    met = "" if record[f"{name}_met"] else ", missed"
    return f"{spread(record[name])} ({aim} {record[f'{name}_goal']}{met})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pass_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--seconds", type=float, default=12.0, help="for each case")
    options = parser.parse_args()
    if not is_warm():
        command = [sys.executable, "-m", "bench.pass_report", *sys.argv[1:]]
        return subprocess.run(command, env=environment(WARM), check=False).returncode
    cases: list[Callable[[], Record]] = [
        *(lambda model=model: whole_step(model, options.seconds) for model in GOALS),
        lambda: clipping(options.seconds),
    ]
    report = {
        "machine": machine.describe(),
        "quick": False,
        "copy_gb_per_s": copy_gb_per_s(),
        "records": [*(case() for case in cases), *format_measure.measure(options.seconds)],
        "peers": [*format_measure.peers()],
    }
    text = f"# The whole step in one pass\n\n{at_a_glance(report)}"
    publish(options.out, "cpu_passes", report, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
