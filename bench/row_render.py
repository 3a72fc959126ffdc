"""The records of the row report as tables: on the terminal by rich, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console

from bench import render
from bench.models import DTYPES
from bench.providers import FASTOPT
from bench.render import Row, markdown_table, ms, spread, yes
from bench.row_cases import BEHIND, BOTH, FLOOR, FORWARD, IN_CACHE, LARGE, RATIO
from bench.row_ops import OPS
from bench.row_providers import ATEN, COMPILE

Record = dict[str, Any]

# One line for each op, a column for each pair of shape and dtype that has goals.
GLANCE = [(dtype, shape) for dtype in DTYPES for shape in (LARGE, IN_CACHE)]
GLANCE_COLUMNS = ("op", *(f"{dtype} {shape}" for dtype, shape in GLANCE))
COLUMNS = (
    "case", "fastopt ms", "ATen ms", "times as fast", "at least", "floor ms", "x floor", "at most",
    "met", "ATen x floor", "torch.compile ms",
)  # fmt: skip
# As many as a terminal has room for.
N_PRINTED = 9
TINY_COLUMNS = ("case", "fastopt us", "ATen us", "us behind", "at most", "met")
LEFT = ("op", "case", "met")
NOTES = (
    "All times are of the public function whole, fastopt.functional's and torch's of the same "
    "name. forward: of tensors that want no gradient; forward + backward: torch.autograd.grad for "
    "x, weight and bias, with an upstream gradient that was there before. A ratio is the median "
    "over rounds in which all take turns, with its quartiles.",
    "floor: a plain copy, the faster of a compiled loop and torch's copy_, that reads and writes "
    "as many bytes as the function cannot avoid to, with as many threads, in the same rounds. So "
    "small shapes are copied in the caches as well. x floor: the time over the floor's, round by "
    "round. The bytes of each pass: bench/row_ops.py.",
    "allocator: warm for everybody; freed memory is kept, so outputs cost no page faults.",
    "us behind: the difference of the medians, fastopt's less ATen's.",
    "Before it is timed, what a function returns is compared with torch's in float32: the mean "
    "error of y and of each gradient is in the JSON file, ATen's too.",
)


def rows(records: Iterable[Record]) -> Iterator[Row]:
    """One row for each case but the tiny ones."""
    for record in records:
        if "times" not in record or record["tiny"]:
            continue
        goals = {goal["what"]: goal for goal in record["goals"]}
        times, floor = record["times"], record["times_the_floor"]
        compiled = times.get(COMPILE)
        cells = (
            record["case"],
            ms(times[FASTOPT]["ms"]),
            ms(times[ATEN]["ms"]),
            spread(record["ratios"][ATEN]),
            _bound(goals.get(RATIO)),
            ms(times[record["floor"]]["ms"]),
            f"{floor[FASTOPT]['median']:.2f}",
            _bound(goals.get(FLOOR)),
            yes(_met(record)) if goals else "",
            f"{floor[ATEN]['median']:.2f}",
            ms(compiled["ms"]) if compiled else "",
        )
        yield Row(cells, _met(record))


def _missed(records: Iterable[Record]) -> Iterator[Row]:
    for row in rows(records):
        if not row.met:
            yield Row(row.cells[:N_PRINTED], row.met)


def tiny_rows(records: Iterable[Record]) -> Iterator[Row]:
    for record in records:
        if "times" not in record or not record["tiny"]:
            continue
        (goal,) = record["goals"]
        ours, theirs = (1e3 * record["times"][name]["ms"] for name in (FASTOPT, ATEN))
        figures = (f"{ours:.1f}", f"{theirs:.1f}", f"{record['us_behind']:+.1f}", _bound(goal))
        yield Row((record["case"], *figures, yes(goal["met"])), goal["met"])


def glance(records: Iterable[Record]) -> Iterator[Row]:
    """Times as fast as ATen, forward / forward + backward, and the goals in brackets."""
    found = {(r["op"], r["dtype"], r["shape"], r["pass"]): r for r in records if "goals" in r}
    for op in OPS:
        cells, met = [op], True
        for column in GLANCE:
            pair = [found.get((op, *column, which)) for which in (FORWARD, BOTH)]
            cells.append(_pair(pair))
            goals = [goal for r in pair if r for goal in r["goals"] if goal["what"] == RATIO]
            met &= all(goal["met"] for goal in goals)
        if any(cells[1:]):
            yield Row(tuple(cells), met)


def _pair(pair: list[Record | None]) -> str:
    goals = [_goal(record, RATIO) for record in pair]
    if not any(goals):
        return ""
    values = " / ".join(f"{goal['value']:.2f}" if goal else "-" for goal in goals)
    bounds = " / ".join(_bound(goal) or "-" for goal in goals)
    missed = "" if all(goal is None or goal["met"] for goal in goals) else ", missed"
    return f"{values} ({bounds}{missed})"


def _goal(record: Record | None, what: str) -> Record | None:
    goals = record["goals"] if record else ()
    return next((goal for goal in goals if goal["what"] == what), None)


def _met(record: Record) -> bool:
    return all(goal["met"] for goal in record["goals"])


def _bound(goal: Record | None) -> str:
    return f"{goal['bound']:g}" if goal else ""


def summary(report: Record) -> list[str]:
    """How many goals of each kind are met, the mean over the matrix and the smallest ratio."""
    records = [record for record in report["cases"] if "goals" in record]
    lines = []
    for what in (RATIO, FLOOR, BEHIND):
        goals = [goal for record in records for goal in record["goals"] if goal["what"] == what]
        if goals:
            met = sum(goal["met"] for goal in goals)
            lines.append(f"Goals in {what}: {met} of {len(goals)} met.")
    mean = report["geometric_mean"]
    if mean:
        lines.append(
            f"Times as fast as ATen, geometric mean over {mean['cases']} of {mean['of']} cases: "
            f"{mean['value']:.2f} (forward {mean[FORWARD]:.2f}, forward + backward "
            f"{mean[BOTH]:.2f}), at least {mean['at_least']:g}: {yes(mean['met'])}."
        )
        worst = min(
            (record for record in records if not record["tiny"]),
            key=lambda record: record["ratios"][ATEN]["median"],
        )
        smallest = spread(worst["ratios"][ATEN])
        lines.append(f"The smallest ratio is {smallest}, in {worst['case']}.")
    return lines


def _remarks(report: Record) -> list[str]:
    return [*render.failures(report["cases"]), *summary(report), render.conditions(report)]


def _skipped(records: Iterable[Record]) -> list[str]:
    """Why a provider has no time, and in how many cases."""
    counts: dict[str, int] = {}
    for record in records:
        for name, reason in record.get("skipped", {}).items():
            line = f"{name}: {reason}"
            counts[line] = counts.get(line, 0) + 1
    return [f"Left out in {n} case{'s' * (n != 1)}: {line}" for line, n in counts.items()]


def print_report(console: Console, report: Record) -> None:
    """The goals at a glance, and every case that misses one; all of them are in the Markdown."""
    records = report["cases"]
    tables = [
        (GLANCE_COLUMNS, glance(records)),
        (COLUMNS[:N_PRINTED], _missed(records)),
        (TINY_COLUMNS, tiny_rows(records)),
    ]
    for columns, lines in tables:
        here = list(lines)
        if here:
            render.print_table(console, columns, here, LEFT)
    render.print_lines(console, [*_remarks(report), *_skipped(records)])


def at_a_glance(report: Record) -> str:
    """The goals, and on what machine: for README and docs."""
    cells = [row.cells for row in glance(report["cases"])]
    return "\n\n".join([markdown_table(GLANCE_COLUMNS, cells), *_remarks(report)]) + "\n"


def markdown(report: Record) -> str:
    """The whole report: goals, every case, notes and conditions."""
    records = report["cases"]
    tables = [
        ("## Times as fast as ATen, forward / forward + backward (goals)", GLANCE_COLUMNS, glance),
        ("## Every case", COLUMNS, rows),
        ("## Below 16 Ki elements", TINY_COLUMNS, tiny_rows),
    ]
    parts = ["# Row functions on a CPU", *_remarks(report)]
    for title, columns, lines in tables:
        cells = [row.cells for row in lines(records)]
        if cells:
            parts += [title, markdown_table(columns, cells)]
    parts += ["## What the columns mean", "\n".join(f"- {note}" for note in NOTES)]
    return "\n\n".join([*parts, *_skipped(records)]) + "\n"
