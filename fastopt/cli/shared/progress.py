"""Which part of a longer piece of work is under way: a bar on a terminal, else a line a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def parts(n: int) -> Iterator[Callable[[str], None]]:
    """Yields what is called with the name of each part, as it begins; goes to stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        # A thread that redraws would run inside the timed steps.
        auto_refresh=False,
    )
    task = bar.add_task("", total=n)
    begun = -1

    def begin(part: str) -> None:
        nonlocal begun
        begun += 1
        if bar.disable:
            console.print(f"{part} ...", highlight=False, soft_wrap=True, markup=False)
        bar.update(task, description=part, completed=begun)
        bar.refresh()

    with bar:
        yield begin
