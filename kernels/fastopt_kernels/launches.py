"""Every launch of a kernel has a name: torch's profiler shows it as `fastopt::<name>`, and a
watcher may time it. Where neither is there, a launch pays for two look-ups."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.autograd import profiler

# watcher(name, kernel, idle) is entered around each launch. kernel: what was compiled; idle: calls
# it the same way with nothing to do, where that can be told apart.
Watcher = Callable[[str, Any, Callable[[], Any] | None], AbstractContextManager[Any]]
_watcher: Watcher | None = None


def unseen() -> bool:
    """True without a watcher and without torch's profiler, which is nearly always."""
    return _watcher is None and not profiler._is_profiler_enabled


def _entered() -> str:
    """The function by which the kernels were entered: layer_norm_backward, whatever it calls."""
    frame, name = sys._getframe(1), ""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("fastopt_kernels."):
            name = frame.f_code.co_name
        elif name:
            break
        frame = frame.f_back  # type: ignore[assignment]
    return name


@contextmanager
def _seen(name: str, kernel: Any, idle: Callable[[], Any] | None) -> Iterator[None]:
    watching = nullcontext() if _watcher is None else _watcher(name, kernel, idle)
    with profiler.record_function(f"fastopt::{name}"), watching:
        yield


def seen(
    name: str | None, kernel: Any, idle: Callable[[], Any] | None = None
) -> AbstractContextManager[None]:
    """Around a launch that somebody looks at; without a name it has that of the function by which
    the kernels were entered."""
    return _seen(name or _entered(), kernel, idle)


def start(kernel: Any, grid: Any, *args: Any, name: str | None = None, **constants: Any) -> None:
    """kernel[grid](...) of Triton."""
    if unseen():
        kernel[grid](*args, **constants)
    else:
        with seen(name, kernel):
            kernel[grid](*args, **constants)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Every launch inside passes by this watcher, of any thread: a backward runs on another."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before
