"""RMSprop, centered and with momentum."""

from __future__ import annotations

from typing import Any

import torch

from fastopt.optim.base import FusedOptimizer
from fastopt.optim.update import Update
from fastopt_kernels import rules

_CENTERED = Update(
    rules.rmsprop_centered,
    rules.rmsprop_scalars,
    ("square_avg", "grad_avg"),
    nonnegative=("square_avg",),
)
_MOMENTUM = Update(
    rules.rmsprop_momentum,
    rules.rmsprop_momentum_scalars,
    ("square_avg", "momentum_buffer"),
    nonnegative=("square_avg",),
    eight_bit=("square_avg", "momentum_buffer"),
)
_CENTERED_MOMENTUM = Update(
    rules.rmsprop_centered_momentum,
    rules.rmsprop_momentum_scalars,
    ("square_avg", "momentum_buffer", "grad_avg"),
    nonnegative=("square_avg",),
    # The variance is the difference of two states: rounded apart, they may make it negative.
    eight_bit=("momentum_buffer",),
)


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    """s' = alpha s + (1 - alpha) g^2;  p' = p - lr g / (sqrt(s') + eps)

    Hinton 2012, lecture 6e; centered (the variance instead of s') and momentum: Graves 2013,
    eqs. 38 to 41 (arXiv:1308.0850), eps outside the root as torch has it. Arguments, errors and
    state are those of torch.optim.RMSprop.
    """

    rule, scalars = rules.rmsprop, rules.rmsprop_scalars
    state_names = ("square_avg",)
    nonnegative_names = eight_bit_names = state_names

    def update_of(self, group: dict[str, Any]) -> Update:
        if group["momentum"] > 0:
            return _CENTERED_MOMENTUM if group["centered"] else _MOMENTUM
        return _CENTERED if group["centered"] else self._update
