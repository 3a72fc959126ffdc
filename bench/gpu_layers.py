"""The functions around the plain ones, in the shapes that a GPU report times.

Traffic in tensors of x's size, forward and backward: an add norm reads x and residual, writes sum
and y, 4; then reads dy, dsum and sum, writes the one gradient that x and residual share, 4, or with
a dropout both, 5. Norms over channels and weight_norm read x, write y, 2; then read dy and x, write
dx, 3. Masked softmax likewise; its mask, a byte for all heads, is left out. Spectral norm reads w
for W v, W^T u and u W v, then once more to write it, 5; then dy and w, writes dw, 3. The bytes of
linear_cross_entropy are x, the weight and their gradients; its time is that of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from bench.gpu_calls import EPS, Call, Function, P, call_of, normal
from fastopt import functional


@dataclass(frozen=True)
class Layer:
    """tensors: read or written forward, and backward; eager: torch's way, where that is not the
    call's own (which may be composed for its precision)"""

    name: str
    call: Call
    shape: tuple[int, ...]
    tensors: tuple[float, float]
    eager: Function | None = None
    layout: torch.memory_format = torch.contiguous_format
    compiled: bool = True
    coarse: bool = False


def _add_layer(x: Tensor, r: Tensor, w: Tensor, b: Tensor, p: float = 0.0) -> Any:
    total = (F.dropout(x, p) if p else x) + r
    return F.layer_norm(total, total.shape[-1:], w, b, EPS), total


