"""The records of a report as tables: on the terminal by rich, and in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.allocator import DEFAULT
from bench.cases import LIMIT, TORCH_BEST
from bench.providers import FASTOPT, LOOP

Record = dict[str, Any]

COLUMNS = (
    "case", "allocator", "fastopt ms", "against", "its ms", "times as fast", "at least", "met",
    "GB/s", "share of limit",
)  # fmt: skip
NOTES = (
    "All times are of `optimizer.step()` whole, through the public class; gradients are put in "
    "place outside of it. A ratio is the median over rounds in which all take turns, with its "
    "quartiles.",
    "GB/s: the bytes no step can avoid (gradient, parameter and states read, parameter and states "
    "written), over the time of the step.",
    "share of limit: of the fastest kernel with trivial arithmetic that moves the same bytes in "
    "the same chunks, in the same rounds. Small models lie in the caches.",
    "allocator: warm, freed memory is kept, so temporaries cost no page faults; default, as a user "
    "has it: glibc returns large blocks, and each new one costs page faults.",
    "first step: a new process from `import torch` to the end of its first step; what counts is "
    "what fastopt adds to torch's.",
    "rebound: gradients are new tensors at other addresses each step, as zero_grad() and a "
    "backward leave them (where nothing is said); flat: views of one buffer, as DDP's "
    "gradient_as_bucket_view makes them.",
)


@dataclass(frozen=True)
class Row:
    """One goal of one case."""

    cells: tuple[str, ...]
    met: bool


def rows(records: Iterable[Record]) -> Iterator[Row]:
    for record in records:
        if "beyond_s" in record:
            yield _first_step_row(record)
        elif "goals" in record:
            yield from (_goal_row(record, goal) for goal in record["goals"])


def failures(records: Iterable[Record]) -> list[str]:
    """What could not be measured, and why."""
    return [
        f"Not measured: {record['case']} (allocator {record['allocator']}): {record['error']}"
        for record in records
        if "error" in record
    ]


def _goal_row(record: Record, goal: Record) -> Row:
    against = goal["against"]
    ratio = record["ratios"][against]
    times, ours = record["times"], record["times"][FASTOPT]
    provider = ratio["provider"]
    target = f"{goal['at_least']:g}"
    if goal["stretch"]:
        target += f" ({goal['stretch']:g})"
    share = record["ratios"].get(LIMIT)
    cells = (
        record["case"],
        record["allocator"],
        ms(ours["ms"]),
        against if provider == against else f"{against}: {provider}",
        ms(times[provider]["ms"]),
        spread(ratio),
        target,
        yes(goal["met"]),
        f"{ours['gb_per_s']:.1f}",
        f"{share['median']:.2f}" if share else "",
    )
    return Row(cells, goal["met"])


def _first_step_row(record: Record) -> Row:
    cells = (
        record["case"],
        DEFAULT,
        ms(1e3 * record["fastopt_s"]),
        LOOP,
        ms(1e3 * record["torch_s"]),
        f"{record['beyond_s']:+.2f} s",
        f"at most {record['at_most_s']:g} s",
        yes(record["met"]),
    )
    return Row(cells + ("",) * (len(COLUMNS) - len(cells)), record["met"])


def summary(records: Iterable[Record]) -> str | None:
    """The case in which fastopt gains least on the best that torch has."""
    measured = [record for record in records if "ratios" in record]
    if not measured:
        return None
    worst = min(measured, key=lambda record: record["ratios"][TORCH_BEST]["median"])
    ratio = worst["ratios"][TORCH_BEST]
    plural = "s" * (len(measured) != 1)
    return (
        f"Never slower than torch's best: over {len(measured)} case{plural} the smallest ratio is "
        f"{spread(ratio)}, in {worst['case']} (allocator {worst['allocator']}) against "
        f"{ratio['provider']}."
    )


def conditions(report: Record) -> str:
    """The machine in two sentences."""
    machine, copy = report["machine"], report["copy_gb_per_s"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    copied = f"; a plain copy moves {copy:.1f} GB/s" if copy else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads ({caches}), "
        f"{machine['memory_gib']} GiB of memory, transparent huge pages "
        f"{machine['transparent_huge_pages'] or 'unknown'}{copied}. "
        f"{machine['system']}, Python {machine['python']}, {packages}; "
        f"commit {machine['commit'] or 'unknown'}, {machine['date']}"
        + (", a quick run: rough figures." if report["quick"] else ".")
    )


def print_report(console: Console, report: Record) -> None:
    left = ("case", "allocator", "against", "met")
    print_table(console, COLUMNS, rows(report["cases"]), left)
    print_lines(console, _remarks(report))


def print_table(
    console: Console, columns: Sequence[str], rows: Iterable[Row], left: Collection[str]
) -> None:
    """left: the columns of words; what is not met stands out."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(
            name, justify="left" if name in left else "right", no_wrap=name != columns[0]
        )
    for row in rows:
        table.add_row(*row.cells, style=None if row.met else "bold red")
    console.print(table)


def print_lines(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _remarks(report: Record) -> list[str]:
    records = report["cases"]
    lines = [*failures(records), summary(records), conditions(report)]
    return [line for line in lines if line]


def markdown(report: Record) -> str:
    """The whole report: goals, every provider's time in every case, notes and conditions."""
    records = report["cases"]
    measured = [record for record in records if "times" in record]
    providers = list(dict.fromkeys(name for r in measured for name in _providers(r)))
    header = ("case", "allocator", "tensors", "elements", *providers, "page faults a step")
    parts = [
        "# Optimizer steps on a CPU",
        markdown_table(COLUMNS, (row.cells for row in rows(records))),
        *_remarks(report),
        "## Every provider, ms a step",
        markdown_table(header, (_time_cells(record, providers) for record in measured)),
        "A dash: the provider has no such step, or it was left out; the JSON file says why. Page "
        "faults: fastopt's, then those of the provider that has most.",
        "## What the columns mean",
        "\n".join(f"- {note}" for note in NOTES),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _providers(record: Record) -> list[str]:
    return [name for name in record["times"] if name not in record["kernels"]]


def _time_cells(record: Record, providers: list[str]) -> tuple[str, ...]:
    times = record["times"]
    faults = {name: times[name]["page_faults"] for name in _providers(record)}
    most = max(faults, key=lambda name: faults[name])
    return (
        record["case"],
        record["allocator"],
        f"{record['tensors']:,}",
        f"{record['elements']:,}",
        *[ms(times[name]["ms"]) if name in times else "-" for name in providers],
        f"{faults[FASTOPT]:,}; {faults[most]:,} ({most})",
    )


def markdown_table(header: Iterable[str], lines: Iterable[tuple[str, ...]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    header = tuple(header)
    return "\n".join([line(header), line("---" for _ in header), *map(line, lines)])


def spread(ratio: Record) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def ms(x: float) -> str:
    """Three digits that count."""
    return f"{x:.4f}" if x < 0.1 else f"{x:.3f}" if x < 10 else f"{x:.1f}"


def yes(met: bool) -> str:
    return "yes" if met else "no"
