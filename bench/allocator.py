"""The two states of the memory allocator a figure may be taken in; each says which.

default: as a user has it. glibc returns large blocks to the system, and every temporary in a step
    costs a page fault for each 4 KiB.
warm: freed memory is kept, so temporaries cost no page faults once they have been made. This is
    the state that flatters torch's loop and foreach, which make them, and not fastopt.

A process is in one of the two from its start to its end.
"""

from __future__ import annotations

import os

import torch

from bench.timing import Subject
from fastopt.cli.shared.memory import KEEP, VARIABLE

WARM, DEFAULT = "warm", "default"
ALLOCATORS = (WARM, DEFAULT)

_PROBE_ELEMENTS = 25_000_000
# Kept memory costs none; fresh memory 48 even in huge pages.
_PROBE_FAULTS = 10


def environment(allocator: str) -> dict[str, str]:
    """The environment of a process whose allocator is to be in this state."""
    variables = dict(os.environ)
    variables.pop(VARIABLE, None)
    if allocator == WARM:
        variables[VARIABLE] = KEEP
    return variables


def is_warm() -> bool:
    """Whether this process keeps a large temporary's memory, found by making some."""
    probe = Subject(lambda: torch.ones(_PROBE_ELEMENTS))
    probe.warm()
    return probe.page_faults() <= _PROBE_FAULTS
