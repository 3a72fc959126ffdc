"""Launches on several threads: Numba's pool, under torch's thread count."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import warnings
from typing import Any

import numba
from numba.core import config
from numba.np.ufunc import parallel

# The OpenMP fork costs 2-5 us: below this many elements one thread is done sooner.
SERIAL_BELOW = 32768

# Numba's threading layers, and the modules that they are in.
_LAYERS = {"tbb": "tbbpool", "omp": "omppool", "workqueue": "workqueue"}
# What other values of NUMBA_THREADING_LAYER choose from. GNU OpenMP does not survive a fork.
_KINDS = {
    "safe": ("tbb",),
    "threadsafe": ("tbb", "omp"),
    "forksafe": tuple(_LAYERS) if sys.platform != "linux" else ("tbb", "workqueue"),
}

# The layer of this process, once its threads are started.
_layer: str | None = None
# What was asked for in its place and is not there, as VARIABLE=value.
missing: str | None = None
_start_lock = threading.Lock()
_workqueue_lock = threading.Lock()
_forked = False


def _after_fork() -> None:
    # GNU OpenMP does not survive a fork: a forked child (a DataLoader worker) runs on one thread.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def worth_it(n_threads: int, n_elements: int) -> bool:
    """True where several threads may and should share so many elements; starts them the first
    time: compiling or loading a kernel for several threads would do that otherwise."""
    if n_threads > 1 and n_elements >= SERIAL_BELOW and not _forked:
        if _layer is None:
            _start()
        return True
    return False


def run_parallel(entry: Any, args: tuple[Any, ...], n_threads: int) -> None:
    """Call a kernel with a parallel loop in it, on at most `n_threads` threads."""
    n_threads = min(n_threads, config.NUMBA_NUM_THREADS)
    # Numba's own get_num_threads takes a lock first: 1.5 us.
    before = parallel._get_num_threads()
    if before != n_threads:
        numba.set_num_threads(n_threads)
    try:
        if _layer == "workqueue":  # it aborts the process when two threads enter it at once
            with _workqueue_lock:
                entry(*args)
        else:
            entry(*args)
    finally:
        if before != n_threads:
            numba.set_num_threads(before)


def _start() -> None:
    """Start Numba's threads, and leave the number of torch's as it is.

    Numba sets OpenMP's number of threads, which every thread has for itself and torch reads: a
    thread of its own does that. TBB has to be started by one that stays.
    """
    global _layer
    with _start_lock:
        if _layer is not None:
            return
        if not parallel._is_initialized:
            layer, asked = _choose(), (config.THREADING_LAYER, config.THREADING_LAYER_PRIORITY)
            config.THREADING_LAYER, config.THREADING_LAYER_PRIORITY = layer, list(_LAYERS)
            try:
                if layer == "tbb":
                    parallel._launch_threads()
                else:
                    _launch_apart()
            finally:
                config.THREADING_LAYER, config.THREADING_LAYER_PRIORITY = asked
        _layer = numba.threading_layer()
    if missing is not None:
        warnings.warn(
            f"Numba has no threading layer here for {missing}: fastopt's kernels run on {_layer}. "
            f"Unset {missing.partition('=')[0]}, or install that layer.",
            RuntimeWarning,
            stacklevel=2,
        )


def _launch_apart() -> None:
    """Start the threads from a thread of its own."""
    errors: list[BaseException] = []

    def launch() -> None:
        try:
            parallel._launch_threads()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _choose() -> str:
    """The threading layer that is asked for; where that is not there, one that is."""
    global missing
    asked, order = str(config.THREADING_LAYER).lower(), config.THREADING_LAYER_PRIORITY
    if asked == "default":
        if sorted(order) == sorted(_LAYERS):
            return next(filter(_loads, order))
        missing = f"NUMBA_THREADING_LAYER_PRIORITY={' '.join(order)!r}"
    else:
        found = next(filter(_loads, (asked,) if asked in _LAYERS else _KINDS.get(asked, ())), None)
        if found is not None:
            return found
        missing = f"NUMBA_THREADING_LAYER={config.THREADING_LAYER}"
    return next(filter(_loads, ("omp", "workqueue")))


def _loads(layer: str) -> bool:
    try:
        if layer == "tbb":
            parallel._check_tbb_version_compatible()
        importlib.import_module(f"numba.np.ufunc.{_LAYERS[layer]}")
    except ImportError:
        return False
    return True
