"""The modules of torch.nn that fastopt.functional serves: same constructors, same state_dict; and
modules for functions of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.jit import is_scripting  # type: ignore[attr-defined]

from fastopt import functional
from fastopt import parametrizations as parametrizations
from fastopt.functional.loss_terms import terms_of
from fastopt.tracers import M, scriptable
from fastopt.tracers import traceable as traceable_class

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CrossEntropyLoss",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LogSoftmax",
    "RMSNorm",
    "Softmax",
]


def traceable(cls: M) -> M:
    """A module that torch.fx records as one node and torch.jit.script takes, or refuses."""
    return traceable_class(cls, options_of)


def options_of(module: torch.nn.Module) -> dict[str, Any]:
    """Options that torch's class of this name has not, where they are not the defaults."""
    for cls, defaults in _OPTIONS.items():
        if isinstance(module, cls):
            return {k: getattr(module, k) for k, v in defaults.items() if getattr(module, k) != v}
    return {}


@traceable
class Softmax(torch.nn.Softmax):
    """fastopt.functional.softmax over `dim`."""

    _scripted = scriptable(torch.nn.Softmax.forward)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted(input)
        return functional.softmax(input, self.dim, _stacklevel=6)


@traceable
class LogSoftmax(torch.nn.LogSoftmax):
    """fastopt.functional.log_softmax over `dim`."""

    _scripted = scriptable(torch.nn.LogSoftmax.forward)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted(input)
        return functional.log_softmax(input, self.dim, _stacklevel=6)


@traceable
class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """fastopt.functional.cross_entropy; z_loss and softcap as there, all else as
    torch.nn.CrossEntropyLoss.

    Raises ValueError for a z_loss or a softcap that is not a positive number.
    """

    # Of modules that were swapped, or pickled before there were these.
    z_loss = 0.0
    softcap = None  # type: float | None

    def __init__(
        self, *args: Any, z_loss: float = 0.0, softcap: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        terms_of(z_loss, softcap)
        self.z_loss, self.softcap = z_loss, softcap

    _scripted = scriptable(torch.nn.CrossEntropyLoss.forward)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted(input, target)
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in options_of(self).items())


