"""The demo's picture: for each task its loss curves, and beside them what a step took."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import LineStyleType

from fastopt.cli.demo.race import (
    FASTOPT,
    FASTOPT_SWAP,
    TORCH,
    TORCH_FUSED,
    WARMUP_STEPS,
    Comparison,
    Run,
)

COLORS = {
    TORCH.name: "#a9b4c2",
    TORCH_FUSED.name: "#f29e4c",
    FASTOPT.name: "#0b6e4f",
    FASTOPT_SWAP.name: "#2f6db5",
}
LABELS = {
    TORCH.name: "torch AdamW (default)",
    TORCH_FUSED.name: "torch AdamW (fused=True)",
    FASTOPT.name: "fastopt AdamW",
    FASTOPT_SWAP.name: "fastopt AdamW (and model)",
}
OURS = (FASTOPT.name, FASTOPT_SWAP.name)
# (line width, dashes): wide, narrower, thin dashes and others between them, so that curves that
# coincide all show.
CURVES: dict[str, tuple[float, LineStyleType]] = {
    TORCH.name: (8.0, "-"),
    TORCH_FUSED.name: (4.4, "-"),
    FASTOPT.name: (1.6, (0, (4, 2.5))),
    FASTOPT_SWAP.name: (1.6, (2.5, (2.5, 4))),
}
INK, FAINT = "#22303c", "#6b7885"
LEFT, BAR_HEIGHT = 0.075, 0.62
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c3ccd5",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
}


def render(comparisons: Sequence[Comparison], conditions: str) -> bytes:
    """The PNG file's bytes; `conditions` is the line at the bottom."""
    with rc_context(STYLE):
        figure = Figure(figsize=(14, 1.8 + 3.8 * len(comparisons)), facecolor="white")
        grid = figure.add_gridspec(
            len(comparisons), 3, width_ratios=(1.9, 1, 1), left=LEFT, right=0.985,
            top=0.8, bottom=0.12, hspace=0.6, wspace=0.32,
        )  # fmt: skip
        for row, comparison in enumerate(comparisons):
            _draw_curves(figure.add_subplot(grid[row, 0]), comparison)
            _draw_optimizer(figure.add_subplot(grid[row, 1]), comparison)
            _draw_step(figure.add_subplot(grid[row, 2]), comparison)
        default, fused = (_speedups(comparisons, name) for name in (TORCH.name, TORCH_FUSED.name))
        figure.text(
            LEFT, 0.94, f"fastopt.optim.AdamW: an optimizer step {default} times as fast as "
            "torch's default", fontsize=19, weight="bold",
        )  # fmt: skip
        figure.text(
            LEFT, 0.9, f"and {fused} times as fast as torch's fused=True. Same initial weights, "
            "same batches; all take each training step in turn.", fontsize=13, color=FAINT,
        )  # fmt: skip
        figure.text(
            LEFT, 0.02, f"Times are medians without the first {WARMUP_STEPS} steps (warm-up). "
            f"{conditions}.", fontsize=9, color=FAINT,
        )  # fmt: skip
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=130)
    return png.getvalue()


def _speedups(comparisons: Sequence[Comparison], reference: str) -> str:
    """The reference's time of step() divided by fastopt's: "2.1", or "2.1 to 3.0"."""
    ratios = [c.run(reference).optimizer_ms / c.run(FASTOPT.name).optimizer_ms for c in comparisons]
    low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    return low if low == high else f"{low} to {high}"


def _title(axes: Axes, title: str, detail: str) -> None:
    axes.set_title(title, pad=22)
    axes.text(0, 1.04, detail, transform=axes.transAxes, fontsize=9.5, color=FAINT)


def _draw_curves(axes: Axes, comparison: Comparison) -> None:
    task, runs = comparison.task, comparison.runs
    window = max(1, len(task.batches) // 40)
    for run in runs:
        width, dashes = CURVES[run.provider]
        axes.plot(
            range(1, len(run.losses) + 1), running_mean(run.losses, window),
            linewidth=width, linestyle=dashes, color=COLORS[run.provider],
            label=f"{LABELS[run.provider]}: {run.held_out_accuracy:.1%}",
        )  # fmt: skip
    if runs[0].final_loss < runs[0].losses[0] / 10:
        axes.set_yscale("log")
    gap = max(run.gap(comparison.run(TORCH.name)) for run in runs if run.provider in OURS)
    size = f"{task.n_parameters:,} parameters in {task.n_tensors} tensors"
    _title(axes, task.title, f"{size}; fastopt's loss stays within {gap:.0e} of the default's")
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss, nats" + f"\n(mean of {window} steps)" * (window > 1))
    axes.grid(alpha=0.25)
    axes.legend(
        loc="upper right", frameon=False, handlelength=3.2, fontsize=10,
        title="accuracy on held-out data", title_fontsize=10, alignment="left",
    )  # fmt: skip


def _draw_optimizer(axes: Axes, comparison: Comparison) -> None:
    _title(axes, "Optimizer step", "optimizer.step() alone")
    _draw_bars(axes, comparison.runs, [run.optimizer_ms for run in comparison.runs])
    labels = [LABELS[run.provider].replace(" (", "\n(") for run in comparison.runs]
    axes.set_yticks(range(len(labels)), labels, color=INK)


def _draw_step(axes: Axes, comparison: Comparison) -> None:
    _title(axes, "Whole training step", "with forward and backward, the light part")
    _draw_bars(axes, comparison.runs, [run.step_ms for run in comparison.runs])
    for y, run in enumerate(comparison.runs):
        axes.barh(y, run.step_ms - run.optimizer_ms, height=BAR_HEIGHT, color="#e6eaee")
    axes.set_yticks([])


def _draw_bars(axes: Axes, runs: Sequence[Run], ms: Sequence[float]) -> None:
    """A bar a run, the first on top, labelled with its length and how many times as fast it is."""
    for y, (run, length) in enumerate(zip(runs, ms, strict=True)):
        axes.barh(y, length, height=BAR_HEIGHT, color=COLORS[run.provider])
        axes.text(
            length, y, f" {length:.3g} ms" + f"  {ms[0] / length:.2f}x" * (y > 0), va="center",
            weight="bold" if run.provider in OURS else "normal",
        )  # fmt: skip
    axes.set_xlabel("ms")
    axes.set_xlim(0, 1.7 * max(ms))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Each value's mean with up to window - 1 before it."""
    starts = (max(0, i + 1 - window) for i in range(len(values)))
    return [sum(values[start : i + 1]) / (i + 1 - start) for i, start in enumerate(starts)]
