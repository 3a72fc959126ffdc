"""A user's own training step: where its time goes, and what fastopt.swap saves of it.

Everything is measured on copies: the model and the optimizer that build() gave stay as they are.
"""

from __future__ import annotations

import copy
import importlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import fastopt
from fastopt.cli.profile.clock import FEWEST, MOST, WARM_STEPS
from fastopt.cli.profile.lines import ms
from fastopt.cli.profile.trace import profiled
from fastopt.cli.shared.shapes import nearest

PHASES = ("zero_grad", "forward", "backward", "optimizer")
Loss = Callable[[nn.Module], Tensor]
MOST_OPERATORS, PROFILED_STEPS = 8, 10


def load(text: str) -> tuple[nn.Module, torch.optim.Optimizer, Loss]:
    """The values that MODULE:BUILD returns; modules of the current folder are found.

    Raises ImportError, LookupError or TypeError for what is no such function.
    """
    module_name, colon, name = text.partition(":")
    if not colon or not module_name or not name:
        raise LookupError(f"--model takes MODULE:BUILD, such as mymodule:build; got {text!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module = importlib.import_module(module_name)
    build = getattr(module, name, None)
    if not callable(build):
        hint = nearest(name, [n for n, x in vars(module).items() if callable(x)])
        raise LookupError(f"{module_name} has no function {name!r}{hint}")
    built = build()
    if not (isinstance(built, tuple) and len(built) == 3):
        came = f"{len(built)} values" if isinstance(built, tuple) else type(built).__name__
        raise TypeError(f"{text} must return (model, optimizer, loss), but returned {came}")
    model, optimizer, loss = built
    kinds = {"model": nn.Module, "optimizer": torch.optim.Optimizer}
    for (what, kind), x in zip(kinds.items(), built, strict=False):
        if not isinstance(x, kind):
            raise TypeError(
                f"the {what} of {text} must be a {kind.__module__}.{kind.__name__}, but is "
                f"a {type(x).__name__}"
            )
    if not callable(loss):
        raise TypeError(
            f"the third value of {text} must be loss(model), which computes the loss of the next "
            f"batch, but is a {type(loss).__name__}"
        )
    return model, optimizer, loss


@dataclass
class Variant:
    """A copy of the model and its optimizer, of which some is swapped.

    seconds: of each phase, the median over the steps
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    taken: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def timed_step(self, wait: Callable[[], None]) -> None:
        """One step, each phase by itself."""
        marks = [perf_counter()]

        def mark() -> None:
            wait()
            marks.append(perf_counter())

        self.optimizer.zero_grad()
        mark()
        loss = self.loss(self.model)
        mark()
        loss.backward()  # type: ignore[no-untyped-call]
        mark()
        self.optimizer.step()
        mark()
        for name, start, end in zip(PHASES, marks, marks[1:], strict=False):
            self.taken[name].append(end - start)

    @property
    def seconds(self) -> dict[str, float]:
        return {name: statistics.median(taken) for name, taken in self.taken.items()}

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


class Swaps:
    """The step as it is, and copies of which the optimizer, and the modules too, are swapped."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss) -> None:
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.operators: list[dict[str, Any]] = []
        self.kept: list[str] = []

        def duplicate(name: str) -> Variant:
            # Together, so that the copied optimizer holds the copied parameters.
            return Variant(name, *copy.deepcopy((model, optimizer)), loss)

        self.variants = [duplicate("as it is")]
        swapped = duplicate("optimizer swapped")
        try:
            fastopt.swap(swapped.optimizer)
            self.variants.append(swapped)
        except (TypeError, RuntimeError) as error:
            self.kept.append(f"optimizer kept: {error}")
        report = fastopt.swap_report(fastopt.swap(copy.deepcopy(model)))
        self.kept += [f"{name or 'model'} kept: {why}" for name, why in report.kept.items()]
        self.replaced = dict(report.replaced)
        if self.replaced:
            both = duplicate("and its modules" if len(self.variants) > 1 else "modules swapped")
            fastopt.swap(both.model)
            if len(self.variants) > 1:
                fastopt.swap(both.optimizer)
            self.variants.append(both)

    def time(self, budget: float) -> None:
        """Steps of all variants in turn."""
        for variant in self.variants:
            for _ in range(WARM_STEPS):
                variant.step()
        deadline = perf_counter() + budget * len(self.variants)
        n = 0
        while n < FEWEST or (n < MOST and perf_counter() < deadline):
            for variant in self.variants:
                variant.timed_step(self._wait)
            n += 1

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def ask_profiler(self) -> None:
        """The operators that the step as it is spends most in by themselves."""
        events = profiled(self.variants[0].step, self.device, PROFILED_STEPS).key_averages()
        on_host = self.device.type == "cpu"
        found = [
            (e.key, (e.self_cpu_time_total if on_host else e.self_device_time_total), e.count)
            for e in events
        ]
        for name, us, count in sorted(found, key=lambda each: -each[1])[:MOST_OPERATORS]:
            ms_a_step, calls = us / 1e3 / PROFILED_STEPS, count / PROFILED_STEPS
            self.operators.append({"name": name, "ms": ms_a_step, "calls": calls})

    def lines(self) -> list[str]:
        """As text."""
        first = self.variants[0].total_s
        found = [f"{'a step':24}{'in all':>12}" + "".join(f"{name:>12}" for name in PHASES)]
        for variant in self.variants:
            times = [variant.total_s, *variant.seconds.values()]
            cells = "".join(f"{ms(seconds):>12}" for seconds in times)
            saved = 1 - variant.total_s / first
            note = "" if variant is self.variants[0] else f"   {saved:+.1%} saved"
            found.append(f"{variant.name:24}{cells}{note}")
        if self.replaced:
            found.append(f"modules swapped: {', '.join(sorted(set(self.replaced.values())))}")
        found += self.kept
        found.append("operators with the most time of their own, in the step as it is:")
        found += [
            f"  {op['name']:44}{ms(op['ms'] / 1e3):>12}{op['calls']:>8.0f} calls"
            for op in self.operators
        ]
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "variants": [
                {
                    "name": variant.name,
                    "total_ms": 1e3 * variant.total_s,
                    **{f"{name}_ms": 1e3 * s for name, s in variant.seconds.items()},
                }
                for variant in self.variants
            ],
            "replaced": self.replaced,
            "kept": self.kept,
            "operators": self.operators,
        }
