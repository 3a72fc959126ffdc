"""Reads the machine code of a compiled kernel: how wide its loops are, how long it took."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from time import perf_counter

from fastopt_kernels.cpu.base import cache as disk

_LABEL = re.compile(r"^(\.?\w+):")
_JUMP = re.compile(r"^\s+(?:j\w+|b(?:\.\w+)?|cbn?z\s+\w+,|tbn?z\s+\w+,.*,)\s+(\.?\w+)\s*$")
# Packed arithmetic and moves: of x86 those that end in ps or pd, and those on integers.
_PACKED = re.compile(r"^\s+v?(?:\w*p[sd]|p[a-z]\w*|movdq\w*)\s.*")
_X86 = re.compile(r"%?\b([xyz])mm\d+")
_ARM = re.compile(r"\bv\d+\.(?:4s|2d|8h|16b)")
_BITS = {"x": 128, "y": 256, "z": 512}


@dataclass(frozen=True)
class Loops:
    """The innermost loops of a kernel.

    bits: the width in which they handle most elements, a tail being written out like the loop it
        ends; 0 where there are no vectors
    loops, vectorized: how many there are, and how many of them work on vectors
    """

    bits: int
    loops: int
    vectorized: int


@dataclass(frozen=True)
class Compiled:
    """from_disk: it came from the cache folder, in load_s; compile_s: what making it anew takes"""

    from_disk: bool
    load_s: float
    compile_s: float
    loops: Loops


def read(key: str) -> Compiled:
    """The facts of a kernel of this process, by its key; compiles it once more to read its code."""
    obtained = disk.obtained[key]
    start = perf_counter()
    # What comes from disk is object code alone.
    library = obtained.make(f"{key}_read").library
    seconds = perf_counter() - start
    return Compiled(obtained.from_disk, obtained.seconds, seconds, loops_of(library.get_asm_str()))


def loops_of(assembly: str) -> Loops:
    """The innermost loops of the assembly of x86 or ARM."""
    lines = assembly.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    spans = set()
    for i, line in enumerate(lines):
        jump = _JUMP.match(line)
        if jump and labels.get(jump.group(1), i) < i:
            spans.add((labels[jump.group(1)], i))
    innermost = [span for span in spans if not any(span != s and _within(s, span) for s in spans)]
    counts = [_vectors(lines[first : last + 1]) for first, last in innermost]
    every = sum(counts, Counter())
    bits = max(every, key=lambda width: width * every[width], default=0)
    return Loops(bits, len(counts), sum(bool(count) for count in counts))


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _vectors(lines: list[str]) -> Counter[int]:
    """Instructions on vectors, by the bits of the widest register each names."""
    found: Counter[int] = Counter()
    for line in lines:
        if widths := [_BITS[x] for x in _X86.findall(line)] if _PACKED.match(line) else []:
            found[max(widths)] += 1
        elif _ARM.search(line):
            found[128] += 1
    return found
