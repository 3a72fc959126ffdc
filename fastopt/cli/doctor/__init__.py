"""Say what fastopt finds on this machine, what is wrong with it, and what to do about that.

Versions, backends (each runs a row function and a step, and compares them with torch in float64),
threads, caches, memory and the kernels kept on disk. Takes some seconds.

The exit status is 0 where everything is well, and 1 where there is a problem; hints do not count.

With --clear-cache it removes the kernels kept on disk instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastopt.cli.doctor.findings import Finding

Facts = dict[str, Any]
Lines = list[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print every fact and finding as JSON")
    parser.add_argument(
        "--clear-cache",
        action="store_true",
        help="remove the compiled kernels kept on disk, and nothing else",
    )


def run(options: argparse.Namespace) -> int:
    """Examines, prints; the status is 1 where a finding is serious."""
    if options.clear_cache:
        return _clear_cache(options.json)
    from fastopt.cli.doctor.examine import examine
    from fastopt.cli.doctor.findings import findings

    if sys.stderr.isatty():
        # A spinner would run beside what is measured.
        print("running kernels and measuring memory, some seconds ...", file=sys.stderr)
    facts = examine()
    found = findings(facts)
    healthy = not any(finding.serious for finding in found)
    if options.json:
        report = {"healthy": healthy, "findings": [asdict(one) for one in found], **facts}
        print(json.dumps(report, indent=1))
    else:
        _print(list(sections(facts)), found)
    return 0 if healthy else 1


def _clear_cache(as_json: bool) -> int:
    """Removes the kernels on disk; the status is 1 where that is not possible."""
    from fastopt_kernels.cpu.base import cache_folder

    folder = cache_folder.folder()
    try:
        if not folder.is_absolute():
            raise OSError("not an absolute path")
        n_files, n_bytes = cache_folder.clear(folder)
    except OSError as error:
        print(f"fastopt: {folder} is not cleared: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps({"folder": str(folder), "files": n_files, "bytes": n_bytes}))
    else:
        print(f"removed {n_files} files, {n_bytes} bytes, from {folder}")
    return 0


def _print(parts: list[tuple[str, Lines]], found: list[Finding]) -> None:
    from fastopt.cli.shared import plain

    if plain.is_terminal():
        _print_rich(parts, found)
        return
    width = max(len(label) for _, lines in parts for label, _ in lines)
    for title, lines in parts:
        print(title)
        for label, value in lines:
            print(f"  {label.ljust(width)}  {value}".rstrip())
    for finding in found:
        print(f"\n{_level(finding)}: {finding.what}\n  remedy: {finding.remedy}")
    print(f"\n{_verdict(found)}")


def _print_rich(parts: list[tuple[str, Lines]], found: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    width = max(len(label) for _, lines in parts for label, _ in lines)
    for title, lines in parts:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=width + 2, no_wrap=True, style="dim")
        for label, value in lines:
            table.add_row(Text(f"  {label}"), Text(value))
        console.print(Text(title, style="bold"))
        console.print(table)
    for finding in found:
        style = "bold red" if finding.serious else "bold yellow"
        console.print()
        console.print(Text.assemble((f"{_level(finding)}: ", style), finding.what))
        console.print(Text.assemble(("  remedy: ", "bold"), finding.remedy), soft_wrap=True)
    console.print()
    style = "bold red" if any(finding.serious for finding in found) else "bold green"
    console.print(Text(_verdict(found), style=style))


def _level(finding: Finding) -> str:
    return "problem" if finding.serious else "hint"


def _verdict(found: list[Finding]) -> str:
    n_problems = sum(finding.serious for finding in found)
    n_hints = len(found) - n_problems
    hints = f", {n_hints} hint{'s' * (n_hints != 1)}" if n_hints else ""
    if n_problems:
        return f"not healthy: {n_problems} problem{'s' * (n_problems != 1)}{hints}"
    return f"healthy{hints}"


def sections(facts: Facts) -> Iterator[tuple[str, Lines]]:
    """The facts as titles over lines of a label and a value."""
    yield "versions", [(name, found or "-") for name, found in facts["versions"].items()]
    yield "machine", _machine(facts["machine"])
    if facts["backends"]:
        yield "backends", [(name, _backend(one)) for name, one in facts["backends"].items()]
    yield "threads", _threads(facts["threads"])
    if facts["memory"]:
        yield "memory", _memory(facts["memory"])
    yield "kernels on disk", _cache(facts["cache"])


def _machine(machine: Facts) -> Lines:
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    pages = machine["transparent_huge_pages"] or "unknown"
    return [
        ("cpu", machine["cpu"]),
        ("cores", f"{machine['cores']}, {machine['usable_cpus']:g} for this process"),
        ("caches", caches or "unknown"),
        ("memory", f"{machine['memory_gib']} GiB, transparent huge pages: {pages}"),
        ("system", machine["system"]),
    ]


def _backend(backend: Facts) -> str:
    if not backend["ready"]:
        return f"none: {backend['why']}"
    return (
        f"{backend['compiler']} on {backend['device']}: results are torch's, "
        f"{backend['first_call_s']:.1f} s for the first calls"
    )


def _threads(threads: Facts) -> Lines:
    numba = "-" if threads["numba"] is None else threads["numba"]
    layer = threads["layer"] or "not started"
    return [
        ("layer", f"{layer} (numba)"),
        ("threads", f"torch {threads['torch']}, numba at most {numba}"),
        ("OpenMP", ", ".join(threads["openmp"]) or "none found"),
        ("child processes", _children(threads)),
    ]


def _children(threads: Facts) -> str:
    if threads["forked"]:
        return "this is a forked one: nothing was run or measured"
    return f"by {threads['start_method']}; a forked one runs CPU kernels on one thread"


def _memory(memory: Facts) -> Lines:
    output, kept = memory["output"], memory["output_kept"]
    lines = [
        ("copy", f"{memory['copy_gb_per_s']:.1f} GB/s, read and written"),
        (
            "64 MB output",
            f"new {output['fresh_ms']:.1f} ms ({output['page_faults']} page faults), "
            f"reused {output['reused_ms']:.1f} ms",
        ),
    ]
    if kept:
        lines.append(("  memory kept", f"new {kept['fresh_ms']:.1f} ms, by GLIBC_TUNABLES"))
    return [*lines, ("allocator", memory["libc"] or "not glibc")]


def _cache(cache: Facts) -> Lines:
    return [
        ("folder", cache["folder"]),
        ("size", f"{cache['bytes'] / 2**20:.1f} MiB in {cache['kernels']} kernels"),
        ("can be written", f"no: {cache['error']}" if cache["error"] else "yes"),
    ]
