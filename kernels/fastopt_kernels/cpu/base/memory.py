"""Load and store codecs: raw addresses in memory to registers and back, as Numba intrinsics.

Each takes an address and an element index; what the loop sees is one compute type (float32, or
float64 for float64 parameters) whatever lies in memory. bf16 is widened by a shift and narrowed by
round-to-nearest-even on the bits, fp16 through the CPU's own conversions; both vectorize.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

KINDS = ("fp32", "bf16", "fp16", "fp64")

_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_IN_MEMORY_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp64": 64}
# int16: whole numbers; int8, uint8: codes, whole numbers as the bits of a float32; top16: a float32
# that is a bf16 already, for stores.
_IN_MEMORY = {
    "int16": _I16,
    "int8": _I8,
    "uint8": _I8,
    "top16": _I16,
    "fp32": _F32,
    "bf16": _I16,
    "fp16": ir.HalfType(),
    "fp64": _F64,
}


def compute_type(kind: str) -> types.Float:
    """The type a parameter of this kind is updated in."""
    return types.float64 if kind == "fp64" else types.float32


def _element(builder, kind, address, i):
    base = builder.inttoptr(address, _IN_MEMORY[kind].as_pointer())
    return builder.gep(base, [i])


def _emit_load(builder, kind, address, i, compute, stream=None):
    x = builder.load(_element(builder, kind, address, i))
    _mark(builder, x, stream)
    return _widen(builder, kind, x, compute)


# Arrays of one kernel that share no memory may be told apart by a stream number below this.
STREAMS = 17


def _mark(builder, instruction, stream):
    """Tell LLVM that an access of one stream never meets one of another.

    Without it a vectorized loop first compares the addresses of all its arrays, each time it is
    entered, and with more than a few arrays is not vectorized at all.
    """
    if stream is None:
        return
    module = builder.module
    domain = module.add_metadata([ir.MetaDataString(module, "fastopt")])
    scopes = [
        module.add_metadata([ir.MetaDataString(module, f"fastopt stream {k}"), domain])
        for k in range(STREAMS)
    ]
    others = [scope for k, scope in enumerate(scopes) if k != stream]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[stream]]))
    instruction.set_metadata("noalias", module.add_metadata(others))


def _widen(builder, kind, x, compute):
    if kind == "bf16":
        bits = builder.shl(builder.zext(x, _I32), ir.Constant(_I32, 16))
        x = builder.bitcast(bits, _F32)
    elif kind == "fp16":
        x = builder.fpext(x, _F32)
    elif kind == "int16":
        x = builder.sitofp(x, _F32)
    elif kind in ("int8", "uint8"):
        extend = builder.sext if kind == "int8" else builder.zext
        x = builder.bitcast(extend(x, _I32), _F32)
    if kind == "fp64" and compute is types.float32:
        return builder.fptrunc(x, _F32)
    if kind != "fp64" and compute is types.float64:
        return builder.fpext(x, _F64)
    return x


def _bf16_bits(builder, x, own_nan):
    """Round to nearest, ties to even; a NaN stays one (its top payload bit is set).

    own_nan: a NaN has no bits below those kept, so rounding leaves it alone
    """
    bits = builder.bitcast(x, _I32)
    shifted = builder.lshr(bits, ir.Constant(_I32, 16))
    odd = builder.and_(shifted, ir.Constant(_I32, 1))
    bias = builder.add(ir.Constant(_I32, 0x7FFF), odd)
    rounded = builder.lshr(builder.add(bits, bias), ir.Constant(_I32, 16))
    if own_nan:
        return builder.trunc(rounded, _I16)
    quiet = builder.or_(shifted, ir.Constant(_I32, 0x40))
    is_nan = builder.fcmp_unordered("uno", x, x)
    return builder.trunc(builder.select(is_nan, quiet, rounded), _I16)


def _emit_store(builder, kind, address, i, x, compute, own_nan=False, stream=None):
    if kind != "fp64" and compute is types.float64:
        x = builder.fptrunc(x, _F32)
    elif kind == "fp64" and compute is types.float32:
        x = builder.fpext(x, _F64)
    if kind == "bf16":
        x = _bf16_bits(builder, x, own_nan)
    elif kind == "fp16":
        x = builder.fptrunc(x, ir.HalfType())
    elif kind == "int16":
        x = builder.fptosi(x, _I16)
    elif kind == "top16":
        x = builder.trunc(builder.lshr(builder.bitcast(x, _I32), ir.Constant(_I32, 16)), _I16)
    _mark(builder, builder.store(x, _element(builder, kind, address, i)), stream)


def make_load(kinds: tuple[str, ...], compute: types.Float, apart: bool = False):
    """load(addresses, i) -> the i-th element of every stream, in the compute type.

    apart: the streams share no memory, and each is the alias stream of its number
    """

    @intrinsic
    def load(typingctx, addresses, i):
        signature = types.UniTuple(compute, len(kinds))(addresses, i)

        def codegen(context, builder, signature, args):
            streams, i = args
            values = [
                _emit_load(
                    builder,
                    kind,
                    builder.extract_value(streams, k),
                    i,
                    compute,
                    k if apart else None,
                )
                for k, kind in enumerate(kinds)
            ]
            return context.make_tuple(builder, signature.return_type, values)

        return signature, codegen

    return load


def make_store(
    kinds: tuple[str, ...], compute: types.Float, streams: tuple[int, ...] | None = None
):
    """store(addresses, i, values): parameter and states; the gradient (stream 1) is only read.

    streams: the alias stream of each, where they share no memory
    """
    written = [k for k in range(len(kinds)) if k != 1]

    @intrinsic
    def store(typingctx, addresses, i, values):
        signature = types.void(addresses, i, values)

        def codegen(context, builder, signature, args):
            addresses, i, values = args
            for source, k in enumerate(written):
                x = builder.extract_value(values, source)
                address, stream = builder.extract_value(addresses, k), streams and streams[k]
                _emit_store(builder, kinds[k], address, i, x, compute, stream=stream)
            return context.get_dummy_value()

        return signature, codegen

    return store


def make_row(scalar: types.Type, width: int):
    """row(address, r) -> row r of a table of `width` columns, as a tuple."""

    @intrinsic
    def row(typingctx, address, r):
        signature = types.UniTuple(scalar, width)(address, r)

        def codegen(context, builder, signature, args):
            address, r = args
            base = builder.inttoptr(address, context.get_value_type(scalar).as_pointer())
            first = builder.mul(r, ir.Constant(_I64, width))
            values = [
                builder.load(builder.gep(base, [builder.add(first, ir.Constant(_I64, k))]))
                for k in range(width)
            ]
            return context.make_tuple(builder, signature.return_type, values)

        return signature, codegen

    return row


def make_loader(kind: str, compute: types.Float, stream: int | None = None):
    """load(address, i) -> element i of an array of this kind, in the compute type."""

    @intrinsic
    def load(typingctx, address, i):
        def codegen(context, builder, signature, args):
            return _emit_load(builder, kind, *args, compute, stream)

        return compute(address, i), codegen

    return load


def make_flag_loader(stream: int | None = None):
    """flag(address, i) -> element i of an array of booleans, a byte each."""

    @intrinsic
    def flag(typingctx, address, i):
        def codegen(context, builder, signature, args):
            address, i = args
            base = builder.inttoptr(address, _I8.as_pointer())
            byte = builder.load(builder.gep(base, [i]))
            _mark(builder, byte, stream)
            return builder.icmp_unsigned("!=", byte, ir.Constant(_I8, 0))

        return types.boolean(address, i), codegen

    return flag


def make_storer(kind: str, compute: types.Float, own_nan: bool = False, stream: int | None = None):
    """store(address, i, x): round x to this kind, once.

    own_nan: a NaN, if any, came out of arithmetic on elements of this kind, so no bit of it is lost
    """

    @intrinsic
    def store(typingctx, address, i, x):
        def codegen(context, builder, signature, args):
            address, i, x = args
            _emit_store(builder, kind, address, i, x, compute, own_nan, stream)
            return context.get_dummy_value()

        return types.void(address, i, compute), codegen

    return store


def make_rounded(kind: str):
    """rounded(x): x as it comes back when it has been stored as this kind."""

    @intrinsic
    def rounded(typingctx, x):
        def codegen(context, builder, signature, args):
            if kind == "bf16":
                return _widen(builder, kind, _bf16_bits(builder, args[0], False), types.float32)
            if kind == "fp16":
                narrow = builder.fptrunc(args[0], ir.HalfType())
                return _widen(builder, kind, narrow, types.float32)
            return args[0]

        return x(x), codegen

    return rounded


def make_code_storer(stream: int):
    """store(address, i, q): the low 8 bits of an int32."""

    @intrinsic
    def store(typingctx, address, i, q):
        def codegen(context, builder, signature, args):
            address, i, q = args
            code = builder.store(builder.trunc(q, _I8), _element(builder, "int8", address, i))
            _mark(builder, code, stream)
            return context.get_dummy_value()

        return types.void(address, i, types.int32), codegen

    return store


def make_order(kind: str, compute: types.Float, stream: int | None = None):
    """(load_order, unorder, lowest): elements as integers that compare as the elements do.

    Maxima of floats vectorize only where there is no NaN; those of integers always do, and of as
    many elements at a time as the register holds in memory's own width. A positive NaN is larger
    than infinity; a negative one is passed over. lowest stands for -inf.
    """
    width = _IN_MEMORY_BITS[kind]
    integer, numba_integer = ir.IntType(width), getattr(types, f"int{width}")
    low_bits = (1 << (width - 1)) - 1

    def order(builder, bits):
        negative = builder.ashr(bits, ir.Constant(integer, width - 1))
        return builder.xor(bits, builder.and_(negative, ir.Constant(integer, low_bits)))

    @intrinsic
    def load_order(typingctx, address, i):
        def codegen(context, builder, signature, args):
            address, i = args
            base = builder.inttoptr(address, integer.as_pointer())
            bits = builder.load(builder.gep(base, [i]))
            _mark(builder, bits, stream)
            return order(builder, bits)

        return numba_integer(address, i), codegen

    @intrinsic
    def unorder(typingctx, ordered):
        def codegen(context, builder, signature, args):
            bits = order(builder, args[0])
            if kind != "bf16":
                bits = builder.bitcast(bits, _IN_MEMORY[kind])
            return _widen(builder, kind, bits, compute)

        return compute(numba_integer), codegen

    infinity = {"fp32": 0x7F800000, "bf16": 0x7F80, "fp16": 0x7C00, "fp64": 0x7FF << 52}[kind]
    return load_order, unorder, getattr(np, f"int{width}")(-1 - infinity)


@intrinsic
def prefetch(typingctx, address):
    """Have the cache line of an address read into the second cache, beyond the array's end too."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        function = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [pointer.type],
            ir.FunctionType(ir.VoidType(), [pointer.type, *3 * [_I32]]),
        )
        builder.call(function, [pointer, *(ir.Constant(_I32, k) for k in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(address), codegen


@intrinsic
def load_integer(typingctx, address, i):
    """Element i of an int64 array."""

    def codegen(context, builder, signature, args):
        address, i = args
        return builder.load(builder.gep(builder.inttoptr(address, _I64.as_pointer()), [i]))

    return types.int64(address, i), codegen


@intrinsic
def store_integer(typingctx, address, i, x):
    """Write element i of an int64 array."""

    def codegen(context, builder, signature, args):
        address, i, x = args
        builder.store(x, builder.gep(builder.inttoptr(address, _I64.as_pointer()), [i]))
        return context.get_dummy_value()

    return types.void(address, i, types.int64), codegen
