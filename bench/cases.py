"""What is measured and what it has to reach: one table, in sections that can run alone."""

from __future__ import annotations

from dataclasses import dataclass

from bench.allocator import DEFAULT, WARM
from bench.models import DTYPES, REAL, SHAPES, Gradients, TrainingLoop, make_parameters
from bench.providers import FASTOPT, FUSED, LOOP, OPTIMIZERS, PROVIDERS, TORCH
from bench.timing import Subject

# Two opponents that are no provider: the fastest of torch's own, and the machine itself.
TORCH_BEST, LIMIT = "torch's best", "measured limit"


@dataclass(frozen=True)
class Goal:
    """fastopt is at least so many times as fast; against LIMIT it is the share of the limit."""

    against: str
    at_least: float
    stretch: float | None = None


NEVER_SLOWER = Goal(TORCH_BEST, 1.0)


@dataclass(frozen=True)
class Case:
    """One optimizer on one model; parameters, gradients and states all have `dtype`.

    allocator: WARM where an opponent makes large temporaries, unless their cost is the point
    """

    optimizer: str
    model: str
    goals: tuple[Goal, ...] = ()
    gradients: str = "rebound"
    dtype: str = "fp32"
    allocator: str = WARM

    @property
    def name(self) -> str:
        words = (self.optimizer, self.model, self.dtype, self.gradients)
        return " ".join(word for word in words if word not in ("fp32", "rebound"))


class Workload:
    """A case made concrete. Gradients are shared, parameters and states are each subject's own."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, DTYPES[case.dtype]
        self.gradients = None
        if case.model != REAL:
            self.gradients = Gradients(case.model, self.dtype, case.gradients)

    def subject(self, provider: str) -> Subject:
        """The provider at work on parameters of its own; raises NoStepError where it has none."""
        if self.gradients is None:
            loop = TrainingLoop.make()
            params, prepare = list(loop.model.parameters()), loop.forward_backward
        else:
            params = make_parameters(self.case.model, self.dtype)
            prepare = self.gradients.binder(params)
        return Subject(PROVIDERS[provider].make(self.case.optimizer, params), prepare, params)


def providers(peers: bool) -> tuple[str, ...]:
    """fastopt and torch's own, or everybody."""
    return tuple(PROVIDERS) if peers else (FASTOPT, *TORCH)


def _many_tensors() -> list[Case]:
    rebound = {"AdamW": Goal(FUSED, 6.0), "SGD": Goal(FUSED, 3.5)}
    flat = {"AdamW": Goal(FUSED, 6.0, stretch=10.0), "SGD": Goal(FUSED, 3.5, stretch=6.0)}
    model = "1000x1000"
    return [
        *[Case(n, model, (goal,), allocator=DEFAULT) for n, goal in rebound.items()],
        *[Case(n, model, (goal,), "flat", allocator=DEFAULT) for n, goal in flat.items()],
    ]


def _memory_bound() -> list[Case]:
    at_limit = (Goal(FUSED, 1.0), Goal(LIMIT, 0.93))
    return [
        Case("AdamW", "33m", at_limit),
        Case("AdamW", "gpt2", (*at_limit, Goal(LOOP, 2.7))),
        Case("AdamW", "33m", (Goal(FUSED, 1.4),), dtype="bf16"),
    ]


def _other_optimizers() -> list[Case]:
    large = {"RMSprop": 1.7, "NAdam": 2.0, "RAdam": 2.5, "Adamax": 1.3, "Adadelta": 2.5}
    cases = []
    for name in OPTIMIZERS:
        if name in large:
            cases.append(Case(name, "20x1m", (Goal(TORCH_BEST, large[name]),)))
            cases.append(Case(name, "1000x1000", (Goal(TORCH_BEST, 6.0),)))
        elif name in ("Adam", "Adagrad"):
            cases += [Case(name, model, (NEVER_SLOWER,)) for model in ("20x1m", "1000x1000")]
    return cases


def _rest(covered: list[Case]) -> list[Case]:
    """Every optimizer and model no other section has: "in any case never slower"."""
    known = {(case.optimizer, case.model) for case in covered}
    return [
        Case(name, model, (NEVER_SLOWER,))
        for name in OPTIMIZERS
        for model in SHAPES
        if model != "gpt2" and (name, model) not in known
    ]


SECTIONS: dict[str, list[Case]] = {
    "many-tensors": _many_tensors(),
    # Two sizes, one goal: below and above the size from which the engine takes several threads.
    "small-model": [
        Case("AdamW", model, (Goal(FUSED, 2.0, stretch=3.0),), allocator=DEFAULT)
        for model in ("mlp", "mlp-784")
    ],
    "memory-bound": _memory_bound(),
    "default-allocator": [Case("AdamW", "gpt2", (Goal(LOOP, 6.0),), allocator=DEFAULT)],
    "other-optimizers": _other_optimizers(),
    "training-loop": [Case(n, REAL, (NEVER_SLOWER,), allocator=DEFAULT) for n in ("AdamW", "SGD")],
}
SECTIONS["rest"] = _rest([case for section in SECTIONS.values() for case in section])
