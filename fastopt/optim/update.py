"""A rule, the function that computes its scalars, and the names of its states, bound together.

A rule takes one element of the parameter, its gradient, its states and the scalars of the step,
all floats, and returns the new parameter and states as a tuple: the update math of an optimizer,
once, for both compilers. It holds no number literals: a literal is a double, and doubles halve the
vector width. The scalars function beside it computes the scalars of a step in double. It takes
`step` (counted from 1), the carried scalars if there are any, and hyper-parameters by the names
they have in a parameter group (`beta1` is `betas[0]`); it returns the rule's scalars in order, then
the carried ones.

The arithmetic of the rules is ordered so that huge, tiny and non-finite gradients give what torch
gives.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The entry that counts the steps of an update whose state has none in torch (SGD).
OWN_STEP = "fastopt_step"


def number(x: Any) -> float:
    """The value of a hyper-parameter, which may be a tensor of one element.

    Raises TypeError for what is no number; a string that reads as one is none.
    """
    if isinstance(x, Tensor):
        if x.numel() != 1:
            raise TypeError(f"a tensor of shape {tuple(x.shape)} is not one number")
        return float(x.detach().item())
    if isinstance(x, (str, bytes, bytearray)):
        raise TypeError(f"{x!r} is a {type(x).__name__}, not a number")
    return float(x)


def number_dtype(on_device: bool = False) -> torch.dtype:
    """The dtype of torch's step counts."""
    double = torch.get_default_dtype() == torch.float64 and not on_device
    return torch.float64 if double else torch.float32


def sign(group: Mapping[str, Any]) -> float:
    """-1 for a parameter group that maximizes, else 1: the sign of its gradients."""
    return -1.0 if group.get("maximize") else 1.0


