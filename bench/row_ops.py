"""The row functions: how each is called, what it must read and write, and inputs for it.

Traffic is counted in tensors of x's size that one pass cannot avoid reading or writing:

    softmax, log_softmax       forward: read x, write y             2
                               backward: read dy, y, write dx       3
    layer_norm, rms_norm       forward: read x, write y             2
                               backward: read dy, x, write dx       3
    cross_entropy, logsumexp   forward: read x                      1
                               backward: read x, write dx           2

So layer_norm in float32 moves 8 bytes an element forward, 12 backward, 20 in both. What there is
one of for a row or a column (targets, statistics, weights and their gradients) is left out: it is
at most 4 % in the shapes that are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int]
Function = Callable[..., Tensor]
EPS = 1e-6

# See `difference`. Rounding explains this much of fastopt's, and a wrong column in each of the
# widest rows is more; a function that returns zeros scores 1.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
# A peer may be as coarse as ATen is: weight gradients summed in bf16, statistics kept in it.
PEERS_TOLERANCE = 0.1


@dataclass(frozen=True)
class Op:
    """name: in the tables; function: its name in fastopt.functional; arguments: those after x

    forward, backward: tensors of x's size that the pass reads or writes
    """

    name: str
    function: str
    forward: int
    backward: int
    arguments: Callable[[Tensor, torch.Generator], tuple[Any, ...]]

    def traffic(self, dtype: torch.dtype, backward: bool) -> int:
        """Bytes an element that the forward, or the forward and the backward, cannot avoid."""
        return dtype.itemsize * (self.forward + self.backward * backward)


def _over(dim: int) -> Callable[[Tensor, torch.Generator], tuple[Any, ...]]:
    return lambda x, random: (dim,)


def _targets(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    return (torch.randint(x.shape[1], x.shape[:1], generator=random, device=x.device),)


def _weight_and_bias(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    weight, bias = (_normal(x.shape[1:], x.dtype, random) for _ in range(2))
    return (x.shape[1:], 1 + weight, bias)


def _weight(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    return (x.shape[1:], 1 + _normal(x.shape[1:], x.dtype, random), EPS)


def _normal(shape: Any, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device).to(dtype)


SOFTMAX, LOG_SOFTMAX = "softmax", "log_softmax"
CROSS_ENTROPY, LOGSUMEXP = "cross_entropy", "logsumexp"
LAYER_NORM, RMS_NORM = "layer_norm", "rms_norm"
SOFTMAX_0 = "softmax dim 0"

OPS = {
    op.name: op
    for op in (
        Op(SOFTMAX, "softmax", 2, 3, _over(-1)),
        Op(LOG_SOFTMAX, "log_softmax", 2, 3, _over(-1)),
        Op(CROSS_ENTROPY, "cross_entropy", 1, 2, _targets),
        Op(LAYER_NORM, "layer_norm", 2, 3, _weight_and_bias),
        Op(RMS_NORM, "rms_norm", 2, 3, _weight),
        Op(LOGSUMEXP, "logsumexp", 1, 2, _over(-1)),
        Op(SOFTMAX_0, "softmax", 2, 3, _over(0)),
    )
}
SHAPES: dict[str, Shape] = {
    "8192x1024": (8192, 1024),
    "4096x4096": (4096, 4096),
    "512x32000": (512, 32000),
    "256x1024": (256, 1024),
    "32x768": (32, 768),
    "65536x128": (65536, 128),
}
# Below 16 Ki elements: the call costs more than the work.
TINY: dict[str, Shape] = {"8x16": (8, 16), "16x256": (16, 256), "32x256": (32, 256)}


def torchs(function: str) -> Function:
    """ATen's, by its public name."""
    module = torch if function == "logsumexp" else torch.nn.functional
    found: Function = getattr(module, function)
    return found


class Workload:
    """One op on one input; every provider gets the same values in the same memory.

    wanted: what a backward gives the gradients of, by name: x first
    dy:     the upstream gradient, random
    """

    def __init__(
        self, op: Op, shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.op = op
        random = torch.Generator(device).manual_seed(0)
        self.x = _normal(shape, dtype, random)
        self.arguments = op.arguments(self.x, random)
        self.leaf, self.leaf_arguments, self.wanted = _leaves(self.x, self.arguments)
        with torch.no_grad():
            y = torchs(op.function)(self.x, *self.arguments)
        self.dy = _normal(y.shape, y.dtype, random)

    @property
    def n_elements(self) -> int:
        return prod(self.x.shape)

    def step(self, function: Function, backward: bool) -> Callable[[], Any]:
        """The forward alone, of tensors that want no gradient, or the forward and the backward."""
        if not backward:
            x, arguments = self.x, self.arguments
            return lambda: function(x, *arguments)
        leaf, leaf_arguments, dy = self.leaf, self.leaf_arguments, self.dy
        wanted, grad = tuple(self.wanted.values()), torch.autograd.grad
        return lambda: grad(function(leaf, *leaf_arguments), wanted, dy)

    def results(self, function: Function, backward: bool) -> dict[str, Tensor]:
        """y, and the gradients where a backward is wanted, by name."""
        if not backward:
            return {"y": function(self.x, *self.arguments)}
        y = function(self.leaf, *self.leaf_arguments)
        return _with_gradients(y, self.wanted, self.dy)

    def oracle(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Torch's y and gradients, of these values in this dtype."""
        x, arguments = self.x.to(dtype), [_cast(a, dtype) for a in self.arguments]
        leaf, leaf_arguments, wanted = _leaves(x, arguments)
        y = torchs(self.op.function)(leaf, *leaf_arguments)
        return _with_gradients(y, wanted, self.dy.to(dtype))


def _with_gradients(y: Tensor, wanted: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(y, tuple(wanted.values()), dy)
    names = (f"d{name}" for name in wanted)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def _leaves(x: Tensor, arguments: Any) -> tuple[Tensor, tuple[Any, ...], dict[str, Tensor]]:
    """The same memory as tensors that want a gradient, and those by name."""
    leaf = x.detach().requires_grad_()
    leaf_arguments = tuple(a.detach().requires_grad_() if _is_floating(a) else a for a in arguments)
    weights = [a for a in leaf_arguments if _is_floating(a)]
    names = ("x", "weight", "bias")
    return leaf, leaf_arguments, dict(zip(names, (leaf, *weights), strict=False))


def _is_floating(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    return argument.to(dtype) if _is_floating(argument) else argument


def difference(results: dict[str, Tensor], oracle: dict[str, Tensor]) -> float:
    """The largest of sum |a - b| / sum |b| over y and the gradients; NaN where a value is."""
    worst = 0.0
    for name, right in oracle.items():
        if name not in results:
            continue
        got = results[name].to(right.dtype)
        share = float((got - right).abs().sum() / right.abs().sum())
        if not share <= worst:
            worst = share
    return worst


def check(results: dict[str, Tensor], oracle: dict[str, Tensor], allowed: float) -> float:
    """Their difference; raises where it is more than allowed."""
    found = difference(results, oracle)
    if not found <= allowed:
        raise RuntimeError(
            f"the result differs from torch's by {found:.1e} of its size, more than the "
            f"{allowed:.0e} that rounding explains: a time for such a function means nothing"
        )
    return found
