"""Norms and counts of each parameter, summed by the launch that steps it (telemetry=True)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from torch import Tensor

from fastopt.optim.step import sharding
from fastopt.optim.step.launch_group import LaunchGroup

# A layer's gradient is flagged where its root mean square is this many times from the median
# layer's: float32 holds seven digits, so beyond three it begins to matter which of two are added.
FAR = 1e3
# Beside the name of a parameter that is sharded.
PART = " (this rank's part)"


@dataclass(frozen=True)
class ParameterTelemetry:
    """One parameter in the last step.

    grad_norm: of the gradient, unscaled, before it was clipped; param_norm: after the step;
    update_norm: of what the rule changed, before it was rounded; nonfinite: elements of the
    gradient that are infinite or NaN; lost: the share of elements that are stored as they were
    though the rule changed them or their gradient was not 0; numel: elements; shard: this rank
    has only a part of the parameter, and all of this is of that part
    """

    grad_norm: float
    param_norm: float
    update_norm: float
    nonfinite: int
    lost: float
    numel: int
    shard: bool = False

    @property
    def ratio(self) -> float:
        """update_norm / param_norm: about 1e-3 is common; NaN for a parameter of zeros."""
        return self.update_norm / self.param_norm if self.param_norm else math.nan


class Telemetry(Mapping[str, ParameterTelemetry]):
    """The parameters of the last step by name; str() makes a table."""

    def __init__(self, rows: dict[str, ParameterTelemetry]) -> None:
        self._rows = rows

    def __getitem__(self, name: str) -> ParameterTelemetry:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def flags(self) -> dict[str, str]:
        """Layers (names up to the last dot) whose gradient is "vanishing" or "exploding": FAR times
        below or above the median layer's root mean square, all zero, or not finite."""
        squares: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        nonfinite: dict[str, int] = defaultdict(int)
        for name, row in self._rows.items():
            layer = name.rpartition(".")[0] or name
            squares[layer] += row.grad_norm**2
            counts[layer] += row.numel
            nonfinite[layer] += row.nonfinite
        # A rank may have no element of a small layer that is sharded.
        rms = {layer: math.sqrt(squares[layer] / n) for layer, n in counts.items() if n}
        finite = [x for x in rms.values() if 0.0 < x < math.inf]
        middle = float(np.median(finite)) if finite else 0.0
        flags = {}
        for layer, x in rms.items():
            if nonfinite[layer] or not x <= FAR * middle:
                flags[layer] = "exploding"
            elif x * FAR < middle or x == 0.0:
                flags[layer] = "vanishing"
        return flags

    def __str__(self) -> str:
        head = ("parameter", "grad norm", "param norm", "update norm", "ratio", "nonfinite", "lost")
        flags, lines = self.flags, []
        for name, row in self._rows.items():
            norms = (row.grad_norm, row.param_norm, row.update_norm, row.ratio)
            numbers = (*(f"{x:.3g}" for x in norms), str(row.nonfinite), f"{row.lost:.1%}")
            flag = flags.get(name.rpartition(".")[0] or name, "")
            lines.append((name + PART * row.shard, *numbers, flag))
        widths = [max(map(len, column)) for column in zip((*head, ""), *lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if k == 0 else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in ((*head, ""), *lines)
        )


def rows_of(
    launch_groups: Iterable[LaunchGroup],
    copied: dict[Tensor, ParameterTelemetry] | None,
    skipped: Mapping[Tensor, ParameterTelemetry | None] | None,
) -> dict[Tensor, ParameterTelemetry] | None:
    """The telemetry of the last launches by parameter; None where none was watched.

    copied: of the original, for an optimizer that was copied or unpickled and has not stepped
    since; skipped: of parameters whose last step was skipped, None for one without a gradient
    """
    watched = [each for each in launch_groups if each.launch.step_options.watched]
    rows = _read(watched) if watched else copied
    if not skipped:
        return rows
    found = {**(rows or {}), **skipped}
    return {param: row for param, row in found.items() if row is not None}


def _read(launch_groups: Iterable[LaunchGroup]) -> dict[Tensor, ParameterTelemetry]:
    rows = {}
    for launch_group in launch_groups:
        unscale = abs(launch_group.inverse_scale)
        active = launch_group.active if launch_group.active is not None else repeat(True)
        for slot, seen, here in zip(
            launch_group.slots, launch_group.launch.telemetry(), active, strict=False
        ):
            if not here:
                continue
            n, (g, p, d) = slot.target.numel(), map(math.sqrt, seen[:3])
            rows[slot.param] = ParameterTelemetry(
                unscale * g,
                p,
                d,
                int(seen[3]),
                float(seen[4]) / max(n, 1),
                n,
                sharding.is_part(slot.param),
            )
    return rows


def names_of(
    groups: Sequence[Mapping[str, Any]], named: Iterable[tuple[str, Tensor]] | None
) -> dict[Tensor, str]:
    """The name of each parameter: as given, else of its group's, else "group.index"."""
    given = {param: name for name, param in named} if named is not None else {}
    names: dict[Tensor, str] = {}
    for number, group in enumerate(groups):
        known = group.get("param_names") or [f"{number}.{k}" for k in range(len(group["params"]))]
        names.update(zip(group["params"], known, strict=True))
    return {param: given.get(param, name) for param, name in names.items()}
