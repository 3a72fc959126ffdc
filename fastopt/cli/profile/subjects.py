"""The subjects of a profile: all optimizers of fastopt.optim, all functions of fastopt.functional.

Neither is listed here. An optimizer is found by its class; a function by its name, and its
arguments by the names of its parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastopt import functional, optim
from fastopt.cli.profile.arithmetic import of_function, of_update
from fastopt.cli.shared import shapes
from fastopt.cli.shared.shapes import Shape

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": "8bit"}
# Parameters that are given although they have a default: without them much of a function is idle.
_GIVEN = ("weight", "bias", "dim", "training")
_PER_COLUMN, _PER_CHANNEL = {"normalized_shape"}, {"running_mean", "num_groups"}
DRAWN = 1_000_003


class Traffic(NamedTuple):
    """Bytes that one call cannot avoid moving: only read, only written, read and written back."""

    read: int
    written: int
    updated: int = 0

    @property
    def total(self) -> int:
        return self.read + self.written + 2 * self.updated


@dataclass
class Subject:
    """step() is what is profiled.

    traffic, operations: what one step moves and computes at least; operations are None where
    torch's own operators, by which they are counted, do not run without memory
    """

    name: str
    kind: str
    shape: str
    dtype: str
    n_elements: int
    n_tensors: int
    step: Callable[[], Any]
    traffic: Traffic
    operations: int | None
    device: torch.device


def optimizers() -> dict[str, type[optim.FusedOptimizer]]:
    """Every optimizer of fastopt.optim by its name in small letters."""
    classes = [getattr(optim, name) for name in optim.__all__]
    return {
        cls.__name__.lower(): cls
        for cls in classes
        if isinstance(cls, type)
        and issubclass(cls, optim.FusedOptimizer)
        and cls is not optim.FusedOptimizer
    }


def functions() -> dict[str, Callable[..., Any]]:
    """Every function of fastopt.functional by its name."""
    return {name: getattr(functional, name) for name in functional.__all__}


def names() -> list[str]:
    return [*optimizers(), *functions()]


def optimizer_subject(
    name: str,
    shape: str,
    dtype: str,
    device: torch.device,
    state: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Subject:
    """A step of an optimizer over a model of these shapes; its gradients stay where they are."""
    chosen = shapes.parameters(shape)
    params = [nn.Parameter(x) for x in _cut(chosen, DTYPES[dtype], device, 2e-2)]
    for param, grad in zip(params, _cut(chosen, DTYPES[dtype], device, 1e-2), strict=True):
        param.grad = grad
    settings = dict(options or {})
    if state is not None:
        settings["state_dtype"] = STATES[state]
    optimizer = optimizers()[name](params, **settings)
    optimizer.step()
    traffic, operations = _of_plan(optimizer)
    n = sum(param.numel() for param in params)
    return Subject(
        name, "optimizer", shape, dtype, n, len(params), optimizer.step, traffic, operations, device
    )


def _of_plan(optimizer: optim.FusedOptimizer) -> tuple[Traffic, int]:
    """The bytes a step moves and the operations it computes: every stream of its launches is read,
    all but g written."""
    read = updated = operations = 0
    plan = optimizer._plan
    for launch_group in plan.launch_groups if plan is not None else []:
        for slot in launch_group.slots:
            grad, kept = slot.grad_dtype.itemsize * slot.target.numel(), slot.states
            read += grad * (2 if plan is not None and plan.measures_gradients else 1)
            updated += slot.target.nbytes + sum(x.nbytes for x in kept)
            operations += slot.target.numel() * of_update(launch_group.update)
    return Traffic(read, 0, updated), operations


def _cut(
    chosen: list[Shape], dtype: torch.dtype, device: torch.device, scale: float
) -> list[Tensor]:
    """Random tensors of these shapes, next to each other in memory."""
    n, random = shapes.n_elements(chosen), torch.Generator(device).manual_seed(0)
    # The values recur: drawing them all would take longer than what is measured.
    drawn = torch.randn(min(n, DRAWN), generator=random, device=device).mul_(scale).to(dtype)
    values = drawn.repeat(-(-n // DRAWN))[:n]
    parts = torch.split(values, [prod(shape) for shape in chosen])
    return [part.view(shape) for part, shape in zip(parts, chosen, strict=True)]


class Arguments:
    """The arguments of a function by the names of its parameters, for an input of one shape."""

    def __init__(
        self, parameters: Mapping[str, Any], shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.parameters, self.dtype, self.device = parameters, dtype, device
        self.classes = shape[1] if len(shape) > 1 else shape[0]
        if "linear_weight" in parameters:
            *rest, self.classes = shape
            shape = tuple(rest)
        self.shape = shape
        self.random = torch.Generator(device).manual_seed(0)

    def make(self, name: str) -> Any:
        """Raises LookupError for a parameter nobody knows how to fill."""
        maker = getattr(self, f"_{name}", None)
        if maker is None:
            raise LookupError(
                f"no value is known for the parameter {name!r}: give one with --set {name}=VALUE"
            )
        return maker()

    def _normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.random, device=self.device)
        return drawn.to(self.dtype)

    def _input(self) -> Tensor:
        return self._normal(*self.shape)

    _x = _residual = _input

    def _linear_weight(self) -> Tensor:
        return self._normal(self.classes, self.shape[-1])

    def _target(self) -> Tensor:
        own = self.shape[:-1] if "linear_weight" in self.parameters else ()
        sizes = own or (self.shape[0], *self.shape[2:])
        options = {"generator": self.random, "device": self.device}
        return torch.randint(self.classes, sizes, **options)  # type: ignore[call-overload, no-any-return]

    def _normalized_shape(self) -> Shape:
        return self.shape[-1:]

    def _weight(self) -> Tensor | None:
        if _PER_COLUMN & self.parameters.keys():
            return 1 + self._normal(self.shape[-1])
        if _PER_CHANNEL & self.parameters.keys():
            return 1 + self._normal(self.shape[1])
        return None

    _bias = _weight

    def _running_mean(self) -> Tensor:
        return torch.zeros(self.shape[1], device=self.device)

    def _running_var(self) -> Tensor:
        return torch.ones(self.shape[1], device=self.device)

    def _num_groups(self) -> int:
        return gcd(32, self.shape[1])

    def _dim(self) -> int:
        return -1

    def _training(self) -> bool:
        return True


def default_shape(name: str) -> str:
    """Of an optimizer or of a function's input; from what its parameters are called."""
    if name in optimizers():
        return "gpt2"
    parameters = inspect.signature(functions()[name]).parameters
    if "linear_weight" in parameters:
        return "1024x512x8192"
    return "32x64x56x56" if _PER_CHANNEL & parameters.keys() else "8192x1024"


