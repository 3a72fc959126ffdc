"""Plots of a GPU report: each case's share of a device copy, ours beside the best of the others.

python bench/gpu_plots.py DIR       draws them from DIR/gpu_report.json, on any machine
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:] = [str(HERE.parent), *(p for p in sys.path if p not in (str(HERE), ""))]

from bench.gpu_aims import SHARE, cells  # noqa: E402

Record = dict[str, Any]

NAMES = {"speed": "gpu_steps.png", "function_speed": "gpu_functions.png"}
TITLES = {"speed": "Optimizer steps", "function_speed": "Row functions"}
OURS, THEIRS, AIM = "#1f6feb", "#b0b8c4", "#d1242f"
LINE_INCHES = 0.22


def draw(folder: Path, rows: Sequence[Record]) -> str | None:
    """Write a plot for each section that was timed; why not, where there is no matplotlib."""
    timed = {s: list(cells([r for r in rows if r["section"] == s])) for s in NAMES}
    if not any(timed.values()):
        return None
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except Exception as error:
        return f"no plots ({type(error).__name__}: {error}); python bench/gpu_plots.py draws them"
    for section, found in timed.items():
        if found:
            figure = _bars(plt, TITLES[section], found)
            figure.savefig(folder / NAMES[section], dpi=110)
            plt.close(figure)
    return None


def _bars(plt: Any, title: str, found: Sequence[tuple[str, Record]]) -> Any:
    figure, axes = plt.subplots(figsize=(10, 1.2 + LINE_INCHES * len(found)), layout="constrained")
    places = range(len(found), 0, -1)
    ours = [data["providers"]["fastopt"].get("share", 0.0) for _, data in found]
    best = [_best_of_others(data) for _, data in found]
    axes.barh([y + 0.2 for y in places], ours, 0.4, color=OURS, label="fastopt")
    axes.barh([y - 0.2 for y in places], best, 0.4, color=THEIRS, label="the fastest other")
    axes.axvline(SHARE, color=AIM, linewidth=0.8, label=f"aim, {SHARE}")
    axes.set_yticks(list(places), [name for name, _ in found], fontsize=6)
    axes.set_ylim(0, len(found) + 1)
    axes.set_xlabel("share of a device copy's bandwidth (what must move, over the time)")
    axes.set_title(title)
    axes.legend(fontsize=7, loc="lower right")
    return figure


def _best_of_others(data: Record) -> float:
    shares = (
        times.get("share", 0.0) for who, times in data["providers"].items() if who != "fastopt"
    )
    return max(shares, default=0.0)


def main() -> int:
    if len(sys.argv) != 2:
        print("python bench/gpu_plots.py DIR: the folder of a gpu_report.json", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    report = json.loads((folder / "gpu_report.json").read_text(encoding="utf-8"))
    if why := draw(folder, report["rows"]):
        print(why, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