@traceable
class LayerNorm(torch.nn.LayerNorm):
    """fastopt.functional.layer_norm with this module's weight and bias."""

    _scripted = scriptable(torch.nn.LayerNorm.forward)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted(input)
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class _OffsetRMSNorm(torch.nn.RMSNorm):
    """A weight that counts as weight + weight_offset, and starts at what makes that 1."""

    weight_offset = 0.0  # annotated, TorchScript would read "float" as a type it does not know

    def __init__(self, *args: Any, weight_offset: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_offset = weight_offset
        if weight_offset:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.weight_offset and self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{super().extra_repr()}{offset}"


@traceable
class RMSNorm(_OffsetRMSNorm):
    """fastopt.functional.rms_norm with this module's weight.

    weight_offset: added to the weight, which starts at what makes it 1; all else as
    torch.nn.RMSNorm, state_dict keys too
    """

    _scripted = scriptable(torch.nn.RMSNorm.forward)

    def forward(self, x: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted(x)
        return functional.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, weight_offset=self.weight_offset
        )


@traceable
class GroupNorm(torch.nn.GroupNorm):
    """fastopt.functional.group_norm with this module's weight and bias."""

    _scripted = scriptable(torch.nn.GroupNorm.forward)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted(input)
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _batch_norm(module: torch.nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor:
    """Does what torch's class does, with fastopt.functional.batch_norm: batches are counted, and
    without a momentum running statistics are the mean over all of them."""
    if is_scripting():
        scripted: Tensor = module._scripted(input)  # type: ignore[operator]
        return scripted
    module._check_input_dim(input)  # type: ignore[no-untyped-call]
    mean, var, counted = module.running_mean, module.running_var, module.num_batches_tracked
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.training and not module.track_running_stats:
        mean = var = None
    elif module.training and counted is not None:
        counted.add_(1)
        if module.momentum is None:
            momentum = 1.0 / float(counted)
    own = module.training or (mean is None and var is None)
    return functional.batch_norm(
        input, mean, var, module.weight, module.bias, own, momentum, module.eps
    )


@traceable
class BatchNorm1d(torch.nn.BatchNorm1d):
    """fastopt.functional.batch_norm with this module's weights and running statistics."""

    _scripted = scriptable(torch.nn.BatchNorm1d.forward)
    forward = _batch_norm


@traceable
class BatchNorm2d(torch.nn.BatchNorm2d):
    """fastopt.functional.batch_norm with this module's weights and running statistics."""

    _scripted = scriptable(torch.nn.BatchNorm2d.forward)
    forward = _batch_norm


@traceable
class BatchNorm3d(torch.nn.BatchNorm3d):
    """fastopt.functional.batch_norm with this module's weights and running statistics."""

    _scripted = scriptable(torch.nn.BatchNorm3d.forward)
    forward = _batch_norm


def _apply_instance_norm(module: torch.nn.modules.instancenorm._InstanceNorm, x: Tensor) -> Tensor:
    if is_scripting():
        scripted: Tensor = module._scripted(x)  # type: ignore[operator]
        return scripted
    return functional.instance_norm(
        x,
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        module.training or not module.track_running_stats,
        0.0 if module.momentum is None else module.momentum,
        module.eps,
    )


@traceable
class InstanceNorm1d(torch.nn.InstanceNorm1d):
    """fastopt.functional.instance_norm with this module's weights and running statistics."""

    _scripted = scriptable(torch.nn.InstanceNorm1d._apply_instance_norm)
    _apply_instance_norm = _apply_instance_norm


@traceable
class InstanceNorm2d(torch.nn.InstanceNorm2d):
    """fastopt.functional.instance_norm with this module's weights and running statistics."""

    _scripted = scriptable(torch.nn.InstanceNorm2d._apply_instance_norm)
    _apply_instance_norm = _apply_instance_norm


@traceable
class InstanceNorm3d(torch.nn.InstanceNorm3d):
    """fastopt.functional.instance_norm with this module's weights and running statistics."""

    _scripted = scriptable(torch.nn.InstanceNorm3d._apply_instance_norm)
    _apply_instance_norm = _apply_instance_norm


@traceable
class AddLayerNorm(torch.nn.LayerNorm):
    """fastopt.functional.add_layer_norm with this module's weight and bias: where a residual branch
    joins, (branch, residual) to (the norm of the sum, the sum).

    dropout_p: of the branch, while training; all else as torch.nn.LayerNorm, state_dict keys too
    """

    dropout_p = 0.0

    def __init__(self, *args: Any, dropout_p: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropout_p = dropout_p

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return functional.add_layer_norm(
            x,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            self.dropout_p,
            self.training,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}"


@traceable
class AddRMSNorm(_OffsetRMSNorm):
    """fastopt.functional.add_rms_norm with this module's weight: where a residual branch joins,
    (branch, residual) to (the norm of the sum, the sum).

    dropout_p: of the branch, while training; weight_offset: added to the weight, which starts at
    what makes it 1; all else as torch.nn.RMSNorm, state_dict keys too
    """

    dropout_p = 0.0

    def __init__(self, *args: Any, dropout_p: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropout_p = dropout_p

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return functional.add_rms_norm(
            x,
            residual,
            self.normalized_shape,
            self.weight,
            self.eps,
            self.dropout_p,
            self.training,
            weight_offset=self.weight_offset,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}"


# Options that torch's classes of these names have not, and what they are there.
_OPTIONS: dict[type[torch.nn.Module], dict[str, Any]] = {
    CrossEntropyLoss: {"z_loss": 0.0, "softcap": None},
    RMSNorm: {"weight_offset": 0.0},
}
