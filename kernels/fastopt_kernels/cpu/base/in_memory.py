"""A check, in compiled code, that kernels may read tensors as they lie in memory.

Python takes 0.6 us to ask a tensor for its type, device, pending sign, layout and storage, and a
row call has up to five of them; this asks five in 0.5 us. A tensor is handed to C functions of
torch: those of its stable interface for compiled models, and the one behind `Tensor.is_neg`. Where
one of them is missing, or they find of some tensors what is not so, there is no such check.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastopt_kernels.cpu.base import cache as disk

_I64, _I8 = ir.IntType(64), ir.IntType(8)
_CLASSES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
# int f(const Tensor *, int64 or int32 *answer), which is not 0 where there is no answer.
_ASKED = tuple(
    f"aoti_torch_get_{name}"
    for name in (
        *("device_type", "device_index", "layout", "dtype", "dim", "sizes", "strides"),
        *("storage_offset", "storage_size", "data_ptr"),
    )
)
# bool f(const Tensor &)
_IS_NEG = "_ZN2at6native6is_negERKNS_6TensorE"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)
# The table that compiled code reads: the address of None; where in an object its class is, and its
# tensor; the classes; the functions; bytes of an element, by the number of its dtype.
_NONE, _CLASS_AT, _TENSOR_AT, _FIRST_CLASS = range(4)
_FIRST_ASKED = _FIRST_CLASS + len(_CLASSES)
_IS_NEG_AT = _FIRST_ASKED + len(_ASKED)
_ITEMSIZES, _N_DTYPES = _IS_NEG_AT + 1, 64


@intrinsic
def _item(typingctx, items, i):
    """PyTuple_GetItem: a borrowed reference, as an integer."""

    def codegen(context, builder, signature, args):
        prototype = ir.FunctionType(_I64, [_I64, _I64])
        function = cgutils.get_or_insert_function(builder.module, prototype, "PyTuple_GetItem")
        return builder.call(function, args)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _load(typingctx, address, i):
    """Element i of the int64 array at an address."""

    def codegen(context, builder, signature, args):
        address, i = args
        return builder.load(builder.gep(builder.inttoptr(address, _I64.as_pointer()), [i]))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _answer(typingctx, function, tensor):
    """The int64 that a function of `_ASKED` returns for a tensor; -1 where it fails."""

    def codegen(context, builder, signature, args):
        function, tensor = args
        answer = cgutils.alloca_once(builder, _I64)
        builder.store(ir.Constant(_I64, 0), answer)
        prototype = ir.FunctionType(ir.IntType(32), [_I64, answer.type])
        failed = builder.call(builder.inttoptr(function, prototype.as_pointer()), [tensor, answer])
        fine = builder.icmp_unsigned("==", failed, ir.Constant(failed.type, 0))
        return builder.select(fine, builder.load(answer), ir.Constant(_I64, -1))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _holds(typingctx, function, tensor):
    """bool f(const Tensor &)"""

    def codegen(context, builder, signature, args):
        function, tensor = args
        prototype = ir.FunctionType(_I8, [_I64])
        result = builder.call(builder.inttoptr(function, prototype.as_pointer()), [tensor])
        return builder.icmp_unsigned("!=", result, ir.Constant(_I8, 0))

    return types.boolean(types.int64, types.int64), codegen


@njit
def _ask(table, which, tensor):
    return _answer(_load(table, _FIRST_ASKED + which), tensor)


@njit
def _is_in_memory(table, tensor):
    """Wherever it is."""
    dtype = _ask(table, 3, tensor)
    if _ask(table, 2, tensor) != 0 or not 0 <= dtype < _N_DTYPES:  # strided
        return False
    itemsize, dim = _load(table, _ITEMSIZES + dtype), _ask(table, 4, tensor)
    sizes, strides = _ask(table, 5, tensor), _ask(table, 6, tensor)
    if itemsize == 0 or dim < 0 or sizes == -1 or strides == -1:
        return False
    if _holds(_load(table, _IS_NEG_AT), tensor):
        return False
    end = _ask(table, 7, tensor) + 1
    for d in range(dim):
        size = _load(sizes, d)
        if size == 0:
            return True
        end += (size - 1) * _load(strides, d)
    return end * itemsize <= _ask(table, 8, tensor) and _ask(table, 9, tensor) > 0


def _all_in_memory(items, n, table):
    first_type, first_index = -1, 0
    for i in range(n):
        item = _item(items, i)
        if item == _load(table, _NONE):
            continue
        kind, known = _load(item + _load(table, _CLASS_AT), 0), False
        for k in range(_FIRST_CLASS, _FIRST_ASKED):
            known |= kind == _load(table, k)
        tensor = item + _load(table, _TENSOR_AT)
        if not known or not _is_in_memory(table, tensor):
            return False
        device_type, index = _ask(table, 0, tensor), _ask(table, 1, tensor)
        if first_type == -1:
            first_type, first_index = device_type, index
        if not 0 <= device_type <= 1 or device_type != first_type or index != first_index:
            return False  # on a CPU or on CUDA, all on one
    return True


def _offset_of(value: int, x: Tensor) -> int:
    """The offset in bytes of a pointer in the object x. ValueError where x does not hold it."""
    words = [ctypes.c_int64.from_address(id(x) + at).value for at in range(0, 48, 8)]
    return 8 * words.index(value)


def _make_table() -> np.ndarray:
    """AttributeError or ValueError where torch has not what it needs."""
    library, x = ctypes.CDLL(torch._C.__file__), torch.zeros(2, device="cpu")
    functions = [
        ctypes.cast(getattr(library, f), ctypes.c_void_p).value for f in (*_ASKED, _IS_NEG)
    ]
    where = _offset_of(id(Tensor), x), _offset_of(x._cdata, x)
    table = np.zeros(_ITEMSIZES + _N_DTYPES, dtype=np.int64)
    table[:_ITEMSIZES] = (id(None), *where, *map(id, _CLASSES), *functions)
    number_of = library[_ASKED[3]]
    for dtype in _DTYPES:
        x, number = torch.zeros(1, dtype=dtype, device="cpu"), ctypes.c_int32()
        number_of(ctypes.c_void_p(id(x) + where[1]), ctypes.byref(number))
        table[_ITEMSIZES + number.value] = x.itemsize
    return table


def _is_right(check: Any, address: int) -> bool:
    """True where the check gives the right answer for each of some tensors."""
    x, y = (torch.zeros(4, 6, device="cpu") for _ in range(2))
    top, bottom, column = y[:2], y[2:], y[:, 0]
    y.untyped_storage().resize_(48)
    good = [torch.zeros(2, dtype=dtype, device="cpu") for dtype in _DTYPES]
    good += [x, x[1:], x.t(), x[:, ::2], x[:0], x[0].expand(3, 6), torch.nn.Parameter(x), top]
    zeros = torch._efficientzerotensor((4, 6), device="cpu")
    bad = [y, bottom, column, torch._neg_view(x), zeros]
    bad += [x.to("meta"), x.to_sparse(), x.to(torch.complex64), torch.Tensor]
    found = [check(id(those), len(those), address) for those in [(x, None, z) for z in good + bad]]
    return found == [True] * len(good) + [False] * len(bad)


@cache
def compiled() -> tuple[Any, int] | None:
    """(check, table), where check(id(tensors), len(tensors), table) is whether all of a tuple that
    are not None are plain tensors on a CPU or on one GPU, strided, without a pending sign, each
    within its storage. None where that cannot be asked."""
    # Whoever listens to torch's calls is not to hear of this, nor to answer.
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return _make_check()


def _make_check() -> tuple[Any, int] | None:
    try:
        table = _make_table()
    except (AttributeError, ValueError, OSError):
        return None

    def make(tag):
        jitted = njit(types.boolean(*[types.int64] * 3))(disk.named(_all_in_memory, tag))
        return next(iter(jitted.overloads.values()))

    check = disk.obtain(disk.key(_all_in_memory), make).entry_point
    _tables.append(table)
    address = table.ctypes.data
    return (check, address) if _is_right(check, address) else None


# Kept alive: compiled code has the address.
_tables: list[np.ndarray] = []
