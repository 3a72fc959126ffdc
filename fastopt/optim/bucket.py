"""One launch: its tensors, their states and steps, and the checks that come before it.

The checks are most of what a step costs in Python on many small tensors, so each is one pass of
`map` over a list, and a gradient object that is known is not looked at again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastopt.optim import layout
from fastopt.optim.layout import Staged
from fastopt.optim.steps import DeviceSteps, Steps
from fastopt.optim.update import Update

_data_ptr: Callable[[Tensor], int] = Tensor.data_ptr
_nbytes: Callable[[Tensor], int] = attrgetter("nbytes")
_is_contiguous: Callable[[Tensor], bool] = Tensor.is_contiguous
_is_neg: Callable[[Tensor], bool] = Tensor.is_neg
_is_conj: Callable[[Tensor], bool] = Tensor.is_conj


def _readable(grad: Tensor, target: Tensor) -> bool:
    """Whether a kernel that walks the target may read this gradient's own memory."""
    return (
        layout.has_memory(grad)
        and not grad.is_neg()
        and not grad.is_conj()
        and layout.same_layout(grad, target)
    )


class Member:
    """One parameter in a launch.

    source is its plain tensor on this rank, target what the kernel walks: the same, or a dense
    buffer where the source has gaps.
    """

    def __init__(self, param: Tensor, source: Tensor, group: int, position: int) -> None:
        self.param, self.source, self.group, self.position = param, source, group, position
        self.target = layout.reference(source)
        self.state: dict[str, Any] = {}
        self.states: list[Tensor] = []
        self.staged: list[Staged] = []
        self.grad_buffer: Tensor | None = None
        self.grad_dtype = param.dtype
        self.kinds: tuple[str, ...] = ()

    @classmethod
    def make(
        cls,
        state: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        group: int,
        position: int,
        update: Update,
    ) -> Member:
        """Lay out a parameter, its gradient and its states alike, staging those that are not."""
        member = cls(param, layout.local(param), group, position)
        member.state = state
        if member.target is not member.source:
            member.staged.append(Staged(member.source, member.target))
        own = layout.local_grad(grad, param)
        if member.target is not member.source or not _readable(own, member.target):
            member.grad_buffer = torch.empty_like(member.target, dtype=own.dtype)
        for name in update.state_names:
            tensor = layout.local(state[name])
            if not layout.same_layout(tensor, member.target):
                buffer = torch.empty_like(member.target, dtype=tensor.dtype)
                member.staged.append(Staged(tensor, buffer))
                tensor = buffer
            member.states.append(tensor)
        streams = [member.target, own, *member.states]
        member.grad_dtype = own.dtype
        member.kinds = tuple(layout.kind(tensor, "a tensor") for tensor in streams)
        return member

    def grad(self, grad: Tensor | None) -> Tensor | None:
        """The gradient as the kernel may read it, or None: missing this time."""
        if grad is None:
            return None
        grad = layout.local_grad(grad, self.param)
        if self.grad_buffer is None:
            return grad
        self.grad_buffer.copy_(grad)
        return self.grad_buffer


def _reshaped(grad: Tensor | None, param: Tensor) -> bool:
    return grad is not None and grad.shape != param.shape


