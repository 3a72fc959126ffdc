"""Registration of an op with torch: schema, kernels, fake kernel and derivative, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastopt.compiler import outside_dynamo
from fastopt.functional import guards
from fastopt.functional.guards import in_memory

_is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
_n_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_library: Any = torch.library.Library("fastopt", "DEF")  # type: ignore[no-untyped-call]


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    keep: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register torch.ops.fastopt.<name>.

    run: computes, on any device with kernels; fake: makes outputs of the right shape and dtype.
    keep(ctx, inputs, output) saves what backward(ctx, *grads) needs; an op without them is itself
    a derivative, and says so where it is to be differentiated. torch.compile leaves them all to
    Python.
    """
    name = schema.partition("(")[0]
    run = outside_dynamo(run)
    keep, backward = keep and outside_dynamo(keep), backward and outside_dynamo(backward)
    _library.define(schema)
    qualified = f"fastopt::{name}"

    arguments = [text.split()[-1] for text in schema.partition("(")[2].split(")")[0].split(",")]

    def operands(args: Sequence[Any]) -> list[guards.Operand]:
        return [(k, x) for k, x in zip(arguments, args, strict=False) if isinstance(x, Tensor)]

    @outside_dynamo
    def checked(*args: Any) -> Any:
        if not guards.in_memory(tuple(x for x in args if isinstance(x, Tensor))):
            guards.check(f"torch.ops.fastopt.{name}", operands(args))
        return run(*args)

    def checked_fake(*args: Any) -> Any:
        guards.check_devices(f"torch.ops.fastopt.{name}", operands(args))
        return fake(*args)

    for key in ("CPU", "CUDA"):
        _library.impl(name, checked, key)
    torch.library.register_fake(qualified, checked_fake, lib=_library)

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"torch.ops.fastopt.{name} has no derivative of its own. For second derivatives, "
            "differentiate fastopt.functional's functions with create_graph=True."
        )

    torch.library.register_autograd(qualified, backward or refuse, setup_context=keep, lib=_library)


def differentiated(upstream: Tensor, *saved: Tensor | None) -> bool:
    """True where torch's operators must do a backward from this gradient: it is itself
    differentiated or mapped over, or of a class with operators of its own.

    saved: what they would read, which is refused where its storage is too short
    """
    by_torch = (
        _is_grad_enabled()
        or _transforms_active()
        or _is_batched(upstream)
        or forward_ad._current_level >= 0
        or (type(upstream) is not Tensor and guards.takes_over(upstream))
    )
    if by_torch:
        refuse_short(upstream, *saved)
    return by_torch


def refuse_short(upstream: Tensor | None, *saved: Tensor | None) -> None:
    """Raise RuntimeError where a gradient or a saved tensor is longer than its storage."""
    operands = [("a gradient", upstream), *(("a saved tensor", x) for x in saved)]
    guards.check_storages("a backward of fastopt", operands)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its `apply` for tensors that no transform of functorch has wrapped, which Function.apply
    asks about each time (2 us). torch.compile leaves its forward and backward to Python."""
    for name in ("forward", "backward"):
        setattr(function, name, staticmethod(outside_dynamo(getattr(function, name))))
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def plain(*tensors: Tensor | None) -> bool:
    """Kernels may be run on these at once. Else the op is called: the dispatcher has listeners, or
    it resolves what is not in memory as it is; or the op refuses it."""
    return not _n_dispatch_modes() and in_memory(tensors)


def gradients_by_torch(
    function: Callable[..., Tensor], inputs: Sequence[Any], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of torch's own function, themselves differentiable; None for what needs none.

    By a view of each input, whose history ends there: of one tensor given twice, or of one that
    another was computed from, the gradient would be that of both.
    """
    with torch.enable_grad():
        given = [
            x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs
        ]
        wanted = [x for x in given if x is not None]
        result = function(*(x if v is None else v for x, v in zip(inputs, given, strict=True)))
        grads = iter(
            torch.autograd.grad(result, wanted, grad, create_graph=True, allow_unused=True)
        )
    return [None if v is None else next(grads) for v in given]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which elements of this dtype are computed, and their statistics kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32
