"""What a step does around the update, as options of every optimizer.

    max_grad_norm   g <- g min(1, max_grad_norm / (norm + 1e-6)), one norm over all parameters, or
                    over those of a group that was given a limit of its own
    norm_type       2 or inf
    clip_value      g <- min(max(g, -clip_value), clip_value)
    skip_nonfinite  no step where an element of a gradient is infinite or NaN
    ema_decay       a <- p' in step t = 1 of an average, then a <- a + (1 - d) (p' - a), in every
                    step of the optimizer, also without a gradient for p;
                    d = min(ema_decay, (1 + t) / (10 + t)) up to t = ema_warmup
    param_rounding  of bf16 parameters: "nearest", "stochastic" (by rounding_seed), "kahan" (what is
                    rounded away is kept in bf16) or "master" (the 16 low bits are kept). Chance
                    follows from seed, step, parameter and element
    state_dtype     how states are stored (`formats`)
    telemetry       note norms and counts of each parameter (`FusedOptimizer.telemetry`)

Gradients are read, never written. torch.nn.utils.clip_grad_norm_ and clip_grad_value_; averages as
Polyak & Juditsky 1992.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastopt.optim.update import number
from fastopt_kernels.chunks import KAHAN, MASTER, NEAREST, NO_OPTIONS, STOCHASTIC, StepOptions

# What marks a group whose limit is its own.
ALONE = "clip_alone"
AVERAGED = "averaged"
# How many steps are in an average. Saved where it says how far the warm-up is.
N_AVERAGED = "n_averaged"
DEFAULTS: dict[str, Any] = {
    "max_grad_norm": None,
    "norm_type": 2.0,
    "clip_value": None,
    "skip_nonfinite": False,
    "ema_decay": None,
    "ema_warmup": 0,
    "param_rounding": "nearest",
    "rounding_seed": 0,
    "state_dtype": None,
    "telemetry": False,
}
# Those that change the kernel.
_AROUND = frozenset({"clip_value", "ema_decay", "param_rounding", "telemetry"})
ROUNDINGS = {"nearest": NEAREST, "stochastic": STOCHASTIC, "kahan": KAHAN, "master": MASTER}
# What a rounding keeps beside a parameter: a state, and its dtype.
LOW_BITS = "low_bits"
KEPT = {KAHAN: ("compensation", torch.bfloat16), MASTER: (LOW_BITS, torch.int16)}
# States that are not of their parameter's dtype, and what they are of; None: as they were made.
OWN_DTYPE = {AVERAGED: None, **dict(KEPT.values())}


def with_options(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that also takes these options, by keyword, and shows them in its signature."""

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in DEFAULTS if name in kwargs}
        # A subclass's constructor was given its options by its user: they come first.
        outer = self._given
        self._given = {**given, **outer}
        try:
            init(self, *args, **kwargs)
            if given:
                self._set_options(self._given)
        finally:
            self._given = outer

    signature = inspect.signature(init)
    parameters = list(signature.parameters.values())
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in DEFAULTS.items()
    ]
    last = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        last -= 1
    parameters[last:last] = added
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.takes_options = True  # type: ignore[attr-defined]
    return wrapper


