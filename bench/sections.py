"""A section of a report in a process of its own: what the report does, and what the process does.

The process prints JSON objects, one a line, and is started in the environment that puts the
allocator in its state. A crash costs the cases that the process did not live to measure.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from rich.console import Console

from bench.allocator import environment
from fastopt.cli.shared.files import write_whole

# Wide enough for the tables where there is no terminal to fit them to.
LOG_WIDTH = 140

Record = dict[str, Any]


class AnyCase(Protocol):
    """What a case of any report has."""

    @property
    def name(self) -> str: ...

    @property
    def allocator(self) -> str: ...


C = TypeVar("C", bound=AnyCase)


def _records(module: str, section: str, allocator: str, flags: list[str]) -> Iterator[Record]:
    """The records of one process as they come."""
    command = [sys.executable, "-m", module, section, "--allocator", allocator, *flags]
    with subprocess.Popen(
        command, env=environment(allocator), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode != 0:
        raise RuntimeError(f"the process exited with status {process.returncode}")


def run(
    module: str,
    section: str,
    allocator: str,
    here: Sequence[C],
    flags: list[str],
    judged: Callable[[Record, C], Record],
) -> Iterator[Record]:
    """What `python -m module section` prints: a judged record for each case here, in order.

    Those the process did not live to measure are errors.
    """
    missing = list(here)
    reason = "the process ended early"
    try:
        for record in _records(module, section, allocator, flags):
            yield judged(record, missing.pop(0)) if "case" in record else record
    except RuntimeError as error:
        reason = str(error)
    for case in missing:
        yield {"case": case.name, "allocator": case.allocator, "error": reason}


def records_file() -> TextIO:
    """Where a process writes its records; from here on all that is printed goes to stderr.

    Compilers and peers print to stdout: the records leave by a descriptor of their own.
    """
    records = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return records


def emit(
    file: TextIO,
    here: Iterable[C],
    measure: Callable[[C], Record],
    facts: Callable[[C], Record],
) -> None:
    """Write the record of each case; an error is one, with the facts of its case."""
    for case in here:
        try:
            record = measure(case)
        except Exception as error:
            traceback.print_exc()
            record = {**facts(case), "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(record), file=file)
        gc.collect()


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def publish(folder: Path, stem: str, report: Record, markdown: str) -> None:
    """Print a report, and write it."""
    console = make_console()
    console.print(markdown)
    write(folder, stem, report, markdown, console)


def write(folder: Path, stem: str, report: Record, markdown: str, console: Console) -> None:
    """stem.json and stem.md, each whole or not at all."""
    write_whole(folder / f"{stem}.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(folder / f"{stem}.md", markdown.encode())
    console.print(f"Written: {folder / stem}.json and {stem}.md")
