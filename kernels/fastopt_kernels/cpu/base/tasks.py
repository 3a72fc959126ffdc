"""The base of the row kernels: a task is one C function, and one loop over tasks runs them all.

A task is a block of rows (or of columns) that follows from the shape alone. It is compiled once and
called through its address, by one thread or by several, so nothing of a result depends on how many
there are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from fastopt_kernels import launches
from fastopt_kernels.cpu.base import cache as disk
from fastopt_kernels.cpu.base import memory, threads
from fastopt_kernels.cpu.base.xp import JIT

KINDS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}
# Of scratch, which is not to lie on torch's default device. By its name it takes 0.2 us to find.
CPU = torch.device("cpu")
_INTEGER, _DOUBLE = struct.Struct("q"), struct.Struct("d")
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
# Elements a task: enough to hide its call, few enough to divide small inputs among threads.
TASK = 8192

# Elements summed in the compute type, vectorized; the sums of these blocks are added in float64, so
# that rounding errors do not grow with the row. What does not fill the vectors is a block of its
# own: added one by one to a large sum, like elements would round alike.
BLOCK, VECTORS = 512, 64

_I64 = ir.IntType(64)


def kind_of(tensor: Tensor | None) -> str | None:
    """The kind that a kernel is compiled for where it takes this tensor; None for no tensor."""
    return None if tensor is None else KINDS[tensor.dtype]


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def wide(kind: str) -> str:
    """The kind of statistics, sums and scratch rows beside elements of this kind."""
    return "fp64" if kind == "fp64" else "fp32"


class Codec:
    """Reads and writes arrays of one kind in a kernel: load(address, i), store(address, i, x).

    stream: tells apart, below memory.STREAMS, what shares no memory in a kernel
    own_nan: all that is stored was computed from elements of this kind alone
    """

    def __init__(self, kind: str, stream: int, own_nan: bool = True) -> None:
        self.kind, self.compute, self.wide = kind, memory.compute_type(kind), wide(kind)
        self.load = memory.make_loader(kind, self.compute, stream)
        self.store = memory.make_storer(kind, self.compute, own_nan, stream)
        self.load_order, self.unorder, self.lowest = memory.make_order(kind, self.compute, stream)
        self.itemsize = ITEMSIZE[kind]


def inlined(tag: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a part of a task; its symbols carry the task's tag."""
    return lambda function: njit(**JIT)(disk.named(function, tag))


@njit(**JIT)
def block_end(start, n):
    """The end of the block that begins at `start`, in a row of n elements."""
    left = n - start
    if left >= BLOCK:
        return start + BLOCK
    if left >= VECTORS:
        return n - left % VECTORS
    return n


# Inputs larger than this come from memory, not from a cache.
FAR = 4 << 20


@njit(**JIT)
def ahead_of(n_rows, n_cols, stride, itemsize):
    """Bytes to the row to fetch while another is computed; 0 where all lie in cache."""
    return stride * itemsize if n_rows * n_cols * itemsize > FAR else 0


@njit(**JIT)
def fetch(row, ahead, start, stop, itemsize):
    """Have elements start to stop of the row that is `ahead` bytes on read into cache: memory is
    idle while a row that lies there is computed."""
    if ahead != 0:
        for at in range(row + ahead + start * itemsize, row + ahead + stop * itemsize, 64):
            memory.prefetch(at)


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


@intrinsic
def _on_stack(typingctx, numbers):
    """The address of these integers, for as long as the caller runs."""

    def codegen(context, builder, signature, args):
        place = cgutils.alloca_once_value(builder, args[0])
        return builder.ptrtoint(place, _I64)

    return types.int64(numbers), codegen


# Integers that a task is given, at most.
N_ARGS = 20
_ZEROS = (0,) * N_ARGS


@cache
def _loop(parallel: bool) -> Any:
    tasks = prange if parallel else range

    def run_tasks(function, n_tasks, last, n_last, numbers):
        args = _on_stack(numbers)
        for task in tasks(n_tasks):
            _call(function, args, task)
        for task in tasks(n_last):
            _call(last, args, task)

    def make(tag):
        numbers = types.UniTuple(types.int64, N_ARGS)
        signature = types.void(*[types.int64] * 4, numbers)
        jitted = njit(signature, parallel=parallel, **JIT)(disk.named(run_tasks, tag))
        return next(iter(jitted.overloads.values()))

    return disk.obtain(disk.key(run_tasks, parallel), make).entry_point


# Tasks that a group is run through, one after the other.
STAGES = 3


