"""Adamax."""

from __future__ import annotations

import torch

from fastopt.optim.optimizer import FusedOptimizer
from fastopt_kernels import xp


def adamax(
    p: float,
    g: float,
    m: float,
    u: float,
    weight_decay: float,
    step_size: float,
    mu: float,
    beta2: float,
    eps: float,
) -> tuple[float, ...]:
    """u' = max(beta2 u, |g| + eps);  p' = p - step_size m' / u'.  Kingma & Ba 2015, algorithm 2."""
    g = xp.add_scaled(g, weight_decay, p)
    m = xp.lerp(m, g, mu)
    u = xp.maximum(beta2 * u, xp.absolute(g) + eps)
    return p - step_size * m / u, m, u


def adamax_scalars(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    step_size = lr / (1.0 - xp.power(beta1, step))
    return weight_decay, step_size, 1.0 - beta1, beta2, eps


class Adamax(FusedOptimizer, torch.optim.Adamax):
    """m' = b1 m + (1 - b1) g;  u' = max(b2 u, |g| + eps);  p' = p - lr / (1 - b1^t) m' / u'

    Kingma & Ba 2015, algorithm 2 (arXiv:1412.6980). Arguments, errors and state are those of
    torch.optim.Adamax.
    """

    rule, scalars = adamax, adamax_scalars
    state_names = ("exp_avg", "exp_inf")
    nonnegative_names, eight_bit_names = ("exp_inf",), ("exp_avg",)
