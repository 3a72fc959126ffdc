"""Trains one task in several ways, interleaved step by step, and compares the runs.

A machine's speed drifts while it runs. So the copies of the model take step i one after the
other, in an order that changes every time, and a ratio of two of them is from the same minutes.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastopt
from fastopt.cli.demo.tasks import AddNorm, Batch, Task, cross_entropy

# Steps left out of every median: the first ones compile kernels, allocate states, fill caches.
WARMUP_STEPS = 5
# The final loss is a mean over this many steps: one batch alone is noise.
FINAL_STEPS = 10
# Largest gap between two loss curves that differ in rounding only. Over 20 seeds torch's fused
# AdamW stays within 7e-7 of its default and ours within 3e-6; without weight decay it is 2e-4 in
# 25 steps, with 0.1 % more learning rate 7e-4. Norms and a loss that round differently add no more
# than that: with the model swapped 5e-7 in 25 steps (20 seeds) and 3e-6 in 320 (3 seeds). Norms
# with an eps of 1e-3 instead of 1e-5 are 3e-4 away in 25 steps, a loss with a label smoothing of
# 1e-4 is 4e-4.
MAX_GAP = 3e-5
# Trained: the final loss is below this share of the first.
MAX_FINAL_LOSS = 0.9


@dataclass(frozen=True)
class Provider:
    """An optimizer under comparison, and what the model goes through for it.

    make    make(parameters, lr) returns the optimizer, all else at its defaults
    adopt   what the model and the loss go through first, in place
    """

    name: str
    make: Callable[[Iterable[Tensor], float], Optimizer]
    adopt: Callable[[nn.Module], nn.Module] = lambda module: module


def _fastopt_adamw(params: Iterable[Tensor], lr: float) -> Optimizer:
    return fastopt.optim.AdamW(params, lr=lr)


def _swapped(module: nn.Module) -> nn.Module:
    """fastopt.swap, and residual norms in one pass where the model has them in two."""
    for each in module.modules():
        if type(each) is AddNorm:
            each.__class__ = fastopt.nn.AddLayerNorm  # type: ignore[assignment]
    return fastopt.swap(module)


TORCH = Provider("torch default", lambda params, lr: torch.optim.AdamW(params, lr=lr))
TORCH_FUSED = Provider(
    "torch fused", lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True)
)
FASTOPT = Provider("fastopt", _fastopt_adamw)
FASTOPT_SWAP = Provider("fastopt swap", _fastopt_adamw, _swapped)
PROVIDERS = (TORCH, TORCH_FUSED, FASTOPT, FASTOPT_SWAP)


def providers_for(task: Task) -> tuple[Provider, ...]:
    """PROVIDERS, but no FASTOPT_SWAP where the model has nothing that it replaces: its run would
    be FASTOPT's."""
    swapped = fastopt.swap_report(_swapped(copy.deepcopy(task.model)))
    return tuple(p for p in PROVIDERS if p is not FASTOPT_SWAP or swapped.replaced)


@dataclass
class Run:
    """The record of one provider's run: one entry a step, times in seconds.

    optimizer_s    around optimizer.step()
    step_s         around zero_grad, forward, backward and optimizer.step()
    """

    provider: str
    losses: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    held_out_loss: float = math.nan
    held_out_accuracy: float = math.nan

    @property
    def final_loss(self) -> float:
        return statistics.fmean(self.losses[-FINAL_STEPS:])

    @property
    def optimizer_ms(self) -> float:
        return 1e3 * statistics.median(self.optimizer_s[WARMUP_STEPS:])

    @property
    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.step_s[WARMUP_STEPS:])

    def gap(self, reference: Run) -> float:
        """Largest |loss - reference loss| over all steps; NaN if any loss is."""
        gaps = [abs(a - b) for a, b in zip(self.losses, reference.losses, strict=True)]
        return math.nan if any(map(math.isnan, gaps)) else max(gaps)


@dataclass(frozen=True)
class Comparison:
    """The runs of one task; runs[0] is the one whose curve the others are compared with."""

    task: Task
    runs: list[Run]

    def run(self, provider: str) -> Run:
        return next(run for run in self.runs if run.provider == provider)


class _Racer:
    """One provider's own copy of the model, its loss, its optimizer and its record."""

    def __init__(self, task: Task, provider: Provider) -> None:
        self.model = provider.adopt(copy.deepcopy(task.model))
        self.loss = partial(cross_entropy, loss=provider.adopt(nn.CrossEntropyLoss()))
        self.optimizer = provider.make(self.model.parameters(), task.lr)
        self.run = Run(provider.name)

    def step(self, batch: Batch) -> None:
        inputs, targets = batch
        start = perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(self.model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it in part
        before_optimizer = perf_counter()
        self.optimizer.step()
        end = perf_counter()
        self.run.losses.append(loss.item())
        self.run.optimizer_s.append(end - before_optimizer)
        self.run.step_s.append(end - start)


def race(
    task: Task,
    providers: Sequence[Provider] = PROVIDERS,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Comparison:
    """Trains a copy of the task's model with each provider; on_step(loss) follows each step."""
    if len(task.batches) <= WARMUP_STEPS:
        raise ValueError(f"{len(task.batches)} steps: {WARMUP_STEPS} of them are warm-up")
    racers = [_Racer(task, provider) for provider in providers]
    # Every order in turn, so that none always runs in the cache another one left behind.
    orders = itertools.cycle(itertools.permutations(racers))
    for batch, order in zip(task.batches, orders, strict=False):
        for racer in order:
            racer.step(batch)
        on_step(racers[-1].run.losses[-1])
    for racer in racers:
        racer.run.held_out_loss, racer.run.held_out_accuracy = evaluate(
            racer.model, racer.loss, task.held_out
        )
    return Comparison(task, [racer.run for racer in racers])


@torch.no_grad()
def evaluate(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], batches: Sequence[Batch]
) -> tuple[float, float]:
    """Mean loss and the share of right predictions over batches of equal size."""
    model.eval()
    losses, accuracies = [], []
    for inputs, targets in batches:
        logits = model(inputs)
        losses.append(loss(logits, targets).item())
        accuracies.append((logits.argmax(-1) == targets).double().mean().item())
    return statistics.fmean(losses), statistics.fmean(accuracies)


def problems(comparison: Comparison) -> list[str]:
    """The problems of the runs, a sentence each; empty where all trained, and alike."""
    found = []
    reference = comparison.runs[0]
    for run in comparison.runs:
        who = f"{comparison.task.name}, {run.provider}"
        bad = next((i for i, loss in enumerate(run.losses) if not math.isfinite(loss)), None)
        if bad is not None:
            found.append(f"{who}: the loss of step {bad + 1} is {run.losses[bad]}")
            continue
        if run.final_loss > MAX_FINAL_LOSS * run.losses[0]:
            found.append(
                f"{who}: did not learn, the loss went from {run.losses[0]:.4f} to "
                f"{run.final_loss:.4f}"
            )
        gap = run.gap(reference)
        if not gap <= MAX_GAP:
            found.append(
                f"{who}: the loss curve is up to {gap:.1e} away from {reference.provider}'s, more "
                f"than the {MAX_GAP:.0e} that rounding explains"
            )
    return found
