"""The modules of torch.nn that fastopt.functional serves: same constructors, same state_dict."""

from __future__ import annotations

import torch
from torch import Tensor

from fastopt import functional

__all__ = [
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


class Softmax(torch.nn.Softmax):
    """fastopt.functional.softmax over `dim`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmax(input, self.dim, _stacklevel=6)


class LogSoftmax(torch.nn.LogSoftmax):
    """fastopt.functional.log_softmax over `dim`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.log_softmax(input, self.dim, _stacklevel=6)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """fastopt.functional.cross_entropy."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LayerNorm(torch.nn.LayerNorm):
    """fastopt.functional.layer_norm with this module's weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """fastopt.functional.rms_norm with this module's weight."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class GroupNorm(torch.nn.GroupNorm):
    """fastopt.functional.group_norm with this module's weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _batch_norm(module: torch.nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor:
    """What torch's class does, with fastopt.functional.batch_norm: batches are counted, and without
    a momentum running statistics are the mean over all of them."""
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


class BatchNorm1d(torch.nn.BatchNorm1d):
    """fastopt.functional.batch_norm with this module's weights and running statistics."""

    forward = _batch_norm


class BatchNorm2d(torch.nn.BatchNorm2d):
    """fastopt.functional.batch_norm with this module's weights and running statistics."""

    forward = _batch_norm


class BatchNorm3d(torch.nn.BatchNorm3d):
    """fastopt.functional.batch_norm with this module's weights and running statistics."""

    forward = _batch_norm


def _apply_instance_norm(module: torch.nn.modules.instancenorm._InstanceNorm, x: Tensor) -> Tensor:
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


class InstanceNorm1d(torch.nn.InstanceNorm1d):
    """fastopt.functional.instance_norm with this module's weights and running statistics."""

    _apply_instance_norm = _apply_instance_norm


class InstanceNorm2d(torch.nn.InstanceNorm2d):
    """fastopt.functional.instance_norm with this module's weights and running statistics."""

    _apply_instance_norm = _apply_instance_norm


class InstanceNorm3d(torch.nn.InstanceNorm3d):
    """fastopt.functional.instance_norm with this module's weights and running statistics."""

    _apply_instance_norm = _apply_instance_norm
