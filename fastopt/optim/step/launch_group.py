"""One launch: its tensors, their states and steps, and the checks that come before it.

The checks are most of what a step costs in Python on many small tensors, so each is one pass over
a list in compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastopt.optim.options import LOW_BITS, option_hypers
from fastopt.optim.state import formats
from fastopt.optim.state.step_counts import DeviceStepCounts, StepCounts
from fastopt.optim.step import memory_layout
from fastopt.optim.step.grad_scale import Scale
from fastopt.optim.step.memory_layout import Staged
from fastopt.optim.step.rng_keys import bases_of, keys_of, seeds_of
from fastopt.optim.step.tensor_guards import TensorGuards
from fastopt.optim.update import Update, sign
from fastopt.storage import PLAIN


def _readable(grad: Tensor, target: Tensor) -> bool:
    """True where a kernel that walks the target may read this gradient's own memory."""
    return (
        memory_layout.has_memory(grad)
        and not memory_layout.is_lazy(grad)
        and memory_layout.same_layout(grad, target)
    )


class ParamSlot:
    """One parameter in a launch.

    source is its plain tensor on this rank, target what the kernel walks: the same, or a dense
    buffer where the source has gaps.
    """

    def __init__(self, param: Tensor, source: Tensor, group: int, position: int) -> None:
        self.param, self.source, self.group, self.position = param, source, group, position
        self.target = memory_layout.reference(source)
        self.state: dict[str, Any] = {}
        self.state_names: tuple[str, ...] = ()
        self.states: list[Tensor] = []
        self.staged: list[Staged] = []
        self.grad_buffer: Tensor | None = None
        self.held: Tensor | None = None
        self.grad_dtype = param.dtype
        self.dtype_codes: tuple[str, ...] = ()

    @classmethod
    def make(
        cls,
        state: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        group: int,
        position: int,
        state_names: tuple[str, ...],
    ) -> ParamSlot:
        """Lay out a parameter, its gradient and its states alike, staging those that are not."""
        slot = cls(param, memory_layout.local(param), group, position)
        slot.state = state
        if slot.target is not slot.source:
            slot.staged.append(Staged(slot.source, slot.target))
        own = memory_layout.local_grad(grad, param)
        if slot.target is not slot.source or not _readable(own, slot.target):
            slot.grad_buffer = torch.empty_like(slot.target, dtype=own.dtype)
        slot.state_names = state_names
        coded = formats.coded_names(state_names)
        whole = {LOW_BITS, *map(formats.codes_name, coded)}
        scales = set(map(formats.scale_name, coded))
        for name in state_names:
            if name in scales:
                formats.check_scale(name, state.get(name), param)
                slot.states.append(state[name])
                continue
            formats.check_state(name, state[name], param)
            tensor = memory_layout.local(state[name])
            if memory_layout.is_lazy(tensor) or not memory_layout.same_layout(tensor, slot.target):
                buffer = torch.empty_like(slot.target, dtype=tensor.dtype)
                slot.staged.append(Staged(tensor, buffer))
                tensor = buffer
            slot.states.append(tensor)
        streams = [slot.target, own, *slot.states]
        slot.grad_dtype = own.dtype
        roles = ["a parameter", "a gradient", *(f"the state {n!r}" for n in state_names)]
        integer = [False, False, *(name in whole for name in state_names)]
        slot.dtype_codes = tuple(map(memory_layout.dtype_code, streams, roles, integer))
        return slot

    def grad(self, grad: Tensor | None) -> Tensor | None:
        """The gradient as the kernel may read it, or None: missing this time."""
        if grad is None:
            return None
        own = memory_layout.local(grad)
        grad = memory_layout.local_grad(grad, self.param)
        if self.grad_buffer is None:
            # Redistributed, it is a temporary: it lives on until the next one.
            self.held = None if grad is own else grad
            return grad
        self.grad_buffer.copy_(grad)
        return self.grad_buffer


def _like(grad: Tensor, slot: ParamSlot) -> bool:
    """True where a gradient may be read as the one the slot was laid out with."""
    return (
        grad.layout is torch.strided
        and type(grad) in PLAIN
        and grad.dtype == slot.grad_dtype
        and grad.shape == slot.target.shape
        and _readable(grad, slot.target)
    )


# From so many elements on a step takes 150 us and more, and a look at a gradient's storage 1.
LARGE = 1 << 20


