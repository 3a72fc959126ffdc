"""The report as JSON and Markdown, each file written whole or not at all."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu_aims import shortfalls
from bench.gpu_rows import FAIL, NO_TIME, NOT_HERE, PASS, Record

JSON_NAME, MARKDOWN_NAME = "gpu_report.json", "gpu_report.md"
FASTOPT, FUSED, FOREACH = "fastopt", "torch fused", "torch foreach"
CHECKS = ("engine", "optim", "combinations", "device", "functions", "compiling", "large")
TITLES = {
    "engine": "Each rule's kernel against torch.optim in float64",
    "optim": "Whole optimizers against torch.optim in float64",
    "combinations": "Optimizers by option and storage against torch.optim in float64",
    "device": "Graphs, streams, launches, synchronizations",
    "functions": "Row functions against torch in float64",
    "compiling": "Compiled beside the checks for what is timed",
    "large": "More than 2^31 elements",
    "speed": "Speed",
    "function_speed": "Speed of the row functions",
    "tuning": "Other sizes of block, chunk and program: AdamW, 33M elements",
}


def write(folder: Path, report: dict[str, Any]) -> None:
    """report: {"machine": ..., "rows": [...], ...}, as it is so far."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / JSON_NAME, json.dumps(report, indent=1, default=str) + "\n")
    _write_whole(folder / MARKDOWN_NAME, markdown(report))


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def counts(rows: Sequence[Record]) -> dict[str, int]:
    found = Counter(row["status"] for row in rows)
    return {status: found[status] for status in (PASS, FAIL, NO_TIME, NOT_HERE)}


def markdown(report: dict[str, Any]) -> str:
    rows = report["rows"]
    lines = ["# fastopt on a GPU", "", *_machine(report), ""]
    lines += ["## Rows", "", *_summary(rows), ""]
    if bad := [row for row in rows if row["status"] in (FAIL, NO_TIME)]:
        lines += ["## Failed, or not run for want of time", ""]
        lines += [f"- **{row['section']}: {row['row']}**: {_line(row['detail'])}" for row in bad]
        lines += [""]
    if absent := [row for row in rows if row["status"] == NOT_HERE]:
        lines += ["## Not applicable on this machine", ""]
        lines += [f"- {row['section']}: {row['row']}: {_line(row['detail'])}" for row in absent]
        lines += [""]
    if short_of := shortfalls(rows):
        lines += ["## Short of the aims", "", *(f"- {line}" for line in short_of), ""]
    lines += _speed([row for row in rows if row["section"] == "speed"])
    lines += _function_speed([row for row in rows if row["section"] == "function_speed"])
    lines += _peaks([row for row in rows if "peak_bytes" in (row.get("data") or {})])
    lines += _tuning([row for row in rows if row["section"] == "tuning"])
    for section in CHECKS:
        here = [row for row in rows if row["section"] == section]
        if here:
            lines += [f"## {TITLES[section]}", "", "| check | | s |", "|---|---|---|"]
            lines += [f"| {row['row']} | {row['status']} | {_s(row)} |" for row in here]
            lines += [""]
    return "\n".join(lines)


def _machine(report: dict[str, Any]) -> list[str]:
    return [f"- {key}: {value}" for key, value in report["machine"].items()]


def _summary(rows: Sequence[Record]) -> list[str]:
    lines = ["| section | pass | fail | out of time | not here |", "|---|---|---|---|---|"]
    for section in dict.fromkeys(row["section"] for row in rows):
        found = counts([row for row in rows if row["section"] == section])
        lines.append(f"| {section} | " + " | ".join(map(str, found.values())) + " |")
    return lines


def _line(text: str, limit: int = 300) -> str:
    return " ".join(text.split())[:limit].replace("|", "\\|")


def _s(row: Record) -> str:
    return f"{row['seconds']:.1f}" if "seconds" in row else ""


SPEED_COLUMNS = (
    "case", "fastopt ms", "GB/s", "of copy", "kernels of copy", "alone ms", "host ms", "launches",
    "fused ms", "of copy", "foreach ms", "of copy", "x fused", "x foreach", "x others",
)  # fmt: skip


def _speed(rows: Sequence[Record]) -> list[str]:
    measured = [row for row in rows if "providers" in row.get("data", {})]
    copies = [row["data"]["copy_gbps"] for row in rows if "copy_gbps" in row.get("data", {})]
    if not copies:
        return []
    lines = [
        f"## {TITLES['speed']}",
        "",
        f"A device copy: {copies[0]:.0f} GB/s, bytes read plus bytes written. Medians; in bursts "
        "unless it says alone, which is one step from an idle queue, host and launch included.",
        "",
    ]
    lines += _table(SPEED_COLUMNS, [speed_cells(row) for row in measured])
    missing = {
        f"- {name}, {row['row']}: {_line(times['unavailable'], 160)}"
        for row in measured
        for name, times in row["data"]["providers"].items()
        if "unavailable" in times
    }
    return [*lines, "", *sorted(missing), ""]


FUNCTION_COLUMNS = (
    "case", "pass", "fastopt ms", "GB/s", "of copy", "kernels of copy", "alone ms", "host ms",
    "launches",
)  # fmt: skip


