"""A function in the graphs of torch.fx and torch.jit.trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.fx import Proxy

P = ParamSpec("P")
T = TypeVar("T")
_tracer: Any = torch._C


def as_node(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The call as one node of the graph that torch.fx records, whatever name the function was
    called by. (torch.fx.wrap replaces one name in one module.)"""
    proxies = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Proxy)]
    return torch.overrides.handle_torch_function(function, proxies, *args, **kwargs)


def unrecorded(check: Callable[P, T]) -> Callable[P, T]:
    """A check of arguments that torch.jit.trace does not record: sizes are numbers inside it, where
    the tracer makes tensors of them and warns at each comparison."""

    @functools.wraps(check)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or not _tracer._is_tracing():
            return check(*args, **kwargs)
        state = _tracer._get_tracing_state()
        _tracer._set_tracing_state(None)
        try:
            return check(*args, **kwargs)
        finally:
            _tracer._set_tracing_state(state)

    return wrapper
