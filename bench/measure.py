"""Measure the cases of one section that want the same allocator, in a process of their own.

Prints JSON objects, one a line: the copy bandwidth, then each case; all else goes to stderr.
`bench.report` starts it, with the environment that puts the allocator in its state.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from bench import cases, limit, timing
from bench.allocator import ALLOCATORS, WARM, is_warm
from bench.cases import LIMIT, TORCH_BEST, Case, Workload
from bench.models import REAL, Gradients, make_parameters
from bench.providers import FASTOPT, LOOP, PROVIDERS, TORCH, NoStepError, traffic
from bench.sections import emit, records_file
from bench.timing import Ratio, Subject, Timing

Record = dict[str, Any]

SECONDS, QUICK_SECONDS = 4.0, 0.4
COPY_ELEMENTS = 33_000_000
ERROR_MODEL = "mlp-784"
# Mean difference between fastopt's parameters and torch's after the warm steps, as a share of how
# far torch's moved. Rounding explains this much; a step that does nothing scores 1.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


def measure(case: Case, providers: tuple[str, ...], seconds: float) -> Record:
    """Every provider's step on this case, interleaved with the limit of the machine."""
    subjects, skipped = _subjects(case, providers)
    params = subjects[FASTOPT].params
    n_elements, dtype = sum(p.numel() for p in params), params[0].dtype
    difference = _warm_and_compare(subjects, skipped, TOLERANCE[case.dtype])
    kernels = {}
    if case.model != REAL:
        kernels = warm(limit.candidates(case.optimizer, n_elements, dtype))
    timings = timing.interleave({**subjects, **kernels}, seconds)
    n_bytes = traffic(case.optimizer, dtype) * n_elements
    return {
        **_facts(case),
        "tensors": len(params),
        "elements": n_elements,
        "bytes": n_bytes,
        "rounds": len(timings[FASTOPT].rounds),
        "difference": difference,
        "times": {name: t.record(n_bytes) for name, t in timings.items()},
        "skipped": skipped,
        "kernels": list(kernels),
        "ratios": _ratios(timings, kernels.keys()),
    }


def warm(steps: dict[str, Callable[[], None]]) -> dict[str, Subject]:
    subjects = {name: Subject(step) for name, step in steps.items()}
    for subject in subjects.values():
        subject.warm()
    return subjects


def copy_gb_per_s() -> float:
    """The faster of two plain float32 copies, from memory to memory."""
    timings = timing.interleave(warm(limit.copies(COPY_ELEMENTS)), QUICK_SECONDS)
    return 8 * COPY_ELEMENTS / min(t.median for t in timings.values()) / 1e9


def error(optimizer: str, dtype: torch.dtype, provider: str) -> float:
    """How far a provider's parameters are from torch's loop in float64 after the warm steps.

    As a share of how far those went, the sum of |a - b| over that of |start - b|, on a small model:
    what an element becomes does not depend on how many there are.
    """
    params = make_parameters(ERROR_MODEL, dtype)
    exact = [nn.Parameter(param.detach().double()) for param in params]
    start = [param.detach().clone() for param in exact]
    bind = Gradients(ERROR_MODEL, dtype, "rebound").binder(params)
    step = PROVIDERS[provider].make(optimizer, params)
    exact_step = PROVIDERS[LOOP].make(optimizer, exact)
    for _ in range(timing.WARM_STEPS):
        bind()
        for param, other in zip(params, exact, strict=True):
            assert param.grad is not None
            other.grad = param.grad.double()
        step()
        exact_step()
    return _distance(params, exact) / _distance(start, exact)


def _facts(case: Case) -> Record:
    return {
        "case": case.name,
        "optimizer": case.optimizer,
        "model": case.model,
        "dtype": case.dtype,
        "gradients": "backward" if case.model == REAL else case.gradients,
        "allocator": case.allocator,
    }


def _subjects(case: Case, providers: tuple[str, ...]) -> tuple[dict[str, Subject], dict[str, str]]:
    """Those who have a step for this case, and why the others have none."""
    workload, subjects, skipped = Workload(case), {}, {}
    for name in providers:
        try:
            subjects[name] = workload.subject(name)
        except NoStepError as reason:
            if name in (FASTOPT, LOOP):
                raise
            skipped[name] = str(reason)
    return subjects, skipped


def _warm_and_compare(
    subjects: dict[str, Subject], skipped: dict[str, str], tolerance: float
) -> float:
    """Warm everybody up, drop the peers that fail, and see that fastopt did what torch's loop did.

    Returns the mean difference between their parameters as a share of how far torch's moved.
    """
    start = [param.detach().clone() for param in subjects[LOOP].params]
    for name in list(subjects):
        try:
            subjects[name].warm()
        except Exception as error:
            if name == FASTOPT or name in TORCH:
                raise
            del subjects[name]
            skipped[name] = f"failed: {type(error).__name__}: {error}"
    ours, theirs = subjects[FASTOPT].params, subjects[LOOP].params
    difference = _distance(ours, theirs) / _distance(start, theirs)
    if not difference <= tolerance:
        raise RuntimeError(
            f"after {timing.WARM_STEPS} steps fastopt's parameters differ from torch's by "
            f"{difference:.1e} of the way torch's went, more than the {tolerance:.0e} that "
            "rounding explains: a time for such a step means nothing"
        )
    return difference


def _distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Sum of |a - b| over all elements."""
    with torch.no_grad():
        return sum(float((a - b).abs().sum()) for a, b in zip(some, others, strict=True))


def _ratios(timings: dict[str, Timing], kernels: Iterable[str]) -> Record:
    """fastopt against each of the others, against torch's best and the limit of the machine."""

    def fastest(names: Iterable[str]) -> str:
        return min(names, key=lambda name: timings[name].median)

    opponents = {name: name for name in timings if name != FASTOPT and name not in kernels}
    opponents[TORCH_BEST] = fastest(name for name in TORCH if name in timings)
    if kernels:
        opponents[LIMIT] = fastest(kernels)
    return {
        opponent: {"provider": name, **asdict(Ratio.of(timings[name], timings[FASTOPT]))}
        for opponent, name in opponents.items()
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.measure", description=__doc__)
    parser.add_argument("section", choices=cases.SECTIONS)
    parser.add_argument("--allocator", choices=ALLOCATORS, required=True)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, rough figures")
    parser.add_argument("--peers", action="store_true", help="others beside torch, if installed")
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    records = records_file()
    if options.allocator == WARM and not is_warm():
        print("the memory allocator of this process does not keep freed memory", file=sys.stderr)
        return 1
    providers = cases.providers(options.peers)
    seconds = QUICK_SECONDS if options.quick else SECONDS
    print(json.dumps({"copy_gb_per_s": copy_gb_per_s()}), file=records)
    here = [c for c in cases.SECTIONS[options.section] if c.allocator == options.allocator]
    emit(records, here, lambda case: measure(case, providers, seconds), _facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
