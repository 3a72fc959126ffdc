"""The wrapper of a step: torch's hooks, and a name in the profiler.

torch.optim's own wrapper takes 9 us of every step, most of it for the profiler's sake: as much as
all the rest of a small model's step. This one does the same for 2 us, with the entry points of
torch.autograd.profiler that have no Python around them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim import optimizer as theirs

from fastopt.compiler import outside_dynamo

F = TypeVar("F", bound=Callable[..., Any])

_enter: Any = getattr(torch._C._autograd, "_record_function_with_args_enter", None)
_exit: Any = getattr(torch._C._autograd, "_record_function_with_args_exit", None)


def hooked(step: F) -> F:
    """A `step` that runs the hooks of the instance and of all optimizers, in torch's order.

    Its mark (`hooked`) keeps torch from wrapping it again. A subclass with a step of its own is
    wrapped by torch, and what it calls here runs bare.
    """
    if _enter is None or _exit is None:
        return outside_dynamo(step)

    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        cls = type(self)
        if cls.step is not wrapper:
            return step(self, *args, **kwargs)
        handle = _enter(f"Optimizer.step#{cls.__name__}.step")
        try:
            if pre_hooks(self):
                self, args, kwargs = _run_pre_hooks(self, args, kwargs)
            result = step(self, *args, **kwargs)
            self._optimizer_step_code()
            if self._optimizer_step_post_hooks or theirs._global_optimizer_post_hooks:
                for hooks in (self._optimizer_step_post_hooks, theirs._global_optimizer_post_hooks):
                    for hook in hooks.values():
                        hook(self, (self, *args), kwargs)
        finally:
            _exit(handle)
        return result

    wrapper.hooked = True  # type: ignore[attr-defined]
    return outside_dynamo(wrapper)  # type: ignore[return-value]


def pre_hooks(optimizer: Any) -> bool:
    """True where a hook runs before a step of this optimizer."""
    return bool(theirs._global_optimizer_pre_hooks or optimizer._optimizer_step_pre_hooks)


def _run_pre_hooks(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of the step, as the hooks leave them."""
    whole = (self, *args)
    for hooks in (theirs._global_optimizer_pre_hooks, self._optimizer_step_pre_hooks):
        for hook in hooks.values():
            result = hook(self, whole, kwargs)
            if result is None:
                continue
            if not isinstance(result, tuple) or len(result) != 2:
                raise RuntimeError(
                    f"a pre-hook of {type(self).__name__}.step must return None or a tuple of "
                    f"(new_args, new_kwargs), but got {result}."
                )
            whole, kwargs = result
    return whole[0], whole[1:], kwargs
