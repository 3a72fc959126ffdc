"""Train two small models with torch and with fastopt, and compare loss curves and step times.

A convolutional network learns scikit-learn's scanned digits, a character-level transformer
learns Python's own library sources; nothing is downloaded. Each is trained with
torch.optim.AdamW as it is by default, with its fused=True, with fastopt.optim.AdamW, and once more
with its norms and the loss swapped for fastopt's too (fastopt.swap).
Same seed, same batches, same initial weights. All runs of a model take every step in turn, so
that a change in the machine's speed meets them alike.

The exit status is 1 if a run did not learn or the loss curves differ by more than rounding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from fastopt.cli.shared.files import output_file, write_whole

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from fastopt.cli.demo.race import Comparison
    from fastopt.cli.demo.record import Conditions
    from fastopt.cli.demo.tasks import Task

EXTRAS = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=output_file(".png"),
        default=Path("demo.png"),
        metavar="FILE.png",
        help="the picture to write (default: demo.png)",
    )
    parser.add_argument(
        "--json",
        type=output_file(".json"),
        metavar="FILE.json",
        help="also write every loss and time, with the machine and the versions",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps: under ten seconds instead of two minutes"
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of weights, split and batches (default: 0)"
    )
    parser.add_argument(
        "--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice)"
    )


def run(options: argparse.Namespace) -> int:
    """Trains, prints the tables, writes the files; the status is 1 where the runs are not alike."""
    missing = [
        package for name, package in EXTRAS.items() if importlib.util.find_spec(name) is None
    ]
    if missing:
        return _fail(f"needs {', '.join(missing)}: pip install 'fastopt[demo]'")
    import torch

    threads_before = torch.get_num_threads()
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return _demo(options)
    except OSError as error:
        return _fail(str(error))
    finally:
        torch.set_num_threads(threads_before)


def _demo(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from fastopt.cli.demo import figure, record, table
    from fastopt.cli.demo.race import problems
    from fastopt.cli.demo.tasks import digits_task, text_task

    conditions = record.Conditions(options.seed, options.quick, torch.get_num_threads())
    tasks = [make(options.seed, options.quick) for make in (digits_task, text_task)]
    comparisons = _train(tasks)

    console = Console()
    table.print_table(console, comparisons)
    _print_conditions(console, comparisons, conditions)
    write_whole(options.out, figure.render(comparisons, str(conditions)))
    console.print(f"Loss curves and step times: {options.out}", highlight=False, soft_wrap=True)
    if options.json is not None:
        numbers = record.as_dict(conditions, comparisons)
        write_whole(options.json, json.dumps(numbers, indent=1, allow_nan=False).encode())
        console.print(f"Every number: {options.json}", highlight=False, soft_wrap=True)

    found = [problem for comparison in comparisons for problem in problems(comparison)]
    return _fail("; ".join(found)) if found else 0


def _train(tasks: list[Task]) -> list[Comparison]:
    """Races each task, with progress bars on a terminal and one line a task elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fastopt.cli.demo.race import providers_for, race

    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        # A thread that redraws would run inside the timed steps.
        auto_refresh=False,
    )
    providers = [providers_for(task) for task in tasks]
    bars = [
        progress.add_task(f"{task.name}, {len(runs)} runs", False, len(task.batches), loss="")
        for task, runs in zip(tasks, providers, strict=True)
    ]
    comparisons = []
    with progress:
        for task, runs, bar in zip(tasks, providers, bars, strict=True):
            if progress.disable:
                console.print(f"{task.title}: {len(runs)} runs of {len(task.batches)} steps")
            progress.start_task(bar)
            comparisons.append(race(task, runs, _advance(progress, bar)))
    return comparisons


def _advance(progress: Progress, bar: TaskID) -> Callable[[float], None]:
    """The function race() calls after each step; it redraws ten times a second at most."""
    drawn = 0.0

    def on_step(loss: float) -> None:
        nonlocal drawn
        progress.update(bar, advance=1, loss=f"loss {loss:.3f}")
        now = monotonic()
        if now - drawn > 0.1:
            progress.refresh()
            drawn = now

    return on_step


def _print_conditions(
    console: Console, comparisons: list[Comparison], conditions: Conditions
) -> None:
    """The machine, and what the medians leave out: the first steps, which compile kernels."""
    first, last = comparisons[0].runs, comparisons[-1].runs
    step = ", ".join(f"{run.provider} {1e3 * run.optimizer_s[0]:.0f} ms" for run in first)
    whole = ", ".join(f"{run.provider} {1e3 * run.step_s[0]:.0f} ms" for run in last)
    console.print(f"First step(), with kernels to compile or load: {step}.", highlight=False)
    console.print(f"First whole step of the {comparisons[-1].task.name}: {whole}.", highlight=False)
    console.print(f"{conditions}.", style="dim", highlight=False)


def _fail(message: str) -> int:
    print(f"fastopt demo: {message}", file=sys.stderr)
    return 1


def _threads(text: str) -> int:
    return _whole_number(text, 1, 1024)


def _seed(text: str) -> int:
    return _whole_number(text, 0, 2**32 - 1)


def _whole_number(text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
    return int(text)
