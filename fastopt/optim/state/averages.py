"""Running averages of parameters (ema_decay): of those that a step has no gradient for, and a model
that holds them for a while.

A parameter's average moves in the launch that steps it. What is not stepped has an average too,
which goes on towards the parameter, as that of torch.optim.swa_utils.AveragedModel does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastopt.optim import options
from fastopt.optim.options import AVERAGED, N_AVERAGED
from fastopt.optim.state import formats
from fastopt.optim.state.store import StateStore
from fastopt.optim.step import memory_layout
from fastopt.optim.step.grad_norm import ClipResult, DeviceClipResult
from fastopt.optim.step.grad_scale import Scale


class AveragedOptimizer(Protocol):
    """An optimizer as its averages see it."""

    param_groups: list[dict[str, Any]]
    _store: StateStore
    _released: Any
    _averaging: Averaging | None


class UnsteppedAverage(NamedTuple):
    """A parameter without gradient that has an average, and the number of its group.

    on_device: whether the steps in the average are counted there, since one may be skipped
    state: where its average is, and what a rounding has kept of it
    """

    param: Tensor
    group: int
    on_device: bool
    state: dict[str, Any]
    average: Tensor

    def fits(self, state_was_accessed: bool) -> bool:
        """True while the average is that of the parameter.

        state_was_accessed: the state may hold another one
        """
        return (
            self.param.shape == self.average.shape
            and self.param.device == self.average.device
            and not (state_was_accessed and self.state.get(AVERAGED) is not self.average)
        )


def can_follow(param: Tensor) -> bool:
    """True for a parameter that has an average even where it is never stepped."""
    return param.dtype in memory_layout.DTYPE_CODES and memory_layout.has_memory(param)


class AverageMoves:
    """The averages that move without a gradient in a step, each by its weight. All that may fail is
    done when this is constructed, before the step writes anything."""

    def __init__(
        self,
        store: StateStore,
        groups: Sequence[dict[str, Any]],
        idle: Sequence[UnsteppedAverage],
        scale: Scale,
        clip: ClipResult | DeviceClipResult | None,
    ) -> None:
        self._counts: list[Tensor] = []
        self._alike: dict[float, list[UnsteppedAverage]] = defaultdict(list)
        on_device: dict[tuple[torch.device, int], list[UnsteppedAverage]] = defaultdict(list)
        for each in idle:
            if not memory_layout.has_memory(each.param):
                continue
            if each.on_device:
                on_device[memory_layout.local(each.param).device, each.group].append(each)
            elif isinstance(clip, DeviceClipResult) or not scale.skip():
                count = store.hidden_counters[each.param][N_AVERAGED]
                group = groups[each.group]
                self._counts.append(count)
                self._alike[options.average_weight(group, count.item() + 1.0)].append(each)
        found = clip.found_inf if isinstance(clip, DeviceClipResult) else scale.found_inf
        self._on_device = [
            DeviceAverageMoves(store, groups[number], alike, found)
            for (_, number), alike in on_device.items()
        ]

    def run(self) -> None:
        """Count the step, and move them."""
        # No gradients either; and what was made in inference mode is written only there.
        with torch.inference_mode():
            if self._counts:
                torch._foreach_add_(self._counts, 1.0)
            for weight, alike in self._alike.items():
                averages, values = zip(*map(_ends, alike), strict=True)
                if weight == 1.0:  # as a difference, infinity would be NaN
                    torch._foreach_copy_(averages, values)
                else:
                    torch._foreach_lerp_(averages, values, weight)
            for each in self._on_device:
                each.run()


class DeviceAverageMoves:
    """The same for parameters of one group and device, where only that knows whether the step is
    taken and which it is. Nothing is read or sent: a graph may be captured.

    found_inf: not 0 where the step is skipped
    """

    def __init__(
        self,
        store: StateStore,
        group: dict[str, Any],
        idle: Sequence[UnsteppedAverage],
        found_inf: Tensor | None,
    ) -> None:
        self._idle = idle
        self._counts = [store.hidden_counters[each.param][N_AVERAGED] for each in idle]
        self._count = torch.stack(self._counts)
        self._taken = torch.ones_like(self._count[0])
        if found_inf is not None:
            self._taken = (found_inf.to(self._count.device).reshape(()) == 0).float()
        self._count += self._taken
        self._weights = _weights_on_device(group, self._count.double())

    def run(self) -> None:
        torch._foreach_copy_(self._counts, list(self._count.unbind()))
        for each, weight in zip(self._idle, self._weights.unbind(), strict=True):
            average, value = _ends(each)
            moved = torch.lerp(average, value, weight.to(average.dtype))
            moved = torch.where(weight == 1.0, value, moved)
            average.copy_(torch.where(self._taken != 0, moved, average))


def _weights_on_device(group: dict[str, Any], count: Tensor) -> Tensor:
    """`passes.average_weight` of each count."""

    def filled(x: Any) -> Tensor:
        return x.to(count).expand_as(count) if isinstance(x, Tensor) else torch.full_like(count, x)

    decay, warmup = filled(group["ema_decay"]), filled(group.get("ema_warmup") or 0)
    warm = torch.minimum(decay, (1.0 + count) / (10.0 + count))
    decay = torch.where(count <= warmup, warm, decay)
    return 1.0 - torch.where(count == 1.0, torch.zeros_like(decay), decay)


def _whole(param: Tensor, state: dict[str, Any]) -> Tensor:
    """A parameter on this rank, with what a rounding has kept of it."""
    for name, _ in options.KEPT.values():
        if isinstance(kept := state.get(name), Tensor):
            return formats.joined(memory_layout.local(param), memory_layout.local(kept))
    return memory_layout.local(param)


def _ends(each: UnsteppedAverage) -> tuple[Tensor, Tensor]:
    """An average, and what it moves towards, of one dtype."""
    average = memory_layout.local(each.average)
    return average, _whole(each.param, each.state).to(average.dtype)


def end_backward(optimizer: AveragedOptimizer) -> None:
    """Let no average wait for the end of a backward that is over."""
    if optimizer._released is not None:
        optimizer._released.averages.end()


def refuse_inside(optimizer: AveragedOptimizer, what: str, param: Tensor | None = None) -> None:
    """Raises RuntimeError where parameters hold their averages, and lose what they are given.

    param: what a backward was to step, and to free the gradient of
    """
    if optimizer._averaging is not None:
        if param is not None:
            param.grad = None
        raise RuntimeError(
            f"{what} inside averaged() would be thrown away: the parameters hold their averages, "
            "and get their own values back when the with block ends. Call it after the block."
        )


class Averaging:
    """A model that holds its averages, and the values it gets back when the last block ends."""

    def __init__(self) -> None:
        self.depth = 0
        self.own: list[tuple[Tensor, Tensor]] = []

    def take(self, optimizer: AveragedOptimizer) -> None:
        """Put the averages into the parameters."""
        held = optimizer._store.states
        groups = [g for g in optimizer.param_groups if g.get("ema_decay") is not None]
        params = [param for group in groups for param in group["params"]]
        chosen = [param for param in params if optimizer._store.has_average(param)]
        self.own = [(param, param.detach().clone()) for param in chosen]
        for param in chosen:
            _write(param, held[param][AVERAGED])

    def give_back(self) -> None:
        """Put their own values into the parameters; from the start again if it is interrupted."""
        try:
            for param, own in self.own:
                _write(param, own)
        except BaseException:
            for param, own in self.own:
                _write(param, own)
            raise


def _write(param: Tensor, value: Tensor) -> None:
    with torch.inference_mode() if param.is_inference() else torch.no_grad():
        param.copy_(value)


@contextmanager
def averaged(optimizer: AveragedOptimizer) -> Iterator[None]:
    """`FusedOptimizer.averaged`."""
    if not any(group.get("ema_decay") is not None for group in optimizer.param_groups):
        raise RuntimeError(f"construct {type(optimizer).__name__} with ema_decay to keep averages")
    end_backward(optimizer)
    averaging = optimizer._averaging
    if averaging is None:
        averaging = optimizer._averaging = Averaging()
    averaging.depth += 1
    try:
        if averaging.depth == 1:
            averaging.take(optimizer)
        yield
    finally:
        averaging.depth -= 1
        if averaging.depth == 0:
            try:
                averaging.give_back()
            finally:
                optimizer._averaging = None
