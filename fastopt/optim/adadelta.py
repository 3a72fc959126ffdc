"""Adadelta."""

from __future__ import annotations

import torch

from fastopt.optim.optimizer import FusedOptimizer
from fastopt_kernels import xp


def adadelta(
    p: float,
    g: float,
    s: float,
    d: float,
    weight_decay: float,
    lr: float,
    rho: float,
    nu: float,
    eps: float,
) -> tuple[float, ...]:
    """delta = sqrt(d + eps) / sqrt(s' + eps) g;  p' = p - lr delta.  Zeiler 2012, algorithm 1."""
    g = xp.add_scaled(g, weight_decay, p)
    s = rho * s + (nu * g) * g
    delta = xp.sqrt(d + eps) / xp.sqrt(s + eps) * g
    d = rho * d + (nu * delta) * delta
    return p - lr * delta, s, d


def adadelta_scalars(
    step: float, lr: float, rho: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    return weight_decay, lr, rho, 1.0 - rho, eps


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    """s' = rho s + (1 - rho) g^2;  delta = sqrt(d + eps) / sqrt(s' + eps) g;
    d' = rho d + (1 - rho) delta^2;  p' = p - lr delta

    Zeiler 2012, algorithm 1 (arXiv:1212.5701). Arguments, errors and state are those of
    torch.optim.Adadelta.
    """

    rule, scalars = adadelta, adadelta_scalars
    state_names = nonnegative_names = ("square_avg", "acc_delta")
