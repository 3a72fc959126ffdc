"""NAdam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastopt.optim.optimizer import FusedOptimizer
from fastopt_kernels import xp


def nadam(
    p: float,
    g: float,
    m: float,
    v: float,
    weight_decay: float,
    decay: float,
    g_size: float,
    m_size: float,
    mu: float,
    beta2: float,
    nu: float,
    eps: float,
    v_scale: float,
) -> tuple[float, ...]:
    """p' = decay p - (g_size g + m_size m') / (v_scale sqrt(v') + eps).  Dozat 2016."""
    g = xp.add_scaled(g, weight_decay, p)
    m = xp.lerp(m, g, mu)
    v = beta2 * v + (nu * g) * g
    denom = v_scale * xp.sqrt(v) + eps
    p = decay * p - g_size * g / denom - m_size * m / denom
    return p, m, v


def nadam_scalars(
    step: float,
    mu_product: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    momentum_decay: float,
    decoupled_weight_decay: float,
) -> tuple[float, ...]:
    coupled = xp.where(decoupled_weight_decay, 0.0, weight_decay)
    decay = xp.where(decoupled_weight_decay, 1.0 - lr * weight_decay, 1.0)
    mu = beta1 * (1.0 - 0.5 * xp.power(0.96, step * momentum_decay))
    mu_next = beta1 * (1.0 - 0.5 * xp.power(0.96, (step + 1.0) * momentum_decay))
    mu_product = mu_product * mu
    g_size = lr * (1.0 - mu) / (1.0 - mu_product)
    m_size = lr * mu_next / (1.0 - mu_product * mu_next)
    v_scale = 1.0 / xp.sqrt(1.0 - xp.power(beta2, step))
    return (
        coupled,
        decay,
        g_size,
        m_size,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        v_scale,
        mu_product,
    )


class NAdam(FusedOptimizer, torch.optim.NAdam):
    """mu_t = b1 (1 - 0.96^(t momentum_decay) / 2);  P_t = mu_1 ... mu_t;
    p' = p - lr ((1 - mu_t) / (1 - P_t) g + mu_(t+1) / (1 - P_(t+1)) m')
             / (sqrt(v' / (1 - b2^t)) + eps)

    Dozat 2016, algorithm 2. Arguments, errors and state are those of torch.optim.NAdam;
    mu_product keeps the dtype of a step count when a checkpoint is loaded.
    """

    rule, scalars = nadam, nadam_scalars
    state_names = ("exp_avg", "exp_avg_sq")
    nonnegative_names, eight_bit_names = ("exp_avg_sq",), state_names
    carried_names = ("mu_product",)

    def initial_state(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        if name == "mu_product":
            return self.initial_number(1.0, param, group)
        return super().initial_state(name, param, group)
