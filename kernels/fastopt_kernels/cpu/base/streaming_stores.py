"""Streaming stores: results that no cache will hold until they are read leave past the caches.

A store to a line that is in no cache first reads that line from memory, to be thrown away: a third
of what softmax moves. Results of PAST bytes or more are made SPAN elements at a time in a
scratch that stays in L1, and leave it by stores that go to memory whole lines at a time.

    scratch = staging()
    for start in range(0, n, SPAN):
        stop = min(start + SPAN, n)
        to = stage(y, scratch, start, streaming)
        for i in range(start, stop):
            store(to, i, ...)
        flush(y, scratch, start, stop, streaming)
    fence(streaming)
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fastopt_kernels.cpu.base.xp import JIT

# Smaller results are read from the last cache by whoever takes them next.
PAST = 16 << 20
# Elements staged before they leave, bytes of a line, and bytes of the memory that stages them: a
# page apart, such memories would share lines of L1.
SPAN, LINE = 512, 64
STAGING = SPAN * 8 + 2 * LINE
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_LINE = ir.VectorType(_I64, LINE // 8)


@njit(**JIT)
def use_streaming_stores(nbytes):
    """True where results of so many bytes in all leave by streaming stores."""
    return nbytes >= PAST


def make_staging(n):
    """stagings(): the address of n times STAGING bytes on the stack, at the beginning of a line."""

    @intrinsic
    def stagings(typingctx):
        def codegen(context, builder, signature, args):
            with builder.goto_entry_block():
                memory = builder.alloca(_LINE, n * STAGING // LINE)
                memory.align = LINE
            return builder.ptrtoint(memory, _I64)

        return types.int64(), codegen

    return stagings


staging = make_staging(1)


@intrinsic
def _stream_line(typingctx, target, source):
    """A line of the cache from source to target, which is its beginning."""

    def codegen(context, builder, signature, args):
        target, source = (builder.inttoptr(x, _LINE.as_pointer()) for x in args)
        sent = builder.store(builder.load(source, align=1), target, align=LINE)
        hint = builder.module.add_metadata([ir.Constant(_I32, 1)])
        sent.set_metadata("nontemporal", hint)
        return context.get_dummy_value()

    return types.void(target, source), codegen


@intrinsic
def _copy_byte(typingctx, target, source):
    def codegen(context, builder, signature, args):
        target, source = (builder.inttoptr(x, _I8.as_pointer()) for x in args)
        builder.store(builder.load(source), target)
        return context.get_dummy_value()

    return types.void(target, source), codegen


@intrinsic
def _fence(typingctx):
    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@njit(**JIT)
def stream_bytes(target, source, nbytes):
    """Copy to target by streaming stores."""
    whole = target + nbytes
    first = min((target + LINE - 1) & -LINE, whole)
    apart = source - target
    for at in range(target, first):
        _copy_byte(at, at + apart)
    last = max(first, whole & -LINE)
    for at in range(first, last, LINE):
        _stream_line(at, at + apart)
    for at in range(last, whole):
        _copy_byte(at, at + apart)


def make_streaming_stores(itemsize):
    """stage(row, scratch, start, streaming): the address at which elements from `start` on are
    stored; flush(row, scratch, start, stop, streaming): moves them from there to the row."""

    @njit(**JIT)
    def stage(row, scratch, start, streaming):
        return scratch - start * itemsize if streaming else row

    @njit(**JIT)
    def flush(row, scratch, start, stop, streaming):
        if streaming:
            stream_bytes(row + start * itemsize, scratch, (stop - start) * itemsize)

    return stage, flush


@njit(**JIT)
def fence(streaming):
    """At the end of a task that sent: others see it all."""
    if streaming:
        _fence()