@cache
def _group_loop(parallel: bool) -> Any:
    groups = prange if parallel else range

    def run_groups(functions, counts, n_groups, numbers):
        args = _on_stack(numbers)
        for group in groups(n_groups):
            for function, count in zip(functions, counts):  # noqa: B905 (Numba)
                for k in range(group * count, (group + 1) * count):
                    _call(function, args, k)

    def make(tag):
        few, numbers = (types.UniTuple(types.int64, n) for n in (STAGES, N_ARGS))
        signature = types.void(few, few, types.int64, numbers)
        jitted = njit(signature, parallel=parallel, **JIT)(disk.named(run_groups, tag))
        return next(iter(jitted.overloads.values()))

    return disk.obtain(disk.key(run_groups, parallel), make).entry_point


class Task:
    """A compiled task, by the address of its C function."""

    def __init__(self, build: Callable[..., Any], *specialization: object) -> None:
        """build(tag, *specialization) returns the body, a function of (args, task)."""

        def make(tag):
            body = build(tag, *specialization)
            jitted = njit(types.void(types.int64, types.int64), **JIT)(disk.named(body, tag))
            return next(iter(jitted.overloads.values()))

        self.key = disk.key(build, *specialization)
        self._compiled = disk.obtain(self.key, make)
        name = self._compiled.fndesc.llvm_cfunc_wrapper_name
        self.address = self._compiled.library.get_pointer_to_function(name)


def run(
    task: Task,
    n_tasks: int,
    n_elements: int,
    numbers: tuple[int, ...],
    last: Task | None = None,
    n_last: int = 0,
) -> None:
    """Task numbers 0 to n_tasks - 1, then those of `last`, each given the same numbers;
    n_elements says whether several threads are worth it."""
    address = 0 if last is None else last.address
    numbers += _ZEROS[len(numbers) :]
    args, idle = (task.address, n_tasks, address, n_last, numbers), (0, 0, 0, 0, numbers)
    _launch(_loop, task.key, args, idle, n_tasks, n_elements)


def run_groups(
    stages: Sequence[tuple[Task, int]], n_groups: int, n_elements: int, numbers: tuple[int, ...]
) -> None:
    """Each group through STAGES tasks, so many of each a group: what one stage reads is in cache
    when the next does. The results are those of the stages run one after the other over all."""
    functions, counts = tuple(task.address for task, _ in stages), tuple(n for _, n in stages)
    key, numbers = "+".join(task.key for task, _ in stages), numbers + _ZEROS[len(numbers) :]
    args, idle = (functions, counts, n_groups, numbers), (functions, counts, 0, numbers)
    _launch(_group_loop, key, args, idle, n_groups, n_elements)


def grouped(n_groups: int) -> bool:
    """True where so many groups keep all threads busy."""
    return n_groups >= 2 * torch.get_num_threads()


def _launch(
    loop: Callable[[bool], Any],
    key: str,
    args: tuple[Any, ...],
    idle: tuple[Any, ...],
    n_tasks: int,
    n_elements: int,
) -> None:
    """Call the loop, on several threads where that is worth it; idle: arguments that ask it for
    nothing, by which a profiler times the call alone."""
    n_threads = 1
    if n_elements >= threads.SERIAL_BELOW and n_tasks > 1:
        n_threads = torch.get_num_threads()
    parallel = threads.worth_it(n_threads, n_elements)
    entry = loop(parallel)
    if launches.unprofiled():
        _call_loop(entry, parallel, args, n_threads)
        return
    with launches.profiled(None, key, lambda: _call_loop(entry, parallel, idle, n_threads)):
        _call_loop(entry, parallel, args, n_threads)


def _call_loop(entry: Any, parallel: bool, args: tuple[Any, ...], n_threads: int) -> None:
    if parallel:
        threads.run_parallel(entry, args, n_threads)
    else:
        entry(*args)


def run_rows(task: Task, n_rows: int, n_cols: int, *numbers: int) -> None:
    """Tasks of some rows each; how many is the last of the numbers each is given."""
    n_task = rows_of(n_cols)
    run(task, -(-n_rows // n_task), n_rows * n_cols, (*numbers, n_task))


def rows_of(n_cols: int) -> int:
    """Rows a task."""
    return max(1, TASK // max(1, n_cols))


@lru_cache(maxsize=256)
def double_bits(x: float) -> int:
    """A float as the integer that carries it to a task."""
    return _INTEGER.unpack(_DOUBLE.pack(x))[0]


@cache
def task_of(build: Callable[..., Any], *specialization: object) -> Task:
    """The compiled task of a builder and its specialization."""
    return Task(build, *specialization)
