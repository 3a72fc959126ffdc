"""RAdam."""

from __future__ import annotations

import torch

from fastopt.optim.base import FusedOptimizer
from fastopt_kernels import rules


class RAdam(FusedOptimizer, torch.optim.RAdam):
    """p' = p - lr m^ r_t sqrt(1 - b2^t) / (sqrt(v') + eps) where the variance is tractable
    (rho_t > 5), p - lr m^ before;  m^ = m' / (1 - b1^t)

    Liu et al. 2020, algorithm 2 (arXiv:1908.03265). Arguments, errors and state are those of
    torch.optim.RAdam.
    """

    rule, scalars = rules.radam, rules.radam_scalars
    state_names = ("exp_avg", "exp_avg_sq")
    nonnegative_names, eight_bit_names = ("exp_avg_sq",), state_names