def chosen(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options that count: all that are given. None is no option, but in place of a default."""
    return {name: x for name, x in given.items() if x is not None or name in defaults}


def check(group: Mapping[str, Any]) -> None:
    """Raises ValueError for options that mean nothing, or not together, and torch's RuntimeError
    for hints that contradict each other."""
    if group.get("fused"):
        if group.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        if group.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    for name in ("max_grad_norm", "clip_value"):
        value = group.get(name)
        if value is not None and not number(value) > 0.0:
            raise ValueError(f"Invalid {name}: {value} (it must be positive, or None for no limit)")
    if group.get("norm_type", 2.0) not in (2, math.inf):
        raise ValueError(f"Invalid norm_type: {group['norm_type']} (supported: 2 and inf)")
    if group.get("max_grad_norm") is not None and group.get("clip_value") is not None:
        raise ValueError(
            f"max_grad_norm={group['max_grad_norm']} and clip_value={group['clip_value']} cannot "
            "be given together: the norm would be of gradients that are not used. Give one."
        )
    if group.get("param_rounding", "nearest") not in ROUNDINGS:
        raise ValueError(
            f"Invalid param_rounding: {group['param_rounding']!r} (supported: "
            f"{', '.join(map(repr, ROUNDINGS))})"
        )
    decay = group.get("ema_decay")
    if decay is not None and not 0.0 <= decay < 1.0:
        raise ValueError(f"Invalid ema_decay: {decay} (it must be at least 0 and below 1)")
    warmup = group.get("ema_warmup", 0)
    if not (isinstance(warmup, (int, float, Tensor)) and number(warmup) >= 0):
        raise ValueError(f"Invalid ema_warmup: {warmup!r} (a number of steps, at least 0)")
    seed = group.get("rounding_seed") or 0
    if not 0 <= operator.index(seed) < 2**64:
        raise ValueError(f"Invalid rounding_seed: {seed} (it must be at least 0 and below 2^64)")
    if group.get("differentiable") and (
        group.get("skip_nonfinite")
        or any(group.get(name) is not None for name in ("max_grad_norm", "clip_value", "ema_decay"))
    ):
        raise ValueError(
            "differentiable=True cannot clip, skip or average inside the step: do so with torch's "
            "operators, which autograd follows."
        )


def step_options_of(group: Mapping[str, Any]) -> StepOptions:
    """The options of a parameter group that are part of its kernel."""
    if not _AROUND.intersection(group):
        return NO_OPTIONS
    return StepOptions(
        group.get("clip_value") is not None,
        group.get("ema_decay") is not None,
        ROUNDINGS[group.get("param_rounding", "nearest")],
        bool(group.get("telemetry")),
    )


def options_of_param(step_options: StepOptions, param: Tensor) -> StepOptions:
    """The step options of one parameter: only bf16 is rounded otherwise than to nearest."""
    if step_options.rounding and param.dtype != torch.bfloat16:
        return step_options._replace(rounding=NEAREST)
    return step_options


def state_names(own: tuple[str, ...], step_options: StepOptions) -> tuple[str, ...]:
    """Tensors kept for a parameter: the rule's states, its average, and what a rounding keeps."""
    if step_options.averaged:
        own = (*own, AVERAGED)
    return (*own, KEPT[step_options.rounding][0]) if step_options.rounding in KEPT else own


def convert_kept(state: dict[str, Any], param: Tensor, step_options: StepOptions) -> None:
    """Take over what another rounding has kept of a parameter, and drop what this one does not."""
    name, dtype = KEPT.get(options_of_param(step_options, param).rounding, ("", None))
    for other, _ in KEPT.values():
        if other == name or not isinstance(kept := state.get(other), Tensor):
            continue
        del state[other]
        if not name or name in state:
            continue
        high, whole = param.detach().float(), joined(param, kept)
        if dtype == torch.int16:
            bits = whole.view(torch.int32) - high.view(torch.int32)
            state[name] = bits.clamp(-(2**15), 2**15 - 1).to(dtype)
        else:
            state[name] = (whole - high).to(dtype)


def joined(param: Tensor, kept: Tensor) -> Tensor:
    """float32: a bf16 parameter with what a rounding has kept of it, its low bits or the rest."""
    high = param.detach().float()
    if kept.dtype == torch.int16:
        return (high.view(torch.int32) + kept.to(torch.int32)).view(torch.float32)
    return high + kept.float()


def seeds_of(groups: Sequence[Mapping[str, Any]], owners: np.ndarray[Any, Any]) -> Any:
    """(n,) uint64, or one number: what chance begins with, of each parameter's group."""
    seeds = [int(group.get("rounding_seed") or 0) for group in groups]
    alike = len(set(seeds)) == 1
    return np.uint64(seeds[0]) if alike else np.array(seeds, dtype=np.uint64)[owners]


def bases_of(seed: Any, positions: np.ndarray[Any, Any]) -> Any:
    """(n,) int64: 64 bits of a seed and a parameter's position."""
    with np.errstate(over="ignore"):
        x = np.asarray(seed, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(
            np.uint64
        )
        return x.view(np.int64)


def keys_of(seed: Any, steps: np.ndarray[Any, Any], positions: np.ndarray[Any, Any]) -> Any:
    """(n,) int64: 32 bits of a seed, a step and a parameter's position, by splitmix64."""
    with np.errstate(over="ignore"):
        x = bases_of(seed, positions).view(np.uint64)
        x = x * np.uint64(0xBF58476D1CE4E5B9) + steps.astype(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return ((x ^ (x >> np.uint64(31))) & np.uint64(0xFFFFFFFF)).astype(np.int64)


def average_weight(group: Mapping[str, Any], count: float) -> float:
    """What the parameter weighs in step `count` of its average, which begins with the first."""
    decay = group["ema_decay"]
    if type(decay) is not float:
        decay = number(decay)
    if count == 1.0:
        decay = 0.0
    elif (warmup := group.get("ema_warmup")) and count <= warmup:
        decay = min(decay, (1.0 + count) / (10.0 + count))
    return 1.0 - decay


def option_scalars(
    group: Mapping[str, Any], step_options: StepOptions, count: float
) -> list[float]:
    """Scalars of the step options, in their order; count: steps in the average, with this one."""
    scalars = [number(group["clip_value"])] if step_options.clipped else []
    if step_options.averaged:
        scalars.append(average_weight(group, count))
    return scalars


def option_hypers(group: Mapping[str, Any], step_options: StepOptions) -> list[Any]:
    """What those scalars are computed from, where the step is counted on a device."""
    hypers = [group["clip_value"]] if step_options.clipped else []
    if step_options.averaged:
        hypers += [group["ema_decay"], group.get("ema_warmup") or 0]
    return [x if isinstance(x, Tensor) else number(x) for x in hypers]


def measures(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a step must look at all gradients before it begins."""
    return any(map(measures_gradients, groups))


def measures_gradients(group: Mapping[str, Any]) -> bool:
    """A step of this group needs all gradients to be looked at first."""
    return group.get("max_grad_norm") is not None or bool(group.get("skip_nonfinite"))


def maximum_of(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the norm of these groups is the largest |g|, not sqrt(sum g^2).

    Raises ValueError where they do not agree.
    """
    kinds = {float(group.get("norm_type", 2.0)) for group in groups}
    if len(kinds) > 1:
        raise ValueError(
            f"Invalid norm_type: {sorted(kinds)} in one optimizer (one norm is over all of its "
            "parameters: give all groups the same)"
        )
    return kinds == {math.inf}


def one_limit(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one coefficient serves all groups, without reading limits that are on a device."""
    limits = [group.get("max_grad_norm") for group in groups]
    return len({id(x) if isinstance(x, Tensor) else x for x in limits}) == 1 and (
        len(groups) == 1 or not any(group.get(ALONE) for group in groups)
    )


@dataclass(frozen=True)
class LastStep:
    """What the last step that looked at its gradients found.

    grad_norm: of all gradients, unscaled; clip_coefficient: what they were multiplied by, one for
    all groups, or (groups,) where one has a limit of its own; nonfinite: elements that were
    infinite or NaN; skipped: whether nothing was updated for it
    """

    grad_norm: Tensor
    clip_coefficient: Tensor
    nonfinite: Tensor
    skipped: Tensor


class ClipResult:
    """The coefficients of a step's parameter groups, and whether it is to be skipped."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._groups, self._inverse_scale, self._skip = list(groups), 1.0, False
        self.maximum = maximum_of(groups)
        self._parts = np.zeros(len(groups))
        self.nonfinite = 0.0

    def add(self, group: np.ndarray[Any, Any], parts: Any, nonfinite: Any) -> None:
        """Take in what was measured: sum g^2 or max |g| of tensors, and whose they are."""
        merge = np.maximum if self.maximum else np.add
        with np.errstate(invalid="ignore"):
            merge.at(self._parts, group, parts)
        self.nonfinite += float(nonfinite.sum())

    def with_grad_scale(self, inverse_scale: float, skip: bool = False) -> ClipResult:
        """The same, of gradients that are multiplied by this first; skip: somebody else says so."""
        self._inverse_scale, self._skip = inverse_scale, skip
        return self

    def _norm(self, parts: Any) -> float:
        if len(parts) == 1:
            merged = float(parts[0])
        else:
            merged = float(np.max(parts, initial=0.0) if self.maximum else np.sum(parts))
        return abs(self._inverse_scale) * (merged if self.maximum else math.sqrt(merged))

    def _coefficient(self, index: int) -> float:
        limit = self._groups[index].get("max_grad_norm")
        if limit is None:
            return 1.0
        if len(self._groups) == 1:
            parts = self._parts
        elif self._groups[index].get(ALONE):
            parts = self._parts[[index]]
        else:
            parts = self._parts[[not group.get(ALONE) for group in self._groups]]
        coefficient = number(limit) / (self._norm(parts) + 1e-6)
        # As torch's clamp: NaN stays.
        return 1.0 if coefficient > 1.0 else coefficient

    @functools.cached_property
    def coefficients(self) -> list[float]:
        """One a parameter group."""
        return [self._coefficient(index) for index in range(len(self._groups))]

    @property
    def skip(self) -> bool:
        """Whether nothing is to be updated."""
        return self._skip or (
            self.nonfinite > 0 and any(group.get("skip_nonfinite") for group in self._groups)
        )

    def report(self, device: torch.device) -> LastStep:
        """The same as tensors on a device."""
        coefficients = self.coefficients[0] if one_limit(self._groups) else self.coefficients
        return LastStep(
            torch.tensor(self._norm(self._parts), dtype=torch.float32, device=device),
            torch.tensor(coefficients, dtype=torch.float32, device=device),
            torch.tensor(int(self.nonfinite), device=device),
            torch.tensor(self.skip, device=device),
        )
