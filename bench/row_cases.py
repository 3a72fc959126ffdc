"""What is measured of the row functions and what it has to reach, in sections of one shape each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import prod

from bench.allocator import WARM
from bench.models import DTYPES
from bench.providers import FASTOPT
from bench.row_ops import (
    CROSS_ENTROPY,
    LAYER_NORM,
    LOG_SOFTMAX,
    LOGSUMEXP,
    OPS,
    RMS_NORM,
    SHAPES,
    SOFTMAX,
    SOFTMAX_0,
    TINY,
    Op,
    Shape,
)
from bench.row_providers import ATEN, PROVIDERS

FORWARD, BOTH = "forward", "forward + backward"
PASSES = (FORWARD, BOTH)
TINY_SECTION = "tiny"

# What a goal bounds: how many times as fast as ATen, the time in times of the floor, and
# microseconds behind ATen.
RATIO, FLOOR, BEHIND = "times as fast", "times the floor", "us behind"


@dataclass(frozen=True)
class Goal:
    """what is at least the bound where it is a RATIO, at most where it is a time."""

    what: str
    bound: float

    def met(self, value: float) -> bool:
        return value >= self.bound if self.what == RATIO else value <= self.bound


# Forward, then forward + backward.
Pair = tuple[float, float]

LARGE, IN_CACHE = "4096x4096", "256x1024"
# Against ATen: fp32 LARGE, fp32 IN_CACHE, bf16 in both shapes.
TIMES_AS_FAST: dict[str, tuple[Pair, Pair, Pair]] = {
    SOFTMAX: ((1.05, 1.0), (1.8, 1.5), (2.0, 2.0)),
    LOG_SOFTMAX: ((1.05, 1.0), (1.8, 1.5), (2.0, 2.0)),
    CROSS_ENTROPY: ((1.6, 1.5), (2.5, 2.5), (3.0, 3.0)),
    LAYER_NORM: ((1.0, 1.0), (1.5, 1.8), (1.8, 2.0)),
    RMS_NORM: ((2.2, 4.0), (2.5, 5.0), (6.0, 7.0)),
    LOGSUMEXP: ((3.5, 2.5), (5.0, 4.0), (5.0, 4.0)),
    SOFTMAX_0: ((3.0, 2.5), (5.0, 4.0), (4.0, 4.0)),
}
# Every case but the tiny ones.
GEOMETRIC_MEAN = 2.5
# In float32 from so many elements on (32 MiB a tensor), which the caches do not hold.
TIMES_THE_FLOOR, FROM_ELEMENTS = 1.25, 2**23
BEHIND_US: Pair = (5.0, 8.0)


@dataclass(frozen=True)
class Case:
    """One op in one shape, dtype and pass. The allocator is warm: fresh pages would cost more than
    most kernels, whoever runs them."""

    op: Op
    shape: str
    dtype: str
    which: str
    allocator: str = WARM

    @property
    def name(self) -> str:
        return f"{self.op.name} {self.shape} {self.dtype}, {self.which}"

    @property
    def backward(self) -> bool:
        return self.which == BOTH

    @property
    def is_tiny(self) -> bool:
        return self.shape in TINY

    @property
    def sizes(self) -> Shape:
        return (TINY if self.is_tiny else SHAPES)[self.shape]

    @property
    def n_bytes(self) -> int:
        """What the case cannot avoid to read and write."""
        return self.op.traffic(DTYPES[self.dtype], self.backward) * prod(self.sizes)

    @property
    def goals(self) -> tuple[Goal, ...]:
        if self.is_tiny:
            return (Goal(BEHIND, BEHIND_US[self.backward]),)
        goals = []
        if self.shape in (LARGE, IN_CACHE):
            column = 2 if self.dtype == "bf16" else (LARGE, IN_CACHE).index(self.shape)
            goals.append(Goal(RATIO, TIMES_AS_FAST[self.op.name][column][self.backward]))
        if self.dtype == "fp32" and prod(self.sizes) >= FROM_ELEMENTS:
            goals.append(Goal(FLOOR, TIMES_THE_FLOOR))
        return tuple(goals)


def _of_shape(shape: str) -> list[Case]:
    # Both passes of one input in a row: they share it.
    return [Case(*words) for words in itertools.product(OPS.values(), (shape,), DTYPES, PASSES)]


def _tiny() -> list[Case]:
    ops = [OPS[name] for name in (SOFTMAX, LAYER_NORM, CROSS_ENTROPY)]
    return [Case(*words) for words in itertools.product(ops, TINY, DTYPES, PASSES)]


SECTIONS: dict[str, list[Case]] = {
    **{shape: _of_shape(shape) for shape in (LARGE, IN_CACHE)},
    TINY_SECTION: _tiny(),
    **{shape: _of_shape(shape) for shape in SHAPES if shape not in (LARGE, IN_CACHE)},
}
# Seconds for each case: more where it has a goal to reach.
SECONDS = {LARGE: 1.2, IN_CACHE: 1.2, TINY_SECTION: 0.4}
OTHER_SECONDS = 0.5


def seconds(section: str, quick: bool) -> float:
    return SECONDS.get(section, OTHER_SECONDS) * (0.1 if quick else 1.0)


def providers(section: str, quick: bool, peers: bool) -> tuple[str, ...]:
    """fastopt and ATen; torch.compile in one shape, or everywhere with `peers`.

    Inductor compiles each case for seconds: everywhere is as long again as all the rest.
    """
    if peers or (section == LARGE and not quick):
        return tuple(PROVIDERS)
    return FASTOPT, ATEN