class Bucket:
    """The members of one launch and what is known of them since the last step."""

    def __init__(
        self,
        members: list[Member],
        update: Update,
        launch: Any,
        steps: Steps | DeviceSteps,
    ) -> None:
        self.members, self.update, self.launch, self.steps = members, update, launch, steps
        self.groups = sorted({member.group for member in members})
        self.positions = [member.position for member in members]
        self.targets = [member.target for member in members]
        self.sources = [member.source for member in members]
        self.written = [m.param for m in members if not m.param.is_inference()]
        self.staged = [staged for member in members for staged in member.staged]
        # Gradients that are read through a buffer, or are the local part of a DTensor.
        self.indirect = [
            k for k, m in enumerate(members) if m.grad_buffer is not None or m.param is not m.source
        ]
        self.complex = members[0].target.is_complex()
        self.contiguous = all(map(_is_contiguous, self.targets))
        self.source_ptrs = list(map(_data_ptr, self.sources))
        self.launch.tensors[:, 0] = list(map(_data_ptr, self.targets))
        self._take_states()
        # Bytes say both size and width: half of what torch has checked where it was assigned.
        self.nbytes = [m.target.numel() * m.grad_dtype.itemsize for m in members]
        self.active: np.ndarray[Any, Any] | None = None
        self.grad_ptrs: list[int] = []
        self.known: list[weakref.ref[Tensor]] = []

    def _take_states(self) -> None:
        """Remember the states by object and by address, and write their addresses to the table."""
        names = self.update.state_names
        self.state_objects = {n: [m.state[n] for m in self.members] for n in names}
        self.state_tensors = [
            layout.local(tensor) for tensors in self.state_objects.values() for tensor in tensors
        ]
        self.state_ptrs = list(map(_data_ptr, self.state_tensors))
        for column in range(len(names)):
            walked = [member.states[column] for member in self.members]
            self.launch.tensors[:, 2 + column] = list(map(_data_ptr, walked))

    @property
    def empty(self) -> bool:
        """Whether every gradient is missing this time."""
        return self.active is not None and not self.active.any()

    @property
    def on_device(self) -> bool:
        """Whether the device counts the steps."""
        return isinstance(self.steps, DeviceSteps)

    def run(self, rows: dict[int, list[Any]], inverse_scale: float, exposed: bool) -> None:
        """Count a step on the host and launch.

        rows: for each group the gradient's sign and the hyper-parameters of the update
        """
        assert isinstance(self.steps, Steps)
        self._stage(Staged.read)
        self.steps.advance(rows, inverse_scale, self.launch, self.active, exposed)
        self.launch.run(torch.get_num_threads())
        self._stage(Staged.write)

    def run_on_device(
        self,
        rows: dict[int, list[Any]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Launch without the host knowing the steps: they are counted on the device."""
        assert isinstance(self.steps, DeviceSteps)
        self._stage(Staged.read)
        self.launch.run_on_device(
            self.update.scalars,
            self.steps.addresses(self.active),
            np.searchsorted(self.groups, self.steps.groups),
            list(rows.values()),
            grad_scale,
            found_inf,
        )
        self._stage(Staged.write)

    def _stage(self, move: Callable[[Staged], None]) -> None:
        if self.staged:
            with torch.no_grad():
                for staged in self.staged:
                    move(staged)

    def touched(self, states: bool) -> list[Tensor]:
        """What the last launch wrote: autograd must know, or a stale backward is silently wrong."""
        if self.active is not None:
            here = np.flatnonzero(self.active)
            chosen = [self.members[k] for k in here]
            written = [m.param for m in chosen if not m.param.is_inference()]
        else:
            written = self.written
        return written + self.state_tensors if states else written

    def refresh(self, grads: list[Tensor | None], exposed: bool) -> bool:
        """Whether every address is still that of its tensor; takes the new gradients' addresses."""
        if list(map(_data_ptr, self.sources)) != self.source_ptrs:
            return False
        if exposed and not self._states_in_place():
            return False
        return self._take_grads(grads)

    def _states_in_place(self) -> bool:
        """States are looked at only once somebody else could have reached them."""
        states = [member.state for member in self.members]
        try:
            for name, objects in self.state_objects.items():
                if not all(map(is_, map(itemgetter(name), states), objects)):
                    return False
        except KeyError:
            return False
        return self.steps.in_place() and list(map(_data_ptr, self.state_tensors)) == self.state_ptrs

    def _take_grads(self, all_grads: list[Tensor | None]) -> bool:
        grads = all_grads
        if len(all_grads) > len(self.members):
            grads = [all_grads[k] for k in self.positions]
        if self.indirect:
            grads = list(grads)
            with torch.no_grad():
                for k in self.indirect:
                    if _reshaped(grads[k], self.members[k].param):
                        return False
                    grads[k] = self.members[k].grad(grads[k])
        try:
            ptrs = list(map(_data_ptr, grads))  # type: ignore[arg-type]
        except (TypeError, RuntimeError):
            return self._take_some_grads(grads)
        if self.active is not None:
            self.active = None
            self.launch.select(None)
        if ptrs == self.grad_ptrs and self._are_known(grads):  # type: ignore[arg-type]
            return True
        if not self._valid(grads, ptrs, range(len(grads))):  # type: ignore[arg-type]
            return False
        self.grad_ptrs = ptrs
        self.launch.tensors[:, 1] = ptrs
        return True

    def _take_some_grads(self, grads: list[Tensor | None]) -> bool:
        """Some gradients are missing (frozen, or not reached this time): a smaller launch."""
        here = [k for k, grad in enumerate(grads) if grad is not None]
        present = [grads[k] for k in here]
        if any(grad.layout is not torch.strided for grad in present):  # type: ignore[union-attr]
            return False
        ptrs = list(map(_data_ptr, present))  # type: ignore[arg-type]
        if not self._valid(present, ptrs, here):  # type: ignore[arg-type]
            return False
        active = np.zeros(len(grads), dtype=bool)
        active[here] = True
        if self.active is None or not np.array_equal(active, self.active):
            self.active = active
            self.launch.select(active)
        self.grad_ptrs, self.known = [], []
        self.launch.tensors[here, 1] = ptrs
        return True

    def _are_known(self, grads: list[Tensor]) -> bool:
        """Whether these are the objects of the last step, as with DDP's gradient buckets.

        Weak references: a plan that held gradients would keep their memory through zero_grad().
        The first one tells whether gradients persist here at all; only then are all remembered.
        """
        if not self.known or self.known[0]() is not grads[0]:
            self.known = [weakref.ref(grads[0])]
            return False
        if len(self.known) < len(grads):
            self.known = list(map(weakref.ref, grads))
            return False
        return all(map(is_, [reference() for reference in self.known], grads))

    def _valid(self, grads: list[Tensor], ptrs: list[int], here: Sequence[int]) -> bool:
        """Whether new gradient objects lie as the plan has them."""
        nbytes = self.nbytes if len(here) == len(self.nbytes) else [self.nbytes[k] for k in here]
        return (
            layout.PLAIN.issuperset(map(type, grads))
            and (
                0 not in ptrs or not any(n for n, ptr in zip(nbytes, ptrs, strict=True) if not ptr)
            )
            and list(map(_nbytes, grads)) == nbytes
            and (
                all(map(_is_contiguous, grads)) if self.contiguous else self._laid_out(grads, here)
            )
            and not any(map(_is_neg, grads))
            and not (self.complex and any(map(_is_conj, grads)))
        )

    def _laid_out(self, grads: list[Tensor], here: Sequence[int]) -> bool:
        return all(
            layout.same_layout(grad, self.targets[k]) for grad, k in zip(grads, here, strict=True)
        )
