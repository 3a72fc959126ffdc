"""How an op of ours enters torch: schema, kernels, fake kernel and derivative, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
    a derivative, and says so where it is to be differentiated.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    qualified = f"fastopt::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"torch.ops.fastopt.{name} has no derivative of its own. For second derivatives, "
            "differentiate fastopt.functional's functions with create_graph=True."
        )

    torch.library.register_autograd(qualified, backward or refuse, setup_context=keep, lib=_library)


def differentiated(upstream: Tensor) -> bool:
    """Whether a backward from this gradient is itself differentiated, or mapped over: then torch's
    operators must do it."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(upstream)
        or forward_ad._current_level >= 0
    )


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its `apply` for tensors that no transform of functorch has wrapped, which Function.apply
    asks about each time (2 us)."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def plain(tensor: Tensor) -> bool:
    """Whether kernels may be run on it at once: else the dispatcher has listeners."""
    return type(tensor) is Tensor and not torch._C._len_torch_dispatch_stack()


def by_torch(
    function: Callable[..., Tensor], inputs: Sequence[Any], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of torch's own function, themselves differentiable; None for what needs none."""
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    with torch.enable_grad():
        grads = torch.autograd.grad(
            function(*inputs), wanted, grad, create_graph=True, allow_unused=True
        )
    found = dict(zip(map(id, wanted), grads, strict=True))
    return [found.get(id(x)) for x in inputs]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What elements of this type are computed in, and their statistics kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