class LaunchGroup:
    """The parameters of one launch, their tensors and the guards of the last step."""

    def __init__(
        self,
        slots: list[ParamSlot],
        update: Update,
        launch: Any,
        steps: StepCounts | DeviceStepCounts,
    ) -> None:
        self.slots, self.update, self.launch, self.steps = slots, update, launch, steps
        # The device counts the steps.
        self.on_device = isinstance(steps, DeviceStepCounts)
        self._draws = bool(launch.draws)
        # Of the step that was prepared: what chance follows from, and what a device computes with.
        self._seeds: Any = np.uint64(0)
        self._hypers: list[list[Any]] = []
        # What the gradients of the last step were multiplied by to unscale them, where the host
        # knows: telemetry of a device is without its scale.
        self.inverse_scale = 1.0
        self.group_of = np.array([slot.group for slot in slots])
        self._numbers = np.array([slot.position for slot in slots])
        self.groups = sorted({slot.group for slot in slots})
        self.positions = [slot.position for slot in slots]
        self.targets = [slot.target for slot in slots]
        self.sources = [slot.source for slot in slots]
        self.written = [m.param for m in slots if not m.param.is_inference()]
        self.staged = [staged for slot in slots for staged in slot.staged]
        gradients = [m.grad_buffer for m in slots if m.grad_buffer is not None]
        # What is the plan's own among what a launch reads and writes.
        self.buffers = [*(staged.buffer for staged in self.staged), *gradients]
        # Gradients that are read through a buffer, or are the local part of a DTensor.
        self.indirect = [
            k for k, m in enumerate(slots) if m.grad_buffer is not None or m.param is not m.source
        ]
        self._large = [k for k, m in enumerate(slots) if m.target.numel() >= LARGE]
        self._collect_data_ptrs = getattr(launch, "walk", None)
        self.source_guards = TensorGuards(self.sources, self._collect_data_ptrs)
        self.launch.tensors[:, 0] = [slot.target.data_ptr() for slot in slots]
        self._take_states()
        # Of all gradients, and of the `active` ones where some are missing.
        self.grad_guards: TensorGuards | None = None
        self.active: np.ndarray[Any, Any] | None = None
        # Every gradient is missing this time.
        self.empty = False
        self.present_guards: TensorGuards | None = None

    def _take_states(self) -> None:
        """Remember the states by object and by address, and write their addresses to the table."""
        names = self.slots[0].state_names
        self.state_objects = {n: [m.state[n] for m in self.slots] for n in names}
        self.state_tensors = [
            memory_layout.local(tensor)
            for tensors in self.state_objects.values()
            for tensor in tensors
        ]
        self.state_guards = TensorGuards(self.state_tensors, self._collect_data_ptrs)
        for row, slot in enumerate(self.slots):
            self.launch.tensors[row, 2:] = [state.data_ptr() for state in slot.states]

    def measure(self, maximum: bool) -> tuple[np.ndarray[Any, Any], Any, Any]:
        """Of each gradient its parameter group, sum g^2 or max |g|, and elements not finite.

        maximum: the norm is max |g|. Addresses are those taken last.
        """
        measured = self.launch.measure(maximum)
        return self.group_of, measured.parts, measured.nonfinite

    def missing_slots(self) -> list[ParamSlot]:
        """The parameters whose gradient is missing this time."""
        return [] if self.active is None else [self.slots[k] for k in np.flatnonzero(~self.active)]

    def prepare(
        self, groups: list[dict[str, Any]], factors: list[float], state_was_accessed: bool
    ) -> None:
        """Take from the groups the scalars of the next step, or what a device computes them from.

        groups: the optimizer's; factors: what the gradients of each are multiplied by. Where it is
        nothing to compute with, this raises, and no step has been counted.
        """
        if self._draws:
            self._seeds = seeds_of(groups, self.group_of)
        if isinstance(self.steps, StepCounts):
            self.steps.prepare(groups, factors, self.launch, self.active, state_was_accessed)
        else:
            step_options, chosen = (
                self.launch.step_options,
                [groups[number] for number in self.groups],
            )
            hypers = self.update.device_hypers
            self._hypers = [[sign(g), *hypers(g), *option_hypers(g, step_options)] for g in chosen]

    def count(self) -> None:
        """Count the step that was prepared, where the host counts."""
        if isinstance(self.steps, StepCounts):
            self.steps.count()
            if self._draws:
                self.launch.keys[:] = keys_of(self._seeds, self.steps.counts(), self._numbers)

    def run(self, on_device: tuple[Any, ...] = ()) -> None:
        """Launch the step that was counted; on_device: a clip result with the factors that only the
        device knows, and the scale it takes out."""
        if self.staged:
            self._stage(Staged.read)
        self.launch.run(torch.get_num_threads(), *on_device)
        if self.staged:
            self._stage(Staged.write)

    def run_on_device(self, scale: Scale, clip: Any) -> None:
        """Launch the step that was prepared without the host knowing its number: it is counted on
        the device. A clip result has the scaler's found_inf in it."""
        assert isinstance(self.steps, DeviceStepCounts)
        self.launch.keep_if_captured(self.buffers)
        if self.staged:
            self._stage(Staged.read)
        self.launch.run_on_device(
            self.update.scalars,
            self.steps.addresses(self.active),
            np.searchsorted(self.groups, self.steps.groups),
            self._hypers,
            scale.grad_scale,
            scale.found_inf if clip is None else None,
            clip,
            bases_of(self._seeds, self._numbers) if self._draws else None,
        )
        if self.staged:
            self._stage(Staged.write)

    def _stage(self, move: Callable[[Staged], None]) -> None:
        with torch.no_grad():
            for staged in self.staged:
                move(staged)

    def written_tensors(self, states: bool) -> list[Tensor]:
        """Tensors that the last launch wrote: autograd must know, or a stale backward is wrong."""
        if self.active is not None:
            here = np.flatnonzero(self.active)
            chosen = [self.slots[k] for k in here]
            written = [m.param for m in chosen if not m.param.is_inference()]
        else:
            written = self.written
        return written + self.state_tensors if states else written

    def refresh(self, grads: list[Tensor | None], state_was_accessed: bool) -> bool:
        """True where every tensor is what and where it was; takes over the gradients' addresses."""
        return (
            self.source_guards.unmoved(self.sources)
            and not (state_was_accessed and not self._states_in_place())
            and self._take_grads(grads)
        )

    def _states_in_place(self) -> bool:
        """True while the states are the tensors whose addresses are known."""
        states = [slot.state for slot in self.slots]
        try:
            for name, objects in self.state_objects.items():
                if not all(map(is_, map(itemgetter(name), states), objects)):
                    return False
        except KeyError:
            return False
        return self.steps.in_place() and self.state_guards.unmoved(self.state_tensors)

    def _take_grads(self, all_grads: list[Tensor | None]) -> bool:
        grads = all_grads
        if len(all_grads) > len(self.slots):
            grads = [all_grads[k] for k in self.positions]
        if self.indirect:
            grads = list(grads)
            with torch.no_grad():
                for k in self.indirect:
                    grad, slot = grads[k], self.slots[k]
                    if grad is not None:
                        memory_layout.check_storage(grad, "a gradient")
                    if grad is not None and grad.shape != slot.param.shape:
                        return False
                    grads[k] = slot.grad(grad)
        for k in self._large:
            if (grad := grads[k]) is not None:
                memory_layout.check_storage(grad, "a gradient")
        if self.grad_guards is None:
            self.grad_guards = TensorGuards(grads, self._collect_data_ptrs, "a gradient")  # type: ignore[arg-type]
        if self.active is not None or not self.grad_guards.take(grads):  # type: ignore[arg-type]
            if any(map(is_, grads, repeat(None))):
                return self._take_some_grads(grads)
            if not self.grad_guards.take(grads):  # type: ignore[arg-type]
                return False
            self.active, self.present_guards, self.empty = None, None, False
            self.launch.select(None)
        self.launch.tensors[:, 1] = self.grad_guards.addresses
        return True

    def _take_some_grads(self, grads: list[Tensor | None]) -> bool:
        """Some gradients are missing (frozen, or not reached this time): a smaller launch."""
        active = np.array([grad is not None for grad in grads], dtype=bool)
        present = [grad for grad in grads if grad is not None]
        if self.active is None or not np.array_equal(active, self.active):
            chosen = [self.slots[k] for k in np.flatnonzero(active)]
            if not all(map(_like, present, chosen)):
                return False
            self.active, self.empty = active, not present
            self.present_guards = TensorGuards(present, self._collect_data_ptrs, "a gradient")
            self.launch.select(active)
        elif self.present_guards is None or not self.present_guards.take(present):
            return False
        self.launch.tensors[active, 1] = self.present_guards.addresses
        return True
