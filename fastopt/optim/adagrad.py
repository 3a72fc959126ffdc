"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad as torch_adagrad

from fastopt.optim.optimizer import FusedOptimizer
from fastopt_kernels import xp


def adagrad(
    p: float, g: float, s: float, weight_decay: float, clr: float, eps: float
) -> tuple[float, ...]:
    """s' = s + g^2;  p' = p - clr g / (sqrt(s') + eps).  Duchi et al. 2011."""
    g = xp.add_scaled(g, weight_decay, p)
    s = s + g * g
    return p - clr * g / (xp.sqrt(s) + eps), s


def adagrad_scalars(
    step: float, lr: float, lr_decay: float, weight_decay: float, eps: float
) -> tuple[float, ...]:
    return weight_decay, lr / (1.0 + (step - 1.0) * lr_decay), eps


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    """s' = s + g^2;  p' = p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s') + eps)

    Duchi et al. 2011. Arguments, errors and state are those of torch.optim.Adagrad (its states are
    there from the start, at initial_accumulator_value), and `capturable`, which torch's does not
    have.
    """

    rule, scalars = adagrad, adagrad_scalars
    state_names = nonnegative_names = ("sum",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        if capturable:
            self._add_option("capturable", True)
        for group in self.param_groups:
            for param in group["params"]:
                # torch's constructor makes them on the default device.
                self.state[param]["step"] = self.initial_number(0.0, param, group)
        self._store.was_accessed = False

    def initial_state(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        value = self.defaults["initial_accumulator_value"]
        fill = complex(value, value) if param.is_complex() else value
        return torch.full_like(param, fill, memory_format=torch.preserve_format)

    def sparse_error(self, group: dict[str, Any]) -> str | None:
        if group["weight_decay"] == 0:
            return None
        return (
            "weight_decay option is not compatible with sparse gradients. Set weight_decay=0 for "
            "that parameter's group, or make the gradient dense (sparse=False in the embedding)."
        )

    def step_sparse(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """torch's own update, which touches only the rows that have a gradient."""
        state = self.__dict__["state"][param]
        torch_adagrad(
            [param],
            [grad],
            [state["sum"]],
            [state["step"]],
            has_sparse_grad=True,
            foreach=False,
            fused=False,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
