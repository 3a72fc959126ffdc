"""Integers that may not fit their type on the way to an address: intervals over Triton's own IR.

Each integer of a kernel is given the least and the greatest value it may have: constants and
`tl.arange` as they stand, program ids and sizes up to 2^31 - 1 or a limit that the launch keeps,
what is loaded or carried through a loop anything its type holds. A sum, product, shift or
truncation whose result may not fit 32 bits is a fault if an offset, a mask or a loop depends on it;
a hash, whose products are meant to wrap, goes into none of these. 64 bits are taken to hold all.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Interval(NamedTuple):
    low: int
    high: int


@dataclass
class Value:
    """What is known of one SSA value."""

    text: str
    operands: list[str] = field(default_factory=list)
    # None: whatever the type holds.
    interval: Interval | None = None
    # How far it would reach, where that does not fit.
    wide: Interval | None = None


def all_of(bits: int) -> Interval:
    return Interval(0, 1) if bits == 1 else Interval(-(1 << bits - 1), (1 << bits - 1) - 1)


def _hull(numbers: Iterator[int]) -> Interval:
    found = list(numbers)
    return Interval(min(found), max(found))


def _corners(of: Callable[[int, int], int]) -> Callable[[Interval, Interval], Interval]:
    """An operation that is monotonic in either operand."""
    return lambda a, b: _hull(of(x, y) for x, y in itertools.product(a, b))


def _quotient(a: Interval, b: Interval) -> Interval | None:
    """Rounded towards zero; division by zero is undefined, so a size divided by is 1 or more."""
    if b.low < 0:
        return None
    b = Interval(max(b.low, 1), max(b.high, 1))
    return _hull(abs(x) // y * (1 if x > 0 else -1) for x, y in itertools.product(a, b))


def _remainder(a: Interval, b: Interval) -> Interval | None:
    """Of the sign of a."""
    if b.low < 0:
        return None
    most = max(b.high - 1, 0)
    return Interval(-min(-a.low, most) if a.low < 0 else 0, max(min(a.high, most), 0))


def _shifted_left(a: Interval, b: Interval) -> Interval | None:
    return _corners(lambda x, n: x << n)(a, b) if b.low >= 0 and b.high < 64 else None


def _shifted_right(a: Interval, b: Interval) -> Interval | None:
    return _corners(lambda x, n: x >> n)(a, b) if b.low >= 0 and b.high < 64 else None


def _both(a: Interval, b: Interval) -> Interval | None:
    """Bits that both have."""
    above = [x.high for x in (a, b) if x.low >= 0]
    return Interval(0, min(above)) if above else None


def _either(a: Interval, b: Interval) -> Interval | None:
    """Bits of either, or of one."""
    if a.low < 0 or b.low < 0:
        return None
    return Interval(0, (1 << max(a.high, b.high).bit_length()) - 1)


def _logical_shift(a: Interval, b: Interval) -> Interval | None:
    return _shifted_right(a, b) if a.low >= 0 else None


ARITHMETIC: dict[str, Callable[[Interval, Interval], Interval | None]] = {
    "arith.addi": lambda a, b: Interval(a.low + b.low, a.high + b.high),
    "arith.subi": lambda a, b: Interval(a.low - b.high, a.high - b.low),
    "arith.muli": _corners(lambda x, y: x * y),
    "arith.shli": _shifted_left,
    "arith.divsi": _quotient,
    "arith.remsi": _remainder,
    "arith.minsi": lambda a, b: Interval(min(a.low, b.low), min(a.high, b.high)),
    "arith.maxsi": lambda a, b: Interval(max(a.low, b.low), max(a.high, b.high)),
    "arith.andi": _both,
    "arith.ori": _either,
    "arith.xori": _either,
    "arith.shrsi": _shifted_right,
    "arith.shrui": _logical_shift,
}


def _size(a: Interval) -> Interval:
    return Interval(0 if a.low <= 0 <= a.high else min(map(abs, a)), max(map(abs, a)))


# Values that stay what they are, in another shape or place.
SAME = {
    "tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "tt.unsplat",
    "tt.split", "ttg.convert_layout", "arith.index_cast",
}  # fmt: skip
# Beyond these nothing is followed: memory has its own faults, and a float no overflow.
ENDS = {"tt.load", "tt.atomic_rmw", "tt.atomic_cas", "arith.cmpf", "arith.fptosi", "arith.fptoui"}
LINE = re.compile(r"^\s*(?:(%[^=]+?) = )?\"?([a-z_]+\.[\w.]+)\"?(.*)$")
NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")
INTEGER = re.compile(r"(?:\b|x)i(\d+)\b")
MEMORY = ("tt.load", "tt.store", "tt.atomic", "tt.addptr", "tt.descriptor", "tt.make_tensor")


def bits_of(types: str) -> int:
    """Of the integers of a type; 0 for others."""
    found = INTEGER.search(types) if "ptr" not in types else None
    return int(found[1]) if found else 0


class Function:
    """The values of a kernel, from its first line to its last: a use comes after what it uses."""

    def __init__(self, ttir: str, limits: Mapping[str, int]) -> None:
        self.limits = limits
        self.values: dict[str, Value] = {}
        # Names are unique where they are seen; a region that is closed gives its own to the next.
        self.meant: dict[str, str] = {}
        # What an offset, a mask or a loop is made of.
        self.roots: list[str] = []
        # The regions that are open, and what each yields for each of its results.
        self.regions: list[list[list[str]]] = []
        for line in ttir.splitlines():
            self._read(re.sub(r" loc\((?:#\w+|unknown)\)\s*$", "", line))

    def _read(self, line: str) -> None:
        if line.lstrip().startswith("tt.func"):
            return self._arguments(line)
        if line.lstrip().startswith("^"):
            # A block of a reduction, or of a loop with a condition: it is given anything.
            given = [name for values in self.regions[-1] for name in values]
            for name in NAME.findall(line):
                self._define(name, Value(line.strip(), given))
            return None
        if line.lstrip().startswith("}"):
            reopened = line.rstrip().endswith("{")
            if self.regions and not reopened:
                self.regions.pop()
            return None
        if match := LINE.match(line):
            results, op, rest = match.groups()
            self._operation(results or "", op, rest, line.strip())
        return None

    def _define(self, name: str, value: Value) -> None:
        key = name
        while key in self.values:
            key += "'"
        self.values[key], self.meant[name] = value, key

    def _used(self, text: str) -> list[str]:
        """The values that a text names."""
        return [self.meant.get(name, name) for name in NAME.findall(text)]

    def _arguments(self, line: str) -> None:
        """Sizes and strides, none of which is negative."""
        for name, kind in re.findall(r"(%[\w.$-]+): (\S+?)(?=[ ,)])", line):
            value = Value(name)
            if (bits := bits_of(kind)) > 1:
                most = self.limits.get(name[1:], all_of(bits).high)
                value.interval = Interval(0, min(most, all_of(bits).high))
            self._define(name, value)
        self.regions.append([[]])

    def _operation(self, results: str, op: str, rest: str, text: str) -> None:
        if op.startswith("cf.") or op == "tt.call":
            raise NotImplementedError(f"ranges are followed within one block: {text}")
        body, _, types = rest.rpartition(" : ")
        operands = self._used(body or rest)
        if op in ("scf.yield", "scf.condition"):
            if op == "scf.condition":
                self.roots.append(operands.pop(0))
            for values, name in zip(self.regions[-1], operands, strict=False):
                values.append(name)
            return
        names = self._names(results)
        if text.endswith("{"):
            self._region(names, op, body or rest, text)
            return
        if op.startswith(MEMORY):
            # Of a pointer and an offset, the offset; of a store, not what is stored.
            stored = {"tt.store": 1, "tt.atomic_rmw": 1}.get(op)
            self.roots += [name for k, name in enumerate(operands) if k != stored]
        made = [Value(text, [] if op in ENDS else operands) for _ in names]
        if len(names) == 1 and (bits := bits_of(types.rpartition(" to ")[2])):
            self._evaluate(made[0], op, operands, body or rest, types, bits)
        for name, value in zip(names, made, strict=True):
            self._define(name, value)

    def _names(self, results: str) -> list[str]:
        """%x:2 is %x#0 and %x#1."""
        found = []
        for name in filter(None, map(str.strip, results.split(","))):
            base, _, count = name.partition(":")
            found += [f"{base}#{k}" for k in range(int(count))] if count else [base]
        return found

    def _region(self, names: list[str], op: str, body: str, text: str) -> None:
        """What a loop carries, and what it or a branch leaves, may be anything yielded for it."""
        listed = body.partition("iter_args(")[2] if op == "scf.for" else body
        carried = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", listed)
        yielded: list[list[str]] = [[] for _ in range(max(len(names), len(carried), 1))]
        self.regions.append(yielded)
        if op in ("scf.for", "scf.while"):
            bounds = self._used(body)[1:4] if op == "scf.for" else []
            for (name, start), values in zip(carried, yielded, strict=False):
                values += self._used(start)
                self._define(name, Value(text, values))
            if op == "scf.for":
                self._loop(NAME.findall(body)[0], bounds, text)
        elif op == "scf.if":
            self.roots += self._used(body)
        else:
            yielded[0] += self._used(body)
        for name, values in zip(names, yielded, strict=False):
            self._define(name, Value(text, values))

    def _loop(self, index: str, bounds: list[str], text: str) -> None:
        """The index of a loop, which a step takes past the last."""
        bits = bits_of(text.rpartition(" : ")[2]) or 64
        first, last, step = (self.interval(name, bits) for name in bounds)
        value = Value(text, bounds, Interval(first.low, max(last.high - 1, first.low)))
        beyond = Interval(first.low, last.high - 1 + step.high)
        if bits < 64 and beyond.high > all_of(bits).high:
            value.wide = beyond
        self._define(index, value)
        self.roots.append(self.meant[index])

    def interval(self, name: str, bits: int) -> Interval:
        value = self.values.get(name)
        return value.interval if value and value.interval else all_of(bits)

    def _evaluate(
        self, value: Value, op: str, operands: list[str], body: str, types: str, bits: int
    ) -> None:
        source = bits_of(types.partition(" to ")[0]) or bits
        of = [self.interval(name, source) for name in operands]
        found: Interval | None = None
        if op == "arith.constant":
            found = _constant(body)
        elif op == "tt.make_range":
            ends = dict(re.findall(r"(end|start) = (\d+)", body))
            found = Interval(int(ends["start"]), int(ends["end"]) - 1)
        elif op in ("tt.get_program_id", "tt.get_num_programs"):
            found = Interval(0, all_of(32).high)
        elif op in SAME or op in ("arith.trunci", "arith.extsi"):
            found = of[0]
            if op == "arith.extsi" and source == 1:
                found = Interval(-1, 0)
        elif op == "arith.extui":
            found = of[0] if of[0].low >= 0 else Interval(0, (1 << source) - 1)
        elif op == "arith.select":
            found = _hull(itertools.chain(self._chosen(*operands[:2], bits), of[2]))
        elif op == "math.absi":
            found = _size(of[0])
        elif op in ARITHMETIC:
            found = ARITHMETIC[op](*of)
        elif op == "arith.cmpi":
            found = Interval(0, 1)
        value.interval = found
        limit = all_of(bits)
        if found and not (limit.low <= found.low and found.high <= limit.high):
            value.interval, value.wide = None, found if 1 < bits < 64 else None

    def _chosen(self, condition: str, name: str, bits: int) -> Interval:
        """A value where a condition holds, which may compare it."""
        low, high = self.interval(name, bits)
        value = self.values.get(condition)
        compared = re.search(r"arith\.cmpi (\w+), (\S+), (\S+) : (.*)", value.text if value else "")
        if compared and self.meant.get(compared[2]) == name:
            bound = self.interval(*self._used(compared[3]), bits_of(compared[4]))
            if compared[1] in ("slt", "sle"):
                high = min(high, bound.high - (compared[1] == "slt"))
            if compared[1] in ("sgt", "sge"):
                low = max(low, bound.low + (compared[1] == "sgt"))
        elif value and " arith.andi " in value.text:
            for part in value.operands:
                found = self._chosen(part, name, bits)
                low, high = max(low, found.low), min(high, found.high)
        return Interval(min(low, high), high)

    def faults(self) -> list[str]:
        """What may not fit and matters, each once."""
        found, seen, rest = [], set(), list(self.roots)
        while rest:
            name = rest.pop()
            if name in seen or name not in self.values:
                continue
            seen.add(name)
            value = self.values[name]
            rest += value.operands
            if value.wide:
                text = value.text.partition(" iter_args")[0]
                found.append(f"may be {value.wide.low} to {value.wide.high}: {text}")
        return sorted(set(found))


def _constant(body: str) -> Interval | None:
    """One number, or a tensor of one."""
    text = body.replace("dense<", "").rstrip("> ").strip()
    if text in ("true", "false"):
        return Interval(*[int(text == "true")] * 2)
    return Interval(int(text), int(text)) if re.fullmatch(r"-?\d+", text) else None


def faults_of(ttir: str, limits: Mapping[str, int]) -> list[str]:
    """Where integers of a kernel may not fit; limits: the most that arguments may be, by name."""
    return Function(ttir, limits).faults()