def _function_speed(rows: Sequence[Record]) -> list[str]:
    """A line for each case and pass, two columns for each provider beside fastopt."""
    measured = [row for row in rows if "passes" in row.get("data", {})]
    if not measured:
        return []
    found = [
        (row["row"], which, data)
        for row in measured
        for which, data in row["data"]["passes"].items()
    ]
    others = dict.fromkeys(name for *_, data in found for name in data["times_as_fast_as"])
    columns = [*FUNCTION_COLUMNS, *(c for name in others for c in (f"{name} of copy", f"x {name}"))]
    lines = [_function_cells(name, which, data, list(others)) for name, which, data in found]
    missing = {
        f"- {name}: {_line(times['unavailable'], 160)}"
        for *_, data in found
        for name, times in data["providers"].items()
        if "unavailable" in times
    }
    title = f"## {TITLES['function_speed']}"
    return [title, "", *_table(columns, lines), "", *sorted(missing), ""]


def _function_cells(row: str, which: str, data: Record, others: Sequence[str]) -> list[str]:
    ours = data["providers"][FASTOPT]
    cells = [
        row,
        which,
        _number(ours["ms"], 4),
        _number(ours["gbps"], 0),
        _percent(ours["share"]),
        _percent(ours.get("kernel_share")),
        _number(ours["alone_ms"], 3),
        _number(ours["host_ms"], 3),
        str(ours.get("kernels", "")),
    ]
    for name in others:
        cells.append(_percent(data["providers"].get(name, {}).get("share")))
        cells.append(_number(data["times_as_fast_as"].get(name), 2))
    return cells


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(row) + " |" for row in rows]


def speed_cells(row: Record) -> list[str]:
    """One line of the table of speeds, in the order of SPEED_COLUMNS."""
    data = row["data"]
    ours, fused, foreach = (data["providers"].get(name, {}) for name in (FASTOPT, FUSED, FOREACH))
    ratios = data["times_as_fast_as"]
    launches = _launches(ours)
    others = [f"{x:.2f} {name}" for name, x in ratios.items() if name not in (FUSED, FOREACH)]
    return [
        row["row"],
        _number(ours.get("ms"), 3),
        _number(ours.get("gbps"), 0),
        _percent(ours.get("share")),
        _percent(ours.get("kernel_share")),
        _number(ours.get("alone_ms"), 3),
        _number(ours.get("host_ms"), 3),
        launches,
        _number(fused.get("ms"), 3),
        _percent(fused.get("share")),
        _number(foreach.get("ms"), 3),
        _percent(foreach.get("share")),
        _number(ratios.get(FUSED), 2),
        _number(ratios.get(FOREACH), 2),
        ", ".join(others),
    ]


def _launches(times: Record) -> str:
    """Kernels and copies; copies are unknown where only fastopt's own launches could be seen."""
    if not times.get("kernels"):
        return ""
    copies = times.get("copies")
    return str(times["kernels"]) if copies is None else f"{times['kernels']} + {copies}"


def _peaks(rows: Sequence[Record]) -> list[str]:
    if not rows:
        return []
    found = [
        (row["row"], *row["data"]["peak_bytes"].values(), row["data"]["share"]) for row in rows
    ]
    cells = [[name, f"{a / 2**20:.0f}", f"{b / 2**20:.0f}", _percent(x)] for name, a, b, x in found]
    columns = ("forward and backward", "fastopt MiB", "ATen MiB", "of ATen's")
    return ["## Memory at its peak", "", *_table(columns, cells), ""]


def _tuning(rows: Sequence[Record]) -> list[str]:
    measured = [row for row in rows if "gbps" in row.get("data", {})]
    if not measured:
        return []
    cells = [
        [row["row"], _number(row["data"]["ms"], 3), _number(row["data"]["gbps"], 0)]
        for row in measured
    ]
    return [f"## {TITLES['tuning']}", "", *_table(("sizes", "ms", "GB/s"), cells), ""]


def _number(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def _percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.0f} %"


def short(report: dict[str, Any]) -> str:
    """What is printed last: the verdict, what failed, and one line a case."""
    rows = report["rows"]
    lines = []
    columns = (0, 1, 2, 3, 4, 8, 9, 12, 13)
    measured = [row for row in rows if "providers" in row.get("data", {})]
    if measured:
        table = [SPEED_COLUMNS, *(speed_cells(row) for row in measured)]
        widths = [max(len(row[k]) for row in table) for k in columns]
        for cells in table:
            chosen = (cells[k].rjust(w) for k, w in zip(columns, widths, strict=True))
            lines.append("  ".join(chosen))
    lines += [f"SHORT {line}" for line in shortfalls(rows)[:40]]
    lines += _short_functions([row for row in rows if row["section"] == "function_speed"])
    for row in [row for row in rows if row["status"] in (FAIL, NO_TIME)][:25]:
        lines.append(f"{row['status'].upper()} {row['section']}: {row['row']}: "
                     f"{_line(row['detail'], 160)}")  # fmt: skip
    lines.append(", ".join(f"{n} {status}" for status, n in counts(rows).items()))
    return "\n".join(lines)


def _short_functions(rows: Sequence[Record]) -> list[str]:
    """Each case's passes: milliseconds, share of a copy, times as fast as the others."""
    lines = []
    for row in rows:
        for which, data in row.get("data", {}).get("passes", {}).items():
            ours = data["providers"][FASTOPT]
            ratios = ", ".join(f"{x:.2f} x {name}" for name, x in data["times_as_fast_as"].items())
            lines.append(
                f"{row['row']}, {which}: {ours['ms']:.4f} ms, {_percent(ours['share'])}; {ratios}"
            )
    return lines
