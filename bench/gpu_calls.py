"""The row functions as the GPU report calls them: ours, torch's in any dtype, and inputs for both.

`missing()` names the public functions without a call here; the report fails where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from bench.row_ops import torchs
from fastopt import functional, parametrizations
from fastopt.functional import masked_softmax
from fastopt.functional.add_layer_norm import composed as composed_add_norm

Function = Callable[..., Any]
Shapes = Sequence[tuple[int, ...]]
Others = Callable[[Tensor, torch.Generator], tuple[Any, ...]]

ROWS: Shapes = ((1, 1), (7, 33), (1823, 781), (3, 131_073), (4099, 64), (5, 8192), (1, 2**20))
# Of functions that walk as others do: alone in registers, short, walked in blocks.
FEW_ROWS: Shapes = ((7, 33), (1823, 781), (3, 131_073))
QUICK_ROWS: Shapes = ((1, 1), (3, 37))
BLOCKS: Shapes = ((2, 5, 37), (3, 781, 130), (1, 4099, 3))
QUICK_BLOCKS: Shapes = ((2, 5, 7),)
IMAGES: Shapes = ((2, 6, 5, 7), (3, 64, 33, 17), (1, 6, 129, 257), (5, 30, 1, 3), (64, 258, 4, 4))
QUICK_IMAGES: Shapes = ((2, 6, 3, 5),)
TOKENS: Shapes = ((1, 1), (7, 33), (1823, 781), (9001, 64))
# Classes of a linear layer.
CLASSES, QUICK_CLASSES = 1009, 11
SMOOTHING, Z_LOSS, SOFTCAP, P, SEED, EPS = 0.1, 0.01, 20.0, 0.3, -7, 1e-5


@dataclass(frozen=True)
class Call:
    """function: its public name; ours, theirs: called with x and the others, giving a tensor or
    several, of which those that hang on x are differentiated

    others: arguments after x, made for it; what requires a gradient gets one
    alone: whether a slice of x's first dimension gives, alone, the bits it gives among others
    narrow: torch's way in the dtype that is judged, where theirs is composed for its precision
    statistics: outputs after the first; what torch makes of infinities there is its order of sums
    large, tiny: what stands in rows of equal values, beside infinities and NaN
    """

    name: str
    function: str
    ours: Function
    theirs: Function
    others: Others
    shapes: Shapes = ROWS
    quick: Shapes = QUICK_ROWS
    alone: bool = True
    narrow: Function | None = None
    statistics: tuple[str, ...] = ()
    large: float = 1e30
    tiny: float = 1e-30

    @property
    def rank(self) -> int:
        return len(self.shapes[0])


def normal(shape: Sequence[int], like: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random, device=like.device).to(like.dtype)


def _both(name: str, function: str, others: Others, *, flags: Any = None, **more: Any) -> Call:
    """A function that torch has under the same name; flags: options of both."""
    ours = partial(getattr(functional, function), **flags or {})
    return Call(name, function, ours, partial(torchs(function), **flags or {}), others, **more)


def _dim(dim: int) -> Others:
    return lambda x, random: (dim,)


def _targets(x: Tensor, random: torch.Generator) -> Tensor:
    shape = (x.shape[0], *x.shape[2:])
    return torch.randint(x.shape[1], shape, generator=random, device=x.device)


def _indices(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    return (_targets(x, random),)


def _weighted(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    target = _targets(x, random)
    target.view(-1)[1::7] = -100
    weight = torch.rand(x.shape[1], generator=random, device=x.device) + 0.5
    return (target, weight.to(x.dtype))


def _probabilities(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    drawn = torch.randn(x.shape, generator=random, device=x.device)
    return (drawn.softmax(1).to(x.dtype),)


def _affine(n_weights: int, *rest: Any) -> Others:
    def make(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
        n = x.shape[-1:]
        drawn = [normal(n, x, random).requires_grad_() for _ in range(n_weights)]
        return (n, *drawn, *rest)

    return make


_BLOCKS: dict[str, Any] = {"shapes": BLOCKS, "quick": QUICK_BLOCKS}
_FEW: dict[str, Any] = {"shapes": FEW_ROWS}
_OVER_DIM = ("softmax", "log_softmax", "logsumexp")
_NORM: dict[str, Any] = {"large": 1024.0}
_PLAIN = (
    *[_both(f"{name} -1", name, _dim(-1)) for name in _OVER_DIM],
    *[_both(f"{name} 0", name, _dim(0), alone=False) for name in _OVER_DIM],
    *[_both(f"{name} 1 of 3", name, _dim(1), **_BLOCKS) for name in _OVER_DIM],
    _both("cross_entropy", "cross_entropy", _indices, alone=False),
    _both("cross_entropy of each row", "cross_entropy", _indices, flags={"reduction": "none"}),
    _both("cross_entropy weight, ignored, smoothing", "cross_entropy", _weighted, alone=False,
          flags={"label_smoothing": SMOOTHING}, **_FEW),
    _both("cross_entropy of 3 dimensions", "cross_entropy", _weighted, alone=False, **_BLOCKS),
    _both("cross_entropy of probabilities", "cross_entropy", _probabilities, alone=False,
          **_FEW),
    _both("layer_norm", "layer_norm", _affine(2), **_NORM),
    _both("layer_norm without weights", "layer_norm", _affine(0), **_NORM, **_FEW),
    _both("rms_norm", "rms_norm", _affine(1, 1e-6), **_NORM),
    _both("rms_norm without weight", "rms_norm", _affine(0), **_NORM, **_FEW),
)  # fmt: skip


def with_terms(x: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of capped logits, and z_loss logsumexp(x)^2, of each row."""
    x = SOFTCAP * torch.tanh(x / SOFTCAP)
    squares = torch.logsumexp(x, 1).square()
    return F.cross_entropy(x, target, reduction="none") + Z_LOSS * squares


