"""Stochastic gradient descent, with Polyak's and Nesterov's momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from fastopt.optim.optimizer import FusedOptimizer
from fastopt.optim.update import Update
from fastopt_kernels import xp


def sgd(p: float, g: float, weight_decay: float, lr: float) -> tuple[float, ...]:
    """p' = p - lr (g + weight_decay p)."""
    g = xp.add_scaled(g, weight_decay, p)
    return (p - lr * g,)


def sgd_scalars(step: float, lr: float, weight_decay: float) -> tuple[float, ...]:
    return weight_decay, lr


def sgd_momentum(
    p: float, g: float, buf: float, weight_decay: float, lr: float, keep: float, damp: float
) -> tuple[float, ...]:
    """buf' = keep buf + damp g;  p' = p - lr buf'.  Polyak 1964; torch's first buf is g."""
    g = xp.add_scaled(g, weight_decay, p)
    buf = keep * buf + damp * g
    return p - lr * buf, buf


def sgd_momentum_scalars(
    step: float, lr: float, momentum: float, dampening: float, weight_decay: float
) -> tuple[float, ...]:
    keep = xp.where(step > 1.0, momentum, 0.0)
    damp = xp.where(step > 1.0, 1.0 - dampening, 1.0)
    return weight_decay, lr, keep, damp


def sgd_nesterov(
    p: float,
    g: float,
    buf: float,
    weight_decay: float,
    lr: float,
    keep: float,
    damp: float,
    momentum: float,
) -> tuple[float, ...]:
    """buf' = keep buf + damp g;  p' = p - lr (g + momentum buf').  Sutskever et al. 2013."""
    g = xp.add_scaled(g, weight_decay, p)
    buf = keep * buf + damp * g
    return p - lr * (g + momentum * buf), buf


def sgd_nesterov_scalars(
    step: float, lr: float, momentum: float, dampening: float, weight_decay: float
) -> tuple[float, ...]:
    keep = xp.where(step > 1.0, momentum, 0.0)
    damp = xp.where(step > 1.0, 1.0 - dampening, 1.0)
    return weight_decay, lr, keep, damp, momentum


_PLAIN = Update(sgd, sgd_scalars, counted=False)
_MOMENTUM = Update(
    sgd_momentum,
    sgd_momentum_scalars,
    ("momentum_buffer",),
    counted=False,
    eight_bit=("momentum_buffer",),
)
_NESTEROV = Update(
    sgd_nesterov,
    sgd_nesterov_scalars,
    ("momentum_buffer",),
    counted=False,
    eight_bit=("momentum_buffer",),
)


class SGD(FusedOptimizer, torch.optim.SGD):
    """b' = momentum b + (1 - dampening) g (the first b is g);  p' = p - lr b',
    with nesterov p' = p - lr (g + momentum b');  g includes weight_decay p.

    Polyak 1964 (heavy ball); Sutskever et al. 2013 (nesterov). Arguments, errors and state are
    those of torch.optim.SGD, and `capturable`, which torch's does not have.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        if capturable:
            self._add_option("capturable", True)

    def update_of(self, group: dict[str, Any]) -> Update:
        if group["momentum"] == 0:
            return _PLAIN
        return _NESTEROV if group["nesterov"] else _MOMENTUM

    def sparse_error(self, group: dict[str, Any]) -> str | None:
        if group["weight_decay"] == 0:
            return None
        return (
            "add(sparse, dense) is not supported. Use add(dense, sparse) instead. SGD got a sparse "
            "gradient with weight_decay: set weight_decay=0 for that parameter's group, or make "
            "the gradient dense (sparse=False in the embedding)."
        )

    def step_sparse(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """torch's own update: a sparse momentum buffer is a sparse tensor."""
        momentum = group["momentum"]
        state = self.__dict__["state"][param] if momentum != 0 else {}
        buffers = [state.get("momentum_buffer")]
        torch_sgd(
            [param],
            [grad],
            buffers,
            has_sparse_grad=True,
            foreach=False,
            fused=False,
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if momentum != 0:
            state["momentum_buffer"] = buffers[0]
