"""RAdam."""

from __future__ import annotations

import torch

from fastopt.optim.optimizer import FusedOptimizer
from fastopt_kernels import xp


def radam(
    p: float,
    g: float,
    m: float,
    v: float,
    weight_decay: float,
    decay: float,
    step_size: float,
    tractable: float,
    rectification: float,
    mu: float,
    beta2: float,
    nu: float,
    eps: float,
) -> tuple[float, ...]:
    """p' = decay p - step_size m' (rectification / (sqrt(v') + eps) where the variance is
    tractable, else 1).  Liu et al. 2020, algorithm 2."""
    g = xp.add_scaled(g, weight_decay, p)
    m = xp.lerp(m, g, mu)
    v = beta2 * v + (nu * g) * g
    momentum = step_size * m
    adaptive = momentum * (rectification / (xp.sqrt(v) + eps))
    return decay * p - xp.where(tractable, adaptive, momentum), m, v


def radam_scalars(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: float,
) -> tuple[float, ...]:
    step_size = lr / (1.0 - xp.power(beta1, step))
    coupled = xp.where(decoupled_weight_decay, 0.0, weight_decay)
    decay = xp.where(decoupled_weight_decay, 1.0 - lr * weight_decay, 1.0)
    beta2_power = xp.power(beta2, step)
    bias_correction2 = 1.0 - beta2_power
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * beta2_power / bias_correction2
    tractable = rho > 5.0
    rho = xp.where(tractable, rho, 6.0)
    rho_inf = xp.where(tractable, rho_inf, 6.0)
    rectification = xp.sqrt(
        bias_correction2
        * ((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))
    )
    return (
        coupled,
        decay,
        step_size,
        xp.where(tractable, 1.0, 0.0),
        rectification,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
    )


class RAdam(FusedOptimizer, torch.optim.RAdam):
    """p' = p - lr m^ r_t sqrt(1 - b2^t) / (sqrt(v') + eps) where the variance is tractable
    (rho_t > 5), p - lr m^ before;  m^ = m' / (1 - b1^t)

    Liu et al. 2020, algorithm 2 (arXiv:1908.03265). Arguments, errors and state are those of
    torch.optim.RAdam.
    """

    rule, scalars = radam, radam_scalars
    state_names = ("exp_avg", "exp_avg_sq")
    nonnegative_names, eight_bit_names = ("exp_avg_sq",), state_names
