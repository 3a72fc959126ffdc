"""A profile as one HTML file that needs no other: its lines, a roofline, bandwidth against size."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from html import escape

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastopt.cli.demo.figure import FAINT, INK, STYLE
from fastopt.cli.profile import lines
from fastopt.cli.profile.measure import Profile

OURS, LIMIT = "#0b6e4f", "#f29e4c"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: {ink}; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; }} th, td {{ text-align: left; vertical-align: top;
  padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #dde3e9; }}
th {{ white-space: nowrap; }} img {{ max-width: 100%; }} p {{ color: {faint}; }}
</style></head><body>
<h1>fastopt profile: {title}</h1>
{body}
</body></html>
"""


def page(profile: Profile) -> bytes:
    """The file's content."""
    launches = {
        f"{x.name}": f"{lines.ms(x.kernel_s)} in the kernel, {lines.ms(x.launch_s)} to launch"
        for x in profile.times.launches
    }
    kernels = {name: lines.facts(kernel) for name, kernel in profile.kernels.items()}
    here = lines.conditions(profile.subject.device)
    parts = [
        _table("What it takes", lines.rows(profile)),
        _picture("Roofline", lambda axes: draw_roofline(axes, profile)),
        "<p>The line is what this machine can do at most, measured in the same run: bytes moved "
        "without arithmetic, and a matrix product. A point on it could only be faster with fewer "
        "bytes or less arithmetic.</p>",
    ]
    if profile.sizes:
        parts.append(_picture("Bandwidth against size", lambda axes: draw_sizes(axes, profile)))
    parts += [
        _table("Launches", launches),
        _table("Machine code", kernels),
        _table("Machine", {name: str(value) for name, value in here.items()}),
    ]
    title = escape(lines.title(profile))
    return PAGE.format(title=title, body="\n".join(parts), ink=INK, faint=FAINT).encode()


def draw_roofline(axes: Axes, profile: Profile) -> None:
    """min(bytes a second x operations a byte, operations a second)."""
    intensity, operations = profile.intensity, profile.subject.operations
    moved, computed = profile.bytes_per_s / 1e9, profile.operations_per_s / 1e9
    ridge = computed / moved
    own = intensity or ridge
    low, high = min(own, ridge) / 8, max(own, ridge) * 8
    axes.loglog(
        [low, ridge, high], [low * moved, computed, computed], color=LIMIT, linewidth=3,
        label=f"limit: {moved:.3g} GB/s, {computed:.4g} Gop/s",
    )  # fmt: skip
    if intensity and operations:
        rate = operations / profile.times.total_s / 1e9
        axes.plot(intensity, rate, "o", color=OURS, markersize=10, label=profile.subject.name)
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("Gop/s")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def draw_sizes(axes: Axes, profile: Profile) -> None:
    """Bandwidth of the whole step, and the limit for as many bytes in the same mix."""
    n_bytes = [size.bytes for size in profile.sizes]
    limits = [size.limit_gb_per_s for size in profile.sizes]
    own = [size.gb_per_s for size in profile.sizes]
    axes.plot(n_bytes, limits, "o-", color=LIMIT, linewidth=3, label="limit")
    axes.plot(n_bytes, own, "o-", color=OURS, label=profile.subject.name)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes that a step moves")
    axes.set_ylabel("GB/s")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _picture(heading: str, draw: Callable[[Axes], None]) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 4.5), layout="constrained", facecolor="white")
        draw(figure.add_subplot())
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
    image = base64.b64encode(png.getvalue()).decode()
    name = escape(heading)
    return f'<h2>{name}</h2>\n<img alt="{name}" src="data:image/png;base64,{image}">'


def _table(heading: str, rows: Mapping[str, str]) -> str:
    cells = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items()
    )
    return f"<h2>{escape(heading)}</h2>\n<table>{cells}</table>"
