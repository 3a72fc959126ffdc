"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch

from fastopt.optim.optimizer import FusedOptimizer
from fastopt.optim.update import Update
from fastopt_kernels import xp


def adam(
    p: float,
    g: float,
    m: float,
    v: float,
    weight_decay: float,
    decay: float,
    step_size: float,
    mu: float,
    beta2: float,
    nu: float,
    eps: float,
    v_scale: float,
) -> tuple[float, ...]:
    """p' = decay p - step_size m' / (v_scale sqrt(v') + eps).  Kingma & Ba 2015, algorithm 1;
    with `decay` below 1 it is AdamW: Loshchilov & Hutter 2019, algorithm 2."""
    g = xp.add_scaled(g, weight_decay, p)
    m = xp.lerp(m, g, mu)
    v = beta2 * v + (nu * g) * g
    p = decay * p - step_size * m / (v_scale * xp.sqrt(v) + eps)
    return p, m, v


def adam_amsgrad(
    p: float,
    g: float,
    m: float,
    v: float,
    v_max: float,
    weight_decay: float,
    decay: float,
    step_size: float,
    mu: float,
    beta2: float,
    nu: float,
    eps: float,
    v_scale: float,
) -> tuple[float, ...]:
    """Adam whose denominator never falls: v_max' = max(v_max, v').  Reddi et al. 2018."""
    g = xp.add_scaled(g, weight_decay, p)
    m = xp.lerp(m, g, mu)
    v = beta2 * v + (nu * g) * g
    v_max = xp.maximum(v_max, v)
    p = decay * p - step_size * m / (v_scale * xp.sqrt(v_max) + eps)
    return p, m, v, v_max


def adam_scalars(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: float,
) -> tuple[float, ...]:
    coupled = xp.where(decoupled_weight_decay, 0.0, weight_decay)
    decay = xp.where(decoupled_weight_decay, 1.0 - lr * weight_decay, 1.0)
    step_size = lr / (1.0 - xp.power(beta1, step))
    v_scale = 1.0 / xp.sqrt(1.0 - xp.power(beta2, step))
    return coupled, decay, step_size, 1.0 - beta1, beta2, 1.0 - beta2, eps, v_scale


_AMSGRAD = Update(
    adam_amsgrad,
    adam_scalars,
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    nonnegative=("exp_avg_sq", "max_exp_avg_sq"),
)


class _AdamUpdate(FusedOptimizer):
    rule, scalars = adam, adam_scalars
    state_names = ("exp_avg", "exp_avg_sq")
    nonnegative_names, eight_bit_names = ("exp_avg_sq",), state_names

    def update_of(self, group: dict[str, Any]) -> Update:
        return _AMSGRAD if group["amsgrad"] else self._update


class Adam(_AdamUpdate, torch.optim.Adam):
    """m' = b1 m + (1 - b1) g;  v' = b2 v + (1 - b2) g^2;
    p' = p - lr / (1 - b1^t) m' / (sqrt(v' / (1 - b2^t)) + eps)

    Kingma & Ba 2015, algorithm 1 (arXiv:1412.6980); amsgrad: Reddi et al. 2018. Arguments, errors
    and state are those of torch.optim.Adam; weight_decay is added to the gradient, unless
    decoupled_weight_decay. Bias corrections are computed in double from the step count.
    """

    def sparse_error(self, group: dict[str, Any]) -> str:
        return (
            "Adam does not support sparse gradients, please consider SparseAdam instead "
            "(torch.optim.SparseAdam), or make the gradient dense (sparse=False in the embedding)."
        )


class AdamW(_AdamUpdate, torch.optim.AdamW):
    """m' = b1 m + (1 - b1) g;  v' = b2 v + (1 - b2) g^2;
    p' = (1 - lr weight_decay) p - lr / (1 - b1^t) m' / (sqrt(v' / (1 - b2^t)) + eps)

    Loshchilov & Hutter 2019, algorithm 2 (arXiv:1711.05101). Arguments, errors and state are those
    of torch.optim.AdamW. Bias corrections are computed in double from the step count, and the
    decay is part of the update, so low-precision parameters are rounded once a step.
    """

    sparse_error = Adam.sparse_error
