"""Put the measured figures into README.md: the rows of the report that a newcomer asks for.

python -m bench.readme            from bench/results/cpu_optim.json
python -m bench.readme --check    exit status 1 where README.md says something else
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import render
from bench.cases import LIMIT, NEVER_SLOWER
from bench.providers import FASTOPT
from fastopt.cli.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "cpu_optim.json"
BEGIN = "<!-- figures: written by bench/readme.py from bench/results/cpu_optim.json -->\n"
END = "<!-- end of figures -->\n"
HEAD = (
    "| step | allocator | fastopt ms | against | its ms | times as fast |\n"
    "|---|---|--:|---|--:|--:|"
)


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
    lines = ["\n".join(rows), render.summary(report["cases"]) or "", render.conditions(report)]
    return "\n\n".join(lines) + "\n"


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


def with_figures(text: str, report: dict[str, Any]) -> str:
    """The text with everything between the two marks replaced by the figures."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"no {BEGIN.strip()!r} ... {END.strip()!r} to write the figures between")
    return before + BEGIN + figures(report) + END + after


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, say whether it fits")
    check = parser.parse_args().check
    text = README.read_text()
    new = with_figures(text, json.loads(RESULTS.read_text()))
    if check:
        return int(new != text)
    write_whole(README, new.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
