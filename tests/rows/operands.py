"""A call of every function, with each tensor that it may be given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastopt import functional
from fastopt.nn import parametrizations
from tests.rows.cases import draw, targets

Tensors = dict[str, Tensor]
SHAPE, ROWS, WIDTH = (6, 8), 6, 8


class Call(NamedTuple):
    """A function of tensors by name, which it calls as torch does."""

    function: Callable[..., Any]
    tensors: Tensors
    options: dict[str, Any]
    # Written, and not differentiated.
    written: tuple[str, ...] = ()

    def __call__(self, **others: Any) -> tuple[Tensor, ...]:
        """Its results, with other tensors in place of some."""
        found = self.function(**{**self.tensors, **others}, **self.options)
        return found if isinstance(found, tuple) else (found,)

    def differentiable(self) -> list[str]:
        """Those of its tensors that it is differentiated by."""
        never = {*self.written, "target", "seed"}
        if "cross_entropy" in getattr(self.function, "__name__", ""):
            never.add("weight")
        return [k for k, x in self.tensors.items() if x.is_floating_point() and k not in never]

    def run(self, upstream: list[Tensor] | None = None, **others: Any) -> dict[str, Tensor]:
        """Results, what has been written, and the gradients of a weighted sum of the results."""
        tensors = {k: others.get(k, x.clone()) for k, x in self.tensors.items()}
        leaves = [tensors[k].requires_grad_() for k in self.differentiable()]
        results = self(**tensors)
        if upstream is None:
            upstream = [draw(*y.shape, seed=9 + k) for k, y in enumerate(results)]
        outputs = [y for y in results if y.requires_grad]
        grads = torch.autograd.grad(outputs, leaves, upstream[: len(outputs)], allow_unused=True)
        found = {f"result {k}": y.detach() for k, y in enumerate(results)}
        found |= {k: tensors[k] for k in self.written}
        return found | {f"grad {k}": g for k, g in zip(self.differentiable(), grads, strict=True)}


def weights(*names: str) -> Tensors:
    return {name: draw(WIDTH, seed=k + 1) for k, name in enumerate(names)}


def running() -> Tensors:
    return {"running_mean": draw(WIDTH, seed=5), "running_var": draw(WIDTH, seed=6).abs() + 0.5}


def weight_norm(weight_g: Tensor, weight_v: Tensor) -> Tensor:
    layer = nn.Linear(WIDTH, ROWS)
    parametrizations.weight_norm(layer)
    return layer.parametrizations.weight[0](weight_g, weight_v)  # type: ignore[no-any-return,union-attr,index,operator]


def spectral_norm(weight: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """With the vectors of the power iteration, which are written."""
    layer = nn.Linear(WIDTH, ROWS)
    parametrizations.spectral_norm(layer)
    inner: Any = layer.parametrizations.weight[0]  # type: ignore[union-attr,index]
    inner._buffers["_u"], inner._buffers["_v"] = u, v
    return inner(weight), u, v


X, IMAGES = {"input": draw(*SHAPE)}, {"input": draw(3, WIDTH, 5)}
PAIR = {"x": draw(*SHAPE), "residual": draw(*SHAPE, seed=4)}
ROW = {"normalized_shape": (WIDTH,)}
TARGET = {"target": targets(ROWS, classes=WIDTH)}
CALLS: dict[str, Call] = {
    "softmax": Call(functional.softmax, X, {"dim": -1}),
    "log_softmax": Call(functional.log_softmax, X, {"dim": 0}),
    "logsumexp": Call(functional.logsumexp, X, {"dim": -1}),
    "scaled_masked_softmax": Call(
        functional.scaled_masked_softmax,
        {"x": PAIR["x"], "mask": draw(*SHAPE, seed=3)},
        {"scale": 0.5, "is_causal": True},
    ),
    "cross_entropy": Call(
        functional.cross_entropy, X | TARGET | weights("weight"), {"label_smoothing": 0.1}
    ),
    "cross_entropy of probabilities": Call(
        functional.cross_entropy, X | {"target": draw(*SHAPE, seed=2).softmax(1)}, {}
    ),
    "linear_cross_entropy": Call(
        functional.linear_cross_entropy,
        X
        | TARGET
        | {"linear_weight": draw(WIDTH, WIDTH, seed=7)}
        | weights("linear_bias", "weight"),
        {},
    ),
    "linear_cross_entropy of each": Call(
        functional.linear_cross_entropy,
        X | TARGET | {"linear_weight": draw(WIDTH, WIDTH, seed=7)},
        {"reduction": "none"},
    ),
    "layer_norm": Call(functional.layer_norm, X | weights("weight", "bias"), ROW),
    "rms_norm": Call(functional.rms_norm, X | weights("weight"), ROW | {"eps": 1e-5}),
    "add_layer_norm": Call(
        functional.add_layer_norm,
        PAIR | weights("weight", "bias") | {"seed": torch.tensor(7)},
        ROW | {"dropout_p": 0.25},
    ),
    "add_rms_norm": Call(functional.add_rms_norm, PAIR | weights("weight"), ROW),
    "batch_norm": Call(
        functional.batch_norm,
        IMAGES | running() | weights("weight", "bias"),
        {"training": True},
        ("running_mean", "running_var"),
    ),
    "batch_norm by statistics": Call(
        functional.batch_norm,
        IMAGES | running() | weights("weight", "bias"),
        {},
        ("running_mean", "running_var"),
    ),
    "instance_norm": Call(
        functional.instance_norm,
        IMAGES | running() | weights("weight", "bias"),
        {},
        ("running_mean", "running_var"),
    ),
    "group_norm": Call(
        functional.group_norm, IMAGES | weights("weight", "bias"), {"num_groups": 2}
    ),
    "weight_norm": Call(
        weight_norm, {"weight_g": draw(ROWS, 1, seed=8), "weight_v": draw(*SHAPE)}, {}
    ),
    "spectral_norm": Call(
        spectral_norm,
        {"weight": draw(*SHAPE), "u": draw(ROWS, seed=1), "v": draw(WIDTH, seed=2)},
        {},
        ("u", "v"),
    ),
}
# A call and one of its tensors.
OPERANDS = [(name, operand) for name, call in CALLS.items() for operand in call.tensors]