def function_subject(
    name: str,
    shape: str,
    dtype: str,
    device: torch.device,
    backward: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Subject:
    """A call of a function, or the call and its backward. Raises as `arguments_of` does."""
    function = functions()[name]
    call = Call(function, arguments_of(name, shape, dtype, device, options or {}), backward)
    n = next(x.numel() for x in call.arguments.values() if isinstance(x, Tensor))
    operations = of_function(function, call.arguments, backward)
    args = (name, "function", shape, dtype, n, 1, call.run, call.traffic(), operations, device)
    return Subject(*args)


def arguments_of(
    name: str, shape: str, dtype: str, device: torch.device, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments a function is called with, by name; its input is the first.

    Raises LookupError for an option it does not have and where an argument is missing, ValueError
    for a shape it refuses.
    """
    function, extents = functions()[name], shapes.tensor(shape)
    parameters = inspect.signature(function).parameters
    arguments: dict[str, Any] = {}
    if unknown := [key for key in options if key not in parameters]:
        hint = shapes.nearest(unknown[0], parameters)
        raise LookupError(f"{name} has no parameter {unknown[0]!r}{hint}: {', '.join(parameters)}")
    source = Arguments(parameters, extents, DTYPES[dtype], device)
    for key, parameter in parameters.items():
        if key in options:
            arguments[key] = options[key]
        elif parameter.default is parameter.empty or key in _GIVEN:
            try:
                arguments[key] = source.make(key)
            except IndexError:
                raise ValueError(f"{name} takes an input of more dimensions than {shape}") from None
    return arguments


class Call:
    """A function with its arguments; those in floating point want gradients where it goes back."""

    def __init__(
        self, function: Callable[..., Any], arguments: dict[str, Any], backward: bool
    ) -> None:
        self.function, self.backward = function, backward
        self.arguments = {
            name: value.requires_grad_()
            if backward and _is_floating(value) and not name.startswith("running_")
            else value
            for name, value in arguments.items()
        }
        self.leaves = [x for x in self.arguments.values() if _is_floating(x) and x.requires_grad]
        outputs = self._outputs()
        self.upstream = [torch.randn_like(y) for y in outputs]
        self.run = self._both if backward else self._forward

    def _outputs(self) -> list[Tensor]:
        found = self.function(**self.arguments)
        return [found] if isinstance(found, Tensor) else list(found)

    def _forward(self) -> None:
        self.function(**self.arguments)

    def _both(self) -> None:
        torch.autograd.grad(self._outputs(), self.leaves, self.upstream)

    def traffic(self) -> Traffic:
        """Arguments are read and results written; going back, what forward kept and the upstream
        gradients are read, and the gradients written."""
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = self._outputs()
        read = sum(x.nbytes for x in self.arguments.values() if isinstance(x, Tensor))
        written = sum(y.nbytes for y in outputs)
        if self.backward:
            read += sum(kept.values()) + sum(dy.nbytes for dy in self.upstream)
            written += sum(x.nbytes for x in self.leaves)
        return Traffic(read, written)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def make(
    name: str,
    shape: str | None,
    dtype: str,
    device: torch.device,
    backward: bool = False,
    state: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Subject:
    """The subject of that name. LookupError, ValueError, TypeError: what does not fit."""
    shape = shape or default_shape(name)
    if name in optimizers():
        if backward:
            raise ValueError(f"{name} is an optimizer: --backward is for functions")
        return optimizer_subject(name, shape, dtype, device, state, options)
    if state is not None:
        raise ValueError(f"{name} is a function: --state is for optimizers")
    return function_subject(name, shape, dtype, device, backward, options)