def _add_rms(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = x + r
    return F.rms_norm(total, total.shape[-1:], w, EPS), total


def _heads(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    """A mask for all heads that keeps four fifths."""
    shape = (x.shape[0], 1, *x.shape[2:])
    return (torch.rand(shape, generator=random, device=x.device) < 0.8,)


def _eager_softmax(x: Tensor, kept: Tensor) -> Tensor:
    return torch.softmax((x * 0.125).masked_fill(~kept, -torch.inf), -1)


def _affine(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    return tuple(normal(x.shape[1:2], x, random).requires_grad_() for _ in range(2))


def _over_channels(name: str, f: Any, groups: int) -> Function:
    if name == "group_norm":
        return lambda x, w, b: f.group_norm(x, groups, w, b)
    return lambda x, w, b: getattr(f, name)(x, None, None, w, b, True)


def _channels(name: str, suffix: str, shape: tuple[int, ...], layout: torch.memory_format) -> Layer:
    groups = min(32, shape[1])
    ours, theirs = (_over_channels(name, f, groups) for f in (functional, F))
    call = Call(f"{name}{suffix}", name, ours, theirs, _affine)
    return Layer(call.name, call, shape, (2, 3), layout=layout)


def _head(n_classes: int) -> Callable[[Tensor, torch.Generator], tuple[Any, ...]]:
    """A language model's: the weight of n_classes, targets, and no bias."""

    def make(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
        weight = normal((n_classes, x.shape[1]), x, random).mul_(x.shape[1] ** -0.5)
        target = torch.randint(n_classes, x.shape[:1], generator=random, device=x.device)
        return weight.requires_grad_(), target, None

    return make


def layers(
    rows: tuple[int, int],
    scores: tuple[int, ...],
    images: tuple[int, ...],
    square: tuple[int, int],
    tokens: tuple[int, int],
    n_classes: int,
) -> list[Layer]:
    linear = call_of("linear_cross_entropy", others=_head(n_classes))
    drops = call_of("add_layer_norm dropout")
    formats = {"": torch.contiguous_format, " channels_last": torch.channels_last}
    return [
        Layer("add_rms_norm", call_of("add_rms_norm"), rows, (4, 4), _add_rms),
        Layer("add_layer_norm", call_of("add_layer_norm"), rows, (4, 4), _add_layer),
        # torch.compile draws another dropout than its eager self, and could not be checked.
        Layer("add_layer_norm dropout", drops, rows, (4, 5), partial(_add_layer, p=P),
              compiled=False),
        Layer("scaled_masked_softmax", call_of("scaled_masked_softmax", others=_heads), scores,
              (2, 3), _eager_softmax),
        *[_channels(name, suffix, images, layout) for suffix, layout in formats.items()
          for name in ("batch_norm", "instance_norm", "group_norm")],
        Layer("weight_norm", call_of("weight_norm 0"), square, (2, 3)),
        Layer("spectral_norm", call_of("spectral_norm"), square, (5, 3), compiled=False),
        Layer("linear_cross_entropy", linear, tokens,
              (1 + n_classes / tokens[0], 1 + n_classes / tokens[0]), coarse=True),
        Layer("cross_entropy z_loss, softcap", call_of("cross_entropy z_loss, softcap"), rows,
              (1, 2)),
    ]  # fmt: skip


LAYERS = layers(
    rows=(32768, 4096),
    scores=(8, 12, 1024, 1024),
    images=(256, 64, 56, 56),
    square=(16384, 4096),
    tokens=(16384, 2048),
    n_classes=32000,
)
# Of the interpreter: one with two outputs, one with a product in it.
QUICK_LAYERS = [
    layer
    for layer in layers((5, 37), (1, 2, 3, 5), (2, 4, 3, 5), (7, 5), (5, 7), 11)
    if layer.name in ("add_rms_norm", "linear_cross_entropy")
]


class LayerWork:
    """A layer on one input."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
        self.layer = layer
        random = torch.Generator(device).manual_seed(0)
        x = torch.randn(layer.shape, generator=random, device=device).to(dtype)
        self.x = x.contiguous(memory_format=layer.layout)
        self.others = layer.call.others(self.x, random)
        with torch.no_grad():
            outputs = _several((layer.eager or layer.call.theirs)(self.x, *self.others))
        self.shapes = [y.shape for y in outputs]
        self.dys = [normal(shape, self.x, random) for shape in self.shapes]

    def _outputs(self, function: Function, x: Tensor, others: Sequence[Any]) -> list[Tensor]:
        """Those that hang on x."""
        return [y for y in _several(function(x, *others)) if y.requires_grad]

    def step(self, function: Function, backward: bool) -> Callable[[], Any]:
        """The forward alone, of tensors that want no gradient, or the forward and the backward."""
        if not backward:
            x, others = self.x, [_plain(a) for a in self.others]
            return lambda: function(x, *others)
        leaf, grad = self.x.detach().requires_grad_(), torch.autograd.grad
        others, wanted = self.others, (leaf, *_wanted(self.others))

        def both() -> Any:
            outputs = self._outputs(function, leaf, others)
            return grad(outputs, wanted, self.dys[: len(outputs)])

        return both

    def results(self, function: Function, backward: bool) -> dict[str, Tensor]:
        return self._results(function, self.x, self.others, self.dys, backward)

    def oracle(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Torch's, of these values in this dtype; of what torch drops at random, ours composed."""
        others = [_cast(a, dtype) for a in self.others]
        dys = [dy.to(dtype) for dy in self.dys]
        return self._results(self.layer.call.theirs, self.x.to(dtype), others, dys, True)

    def _results(
        self,
        function: Function,
        x: Tensor,
        others: Sequence[Any],
        dys: Sequence[Tensor],
        backward: bool,
    ) -> dict[str, Tensor]:
        leaf = x.detach().requires_grad_(backward)
        if not backward:
            found = _several(function(leaf, *map(_plain, others)))
            return {"y": found[0]}
        outputs = self._outputs(function, leaf, others)
        wanted = (leaf, *_wanted(others))
        grads = torch.autograd.grad(outputs, wanted, dys[: len(outputs)])
        named = {f"d{k}": g for k, g in enumerate(grads)}
        return {"y": outputs[0].detach(), **named}


def _several(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def _plain(argument: Any) -> Any:
    return argument.detach() if isinstance(argument, Tensor) else argument


def _wanted(others: Sequence[Any]) -> list[Tensor]:
    return [a for a in others if isinstance(a, Tensor) and a.requires_grad]


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    if not isinstance(argument, Tensor) or not argument.is_floating_point():
        return argument
    return argument.detach().to(dtype).requires_grad_(argument.requires_grad)
