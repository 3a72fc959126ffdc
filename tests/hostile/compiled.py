"""Training steps that torch.compile breaks in pieces, each of a small model around one function.

    python -m tests.hostile.compiled WAY [CASE ...]

prints a line of JSON for each case: its name, and the losses of its steps without compiling and
with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastopt
from fastopt import functional as F  # noqa: N812 -- as torch.nn.functional is imported
from fastopt.nn import parametrizations
from tests.hostile import gpt

STEPS, WIDTH, CLASSES, CHANNELS = 40, 8, 5, 4
Function = Callable[..., Tensor]
Step = Callable[[], Tensor]


class Around(nn.Module):
    """A function of h, the weight and the bias of a layer, between two linear ones.

    images: h is (6, 4, 2) and not (6, 8), the weight and the bias are (4,) and not (8,)
    """

    def __init__(self, function: Function, images: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.function, self.shape = function, (CHANNELS, 2) if images else (WIDTH,)
        self.weight = nn.Parameter(torch.rand(self.shape[0]))
        self.bias = nn.Parameter(torch.rand(self.shape[0]))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.first(x).view(len(x), *self.shape)
        y = self.function(h, self.weight, self.bias).flatten(1)
        return nn.functional.cross_entropy(self.last(y), target)


class Ending(nn.Module):
    """A loss(h, layer, target), where the layer gives logits of h."""

    def __init__(self, loss: Function) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.function = loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.function(self.first(x).tanh(), self.last, target)


def holding(module: nn.Module, images: bool = False) -> nn.Module:
    """A module of torch between the layers, swapped; or a layer that is parametrized."""
    model = Around(lambda h, weight, bias: module(h), images)
    model.module = module
    return fastopt.swap(model)


def added(norm: Callable[..., tuple[Tensor, Tensor]], h: Tensor, *weights: Tensor) -> Tensor:
    y, total = norm(h.sin(), h, (WIDTH,), *weights, seed=3, dropout_p=0.25)
    return y + total


def parted_gpt() -> nn.Module:
    """Its blocks break the graph; its function, which one way does not compile, is a block."""
    model = fastopt.swap(gpt.GPT())
    for block in model.blocks:
        block.parted = True
    first = model.blocks[0]
    model.function = first.forward
    first.forward = lambda x: model.function(x)
    return model


ROW = (WIDTH,)
CASES: dict[str, Callable[[], nn.Module]] = {
    "softmax": lambda: Around(lambda h, w, b: F.softmax(h * w + b, -1)),
    "softmax of columns": lambda: Around(lambda h, w, b: F.softmax(h * w + b, 0)),
    "log_softmax": lambda: Around(lambda h, w, b: F.log_softmax(h * w + b, -1)),
    "logsumexp": lambda: Around(lambda h, w, b: h * F.logsumexp(h * w + b, -1, True)),
    "masked": lambda: Around(lambda h, w, b: F.scaled_masked_softmax(h, w, 0.5, True) + b),
    "layer_norm": lambda: Around(lambda h, w, b: F.layer_norm(h, ROW, w, b)),
    "rms_norm": lambda: Around(lambda h, w, b: F.rms_norm(h, ROW, w) + b),
    "add_layer_norm": lambda: Around(lambda h, w, b: added(F.add_layer_norm, h, w, b)),
    "add_rms_norm": lambda: Around(lambda h, w, b: added(F.add_rms_norm, h, w) + b),
    "batch_norm": lambda: Around(
        lambda h, w, b: F.batch_norm(h, None, None, w, b, training=True), images=True
    ),
    "instance_norm": lambda: Around(
        lambda h, w, b: F.instance_norm(h, None, None, w, b), images=True
    ),
    "group_norm": lambda: Around(lambda h, w, b: F.group_norm(h, 2, w, b), images=True),
    "cross_entropy": lambda: Ending(
        lambda h, layer, t: F.cross_entropy(layer(h), t, label_smoothing=0.1, z_loss=1e-3)
    ),
    "linear_cross_entropy": lambda: Ending(
        lambda h, layer, t: F.linear_cross_entropy(h, layer.weight, t, linear_bias=layer.bias)
    ),
    "linear_cross_entropy of each": lambda: Ending(
        lambda h, layer, t: F.linear_cross_entropy(h, layer.weight, t, reduction="none").mean()
    ),
    "Softmax": lambda: holding(nn.Softmax(-1)),
    "LogSoftmax": lambda: holding(nn.LogSoftmax(-1)),
    "LayerNorm": lambda: holding(nn.LayerNorm(WIDTH)),
    "RMSNorm": lambda: holding(nn.RMSNorm(WIDTH)),
    "GroupNorm": lambda: holding(nn.GroupNorm(2, WIDTH)),
    "BatchNorm1d": lambda: holding(nn.BatchNorm1d(CHANNELS), images=True),
    "InstanceNorm1d": lambda: holding(
        nn.InstanceNorm1d(CHANNELS, affine=True, track_running_stats=True), images=True
    ),
    "weight_norm": lambda: holding(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
    "spectral_norm": lambda: holding(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))),
    "GPT": parted_gpt,
}


def compiled_by_dynamo(step: Step, model: Any) -> Step:
    return torch.compile(step, backend="eager")


def compiled_by_inductor(step: Step, model: Any) -> Step:
    """With one block that is not compiled."""
    model.function = torch.compiler.disable(model.function)
    return torch.compile(step, backend="inductor")


def with_compiled_autograd(step: Step, model: Any) -> Step:
    def compiled() -> Tensor:
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            return step()

    return compiled


WAYS = {
    "eager": compiled_by_dynamo,
    "inductor": compiled_by_inductor,
    "compiled autograd": with_compiled_autograd,
}


def losses(case: str, compiled: Callable[[Step, Any], Step] | None) -> list[float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = CASES[case]()
    optimizer = fastopt.swap(torch.optim.AdamW(model.parameters(), lr=0.01))
    x, target = torch.randn(6, WIDTH), torch.randint(CLASSES, (6,))
    given = gpt.batch() if case == "GPT" else (x, target)

    def step() -> Tensor:
        loss = model(*given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    if compiled is not None:
        step = compiled(step, model)
    return [step().item() for _ in range(STEPS)]


def main(way: str, *cases: str) -> None:
    for case in cases or CASES:
        print(json.dumps([case, losses(case, None), losses(case, WAYS[way])]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
