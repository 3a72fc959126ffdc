"""Adamax."""

from __future__ import annotations

import torch

from fastopt.optim.base import FusedOptimizer
from fastopt_kernels import rules


class Adamax(FusedOptimizer, torch.optim.Adamax):
    """m' = b1 m + (1 - b1) g;  u' = max(b2 u, |g| + eps);  p' = p - lr / (1 - b1^t) m' / u'

    Kingma & Ba 2015, algorithm 2 (arXiv:1412.6980). Arguments, errors and state are those of
    torch.optim.Adamax.
    """

    rule, scalars = rules.adamax, rules.adamax_scalars
    state_names = ("exp_avg", "exp_inf")
    nonnegative_names, eight_bit_names = ("exp_inf",), ("exp_avg",)
