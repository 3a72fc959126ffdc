"""Ctrl-C while a step writes: delivered at its end, so that no step is left half done.

Python runs a signal handler between any two instructions of the main thread, and the handler of
SIGINT raises KeyboardInterrupt there: between two launches, or between the count of a step and its
launch. `hold` puts a handler in its place that only notes the signal.
"""

from __future__ import annotations

# The C functions: signal.signal turns numbers into enums, which takes ten times as long (12 us).
import _signal  # type: ignore[import-not-found]
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

Handler: TypeAlias = Callable[[int, FrameType | None], Any]

_SIGINT = int(_signal.SIGINT)
_noted: list[FrameType | None] = []
_main_thread = threading.main_thread().ident


def _after_fork() -> None:
    """The thread that forks is the main one of the child."""
    global _main_thread
    _main_thread = threading.get_ident()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _note(signum: int, frame: FrameType | None) -> None:
    _noted[:] = [frame]


def hold() -> Handler | None:
    """Defer SIGINT, and return the handler that `release` puts back.

    None where there is nothing to defer: outside the main thread, where another `hold` is in force,
    and where no Python function handles the signal.
    """
    if threading.get_ident() != _main_thread:
        return None
    handler: Handler | None = _signal.getsignal(_SIGINT)
    if handler is _note or not callable(handler):
        return None
    _signal.signal(_SIGINT, _note)
    return handler


def release(handler: Handler | None) -> None:
    """Put a handler back that `hold` returned, and call it if the signal came meanwhile."""
    if handler is None:
        return
    _signal.signal(_SIGINT, handler)
    if _noted:
        handler(_SIGINT, _noted.pop())


@contextmanager
def deferred() -> Iterator[None]:
    """SIGINT is delivered at the end of the block."""
    handler = hold()
    try:
        yield
    finally:
        release(handler)
