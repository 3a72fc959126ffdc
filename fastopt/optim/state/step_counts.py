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

from fastopt.optim.options import N_AVERAGED, option_scalars
from fastopt.optim.update import Update, sign
from fastopt_kernels.chunks import NO_OPTIONS

Array: TypeAlias = np.ndarray[Any, Any]


class StepCounters:
    """Numbers kept one a parameter: a flat tensor for each name, of which every owner has a view.

    owners: the dicts that hold them; what they hold is copied and replaced by views, but for
    tensors in shared memory, which are written after each step
    names: of the step count, then of the others
    averages: the dicts that hold the number of steps in an average; none for no averages
    """

    def __init__(
        self,
        owners: Sequence[dict[str, Any]],
        names: tuple[str, ...],
        averages: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.owners, self.names = owners, names
        given = owners[0][names[0]]
        dtype = given.dtype if isinstance(given, Tensor) else torch.float32
        self.flat: list[Tensor] = []
        self.views: list[tuple[Tensor, ...]] = []
        # StepCounters in shared memory are other processes' too: they stay where they are.
        self.shared: list[tuple[Tensor, Tensor]] = []
        for name in names:
            flat, views = self._join(owners, name, dtype)
            self.flat.append(flat)
            self.views.append(views)
        self.averaged = self._join(averages, N_AVERAGED, dtype)[0] if averages else None

    def _join(
        self, owners: Sequence[dict[str, Any]], name: str, dtype: torch.dtype
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A flat tensor of one number of every owner, and what each owner then holds of it."""
        flat = torch.stack([_number(owner[name], dtype, torch.device("cpu")) for owner in owners])
        held = list(flat.unbind())
        for row, owner in enumerate(owners):
            given = owner[name]
            if isinstance(given, Tensor) and _in_shared_memory(given):
                self.shared.append((given, held[row]))
                held[row] = given
            owner[name] = held[row]
        return flat, tuple(held)

    def pull(self) -> None:
        """Take over what other processes have counted."""
        for theirs, ours in self.shared:
            ours.copy_(theirs)

    def push(self) -> None:
        """Let other processes see what was counted here."""
        for theirs, ours in self.shared:
            theirs.copy_(ours)

    def values(self) -> list[Tensor]:
        """Copies of all of them, for `restore`."""
        return [tensor.clone() for tensor in self._all_flat()]

    def restore(self, values: list[Tensor]) -> None:
        """Set them back to what they were."""
        for tensor, was in zip(self._all_flat(), values, strict=True):
            tensor.copy_(was)
        self.push()

    def _all_flat(self) -> list[Tensor]:
        return self.flat if self.averaged is None else [*self.flat, self.averaged]

    def in_place(self) -> bool:
        """True while every owner holds the view it was given."""
        return all(
            owner.get(name) is view
            for name, views in zip(self.names, self.views, strict=True)
            for owner, view in zip(self.owners, views, strict=True)
        )


def move_counter(owner: dict[str, Any], name: str, device: torch.device) -> None:
    """Have a number where a device counts it, as it is there where it is already."""
    value = owner[name]
    if not isinstance(value, Tensor) or value.dtype is not torch.float32:
        owner[name] = _number(value, torch.float32, device)
    elif value.device != device:
        owner[name] = value.to(device)


def _in_shared_memory(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and bool(tensor.untyped_storage().is_shared())


def _number(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=dtype, device=device).detach().reshape(())


class DeviceStepCounts:
    """The numbers of one launch where the device counts them: they stay where they are, since a
    captured graph may hold their addresses.

    owners: the dicts that hold them; averages: those that hold the number of steps in an average,
    none for no averages; groups: (n,) the parameter group of each.
    """

    def __init__(
        self,
        update: Update,
        owners: Sequence[dict[str, Any]],
        averages: Sequence[dict[str, Any]],
        groups: Sequence[int],
        device: torch.device,
    ) -> None:
        self.groups = np.asarray(groups, dtype=np.int64)
        self._names, self._owners = update.counter_names, owners
        for owner in owners:
            for name in self._names:
                move_counter(owner, name, device)
        for owner in averages:
            move_counter(owner, N_AVERAGED, device)
        self._tensors = self._held()
        self._addresses = self._read_addresses()
        self._averaged = [owner[N_AVERAGED] for owner in averages]
        columns = [tensor.data_ptr() for tensor in self._averaged]
        self._table = self._addresses
        if averages:
            self._table = np.column_stack([self._addresses, columns])

    def _held(self) -> list[Tensor]:
        return [owner[name] for owner in self._owners for name in self._names]

    def _read_addresses(self) -> Array:
        flat = [tensor.data_ptr() for tensor in self._tensors]
        return np.asarray(flat, dtype=np.int64).reshape(len(self._owners), len(self._names))

    def in_place(self) -> bool:
        """True while every owner holds the tensor whose address is known."""
        return all(a is b for a, b in zip(self._held(), self._tensors, strict=True)) and bool(
            (self._read_addresses() == self._addresses).all()
        )

    def addresses(self, active: Array | None) -> Array:
        """(n, numbers) int64; 0 for a parameter that is not stepped this time."""
        if active is None:
            return self._table
        return np.where(active[:, None], self._table, 0)


class StepCounts:
    """The numbers of one launch.

    rows: (n,) where each parameter's numbers lie in the flat tensors; groups: (n,) its group;
    shared: true where another launch counts some of these too (a parameter given twice).
    """

    def __init__(
        self,
        update: Update,
        counters: StepCounters,
        rows: Sequence[int],
        groups: Sequence[int],
        shared: bool,
    ) -> None:
        self.update, self.counters, self.shared = update, counters, shared
        self.groups = np.asarray(groups, dtype=np.int64)
        self.rows = np.asarray(rows, dtype=np.int64)
        self._all: slice | Array = self.rows
        if np.array_equal(self.rows, np.arange(rows[0], rows[0] + len(rows))):
            self._all = slice(rows[0], rows[0] + len(rows))
        self._arrays = [tensor.numpy() for tensor in counters.flat]
        # Steps in the averages, which move without a gradient too.
        self._averaged = None if counters.averaged is None else counters.averaged.numpy()
        counts = self._arrays[0][self._all]
        self._view = counts if isinstance(self._all, slice) else None
        self._averaged_view = None
        if self._view is not None and self._averaged is not None:
            self._averaged_view = self._averaged[self._all]
        self._classes: list[tuple[int, int, Array]] | None = None
        self._expected: Array | None = None
        # Of the step that was prepared: who takes part, whether the counts may be others than the
        # last step left, and the carried counters after it.
        self._active: Array | None = None
        self._looked = True
        self._carried: list[tuple[Array, list[float]]] = []

    def in_place(self) -> bool:
        """True while every owner holds its view."""
        return self.counters.in_place()

    def counts(self) -> Array:
        """(n,) the step of each parameter."""
        return self._arrays[0][self._all]

    def prepare(
        self,
        groups: Sequence[Mapping[str, Any]],
        factors: Sequence[float],
        launch: Any,
        active: Array | None,
        state_was_accessed: bool,
    ) -> None:
        """Fill in the rows of scalars of the next step of the active parameters, on the host; what
        `count` counts then. Where a scalar cannot be computed, no number has changed.

        groups: the optimizer's parameter groups; factors: of each group's gradients
        state_was_accessed: the numbers may have been set from outside since the last step
        """
        if self.counters.shared:
            self.counters.pull()
        self._active, self._looked = (
            active,
            state_was_accessed or self.shared or bool(self.counters.shared),
        )
        n = self.update.n_scalars
        self._carried = []
        for row, (group, first, kin) in enumerate(self._find_classes(launch)):
            step = self._arrays[0].item(first) + 1.0
            if self.update.carried:
                counters = [array.item(first) for array in self._arrays[1:]]
                values = self.update.scalars(step, *counters, *self.update.floats(groups[group]))
                self._carried.append((kin, list(map(float, values[n:]))))
                values = values[:n]
            else:
                values = self.update.scalars(step, *self.update.floats(groups[group]))
            if launch.step_options is not NO_OPTIONS:
                count = 0.0 if self._averaged is None else self._averaged.item(first)
                values = (*values, *option_scalars(groups[group], launch.step_options, count + 1.0))
            launch.scalars[row] = (sign(groups[group]) * factors[group], *values)

    def count(self) -> None:
        """Count the step that was prepared."""
        for kin, values in self._carried:
            for array, value in zip(self._arrays[1:], values, strict=True):
                array[kin] = value
        if self._averaged is not None:
            self._count_averages(self._averaged)
        steps, self._expected = self._arrays[0], None
        if self._active is not None:
            steps[self.rows[self._active]] += 1
        elif self._looked:
            self._expected = steps[self._all] = steps[self._all] + 1
        elif self._view is not None:
            np.add(self._view, 1, out=self._view)
        else:
            steps[self._all] += 1
        if self.counters.shared:
            self.counters.push()

    def _count_averages(self, counts: Array) -> None:
        if self._active is not None:
            counts[self.rows[self._active]] += 1
        elif self._averaged_view is not None:
            np.add(self._averaged_view, 1, out=self._averaged_view)
        else:
            counts[self._all] += 1

    def _find_classes(self, launch: Any) -> list[tuple[int, int, Array]]:
        """The partition of the active parameters, made anew where it may have changed."""
        if self._active is not None:
            self._classes = None
            return self._partition(self._active, launch)
        if self._looked:
            now = self._arrays[0][self._all]
            if self._expected is None or (now != self._expected).any():
                self._classes = None
        if self._classes is None:
            self._classes = self._partition(None, launch)
        return self._classes

    def _partition(self, active: Array | None, launch: Any) -> list[tuple[int, int, Array]]:
        """Parameters alike in group, step and carried counters share a row of scalars: for each row
        its group, and where the numbers of the first and of all of its parameters lie."""
        chosen = np.arange(len(self.rows)) if active is None else np.flatnonzero(active)
        counters = [n for n in (*self._arrays, self._averaged) if n is not None]
        table = np.stack([self.groups[chosen], *(n[self.rows[chosen]] for n in counters)], axis=1)
        if (table == table[0]).all():
            launch.index[chosen] = 0
            return [(int(table[0, 0]), int(self.rows[chosen[0]]), self.rows[chosen])]
        kinds, inverse = np.unique(table, axis=0, return_inverse=True)
        inverse = inverse.reshape(-1)
        launch.index[chosen] = inverse
        alike = [self.rows[chosen[inverse == row]] for row in range(len(kinds))]
        return [(int(kind[0]), int(kin[0]), kin) for kind, kin in zip(kinds, alike, strict=True)]
