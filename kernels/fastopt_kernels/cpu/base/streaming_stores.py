"""Results that no cache will hold until they are read: written past the caches.

A store to a line that is in no cache first reads that line from memory, to be thrown away: a third
of what softmax moves. Results of PAST bytes or more are made SPAN elements at a time in a
scratch that stays in L1, and leave it by stores that go to memory whole lines at a time.

    scratch = room()
    for start in range(0, n, SPAN):
        stop = min(start + SPAN, n)
        to = place(y, scratch, start, past)
        for i in range(start, stop):
            store(to, i, ...)
        send(y, scratch, start, stop, past)
    settle(past)
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fastopt_kernels.cpu.base.xp import JIT

# Smaller results are read from the last cache by whoever takes them next.
PAST = 16 << 20
# Elements made before they leave, bytes of a line, and room for those: a page apart, rooms would
# share their places in L1.
SPAN, LINE = 512, 64
ROOM = SPAN * 8 + 2 * LINE
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_LINE = ir.VectorType(_I64, LINE // 8)


@njit(**JIT)
def goes_past(nbytes):
    """True where results of so many bytes in all go past the caches."""
    return nbytes >= PAST


def make_rooms(n):
    """rooms(): the address of n times ROOM bytes of scratch on the stack, at the beginning of a
    line."""

    @intrinsic
    def rooms(typingctx):
        def codegen(context, builder, signature, args):
            with builder.goto_entry_block():
                place = builder.alloca(_LINE, n * ROOM // LINE)
                place.align = LINE
            return builder.ptrtoint(place, _I64)

        return types.int64(), codegen

    return rooms


room = make_rooms(1)


@intrinsic
def _send_line(typingctx, target, source):
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
def send_bytes(target, source, nbytes):
    """To target, past the caches."""
    whole = target + nbytes
    first = min((target + LINE - 1) & -LINE, whole)
    apart = source - target
    for at in range(target, first):
        _copy_byte(at, at + apart)
    last = max(first, whole & -LINE)
    for at in range(first, last, LINE):
        _send_line(at, at + apart)
    for at in range(last, whole):
        _copy_byte(at, at + apart)


def make_outputs(itemsize):
    """place(row, scratch, start, past): where elements from `start` on are stored;
    send(row, scratch, start, stop, past): from there to where they belong."""

    @njit(**JIT)
    def place(row, scratch, start, past):
        return scratch - start * itemsize if past else row

    @njit(**JIT)
    def send(row, scratch, start, stop, past):
        if past:
            send_bytes(row + start * itemsize, scratch, (stop - start) * itemsize)

    return place, send


@njit(**JIT)
def settle(past):
    """At the end of a task that sent: others see it all."""
    if past:
        _fence()
