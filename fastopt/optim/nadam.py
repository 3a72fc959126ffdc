"""NAdam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastopt.optim.base import FusedOptimizer
from fastopt_kernels import rules


class NAdam(FusedOptimizer, torch.optim.NAdam):
    """mu_t = b1 (1 - 0.96^(t momentum_decay) / 2);  P_t = mu_1 ... mu_t;
    p' = p - lr ((1 - mu_t) / (1 - P_t) g + mu_(t+1) / (1 - P_(t+1)) m')
             / (sqrt(v' / (1 - b2^t)) + eps)

    Dozat 2016, algorithm 2. Arguments, errors and state are those of torch.optim.NAdam;
    mu_product keeps the dtype of a step count when a checkpoint is loaded.
    """

    rule, scalars = rules.nadam, rules.nadam_scalars
    state_names = ("exp_avg", "exp_avg_sq")
    nonnegative_names, eight_bit_names = ("exp_avg_sq",), state_names
    carried_names = ("mu_product",)

    def initial_state(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        if name == "mu_product":
            return self.initial_number(1.0, param, group)
        return super().initial_state(name, param, group)
