"""Does a storage format train as float32 does? A character transformer, by format and by seed.

    python -m bench.training_report --out bench/results

The text task of `fastopt demo` with AdamW, its learning rate falling by a cosine to a hundredth.
float32 is run from five seeds (weights, and order of the data); each format from the first. What
counts is the loss on text that was held out: a format trains as float32 does where it ends no
higher than the worst of the five seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastopt
from bench import machine
from bench.render import conditions, markdown_table, yes
from bench.sections import make_console, publish
from fastopt.cli.demo.tasks import Task, cross_entropy, text_task

SEEDS = range(5)
LR, LAST = 1e-3, 1e-5
Record = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """How parameters, and states, are stored."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]


_B16 = torch.bfloat16
FORMATS = (
    Format("float32, 8-bit states", torch.float32, {"state_dtype": "8bit"}),
    Format("bf16, nearest (as torch)", _B16, {}),
    Format("bf16, stochastic", _B16, {"param_rounding": "stochastic"}),
    Format("bf16, kahan", _B16, {"param_rounding": "kahan"}),
    Format("bf16, master", _B16, {"param_rounding": "master"}),
    Format(
        "bf16, stochastic, 8-bit states",
        _B16,
        {"param_rounding": "stochastic", "state_dtype": "8bit"},
    ),
    Format("bf16, master, 8-bit states", _B16, {"param_rounding": "master", "state_dtype": "8bit"}),
)


def train(task: Task, dtype: torch.dtype, options: dict[str, Any]) -> float:
    """Mean held-out loss at the end, in nats a character."""
    model = task.model.to(dtype)
    optimizer = fastopt.optim.AdamW(model.parameters(), lr=LR, **options)
    for step, batch in enumerate(task.batches):
        share = (1.0 + math.cos(math.pi * step / len(task.batches))) / 2.0
        optimizer.param_groups[0]["lr"] = LAST + (LR - LAST) * share
        optimizer.zero_grad()
        _loss(model, *batch).backward()
        optimizer.step()
    with torch.no_grad():
        losses = [_loss(model, *batch).item() for batch in task.held_out]
    return sum(losses) / len(losses)


def _loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(inputs).float(), targets)


def runs(quick: bool) -> Iterator[Record]:
    spread = []
    for seed in SEEDS:
        loss = train(text_task(seed, quick), torch.float32, {})
        spread.append(loss)
        yield {"run": f"float32, seed {seed}", "loss": loss}
    for each in FORMATS:
        loss = train(text_task(SEEDS[0], quick), each.dtype, each.options)
        yield {
            "run": each.name,
            "loss": loss,
            "beyond": loss - spread[0],
            "within": loss <= max(spread),
        }


def at_a_glance(report: Record) -> str:
    """The runs and the machine: for docs."""
    lines = [
        (
            record["run"],
            f"{record['loss']:.4f}",
            f"{record['beyond']:+.4f}" if "beyond" in record else "",
            yes(record["within"]) if "within" in record else "",
        )
        for record in report["records"]
    ]
    head = ("run", "held-out loss", "against float32 of the same seed", "within the five seeds")
    return f"{markdown_table(head, lines)}\n\n{conditions(report)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--quick", action="store_true", help="a small model, few steps")
    options = parser.parse_args()
    console = make_console()
    records = []
    for record in runs(options.quick):
        console.print(f"{record['run']}: {record['loss']:.4f}")
        records.append(record)
    report = {
        "machine": machine.describe(),
        "quick": options.quick,
        "copy_gb_per_s": None,
        "records": records,
    }
    text = f"# Training by storage format\n\n{at_a_glance(report)}"
    publish(options.out, "cpu_training", report, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
