"""The demo's result as a table: what the training reached, and what a step cost."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from fastopt.cli.demo.race import (
    FASTOPT,
    FASTOPT_SWAP,
    FINAL_STEPS,
    TORCH,
    TORCH_FUSED,
    WARMUP_STEPS,
    Comparison,
    Run,
)

HEADERS = (
    "final\nloss",
    "held-out\naccuracy",
    "largest\ngap",
    "step()\nms",
    "vs\ndefault",
    "vs\nfused",
    "whole\nms",
    "vs\ndefault",
    "vs\nfused",
)
CAPTION = (
    f"final loss: mean of the last {FINAL_STEPS} training steps. largest gap: between this loss "
    f"curve and torch default's, at any step. step(): optimizer.step() alone; whole: forward, "
    f"backward, zero_grad and step(). Both are medians without the first {WARMUP_STEPS} steps, "
    f"which are warm-up. vs: how many times as fast. fastopt: the optimizer alone; fastopt swap: "
    f"the model's norms and the loss too."
)


def print_table(console: Console, comparisons: Sequence[Comparison]) -> None:
    """A table for each task, a row for each run."""
    # At 80 columns the table just fits without padding.
    padding = (0, 1) if console.width >= 100 else (0, 0)
    for comparison in comparisons:
        table = Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False)
        table.add_column("AdamW", no_wrap=True, vertical="bottom")
        for header in HEADERS:
            table.add_column(header, justify="right", no_wrap=True)
        for run in comparison.runs:
            ours = run.provider in (FASTOPT.name, FASTOPT_SWAP.name)
            style = "bold green" if ours else None
            table.add_row(run.provider, *_cells(run, comparison), style=style)
        console.print(f"\n[bold]{comparison.task.title}[/] ({_size(comparison)})", highlight=False)
        console.print(table)
    console.print(CAPTION, style="dim", highlight=False)


def _size(comparison: Comparison) -> str:
    task = comparison.task
    return f"{task.n_parameters:,} parameters, {task.n_tensors} tensors"


def _cells(run: Run, comparison: Comparison) -> list[str]:
    default, fused = comparison.run(TORCH.name), comparison.run(TORCH_FUSED.name)
    gap = "-" if run is default else f"{run.gap(default):.1e}"
    return [
        f"{run.final_loss:.4f}",
        f"{run.held_out_accuracy:.1%}",
        gap,
        _short(run.optimizer_ms, 3),
        _short(default.optimizer_ms / run.optimizer_ms, 2) + "x",
        _short(fused.optimizer_ms / run.optimizer_ms, 2) + "x",
        _short(run.step_ms, 2),
        _short(default.step_ms / run.step_ms, 2) + "x",
        _short(fused.step_ms / run.step_ms, 2) + "x",
    ]


def _short(x: float, decimals: int) -> str:
    """x with fewer decimals from 10 and from 100 on: never wider than its column."""
    return f"{x:.{decimals - (x >= 10) - (x >= 100)}f}"
