"""The bandwidth of memory: streams read, written, copied and updated with no arithmetic.

Every task takes its share of each stream in turn, a piece at a time. The pieces set how many
streams are under way at once; the fastest size of them is the limit.
"""

from __future__ import annotations

import numpy as np
from numba import types

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.vector_math import add

# A row of the table: mode, source, target, elements of 4 bytes.
READ, WRITE, COPY, UPDATE = range(4)
_args = memory.make_row(types.int64, 5)
# Bytes of a stream that a task moves; more than this many tasks gain nothing.
TASK, MOST_TASKS = 1 << 16, 4096


def _stream(tag):
    """A share of every stream, in `n_pieces` pieces."""
    row = memory.make_row(types.int64, 4)
    load = memory.make_loader("fp32", types.float32, 0)
    store = memory.make_storer("fp32", types.float32, True, 1)
    load_own = memory.make_loader("fp32", types.float32, 2)
    store_own = memory.make_storer("fp32", types.float32, True, 2)
    one = np.float32(1)

    @tasks.inlined(tag)
    def move(mode, source, target, first, last):
        total = np.float32(0)
        if mode == READ:
            for i in range(first, last):
                total = add(total, load(source, i))
        elif mode == WRITE:
            for i in range(first, last):
                store(target, i, one)
        elif mode == COPY:
            for i in range(first, last):
                store(target, i, load(source, i))
        else:
            for i in range(first, last):
                store_own(target, i, load_own(target, i) + one)
        return total

    def stream(args, task):
        table, n_streams, n_tasks, n_pieces, sums = _args(args, 0)
        total = np.float32(0)
        for piece in range(task * n_pieces, (task + 1) * n_pieces):
            for k in range(n_streams):
                mode, source, target, n = row(table, k)
                first, last = (
                    n * piece // (n_tasks * n_pieces),
                    n * (piece + 1) // (n_tasks * n_pieces),
                )
                total = add(total, move(mode, source, target, first, last))
        store(sums, task, total)

    return stream


class Streams:
    """Streams of these lengths in bytes, by mode, and a pass over all of them.

    memory: (source, target) of each; sums: of what each task read or moved
    """

    def __init__(self, streams: list[tuple[int, int]]) -> None:
        """streams: (mode, bytes) each"""
        self.memory = []
        table = []
        for mode, n_bytes in streams:
            n = max(1, n_bytes // 4)
            source, target = (np.ones(n, dtype=np.float32) for _ in range(2))
            self.memory.append((source, target))
            table.append((mode, source.ctypes.data, target.ctypes.data, n))
        self._table = np.array(table, dtype=np.int64)
        self._n = int(self._table[:, 3].sum())
        longest = 4 * int(self._table[:, 3].max())
        self._n_tasks = min(MOST_TASKS, max(1, longest // TASK))
        self.sums = np.zeros(self._n_tasks, dtype=np.float32)

    def run(self, n_pieces: int) -> None:
        """Move every stream once, each task's share in so many pieces."""
        numbers = (self._table.ctypes.data, len(self._table), self._n_tasks, n_pieces)
        task = tasks.task_of(_stream)
        tasks.run(task, self._n_tasks, self._n, (*numbers, self.sums.ctypes.data))
