"""What storing in few bits loses: a parameter's movement, and a second moment, over many steps.

    python -m bench.storage_report --out bench/results

Roundings: a bf16 parameter goes in equal steps, by fastopt's SGD, from 1 towards 1.1; the share of
the way that it has gone. "kahan" and "master" are read together with what they keep.

Codes, simulated: an exponential average of squares, beta2 0.999, kept in blocks of 256 elements as
codes of 8 bits and decoded for each step, beside the same average in float64. Gradients are normal;
their size swings by a factor of e in either direction every 2000 steps ("even"), and is spread over
the elements of a block by e^(1.5 n), n normal ("uneven"). The error is what a step is off by where
it is divided by sqrt(v): the root mean square, over all elements and the last half of the steps, of
sqrt(right / kept) - 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fastopt
from bench import machine
from bench.render import conditions, markdown_table
from bench.sections import publish
from fastopt.optim.options import LOW_BITS, ROUNDINGS
from fastopt_kernels.chunks import BLOCK_8BIT, SHIFT

Record = dict[str, Any]
Floats = NDArray[np.float64]

# Sizes of a step beside the parameter, of which so many go a tenth of it.
STEP_SIZES, WAY = (1e-2, 1e-3, 1e-4, 1e-5), 0.1
ELEMENTS = 4096

BETA2, STEPS, BLOCKS = 0.999, 5000, 16
SPREADS = {"even": 0.0, "uneven": 1.5}
SWING, PERIOD = 1.0, 2000


def moved(rounding: str, size: float) -> float:
    """The share of the way that so many steps of that size go."""
    param = torch.nn.Parameter(torch.ones(ELEMENTS, dtype=torch.bfloat16))
    optimizer = fastopt.optim.SGD([param], lr=size, param_rounding=rounding)
    param.grad = -torch.ones_like(param)
    for _ in range(round(WAY / size)):
        optimizer.step()
    state = optimizer.state[param]
    value = param.detach().float()
    if LOW_BITS in state:
        value = (value.view(torch.int32) + state[LOW_BITS].to(torch.int32)).view(torch.float32)
    elif "compensation" in state:
        value = value + state["compensation"].float()
    return (value.double().mean().item() - 1.0) / WAY


@dataclass(frozen=True)
class Codec:
    """What non-negative numbers beside the largest of their block, 0 to 1, are kept as.

    levels: (256,) what the codes stand for, rising; by_chance: between two codes the upper one is
    taken with the probability of the distance, else the nearest
    """

    name: str
    levels: Callable[[], Floats]
    by_chance: bool

    def keep(self, x: Floats, random: np.random.Generator) -> Floats:
        levels = self.levels()
        upper = np.clip(np.searchsorted(levels, x), 1, len(levels) - 1)
        low, high = levels[upper - 1], levels[upper]
        share = (x - low) / (high - low)
        kept = np.where(share > (random.random(x.shape) if self.by_chance else 0.5), high, low)
        # As in the kernels: a second moment is never the code that stands for nothing.
        return np.maximum(kept, levels[1])


def octaves(shift: int) -> Floats:
    """Codes that are the top of a float32's bits: 2^(23 - shift) to an octave."""
    base = np.float32(2.0 ** -(256 >> (23 - shift)) * 2.0)
    bits = base.view(np.int32) + (np.arange(256, dtype=np.int32) << shift)
    values = bits.astype(np.int32).view(np.float32).astype(np.float64) - float(base)
    return np.asarray(values / values[-1])


def powers(power: int) -> Floats:
    """Codes spaced evenly in a root of the number."""
    return (np.arange(256) / 255.0) ** power


def _codecs() -> Iterator[Codec]:
    for name, levels in (
        ("16 codes an octave (fastopt's)", lambda: octaves(SHIFT)),
        ("32 codes an octave", lambda: octaves(SHIFT - 1)),
        ("square root", lambda: powers(2)),
        ("fourth root", lambda: powers(4)),
    ):
        yield Codec(name, levels, False)
        yield Codec(name, levels, True)


CODECS = tuple(_codecs())


def tracked(codec: Codec, spread: float, steps: int) -> float:
    """What steps are off by that are divided by a second moment kept so."""
    random = np.random.default_rng(0)
    shape = (BLOCKS, BLOCK_8BIT)
    sizes = np.exp(spread * random.standard_normal(shape))
    right, kept = np.zeros(shape), np.zeros(shape)
    squares, n = 0.0, 0
    for step in range(1, steps + 1):
        size = sizes * math.exp(SWING * math.sin(2.0 * math.pi * step / PERIOD))
        g = size * random.standard_normal(shape)
        right = BETA2 * right + (1.0 - BETA2) * g * g
        kept = BETA2 * kept + (1.0 - BETA2) * g * g
        scale = kept.max(axis=1, keepdims=True)
        kept = scale * codec.keep(kept / scale, random)
        if 2 * step > steps:
            squares += float(np.square(np.sqrt(right / kept) - 1.0).mean())
            n += 1
    return math.sqrt(squares / n)


def roundings(report: Record) -> str:
    """How far bf16 parameters go, and the machine: for docs."""
    names = list(ROUNDINGS)
    lines = [
        (f"{record['size']:.0e}", *(f"{record['moved'][name]:.3f}" for name in names))
        for record in report["roundings"]
    ]
    return f"{markdown_table(('step', *names), lines)}\n\n{conditions(report)}\n"


def codes(report: Record) -> str:
    """How codes follow a second moment, and what it was computed with: for docs."""
    head = ("codes", *(f"{name}, {how}" for name in SPREADS for how in ("nearest", "by chance")))
    lines = [
        (name, *(f"{100 * error:.1f} %" for error in errors))
        for name, errors in report["codes"].items()
    ]
    return f"{markdown_table(head, lines)}\n\n{conditions(report)}\n"


def measure_codes(steps: int) -> dict[str, list[float]]:
    """By the codes' name: the error by data, then nearest and by chance."""
    errors: dict[str, list[float]] = {}
    for spread in SPREADS.values():
        for codec in CODECS:
            errors.setdefault(codec.name, []).append(tracked(codec, spread, steps))
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.storage_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    report = {
        "machine": machine.describe(),
        "quick": False,
        "copy_gb_per_s": None,
        "roundings": [
            {"size": size, "moved": {name: moved(name, size) for name in ROUNDINGS}}
            for size in STEP_SIZES
        ],
        "codes": measure_codes(STEPS),
    }
    text = f"# What few bits lose\n\n{roundings(report)}\n{codes(report)}"
    publish(options.out, "storage", report, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
