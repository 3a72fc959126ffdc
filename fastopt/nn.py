"""The modules of torch.nn that fastopt.functional serves: same constructors, same state_dict."""

from __future__ import annotations

import torch
from torch import Tensor

from fastopt import functional
from fastopt import parametrizations as parametrizations

__all__ = ["CrossEntropyLoss", "LayerNorm", "LogSoftmax", "RMSNorm", "Softmax"]


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
