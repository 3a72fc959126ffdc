"""Options of every optimizer: clipping, skipping, averages, rounding, formats, telemetry.

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
from typing import Any

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
IN_KERNEL = frozenset({"clip_value", "ema_decay", "param_rounding", "telemetry"})
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
    if not IN_KERNEL.intersection(group):
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


def average_weight(group: Mapping[str, Any], count: float) -> float:
    """Weight of the parameter in step `count` of its average, counted from 1."""
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
    """Hyper-parameters of those scalars, for a step that is counted on a device."""
    hypers = [group["clip_value"]] if step_options.clipped else []
    if step_options.averaged:
        hypers += [group["ema_decay"], group.get("ema_warmup") or 0]
    return [x if isinstance(x, Tensor) else number(x) for x in hypers]


def measures(groups: Sequence[Mapping[str, Any]]) -> bool:
    """True where a step measures all gradients before it begins."""
    return any(map(measures_gradients, groups))


def measures_gradients(group: Mapping[str, Any]) -> bool:
    """True where a step of this group measures all gradients first."""
    return group.get("max_grad_norm") is not None or bool(group.get("skip_nonfinite"))
