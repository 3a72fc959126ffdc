"""A small call of every function and every module, and the same made of elementary operators.

All of it is float64 and takes the tensors it is differentiated by. torch's own functions are no
oracle of derivatives here: layer_norm, batch_norm and group_norm of 2.13 are wrong or refuse under
some transforms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastopt import functional
from fastopt import nn as fnn
from fastopt.parametrizations import WeightNorm
from tests.rows.cases import draw, probabilities

F64 = torch.float64
EPS = 1e-5
Outputs = Tensor | tuple[Tensor, ...]


class Call(NamedTuple):
    """run(*tensors) is ours, right(*tensors) what it must be."""

    tensors: tuple[Tensor, ...]
    run: Callable[..., Outputs]
    right: Callable[..., Outputs]


def x(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=F64, seed=seed)


T = torch.tensor([2, 0, -100, 1])
POINTS = torch.tensor([[0, 2], [1, -100]])
CLASSES = torch.tensor([0.5, 1.0, 1.5], dtype=F64)
MEAN, VAR = x(4, seed=7), x(4, seed=8).square() + 0.5
WEIGHT, BIAS = x(4, seed=5) + 1, x(4, seed=6)
# Neighbours in memory, as the columns of a matrix are.
APART = torch.stack([WEIGHT, BIAS], 1).unbind(1)
PIXELS = x(2, 4, 2, 2).contiguous(memory_format=torch.channels_last)
SEEN = torch.tensor([[True, False, True], [False] * 3])
SEED = 7


# Elementary operators.


def softmax(v: Tensor, dim: int) -> Tensor:
    e = (v - v.amax(dim, keepdim=True).detach()).exp()
    return e / e.sum(dim, keepdim=True)


def logsumexp(v: Tensor, dim: Any) -> Tensor:
    return v.exp().sum(dim).log()


def masked_softmax(v: Tensor, seen: Tensor) -> Tensor:
    """0 where nothing is seen."""
    e = v.exp() * seen
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total > 0, total, 1.0)


def cross_entropy(
    v: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    v = v if softcap is None else softcap * torch.tanh(v / softcap)
    n, lse = v.shape[1], logsumexp(v, 1)
    w = (torch.ones(n, dtype=v.dtype) if weight is None else weight).view(-1, *[1] * (v.dim() - 2))
    less = lse.unsqueeze(1) - v
    if target.is_floating_point():
        q, counts, weights = target, torch.ones_like(lse), torch.ones_like(lse)
        loss = (w * ((1 - smoothing) * q + smoothing / n) * less).sum(1)
    else:
        q = (target.unsqueeze(1) == torch.arange(n).view(w.shape)).to(v.dtype)
        counts = (target != -100).to(v.dtype)
        weights = (w * q).sum(1)
        loss = ((1 - smoothing) * w * q * less + smoothing / n * w * less).sum(1) * counts
    squares = z_loss * lse.square() * counts
    if reduction == "none":
        return loss + squares
    if reduction == "sum":
        return (loss + squares).sum()
    return loss.sum() / weights.sum() + squares.sum() / counts.sum()


def normalized(v: Tensor, dims: Any, centered: bool = True, eps: float = EPS) -> Tensor:
    v = v - v.mean(dims, keepdim=True) if centered else v
    return v / (v.square().mean(dims, keepdim=True) + eps).sqrt()


def affine(y: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """One of each a channel."""
    shape = (1, -1, *[1] * (y.dim() - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def batch_norm(v: Tensor, *weights: Tensor | None) -> Tensor:
    return affine(normalized(v, [0, *range(2, v.dim())]), *weights)


def given_norm(v: Tensor, *weights: Tensor | None) -> Tensor:
    """By statistics that are there."""
    shape = (1, -1, *[1] * (v.dim() - 2))
    return affine((v - MEAN.view(shape)) / (VAR.view(shape) + EPS).sqrt(), *weights)


def group_norm(v: Tensor, groups: int, *weights: Tensor | None) -> Tensor:
    y = normalized(v.reshape(len(v), groups, -1), -1).reshape(v.shape)
    return affine(y, *weights)


def weight_norm(g: Tensor, v: Tensor, dims: Any) -> Tensor:
    return g * v / v.square().sum(dims, keepdim=True).sqrt()


# Functions.


def with_weights(
    v: Tensor, run: Callable[..., Tensor], right: Callable[..., Tensor], name: str
) -> dict[str, Call]:
    """With both, either and none of a weight and a bias."""
    return {
        name: Call((v, WEIGHT, BIAS), run, right),
        f"{name}, weight": Call((v, WEIGHT), run, right),
        f"{name}, bias": Call(
            (v, BIAS), lambda v, b: run(v, None, b), lambda v, b: right(v, None, b)
        ),
        f"{name}, alone": Call((v,), run, right),
    }


def _layer_norm(v: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    y = normalized(v, -1)
    y = y if w is None else y * w
    return y if b is None else y + b


def _rms_norm(v: Tensor, w: Tensor, offset: float = 0.0) -> Tensor:
    return normalized(v, -1, False) * (w + offset)


F = functional
LOSS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0}
RIGHT: dict[str, Any] = {"smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0}
DROPPED: dict[str, Any] = {"dropout_p": 0.5, "seed": SEED}
LINEAR = (x(4, 5), x(3, 5, seed=1), x(3, seed=2))
SUM = (x(3, 4), x(3, 4, seed=1), WEIGHT, BIAS)

FUNCTIONS: dict[str, Call] = {
    "softmax": Call((x(4, 3),), lambda v: F.softmax(v, 1), lambda v: softmax(v, 1)),
    "softmax of columns": Call((x(4, 3),), lambda v: F.softmax(v, 0), lambda v: softmax(v, 0)),
    "log_softmax": Call(
        (x(4, 3),), lambda v: F.log_softmax(v, 1), lambda v: softmax(v, 1).log()
    ),
    "logsumexp": Call((x(4, 3),), lambda v: F.logsumexp(v, 1), lambda v: logsumexp(v, 1)),
    "logsumexp of dims": Call(
        (x(2, 3, 2),), lambda v: F.logsumexp(v, (0, 2)), lambda v: logsumexp(v, (0, 2))
    ),
    "scaled_masked_softmax": Call(
        (x(2, 2, 3), x(2, 1, 3, seed=1)),
        lambda v, m: F.scaled_masked_softmax(v, m, 0.5, True),
        lambda v, m: masked_softmax(v * 0.5 + m, torch.ones(2, 3).tril()),
    ),
    "scaled_masked_softmax, boolean": Call(
        (x(2, 2, 3),),
        lambda v: F.scaled_masked_softmax(v, SEEN),
        lambda v: masked_softmax(v, SEEN),
    ),
    "cross_entropy": Call(
        (x(4, 3),), lambda v: F.cross_entropy(v, T), lambda v: cross_entropy(v, T)
    ),
    **{
        f"cross_entropy, all terms, {how}": Call(
            (x(4, 3),),
            lambda v, how=how: F.cross_entropy(v, T, CLASSES, reduction=how, **LOSS),
            lambda v, how=how: cross_entropy(v, T, CLASSES, how, **RIGHT),
        )
        for how in ("mean", "sum", "none")
    },
    "cross_entropy of columns": Call(
        (x(2, 3, 2),),
        lambda v: F.cross_entropy(v, POINTS, CLASSES, **LOSS),
        lambda v: cross_entropy(v, POINTS, CLASSES, **RIGHT),
    ),
    "cross_entropy of probabilities": Call(
        (x(4, 3), probabilities(x(4, 3))),
        lambda v, p: F.cross_entropy(v, p, CLASSES, **LOSS),
        lambda v, p: cross_entropy(v, p, CLASSES, **RIGHT),
    ),
    **{
        f"linear_cross_entropy, {how}": Call(
            LINEAR,
            lambda v, w, b, how=how: F.linear_cross_entropy(
                v, w, T, linear_bias=b, weight=CLASSES, reduction=how, **LOSS
            ),
            lambda v, w, b, how=how: cross_entropy(v @ w.T + b, T, CLASSES, how, **RIGHT),
        )
        for how in ("mean", "none")
    },
    **with_weights(
        x(3, 4), lambda v, *w: F.layer_norm(v, (4,), *w), _layer_norm, "layer_norm"
    ),
    "rms_norm": Call((x(3, 4), WEIGHT), lambda v, w: F.rms_norm(v, (4,), w, EPS), _rms_norm),
    "rms_norm, offset": Call(
        (x(3, 4), WEIGHT),
        lambda v, w: F.rms_norm(v, (4,), w, EPS, weight_offset=1.0),
        lambda v, w: _rms_norm(v, w, 1.0),
    ),
    "add_layer_norm": Call(
        SUM,
        lambda v, r, w, b: F.add_layer_norm(v, r, (4,), w, b),
        lambda v, r, w, b: (_layer_norm(v + r, w, b), v + r),
    ),
    "add_layer_norm, the norm": Call(
        SUM,
        lambda v, r, w, b: F.add_layer_norm(v, r, (4,), w, b)[0],
        lambda v, r, w, b: _layer_norm(v + r, w, b),
    ),
    "add_layer_norm, the sum": Call(
        SUM[:2], lambda v, r: F.add_layer_norm(v, r, (4,), WEIGHT)[1], lambda v, r: v + r
    ),
    "add_rms_norm": Call(
        SUM[:3],
        lambda v, r, w: F.add_rms_norm(v, r, (4,), w, EPS, weight_offset=1.0),
        lambda v, r, w: (_rms_norm(v + r, w, 1.0), v + r),
    ),
    "add_rms_norm, the sum": Call(
        SUM[:2], lambda v, r: F.add_rms_norm(v, r, (4,), WEIGHT)[1], lambda v, r: v + r
    ),
    **{
        f"batch_norm {shape}": Call(
            (x(*shape), WEIGHT, BIAS),
            lambda v, w, b: F.batch_norm(v, None, None, w, b, True),
            batch_norm,
        )
        for shape in ((3, 4), (3, 4, 2), (2, 4, 2, 2))
    },
    **with_weights(
        x(3, 4), lambda v, *w: F.batch_norm(v, MEAN, VAR, *w), given_norm, "batch_norm, given"
    ),
    **{
        f"{name}, given, {shape}": Call((x(*shape), WEIGHT, BIAS), run, given_norm)
        for shape in ((3, 4, 1), (3, 4, 1, 1), (2, 4, 2, 2))
        for name, run in {
            "batch_norm": lambda v, w, b: F.batch_norm(v, MEAN, VAR, w, b),
            "instance_norm": lambda v, w, b: F.instance_norm(v, MEAN, VAR, w, b, False),
        }.items()
    },
    **with_weights(
        x(2, 4, 3),
        lambda v, *w: F.instance_norm(v, None, None, *w),
        lambda v, *w: group_norm(v, 4, *w),
        "instance_norm",
    ),
    **with_weights(
        x(2, 4, 3),
        lambda v, *w: F.group_norm(v, 2, *w),
        lambda v, *w: group_norm(v, 2, *w),
        "group_norm",
    ),
    "group_norm (3, 4)": Call(
        (x(3, 4), WEIGHT), lambda v, w: F.group_norm(v, 2, w), lambda v, w: group_norm(v, 2, w)
    ),
    "group_norm of pixels": Call(
        (PIXELS, WEIGHT, BIAS),
        lambda v, w, b: F.group_norm(v, 2, w, b),
        lambda v, w, b: group_norm(v, 2, w, b),
    ),
    "batch_norm of pixels": Call(
        (PIXELS, WEIGHT, BIAS),
        lambda v, w, b: F.batch_norm(v, None, None, w, b, True),
        batch_norm,
    ),
    "batch_norm, given, of pixels": Call(
        (PIXELS, *APART), lambda v, w, b: F.batch_norm(v, MEAN, VAR, w, b), given_norm
    ),
    "instance_norm, given, of pixels": Call(
        (PIXELS, *APART), lambda v, w, b: F.instance_norm(v, MEAN, VAR, w, b, False), given_norm
    ),
    "weight_norm": Call(
        (x(3, 1), x(3, 4, seed=1)), WeightNorm(0), lambda g, v: weight_norm(g, v, 1)
    ),
    "weight_norm of columns": Call(
        (x(1, 4), x(3, 4, seed=1)), WeightNorm(1), lambda g, v: weight_norm(g, v, 0)
    ),
    "weight_norm of all": Call(
        (x(1)[0], x(3, 4, seed=1)), WeightNorm(-1), lambda g, v: weight_norm(g, v, (0, 1))
    ),
}  # fmt: skip


# Modules, and torch's of the same name beside them.
_IMAGES = {1: (3, 4, 2), 2: (2, 4, 2, 2), 3: (2, 4, 1, 2, 2)}
_SHAPES: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = {
    "Softmax": (lambda n: n.Softmax(1), (4, 3)),
    "LogSoftmax": (lambda n: n.LogSoftmax(1), (4, 3)),
    "LayerNorm": (lambda n: n.LayerNorm(4), (3, 4)),
    "RMSNorm": (lambda n: n.RMSNorm(4), (3, 4)),
    "GroupNorm": (lambda n: n.GroupNorm(2, 4), (3, 4, 2)),
    **{
        f"BatchNorm{d}d": (lambda n, d=d: getattr(n, f"BatchNorm{d}d")(4), shape)
        for d, shape in _IMAGES.items()
    },
    **{
        f"InstanceNorm{d}d": (
            lambda n, d=d: getattr(n, f"InstanceNorm{d}d")(
                4, affine=True, track_running_stats=True
            ),
            shape,
        )
        for d, shape in _IMAGES.items()
    },
}  # fmt: skip


def _called(module: nn.Module) -> Callable[..., Outputs]:
    """A module as a function of its inputs and then its parameters, in their order."""
    module = module.double()
    names = [name for name, _ in module.named_parameters()]

    def call(*tensors: Tensor) -> Outputs:
        n = len(tensors) - len(names)
        parameters = dict(zip(names, tensors[n:], strict=True))
        found: Outputs = torch.func.functional_call(module, parameters, tensors[:n])
        return found

    return call


def module_call(name: str, training: bool) -> Call:
    make, shape = _SHAPES[name]
    sides = [make(package).train(training) for package in (fnn, nn)]
    params = [x(*p.shape, seed=k + 3) + 1 for k, p in enumerate(sides[0].parameters())]
    return Call((x(*shape), *params), *map(_called, sides))


def _loss(v: Tensor) -> Tensor:
    found: Tensor = fnn.CrossEntropyLoss(CLASSES, **LOSS)(v, T)
    return found


def _offset(v: Tensor, w: Tensor) -> Outputs:
    return _called(fnn.RMSNorm(4, eps=EPS, weight_offset=1.0))(v, w)


def _parametrized(name: str, package: Any) -> Callable[..., Outputs]:
    torch.manual_seed(0)
    made: nn.Module = getattr(package, name)(nn.Linear(4, 3).double()).eval()
    return _called(made)


def parametrized(name: str) -> Call:
    packages = (fnn.parametrizations, nn.utils.parametrizations)
    weights = (x(3, 1, seed=1), x(3, 4, seed=2)) if name == "weight_norm" else (x(3, 4, seed=2),)
    return Call((x(2, 4), x(3), *weights), *(_parametrized(name, p) for p in packages))


MODULES: dict[str, Call] = {
    **{
        f"{name}, {'train' if training else 'eval'}": module_call(name, training)
        for name in _SHAPES
        for training in (True, False)
    },
    "CrossEntropyLoss": Call((x(4, 3),), _loss, lambda v: cross_entropy(v, T, CLASSES, **RIGHT)),
    "RMSNorm, offset": Call((x(3, 4), WEIGHT), _offset, lambda v, w: _rms_norm(v, w, 1.0)),
    "AddLayerNorm": Call(
        SUM, _called(fnn.AddLayerNorm(4)), lambda v, r, w, b: (_layer_norm(v + r, w, b), v + r)
    ),
    "AddRMSNorm": Call(
        SUM[:3],
        _called(fnn.AddRMSNorm(4, eps=EPS, weight_offset=1.0)),
        lambda v, r, w: (_rms_norm(v + r, w, 1.0), v + r),
    ),
    # In training every call of spectral_norm is another function.
    **{f"parametrizations, {n}": parametrized(n) for n in ("weight_norm", "spectral_norm")},
}
EVERY = FUNCTIONS | MODULES


def leaves(call: Call) -> list[Tensor]:
    """The tensors, that need gradients, with their strides."""
    return [t.detach().requires_grad_() for t in call.tensors]


def as_tuple(found: Outputs) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
