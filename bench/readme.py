"""Put the measured figures into README.md and docs: what a newcomer asks for, from the reports.

python -m bench.readme            from bench/results/*.json
python -m bench.readme --check    exit status 1 where a text says something else
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench import (
    accuracy,
    combinations,
    function_report,
    memory_report,
    output_report,
    pass_report,
    readme_tables,
    render,
    row_render,
    storage_report,
    training_report,
)
from bench.cases import LIMIT, NEVER_SLOWER
from bench.providers import FASTOPT
from fastopt.cli.shared.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
RESULTS = ROOT / "bench" / "results"
HEAD = (
    "| step | allocator | fastopt ms | against | its ms | times as fast |\n"
    "|---|---|--:|---|--:|--:|"
)


class Place(NamedTuple):
    """Where figures stand, between two marks, and what they come from."""

    text: Path
    mark: str
    results: tuple[str, ...]
    figures: Callable[..., str]

    @property
    def begin(self) -> str:
        names = ", ".join(self.results)
        return f"<!-- {self.mark}: written by bench/readme.py from bench/results/{names} -->\n"

    @property
    def end(self) -> str:
        return f"<!-- end of {self.mark} -->\n"


def figures(report: dict[str, Any]) -> str:
    """The table, and the machine it was measured on."""
    rows = [HEAD]
    for record in report["cases"]:
        goals = record.get("goals", ())
        rows += [_row(record, goal) for goal in goals if _is_shown(goal)]
        if "beyond_s" in record:
            rows.append(
                f"| {record['case']} | default | {1e3 * record['fastopt_s']:.0f} | torch's first "
                f"step | {1e3 * record['torch_s']:.0f} | {record['beyond_s']:+.2f} s |"
            )
    summary = render.summary(report["cases"]) or ""
    lines = ["\n".join(rows), summary, _missed(report["cases"]), render.conditions(report)]
    return "\n\n".join(lines) + "\n"


def _missed(records: list[dict[str, Any]]) -> str:
    found = (
        f"- {record['case']} (allocator {record['allocator']}): at least {goal['at_least']} times "
        f"as fast as {goal['against']}, measured "
        f"{render.spread(record['ratios'][goal['against']])}"
        for record in records
        for goal in record.get("goals", ())
        if not goal["met"]
    )
    return "\n".join(("Goals missed:", "", *found))


def _is_shown(goal: dict[str, Any]) -> bool:
    everywhere = goal["against"] == NEVER_SLOWER.against and goal["at_least"] == 1.0
    return goal["against"] != LIMIT and not everywhere


def _row(record: dict[str, Any], goal: dict[str, Any]) -> str:
    ratio = record["ratios"][goal["against"]]
    ours, theirs = record["times"][FASTOPT]["ms"], record["times"][ratio["provider"]]["ms"]
    return (
        f"| {record['case']} | {record['allocator']} | {ours:.3g} | {ratio['provider']} | "
        f"{theirs:.3g} | {ratio['median']:.2g} |"
    )


README, PERFORMANCE = ROOT / "README.md", DOCS / "performance.md"
PLACES = (
    Place(README, "storage", ("combinations.json",), readme_tables.storage),
    Place(README, "memory", ("memory.json",), readme_tables.memory),
    Place(
        README,
        "speed",
        ("cpu_optim.json", "cpu_passes.json", "cpu_rows.json"),
        readme_tables.speed,
    ),
    Place(PERFORMANCE, "figures", ("cpu_optim.json",), figures),
    Place(PERFORMANCE, "passes", ("cpu_passes.json",), pass_report.at_a_glance),
    Place(PERFORMANCE, "rows", ("cpu_rows.json",), row_render.at_a_glance),
    Place(PERFORMANCE, "functions", ("cpu_functions.json",), function_report.at_a_glance),
    Place(DOCS / "optimizers.md", "training", ("cpu_training.json",), training_report.at_a_glance),
    Place(DOCS / "optimizers.md", "memory", ("memory.json",), memory_report.at_a_glance),
    Place(DOCS / "optimizers.md", "combinations", ("combinations.json",), combinations.at_a_glance),
    Place(DOCS / "functions.md", "accuracy", ("cpu_accuracy.json",), accuracy.at_a_glance),
    Place(DOCS / "numerics.md", "roundings", ("storage.json",), storage_report.roundings),
    Place(DOCS / "design.md", "outputs", ("cpu_outputs.json",), output_report.at_a_glance),
    Place(DOCS / "design.md", "codes", ("storage.json",), storage_report.codes),
)


def with_figures(text: str, place: Place, *reports: dict[str, Any]) -> str:
    """The text with everything between the two marks replaced by the figures."""
    before, begins, rest = text.partition(place.begin)
    _, ends, after = rest.partition(place.end)
    if not begins or not ends:
        raise ValueError(
            f"{place.text.name} has no {place.begin.strip()!r} ... {place.end.strip()!r} to write "
            "the figures between"
        )
    return before + place.begin + place.figures(*reports) + place.end + after


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, say whether it fits")
    check = parser.parse_args().check
    differs = False
    for place in PLACES:
        text = place.text.read_text()
        reports = (json.loads((RESULTS / name).read_text()) for name in place.results)
        new = with_figures(text, place, *reports)
        differs |= new != text
        if not check:
            write_whole(place.text, new.encode())
    return int(check and differs)


if __name__ == "__main__":
    sys.exit(main())
