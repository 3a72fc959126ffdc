"""What the row kernels share: a task is one C function, and one loop over tasks runs them all.

A task is a block of rows (or of columns) that follows from the shape alone. It is compiled once and
called through its address, by one thread or by several, so nothing of a result depends on how many
there are.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from fastopt_kernels.cpu import cache as disk
from fastopt_kernels.cpu import memory, threads
from fastopt_kernels.cpu.xp import JIT

KINDS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
# Elements a task: enough to hide its call, few enough to divide small inputs among threads.
TASK = 8192

# Elements summed in the compute type, vectorized; the sums of these blocks are added in float64, so
# that rounding errors do not grow with the row. What does not fill the vectors is a block of its
# own: added one by one to a large sum, like elements would round alike.
BLOCK, VECTORS = 512, 64

_I64 = ir.IntType(64)


def wide(kind: str) -> str:
    """The kind of statistics, sums and scratch rows beside elements of this kind."""
    return "fp64" if kind == "fp64" else "fp32"


class Codec:
    """How a kernel reads and writes arrays of one kind: load(address, i), store(address, i, x).

    stream: tells apart, below memory.STREAMS, what shares no memory in a kernel
    own_nan: all that is stored was computed from elements of this kind alone
    """

    def __init__(self, kind: str, stream: int, own_nan: bool = True) -> None:
        self.compute, self.wide = memory.compute_type(kind), wide(kind)
        self.load = memory.make_loader(kind, self.compute, stream)
        self.store = memory.make_storer(kind, self.compute, own_nan, stream)
        self.load_order, self.unorder, self.lowest = memory.make_order(kind, self.compute, stream)
        self.itemsize = ITEMSIZE[kind]


def inlined(tag: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a part of a task; its symbols carry the task's tag."""
    return lambda function: njit(**JIT)(disk.named(function, tag))


@njit(**JIT)
def block_end(start, n):
    """Where the block of a row of n elements that begins at `start` ends."""
    left = n - start
    if left >= BLOCK:
        return start + BLOCK
    if left >= VECTORS:
        return n - left % VECTORS
    return n


@njit(**JIT)
def alive(array):
    """Called on a scratch array after its last use through an address: Numba frees an array when
    its name is used no more."""
    return array.size


@intrinsic
def _call(typingctx, function, args, task):
    """A C function of (args, task)."""

    def codegen(context, builder, signature, values):
        function, args, task = values
        prototype = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        builder.call(builder.inttoptr(function, prototype.as_pointer()), [args, task])
        return context.get_dummy_value()

    return types.void(function, args, task), codegen


@cache
def _loop(parallel: bool) -> Any:
    tasks = prange if parallel else range

    def run_tasks(function, args, n_tasks):
        for task in tasks(n_tasks):
            _call(function, args, task)

    def make(tag):
        signature = types.void(*[types.int64] * 3)
        jitted = njit(signature, parallel=parallel, **JIT)(disk.named(run_tasks, tag))
        return next(iter(jitted.overloads.values()))

    return disk.obtain(disk.key(run_tasks, parallel), make).entry_point


class Task:
    """A compiled task: `run` calls it for every task number, on one thread or several."""

    def __init__(self, build: Callable[..., Any], *specialization: object) -> None:
        """build(tag, *specialization) returns the body, a function of (args, task)."""

        def make(tag):
            body = build(tag, *specialization)
            jitted = njit(types.void(types.int64, types.int64), **JIT)(disk.named(body, tag))
            return next(iter(jitted.overloads.values()))

        self._compiled = disk.obtain(disk.key(build, *specialization), make)
        name = self._compiled.fndesc.llvm_cfunc_wrapper_name
        self._address = self._compiled.library.get_pointer_to_function(name)
        self._one_thread = _loop(False)

    def run(self, n_tasks: int, n_elements: int, *args: int) -> None:
        """Task numbers 0 to n_tasks - 1; n_elements says whether several threads are worth it."""
        packed = array("q", args)
        where = packed.buffer_info()[0]
        n_threads = torch.get_num_threads()
        if n_tasks > 1 and threads.worth_it(n_threads, n_elements):
            threads.run_parallel(_loop(True), (self._address, where, n_tasks), n_threads)
        else:
            self._one_thread(self._address, where, n_tasks)

    def run_rows(self, n_rows: int, n_cols: int, *args: int) -> None:
        """Tasks of some rows each; how many is the last argument of each task."""
        n_task = rows_of(n_cols)
        self.run(-(-n_rows // n_task), n_rows * n_cols, *args, n_task)


def rows_of(n_cols: int) -> int:
    """Rows a task."""
    return max(1, TASK // max(1, n_cols))


@lru_cache(maxsize=256)
def double_bits(x: float) -> int:
    """A float as the integer that carries it to a task."""
    return struct.unpack("q", struct.pack("d", x))[0]


@cache
def task_of(build: Callable[..., Any], *specialization: object) -> Task:
    """The compiled task of a builder and its specialization."""
    return Task(build, *specialization)
