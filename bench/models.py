"""The workloads: models as lists of parameter shapes, their gradients, and one real training loop.

A step reads no more of a model than its parameters, gradients and states, so a list of shapes
stands for it. What else decides the cost of a step is how gradients arrive; see `GRADIENTS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from fastopt.cli.shared import shapes
from fastopt.cli.shared.shapes import MODELS as SHAPES

DRAWN = 1_000_003
# Trained for real, so its shapes come from the model itself: see `TrainingLoop`.
REAL = "text transformer"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# rebound: every step finds new tensor objects in p.grad, at other addresses than the step before,
#     as zero_grad() and a backward leave them.
# flat: views of one flat buffer, the same objects each step, as DDP's gradient_as_bucket_view
#     makes them.
GRADIENTS = ("rebound", "flat")


def n_elements(model: str) -> int:
    return shapes.n_elements(SHAPES[model])


def make_parameters(model: str, dtype: torch.dtype) -> list[nn.Parameter]:
    """Fresh parameters, the same values in every call."""
    values = _tensors(model, dtype, seed=0, scale=2e-2)
    return [nn.Parameter(tensor.clone()) for tensor in values]


class Gradients:
    """The gradients of a model; any number of optimizers may take them in turn."""

    def __init__(self, model: str, dtype: torch.dtype, mode: str) -> None:
        if mode not in GRADIENTS:
            raise ValueError(f"gradients {mode!r}: choose from {', '.join(GRADIENTS)}")
        self.rebound = mode == "rebound"
        # Two sets, so that no gradient lies where the last one did.
        seeds = (1, 2) if self.rebound else (1,)
        self._sets = [_tensors(model, dtype, seed, scale=1e-2) for seed in seeds]
        if self.rebound:
            self._sets = [[grad.clone() for grad in grads] for grads in self._sets]

    def binder(self, params: list[nn.Parameter]) -> Callable[[], None]:
        """A function that gives these parameters the gradients of the next step."""
        if not self.rebound:
            _bind(params, self._sets[0])
            return lambda: None
        sets = itertools.cycle(self._sets)
        return lambda: _bind(params, [grad.detach() for grad in next(sets)])


def _tensors(model: str, dtype: torch.dtype, seed: int, scale: float) -> list[Tensor]:
    """Random tensors of the model's shapes, views of one buffer; the same for the same seed."""
    n = n_elements(model)
    random = torch.Generator().manual_seed(seed)
    # The values recur: drawing them all would take longer than what is measured.
    drawn = torch.randn(min(n, DRAWN), generator=random).mul_(scale).to(dtype)
    values = drawn.repeat(-(-n // DRAWN))[:n]
    parts = values.split([prod(shape) for shape in SHAPES[model]])
    return [part.view(shape) for part, shape in zip(parts, SHAPES[model], strict=True)]


def _bind(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


@dataclass(frozen=True)
class TrainingLoop:
    """A character-level transformer trained on Python's own sources, the demo's second task.

    model:   its weights are the same at first in every call of `make`
    forward_backward: zero_grad, forward and backward of the next batch; what is left is the step
    """

    model: nn.Module
    forward_backward: Callable[[], None]

    @classmethod
    def make(cls) -> TrainingLoop:
        from fastopt.cli.demo.tasks import cross_entropy, text_task

        task = text_task(seed=0, quick=False)
        batches = itertools.cycle(task.batches)

        def forward_backward() -> None:
            inputs, targets = next(batches)
            task.model.zero_grad()
            cross_entropy(task.model(inputs), targets).backward()

        return cls(task.model, forward_backward)
