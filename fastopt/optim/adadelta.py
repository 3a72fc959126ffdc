"""Adadelta."""

from __future__ import annotations

import torch

from fastopt.optim.base import FusedOptimizer
from fastopt_kernels import rules


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    """s' = rho s + (1 - rho) g^2;  delta = sqrt(d + eps) / sqrt(s' + eps) g;
    d' = rho d + (1 - rho) delta^2;  p' = p - lr delta

    Zeiler 2012, algorithm 1 (arXiv:1212.5701). Arguments, errors and state are those of
    torch.optim.Adadelta.
    """

    rule, scalars = rules.adadelta, rules.adadelta_scalars
    state_names = nonnegative_names = ("square_avg", "acc_delta")