def _layer(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    n = QUICK_CLASSES if x.device.type == "cpu" else CLASSES
    target = torch.randint(n, x.shape[:1], generator=random, device=x.device)
    weight = normal((n, x.shape[1]), x, random) * x.shape[1] ** -0.5
    return weight.requires_grad_(), target, normal((n,), x, random).requires_grad_()


def _ours_linear(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor, **more: Any) -> Tensor:
    return functional.linear_cross_entropy(x, weight, target, linear_bias=bias, **more)


def _their_linear(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor, **more: Any) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), target, **more)


def _their_linear_terms(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    return with_terms(F.linear(x, weight, bias), target).mean()


_TOKENS: dict[str, Any] = {"shapes": TOKENS, "alone": False}
_TERMS: dict[str, Any] = {"z_loss": Z_LOSS, "softcap": SOFTCAP}
_LOSSES = (
    Call("cross_entropy z_loss, softcap", "cross_entropy",
         partial(functional.cross_entropy, reduction="none", **_TERMS), with_terms, _indices,
         **_FEW),
    Call("linear_cross_entropy", "linear_cross_entropy", _ours_linear, _their_linear, _layer,
         **_TOKENS),
    Call("linear_cross_entropy of each row", "linear_cross_entropy",
         partial(_ours_linear, reduction="none"), partial(_their_linear, reduction="none"), _layer,
         **_TOKENS),
    Call("linear_cross_entropy z_loss, softcap", "linear_cross_entropy",
         partial(_ours_linear, **_TERMS), _their_linear_terms, _layer, **_TOKENS),
)  # fmt: skip


def _joins(n_weights: int) -> Others:
    def make(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
        drawn = [normal(x.shape, x, random), *(normal(x.shape[-1:], x, random) for _ in range(2))]
        return tuple(t.requires_grad_() for t in drawn[: 1 + n_weights])

    return make


def _ours_layer(x: Tensor, r: Tensor, w: Tensor, b: Tensor, p: float = 0.0) -> Any:
    return functional.add_layer_norm(x, r, x.shape[-1:], w, b, EPS, p, seed=SEED)


def _ours_rms(x: Tensor, r: Tensor, w: Tensor, p: float = 0.0) -> Any:
    return functional.add_rms_norm(x, r, x.shape[-1:], w, EPS, p, seed=SEED)


def _composed(x: Tensor, r: Tensor, w: Tensor, b: Any = None, p: float = 0.0) -> Any:
    """By torch's operators, the dropout's hash included."""
    seed = torch.full((), SEED, dtype=torch.int64, device=x.device) if p else None
    return composed_add_norm(x, r, w, b, seed, 1, EPS, 0.0, p, b is not None)


_DROPS: dict[str, Any] = {"alone": False, **_NORM, **_FEW}
_JOINED = (
    Call("add_layer_norm", "add_layer_norm", _ours_layer, _composed, _joins(2), **_NORM),
    Call("add_rms_norm", "add_rms_norm", _ours_rms, _composed, _joins(1), **_NORM),
    Call("add_layer_norm dropout", "add_layer_norm", partial(_ours_layer, p=P),
         partial(_composed, p=P), _joins(2), **_DROPS),
    Call("add_rms_norm dropout", "add_rms_norm", partial(_ours_rms, p=P), partial(_composed, p=P),
         _joins(1), **_DROPS),
)  # fmt: skip


def _kept(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    kept = torch.rand(x.shape, generator=random, device=x.device) < 0.8
    kept[:1] = len(x) < 2
    kept[1:3] = True  # of a row with a NaN, what is left out is not looked at
    return (kept,)


def _added(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    """A mask for all rows, as a bias of positions is."""
    return (normal(x.shape[-1:], x, random).requires_grad_(),)


def _masked(**options: Any) -> dict[str, Function]:
    def theirs(x: Tensor, mask: Tensor | None = None) -> Tensor:
        scale, is_causal = options.get("scale", 1.0), options.get("is_causal", False)
        return masked_softmax.composed(x, mask, scale, is_causal)

    def narrow(x: Tensor, mask: Tensor | None = None) -> Tensor:
        """With y rounded as a backward reads it."""
        v = x * options.get("scale", 1.0)
        if mask is None:
            mask = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
        v = v + mask if mask.is_floating_point() else v.masked_fill(~mask, -torch.inf)
        return torch.softmax(v, -1)

    ours = partial(functional.scaled_masked_softmax, **options)
    return {"ours": ours, "theirs": theirs, "narrow": narrow}


_MASKED = "scaled_masked_softmax"
_SCORES = (
    Call(_MASKED, _MASKED, others=_kept, **_masked(scale=0.125)),
    Call(f"{_MASKED} added", _MASKED, others=_added, **_masked(scale=0.5), **_FEW),
    Call(f"{_MASKED} causal", _MASKED, others=lambda x, random: (), **_masked(is_causal=True),
         **_BLOCKS),
)  # fmt: skip


def _affine_channels(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    """weight, bias, running mean and variance, in float32 beside 16 bits as batch_norm's are."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    drawn = [torch.randn(x.shape[1], generator=random, device=x.device) for _ in range(4)]
    weight, bias, mean, var = (t.to(dtype) for t in drawn)
    return weight.requires_grad_(), bias.requires_grad_(), mean, var.abs() + 0.5


def _affine_groups(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    return tuple(normal(x.shape[1:2], x, random).requires_grad_() for _ in range(2))


def _channels(name: str, f: Any, training: bool, layout: torch.memory_format) -> Function:
    """y, and where the running statistics have moved to."""

    def call(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Any:
        if x.dim() == 4:
            x = x.contiguous(memory_format=layout)
        mean, var = mean.clone(), var.clone()
        return getattr(f, name)(x, mean, var, w, b, training), mean, var

    return call


def _groups(f: Any, layout: torch.memory_format) -> Function:
    def call(x: Tensor, w: Tensor, b: Tensor) -> Any:
        if x.dim() == 4:
            x = x.contiguous(memory_format=layout)
        return f.group_norm(x, 2 - x.shape[1] % 2, w, b)

    return call


def _channel_calls(suffix: str, layout: torch.memory_format) -> list[Call]:
    more: dict[str, Any] = {"shapes": IMAGES, "quick": QUICK_IMAGES, **_NORM}
    calls = [
        Call(f"{name}{suffix}", name.split()[0],
             *(_channels(name.split()[0], f, "eval" not in name, layout) for f in (functional, F)),
             _affine_channels, alone=False, statistics=("y1", "y2"), **more)
        for name in ("batch_norm", "batch_norm eval", "instance_norm")
    ]  # fmt: skip
    group = [_groups(f, layout) for f in (functional, F)]
    return [*calls, Call(f"group_norm{suffix}", "group_norm", *group, _affine_groups, **more)]


_CHANNELS = (
    *_channel_calls("", torch.contiguous_format),
    *_channel_calls(" channels_last", torch.channels_last),
)


def _g(dim: int) -> Others:
    def make(v: Tensor, random: torch.Generator) -> tuple[Any, ...]:
        shape = [n if k == dim else 1 for k, n in enumerate(v.shape)] if dim >= 0 else []
        return (normal(shape, v, random).requires_grad_(),)

    return make


def _weight_norm(dim: int) -> Call:
    norm = parametrizations.WeightNorm(dim)
    return Call(
        f"weight_norm {dim if dim >= 0 else 'whole'}", "weight_norm", lambda v, g: norm(g, v),
        lambda v, g: torch._weight_norm(v, g, dim), _g(dim), alone=dim == 0, large=1024.0,
        tiny=1e-10,
    )  # fmt: skip


def _spectral_norm(cls: type[_SpectralNorm]) -> Function:
    """One step of the power method from given vectors: a constructor would draw its own."""

    def call(w: Tensor, u: Tensor, v: Tensor) -> Any:
        norm = cls.__new__(cls)
        nn.Module.__init__(norm)
        norm.dim, norm.n_power_iterations, norm.eps = 0, 1, 1e-12
        norm.register_buffer("_u", u.clone())
        norm.register_buffer("_v", v.clone())
        return norm(w), norm._u, norm._v

    return call


def _singular(w: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    vectors = (normal((n,), w, random).float() for n in w.shape)
    return tuple((x / x.norm()).to(w.dtype) for x in vectors)


_WEIGHTS = (
    *map(_weight_norm, (0, 1, -1)),
    Call("spectral_norm", "spectral_norm", _spectral_norm(parametrizations.SpectralNorm),
         _spectral_norm(_SpectralNorm), _singular, shapes=((7, 33), (1823, 781), (64, 4099)),
         quick=((3, 37),), alone=False, large=1024.0, tiny=1e-10),
)  # fmt: skip

CALLS: tuple[Call, ...] = (*_PLAIN, *_LOSSES, *_JOINED, *_SCORES, *_CHANNELS, *_WEIGHTS)


def call_of(name: str, **changes: Any) -> Call:
    return replace(next(call for call in CALLS if call.name == name), **changes)


def missing() -> list[str]:
    """Public functions that nothing here calls."""
    served = {call.function for call in CALLS}
    return sorted({*functional.__all__, *parametrizations.__all__} - served)
