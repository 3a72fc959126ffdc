"""Whether and how a launch runs on several threads: Numba's pool, under torch's thread count."""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import Any

import numba
from numba.np.ufunc import parallel

# The OpenMP fork costs 2-5 us: below this many elements one thread is done sooner.
SERIAL_BELOW = 32768

_workqueue_lock = threading.Lock()
_forked = False


def _after_fork() -> None:
    # GNU OpenMP does not survive a fork: a forked child (a DataLoader worker) runs on one thread.
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def worth_it(n_threads: int, n_elements: int) -> bool:
    """Whether several threads may and should share so many elements."""
    return n_threads > 1 and n_elements >= SERIAL_BELOW and not _forked


def run_parallel(entry: Any, args: tuple[Any, ...], n_threads: int) -> None:
    """Call a kernel with a parallel loop in it, on at most `n_threads` threads."""
    one_at_a_time = _one_at_a_time()  # launches the threads
    n_threads = min(n_threads, numba.config.NUMBA_NUM_THREADS)
    # Numba's own get_num_threads takes a lock first: 1.5 us.
    before = parallel._get_num_threads()
    if before != n_threads:
        numba.set_num_threads(n_threads)
    try:
        if one_at_a_time:
            with _workqueue_lock:
                entry(*args)
        else:
            entry(*args)
    finally:
        if before != n_threads:
            numba.set_num_threads(before)


@cache
def _one_at_a_time() -> bool:
    """Numba's workqueue aborts the process when two threads enter it at once."""
    parallel._launch_threads()
    return numba.threading_layer() == "workqueue"
