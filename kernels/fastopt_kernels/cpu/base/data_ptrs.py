"""A walk over a Python list in compiled code: the address behind each of its objects.

Asking a thousand tensors for their addresses takes Python 55 us and this 8: the list is read
through CPython's own interface and every object handed to a C function, which torch keeps for the
code it compiles itself. It runs with the GIL held, like any code that touches objects.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fastopt_kernels.cpu.base import cache as disk

_I64 = ir.IntType(64)


@intrinsic
def _item(typingctx, items, i):
    """PyList_GetItem: a borrowed reference, as an integer."""
    signature = types.int64(types.int64, types.int64)

    def codegen(context, builder, signature, args):
        items, i = args
        api = context.get_python_api(builder)
        item = api.list_getitem(builder.inttoptr(items, api.pyobj), i)
        return builder.ptrtoint(item, _I64)

    return signature, codegen


@intrinsic
def _call(typingctx, function, argument):
    """A C function of one pointer that returns one."""
    signature = types.int64(types.int64, types.int64)

    def codegen(context, builder, signature, args):
        function, argument = args
        prototype = ir.FunctionType(_I64, [_I64])
        return builder.call(builder.inttoptr(function, prototype.as_pointer()), [argument])

    return signature, codegen


@intrinsic
def _exchange(typingctx, address, value):
    """Write an int64; returns whether another one was there."""
    signature = types.int64(types.int64, types.int64)

    def codegen(context, builder, signature, args):
        address, value = args
        place = builder.inttoptr(address, _I64.as_pointer())
        before = builder.load(place)
        builder.store(value, place)
        return builder.zext(builder.icmp_unsigned("!=", before, value), _I64)

    return signature, codegen


# What the walk finds: an address that is not what it was, and one below the lowest there may be.
MOVED, LOW = 1, 2


@cache
def compiled() -> Any:
    """The walk, compiled: (id(items), len(items), address_of, addresses, lowest) -> flags.

    It writes address_of(item) of each item of a list to the int64 array that lies at `addresses`,
    and returns MOVED where any was another before, LOW where one is below `lowest`, or both.
    address_of is a C function, void *(PyObject *), that must know what to do with each item.
    """

    def walk(items, n, address_of, addresses, lowest):
        changed, low = 0, 0
        for i in range(n):
            address = _call(address_of, _item(items, i))
            changed |= _exchange(addresses + 8 * i, address)
            low |= address < lowest
        return changed | (low << 1)

    def make(tag):
        jitted = njit(types.int64(*[types.int64] * 5))(disk.named(walk, tag))
        return next(iter(jitted.overloads.values()))

    return disk.obtain(disk.key(walk), make).entry_point
