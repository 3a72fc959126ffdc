"""GradScaler's scale and skip flag in a step, and the optimizers it leaves the unscaling to."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastopt.optim.step import sharding


class Unscaling(Protocol):
    """An optimizer as the attribute below sees it; unscales: a scaler leaves that to the step."""

    param_groups: list[dict[str, Any]]
    unscales: bool


class Scale:
    """GradScaler's grad_scale and found_inf, read on the host only where a launch needs them there.

    Either may be a number: torch's found_inf is the int 0 where no parameter has a gradient.
    """

    def __init__(self, grad_scale: Tensor | float | None, found_inf: Tensor | float | None) -> None:
        self.grad_scale, self.found_inf = _tensor(grad_scale), _tensor(found_inf)
        self._skip: bool | None = None
        self._inverse: float | None = None

    def on_host(self) -> bool:
        """True where found_inf can be read without waiting for a device."""
        return self.found_inf is not None and self.found_inf.device.type == "cpu"

    def skip(self) -> bool:
        if self._skip is None:
            self._skip = self.found_inf is not None and bool(self.found_inf.item())
        return self._skip

    def inverse(self) -> float:
        if self._inverse is None:
            self._inverse = 1.0 if self.grad_scale is None else 1.0 / self.grad_scale.item()
        return self._inverse


def _tensor(x: Tensor | float | None) -> Tensor | None:
    if x is None or isinstance(x, Tensor):
        return x
    return torch.tensor(float(x), dtype=torch.float32, device="cpu")


NO_SCALE = Scale(None, None)


class ScalesInside:
    """`_step_supports_amp_scaling`, which GradScaler reads before each step: True where the
    step unscales and skips by itself. As in torch, the attribute exists only there.

    It is there with fused=True, with an option that clips, and where a scaler of ours asks; not
    where a scaler must ask other ranks what they found, which it does only where it unscales. With
    an option that clips it is not there if `step` was replaced on the instance: a function of
    others sees only steps that are taken, as with fused=False. Setting it to False turns it off.
    """

    _NAME = "_step_supports_amp_scaling"

    def __get__(self, optimizer: Unscaling | None, owner: type | None = None) -> bool:
        if optimizer is None or optimizer.__dict__.get(self._NAME) is False:
            raise AttributeError(self._NAME)
        if _scales_inside(optimizer) and not sharding.finds_inf_alone(optimizer):  # type: ignore[arg-type]
            return True
        raise AttributeError(self._NAME)

    def __set__(self, optimizer: Unscaling, value: bool) -> None:
        # True is set by torch's constructors, and means nothing: options may change.
        optimizer.__dict__[self._NAME] = value


def _scales_inside(optimizer: Unscaling) -> bool:
    clips = False
    for group in optimizer.param_groups:
        if group.get("fused"):
            return True
        # Not by their truth: a limit may be a tensor on a device.
        if group.get("max_grad_norm") is not None or group.get("clip_value") is not None:
            clips = True
    return optimizer.unscales or (clips and not step_is_replaced(optimizer))


def step_is_replaced(optimizer: Any) -> bool:
    """`step` of this instance is a function of others, such as accelerate's, which counts steps.
    The wrapper of a learning rate scheduler counts nothing: what it wraps decides."""
    step: Any = optimizer.__dict__.get("step")
    if step is None:
        return False
    step = getattr(step, "__func__", step)
    if getattr(step, "_wrapped_by_lr_sched", False):
        step = getattr(step, "__wrapped__", step)
    return step is not type(optimizer).step
