"""The step counts of a launch and the scalars that follow from them.

`state["step"]` is one tensor a parameter, as torch has it, but all of them are views of one flat
buffer, so a launch counts its steps with one operation. Parameters of one group at one step share
a row of scalars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastopt.optim.update import Update

Array: TypeAlias = np.ndarray[Any, Any]


class Numbers:
    """Numbers kept one a parameter: a flat tensor for each name, of which every owner has a view.

    owners: the dicts that hold them; what they hold is copied and replaced by views.
    """

    def __init__(
        self,
        owners: Sequence[dict[str, Any]],
        names: tuple[str, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.owners, self.names = owners, names
        self.flat: list[Tensor] = []
        self.views: list[tuple[Tensor, ...]] = []
        for name in names:
            values = [_number(owner[name], dtype, device) for owner in owners]
            self.flat.append(torch.stack(values))
            self.views.append(self.flat[-1].unbind())
            for owner, view in zip(owners, self.views[-1], strict=True):
                owner[name] = view

    def in_place(self) -> bool:
        """Whether every owner still holds the view it was given."""
        return all(
            owner.get(name) is view
            for name, views in zip(self.names, self.views, strict=True)
            for owner, view in zip(self.owners, views, strict=True)
        )


def _number(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=dtype, device=device).detach().reshape(())


class Steps:
    """The numbers of one launch.

    rows: (n,) where each parameter's numbers lie in the flat tensors; groups: (n,) its group.
    """

    def __init__(
        self, update: Update, numbers: Numbers, rows: Sequence[int], groups: Sequence[int]
    ) -> None:
        self.update, self.numbers = update, numbers
        self.groups = np.asarray(groups, dtype=np.int64)
        self.rows = np.asarray(rows, dtype=np.int64)
        self._all: slice | Array = self.rows
        if np.array_equal(self.rows, np.arange(rows[0], rows[0] + len(rows))):
            self._all = slice(rows[0], rows[0] + len(rows))
        self._classes: list[tuple[int, Array]] | None = None
        self._expected: Array | None = None

    def advance(
        self,
        hypers: Mapping[int, Sequence[float]],
        g_scales: Mapping[int, float],
        launch: Any,
        active: Array | None,
    ) -> None:
        """Count one step of the active parameters and fill in their rows of scalars, on the host.

        hypers: group -> values of the update's hyper_names; g_scales: group -> gradient's factor
        """
        flat = [tensor.numpy() for tensor in self.numbers.flat]
        here = self._all if active is None else self.rows[active]
        steps = flat[0][here]
        if active is not None or self._expected is None or (steps != self._expected).any():
            self._classes = None
        steps = flat[0][here] = steps + 1
        classes = self._classes or self._partition(active, flat, launch)
        n = self.update.n_scalars
        for row, (group, members) in enumerate(classes):
            kin = self.rows[members]
            numbers = [float(number[kin[0]]) for number in flat]
            values = self.update.scalars(*numbers, *hypers[group])
            launch.scalars[row, 0] = g_scales[group]
            launch.scalars[row, 1:] = values[:n]
            for number, value in zip(flat[1:], values[n:], strict=True):
                number[kin] = value
        self._classes, self._expected = (classes, steps) if active is None else (None, None)

    def _partition(
        self, active: Array | None, flat: list[Array], launch: Any
    ) -> list[tuple[int, Array]]:
        """Parameters alike in group, step and carried numbers: one row of scalars for each kind."""
        here = np.arange(len(self.rows)) if active is None else np.flatnonzero(active)
        table = np.stack([self.groups[here], *(n[self.rows[here]] for n in flat)], axis=1)
        if (table == table[0]).all():
            launch.index[here] = 0
            return [(int(table[0, 0]), here)]
        kinds, inverse = np.unique(table, axis=0, return_inverse=True)
        inverse = inverse.reshape(-1)
        launch.index[here] = inverse
        return [(int(kind[0]), here[inverse == row]) for row, kind in enumerate(kinds)]
