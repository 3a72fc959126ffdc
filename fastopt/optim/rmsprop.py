"""RMSprop, centered and with momentum."""

from __future__ import annotations

from typing import Any

import torch

from fastopt.optim.optimizer import FusedOptimizer
from fastopt.optim.update import Update
from fastopt_kernels import xp


def rmsprop(
    p: float,
    g: float,
    s: float,
    weight_decay: float,
    lr: float,
    alpha: float,
    nu: float,
    eps: float,
) -> tuple[float, ...]:
    """s' = alpha s + (1 - alpha) g^2;  p' = p - lr g / (sqrt(s') + eps).  Hinton 2012."""
    g = xp.add_scaled(g, weight_decay, p)
    s = alpha * s + (nu * g) * g
    return p - lr * g / (xp.sqrt(s) + eps), s


def rmsprop_scalars(
    step: float, lr: float, alpha: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    return weight_decay, lr, alpha, 1.0 - alpha, eps


def rmsprop_centered(
    p: float,
    g: float,
    s: float,
    a: float,
    weight_decay: float,
    lr: float,
    alpha: float,
    nu: float,
    eps: float,
) -> tuple[float, ...]:
    """RMSprop by the variance: a' = alpha a + (1 - alpha) g, sqrt(s' - a'^2).  Graves 2013."""
    g = xp.add_scaled(g, weight_decay, p)
    s = alpha * s + (nu * g) * g
    a = xp.lerp(a, g, nu)
    return p - lr * g / (xp.sqrt(s - a * a) + eps), s, a


def rmsprop_momentum(
    p: float,
    g: float,
    s: float,
    buf: float,
    weight_decay: float,
    lr: float,
    alpha: float,
    nu: float,
    eps: float,
    momentum: float,
) -> tuple[float, ...]:
    """RMSprop through a momentum buffer: buf' = momentum buf + g / (sqrt(s') + eps)."""
    g = xp.add_scaled(g, weight_decay, p)
    s = alpha * s + (nu * g) * g
    buf = momentum * buf + g / (xp.sqrt(s) + eps)
    return p - lr * buf, s, buf


def rmsprop_centered_momentum(
    p: float,
    g: float,
    s: float,
    buf: float,
    a: float,
    weight_decay: float,
    lr: float,
    alpha: float,
    nu: float,
    eps: float,
    momentum: float,
) -> tuple[float, ...]:
    """Centered RMSprop through a momentum buffer.  Graves 2013, eqs. 38 to 41."""
    g = xp.add_scaled(g, weight_decay, p)
    s = alpha * s + (nu * g) * g
    a = xp.lerp(a, g, nu)
    buf = momentum * buf + g / (xp.sqrt(s - a * a) + eps)
    return p - lr * buf, s, buf, a


def rmsprop_momentum_scalars(
    step: float, lr: float, alpha: float, eps: float, weight_decay: float, momentum: float
) -> tuple[float, ...]:
    return weight_decay, lr, alpha, 1.0 - alpha, eps, momentum


_CENTERED = Update(
    rmsprop_centered,
    rmsprop_scalars,
    ("square_avg", "grad_avg"),
    nonnegative=("square_avg",),
)
_MOMENTUM = Update(
    rmsprop_momentum,
    rmsprop_momentum_scalars,
    ("square_avg", "momentum_buffer"),
    nonnegative=("square_avg",),
    eight_bit=("square_avg", "momentum_buffer"),
)
_CENTERED_MOMENTUM = Update(
    rmsprop_centered_momentum,
    rmsprop_momentum_scalars,
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

    rule, scalars = rmsprop, rmsprop_scalars
    state_names = ("square_avg",)
    nonnegative_names = eight_bit_names = state_names

    def update_of(self, group: dict[str, Any]) -> Update:
        if group["momentum"] > 0:
            return _CENTERED_MOMENTUM if group["centered"] else _MOMENTUM
        return _CENTERED if group["centered"] else self._update
