"""What the gate asks of every kernel, whatever it is for, and how it names what it compiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastopt_kernels.gpu import machine_code
from fastopt_kernels.gpu.base import extents
from fastopt_kernels.gpu.machine_code import Launched, Read
from tests.gpu import ranges


class Case(NamedTuple):
    """One thing that is compiled: a rule or a function, its dtypes, and what of it."""

    target: str
    subject: str
    dtypes: str
    what: str

    def __str__(self) -> str:
        return f"{self.target:7} {self.subject:35} {self.dtypes:15} {self.what}".rstrip()


@dataclass
class Checked:
    """A kernel that was compiled; elements: of a thread (`inspect.Launched`)."""

    kernel: str
    elements: int
    read: Read
    faults: list[str]

    def wide(self, loads: int, stores: int) -> None:
        """It needs so many accesses of 128 bits."""
        if self.read.loads < loads:
            self.faults.append(f"{self.read.loads} loads of 128 bits, {loads} needed")
        if self.read.stores < stores:
            self.faults.append(f"{self.read.stores} stores of 128 bits, {stores} needed")


def checked(launched: Launched) -> Checked:
    """No kernel spills, or computes offsets in 32 bits that may not hold them."""
    found, ttir = machine_code.read(launched.compiled), launched.compiled.asm["ttir"]
    faults = ranges.faults_of(ttir, extents.limits(launched.constants))
    faults = [f"32 bits {text}" for text in faults]
    if found.spilled:
        faults.append(f"spills: {found.spilled} (stack, local memory, instructions)")
    return Checked(launched.name, launched.elements, found, faults)
