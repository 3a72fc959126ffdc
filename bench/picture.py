"""Draw the README's picture: the time of a step beside torch's and other libraries', as bars.

python -m bench.picture            from bench/results/*.json into docs/steps.svg
python -m bench.picture --check    exit status 1 where the picture shows something else
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PICTURE = ROOT / "docs" / "steps.svg"

# Case and allocator in cpu_optim.json, and the title of its panel.
STEPS = (
    ("AdamW gpt2", "warm", "AdamW, the 148 tensors of GPT-2 (124 million parameters)"),
    ("AdamW 1000x1000", "default", "AdamW, 1000 tensors of 1000 parameters"),
    ("AdamW 33m bf16", "warm", "AdamW, 33 million parameters in bfloat16"),
)
PEERS_TITLE = "AdamW with 8-bit states, 33 million parameters"
# Pixels.
WIDTH, LEFT, RIGHT, BAR, GAP, PANEL_GAP = 760, 130, 90, 18, 6, 22
OURS, THEIRS, INK, PAPER = "#0b6e4f", "#b8bfc6", "#1f2328", "#ffffff"


class Panel(NamedTuple):
    """One comparison: milliseconds a step by provider, fastopt first."""

    title: str
    ms: dict[str, float]


def panels(optim: dict[str, Any], passes: dict[str, Any]) -> Iterator[Panel]:
    """The comparisons that are drawn, from the contents of cpu_optim.json and cpu_passes.json."""
    for case, allocator, title in STEPS:
        (record,) = (
            r
            for r in optim["cases"]
            if r["case"] == case and r["allocator"] == allocator and "times" in r
        )
        yield Panel(title, _ordered(record["times"].items(), set(record["kernels"])))
    times = [item for record in passes["peers"] for item in record.get("times", {}).items()]
    yield Panel(PEERS_TITLE, _ordered(times, set()))


def _ordered(times: Iterable[tuple[str, dict[str, Any]]], without: set[str]) -> dict[str, float]:
    """Milliseconds by provider, fastopt first, then from fast to slow.

    A provider that was timed several times, each beside another, counts with its slowest.
    """
    ms: dict[str, float] = {}
    for provider, time in times:
        if provider not in without:
            ms[provider] = max(time["ms"], ms.get(provider, 0.0))
    return dict(sorted(ms.items(), key=lambda item: (item[0] != "fastopt", item[1])))


def draw(shown: Iterable[Panel], caption: str) -> str:
    """The picture as SVG: a panel below the other, bars in proportion within a panel."""
    parts, y = [], 24
    for panel in shown:
        parts.append(_text(12, y, panel.title, "bold"))
        y += 10
        scale = (WIDTH - LEFT - RIGHT) / max(panel.ms.values())
        for provider, ms in panel.ms.items():
            color = OURS if provider == "fastopt" else THEIRS
            middle = y + BAR - 5
            parts += [
                _text(LEFT - 8, middle, provider, anchor="end"),
                f'<rect x="{LEFT}" y="{y}" width="{max(ms * scale, 1):.1f}" height="{BAR}" '
                f'fill="{color}"/>',
                _text(LEFT + ms * scale + 6, middle, f"{ms:.3g} ms"),
            ]
            y += BAR + GAP
        y += PANEL_GAP
    parts.append(_text(12, y, caption))
    height = y + 14
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13" fill="{INK}">'
    )
    paper = f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>'
    return "\n".join((head, paper, *parts, "</svg>")) + "\n"


def _text(x: float, y: float, text: str, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.picture", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    optim, passes = (
        json.loads((RESULTS / name).read_text()) for name in ("cpu_optim.json", "cpu_passes.json")
    )
    machine = optim["machine"]
    caption = f"Median time of step() on {machine['cores']} cores of an {machine['cpu']}; shorter "
    svg = draw(panels(optim, passes), f"{caption}is better. Each panel has its own scale.")
    if check:
        return int(PICTURE.read_text() != svg)
    PICTURE.write_text(svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