class Update:
    """A rule bound to the states of a parameter and the hyper-parameters of its group.

    rule(p, g, *states, *scalars) -> (p, *states)
    scalars(step, *carried, *hyper-parameters) -> (*scalars, *carried)

    `carried` names states that are one number a parameter and live in double on the host, such as
    NAdam's mu_product. `counted` is false where the state has no "step" (SGD). `nonnegative` names
    states that never fall below zero, such as means of squares, and `eight_bit` those that may be
    kept in 8 bits.
    """

    def __init__(
        self,
        rule: Callable[..., Any],
        scalars: Callable[..., Any],
        state_names: tuple[str, ...] = (),
        carried: tuple[str, ...] = (),
        counted: bool = True,
        nonnegative: tuple[str, ...] = (),
        eight_bit: tuple[str, ...] = (),
    ) -> None:
        self.rule, self.scalars = rule, scalars
        self.nonnegative, self.eight_bit = nonnegative, eight_bit
        self.state_names, self.carried, self.counted = state_names, carried, counted
        self._check()

    def _check(self) -> None:
        """A rule and scalars that do not fit each other are refused where the class is used."""
        for function in (self.rule, self.scalars):
            if not inspect.isfunction(function):
                raise TypeError(f"a rule must be a plain Python function, got {function!r}")
            if function.__code__.co_freevars:
                raise TypeError(
                    f"{function.__qualname__} closes over {function.__code__.co_freevars}: the "
                    "compilers see only its own source. Make these arguments."
                )
        self._check_source()
        leading = tuple(self._scalars_arguments[: 1 + len(self.carried)])
        if leading != ("step", *self.carried):
            raise TypeError(
                f"{self.scalars.__qualname__} must take (step, {', '.join(self.carried)}...) "
                f"first, but takes {leading}"
            )
        if self.n_scalars < 1:
            raise TypeError(
                f"{self.rule.__qualname__} must take p, g, {len(self.state_names)} states "
                f"{self.state_names} and at least one scalar, but takes "
                f"{self.rule.__code__.co_argcount} arguments"
            )

    def _check_source(self) -> None:
        """A number or a name from outside is a double, or a stale one, in a compiled rule."""
        name = f"the rule {self.rule.__module__}.{self.rule.__qualname__}"
        numbers = [c for c in self.rule.__code__.co_consts if isinstance(c, (int, float))]
        if numbers:
            raise TypeError(
                f"{name} holds the number {numbers[0]!r}: it is compiled for several precisions, "
                "and a literal is a double. Make it an argument that the scalars return."
            )
        for instruction in dis.get_instructions(self.rule):
            if instruction.opname == "LOAD_GLOBAL" and instruction.argval != "xp":
                raise TypeError(
                    f"{name} uses {instruction.argval!r}: it may use its arguments and the "
                    "functions of fastopt.optim.xp. Pass a constant as a scalar."
                )

    @cached_property
    def _scalars_arguments(self) -> list[str]:
        return list(inspect.signature(self.scalars).parameters)

    @cached_property
    def hyper_names(self) -> tuple[str, ...]:
        """Hyper-parameters the scalars need, in order."""
        return tuple(self._scalars_arguments[1 + len(self.carried) :])

    @cached_property
    def n_scalars(self) -> int:
        """The number of scalars that the rule takes."""
        return int(self.rule.__code__.co_argcount) - 2 - len(self.state_names)

    @property
    def step_name(self) -> str:
        """The entry that counts the steps of a parameter."""
        return "step" if self.counted else OWN_STEP

    @property
    def counter_names(self) -> tuple[str, ...]:
        """The entries that are one number a parameter: the step count, then the carried ones."""
        return (self.step_name, *self.carried)

    def hypers(self, group: Mapping[str, Any]) -> list[Any]:
        """The values of `hyper_names` in a parameter group; beta1 is betas[0].

        Raises KeyError where the group lacks one, TypeError where one has too few elements.
        """
        try:
            return [group[k] if i is None else group[k][i] for k, i in self._hyper_refs]
        except (KeyError, IndexError):
            missing = [k for k, _ in self._hyper_refs if k not in group]
            if not missing:
                short = {k: group[k] for k, i in self._hyper_refs if i is not None}
                raise TypeError(
                    f"{self.scalars.__qualname__} takes {self.hyper_names}, but the parameter "
                    f"group has {short}. Give one value for each."
                ) from None
            raise KeyError(
                f"{self.scalars.__qualname__} takes {self.hyper_names}, but the parameter group "
                f"has no {missing}: it has {sorted(k for k in group if k != 'params')}"
            ) from None

    def floats(self, group: Mapping[str, Any]) -> list[float]:
        """The values of `hyper_names`, those in tensors too; TypeError for what is no number."""
        hypers = self.hypers(group)
        try:
            for k, x in enumerate(hypers):
                if type(x) is not float:
                    hypers[k] = number(x)
            return hypers
        except (TypeError, ValueError) as error:
            raise self._no_number(hypers) from error

    def device_hypers(self, group: Mapping[str, Any]) -> list[Any]:
        """The same without reading tensors, whose values a device may not have computed yet."""
        hypers = self.hypers(group)
        try:
            return [x if isinstance(x, Tensor) and x.numel() == 1 else number(x) for x in hypers]
        except (TypeError, ValueError) as error:
            raise self._no_number(hypers) from error

    def _no_number(self, hypers: list[Any]) -> TypeError:
        given = ", ".join(f"{k}={x!r}" for k, x in zip(self.hyper_names, hypers, strict=True))
        return TypeError(
            f"{self.scalars.__qualname__} takes numbers or tensors of one element, but the "
            f"parameter group has {given}"
        )

    def probe(self, group: Mapping[str, Any]) -> None:
        """Run both halves once on the host: TypeError where what they return does not fit.

        Raises KeyError where the group lacks a hyper-parameter.
        """
        hypers = map(np.float64, self.floats(group))
        counted = np.ones(1 + len(self.carried))
        one_element = np.linspace(0.25, 0.75, self.rule.__code__.co_argcount)
        n_values = self.n_scalars + len(self.carried)
        self._expect(self.scalars, [*counted, *hypers], n_values, "scalars")
        self._expect(self.rule, one_element, 1 + len(self.state_names), "p and its states")

    def _expect(self, function: Callable[..., Any], arguments: Any, n: int, what: str) -> None:
        try:
            with np.errstate(all="ignore"):
                result = function(*arguments)
        except Exception as error:
            raise TypeError(
                f"{function.__module__}.{function.__qualname__} does not run on floats: it may use "
                f"+ - * / and the functions of fastopt.optim.xp. It says: {error}"
            ) from error
        if not isinstance(result, tuple) or len(result) != n:
            came = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
            raise TypeError(
                f"{function.__qualname__} must return a tuple of {n} ({what}), but returns {came}: "
                f"{self.rule.__qualname__} takes p, g, {len(self.state_names)} states "
                f"{self.state_names} and {self.n_scalars} scalars"
            )

    @cached_property
    def _hyper_refs(self) -> list[tuple[str, int | None]]:
        """Name and index of each hyper-parameter in a group: beta2 is element 1 of betas."""
        return [
            (name[:-1] + "s", int(name[-1]) - 1) if name[-1:].isdigit() else (name, None)
            for name in self.hyper_names
        ]
