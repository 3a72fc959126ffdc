"""The checks of a state_dict before any of it is taken: of groups, of states, of numbers."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastopt.optim import options
from fastopt.optim.contract import Loadable
from fastopt.optim.state import formats
from fastopt.optim.step import memory_layout
from fastopt.optim.update import Update

_KEPT_ERRORS = (ValueError, TypeError, RuntimeError)


def check_group(
    optimizer: Loadable, number: int, saved: Mapping[str, Any], group: dict[str, Any]
) -> None:
    """Raise what the constructor would for a parameter group.

    saved: as the state_dict has it, whose options of ours are refused where they mean nothing,
    though those of the optimizer stay; group: as it will be
    """
    try:
        options.check(saved)
        formats.check_given(saved.get("state_dtype"))
        _check_by_constructors(optimizer, group)
        optimizer._check_group(group)
        optimizer.update_of(group).probe(group)
    except Exception as error:
        kind = type(error) if type(error) in _KEPT_ERRORS else ValueError
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        given = ", ".join(f"{k}={v!r}" for k, v in saved.items() if k != "params")
        raise kind(
            f"{text} (in parameter group {number} of the state_dict, of which nothing is loaded: "
            f"{given})"
        ) from error


def _check_by_constructors(optimizer: Loadable, group: Mapping[str, Any]) -> None:
    """Construct an optimizer of an empty parameter with the hyper-parameters of a group.

    By each class that has a constructor of its own, since one may not pass on all of its bases'. A
    constructor that refuses this optimizer's own defaults wants something else: it says nothing.
    """
    for cls in _constructed(type(optimizer)):
        try:
            _construct(cls, group)
        except Exception:
            try:
                _construct(cls, {**optimizer.defaults, "params": group["params"]})
            except Exception:
                continue
            raise


def _constructed(cls: type) -> Iterator[type]:
    for each in cls.__mro__:
        bare = each is torch.optim.Optimizer
        if not bare and issubclass(each, torch.optim.Optimizer) and "__init__" in vars(each):
            yield each


def _construct(cls: type, group: Mapping[str, Any]) -> None:
    taken = list(inspect.signature(cls).parameters.values())[1:]
    named = [p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    chosen = [name for name in named if name in group and name not in options.DEFAULTS]
    like = next(iter(group["params"]), torch.empty(0))
    cls([torch.empty(0, dtype=like.dtype, device=like.device)], **{k: group[k] for k in chosen})


class StateCheck:
    """The checks of one parameter's state, which is named as `where`.

    Each raises ValueError, and nothing of the state_dict has been taken.
    """

    def __init__(self, where: str, param: Tensor, state: Mapping[str, Any]) -> None:
        self._where, self._param, self._state = where, param, state
        # The shape of a lazy parameter is not known before the model's first call.
        self._shape = None if torch.nn.parameter.is_lazy(param) else param.shape

    def check(self, update: Update, required: tuple[str, ...], sparse: bool) -> None:
        """Refuse a state that an update cannot go on from.

        required: states without which the rest means nothing; sparse: whether they may be sparse
        """
        state = self._state
        if self._is_averaged_alone(update):
            required = ()
        for name in update.counter_names:
            if name in state:
                self._check_number(name, counts=name == update.step_name)
            elif update.counted:
                self._fail(f"it has {sorted(map(str, state))} but no {name!r}")
        if options.N_AVERAGED in state:
            self._check_number(options.N_AVERAGED, counts=True)
        for name in update.state_names:
            self._check_format(name)
            if state.get(name) is not None:
                self._check_elements(name, None, sparse)
            elif state.get(formats.codes_name(name)) is not None:
                self._check_codes(name, formats.code_dtype(update, name))
            elif name in required:
                self._fail(f"it has {sorted(map(str, state))} but no {name!r}")
        for name, dtype in options.OWN_DTYPE.items():
            if state.get(name) is not None:
                self._check_elements(name, dtype, False)

    def _is_averaged_alone(self, update: Update) -> bool:
        """True for the state of a parameter that has an average, and was never stepped."""
        step = self._state.get(update.step_name)
        zero = isinstance(step, Tensor) and step.numel() == 1 and not step.any()
        return zero and self._state.get(options.AVERAGED) is not None

    def _fail(self, what: str) -> NoReturn:
        raise ValueError(
            f"the state_dict does not fit {self._where}: {what}. Nothing is loaded; give one that "
            "was saved of such a parameter, or leave its state out, and it begins anew."
        )

    def _check_number(self, name: str, counts: bool) -> None:
        """One real number; of a count a whole one, not below zero."""
        given = self._state[name]
        if isinstance(given, Tensor):
            if given.numel() != 1 or given.is_complex() or given.dtype == torch.bool:
                self._fail(f"{name!r} is not one number, but {_described(given)}")
            if not memory_layout.has_memory(given):
                return
            value = float(given.detach().item())
        elif isinstance(given, numbers.Real) and not isinstance(given, bool):
            value = float(given)
        else:
            self._fail(f"{name!r} is not one number, but {_described(given)}")
        if math.isnan(value) or (counts and not (value >= 0.0 and value.is_integer())):
            expected = "a whole number, 0 or more" if counts else "a number"
            self._fail(f"{name!r} is {value}, and must be {expected}")

    def _check_format(self, name: str) -> None:
        """Refuse codes without scales, scales without codes, and a state that is there twice."""
        codes, scale = formats.codes_name(name), formats.scale_name(name)
        there = [key for key in (name, codes, scale) if self._state.get(key) is not None]
        if there not in ([], [name], [codes, scale]):
            self._fail(f"it has {there}, and must have {name!r} alone, or {codes!r} and {scale!r}")

    def _check_elements(self, name: str, dtype: torch.dtype | None, sparse: bool) -> None:
        """One number for each of the parameter's; dtype: None for any of its kind."""
        value = self._state[name]
        if not isinstance(value, Tensor) or self._shape not in (None, value.shape):
            self._fail(f"{name!r} must be of shape {self._shape}, but is {_described(value)}")
        kind = value.dtype.is_floating_point, value.is_complex()
        right = (not self._param.is_complex(), self._param.is_complex())
        if kind != right if dtype is None else value.dtype != dtype:
            expected = dtype or ("complex" if right[1] else "floating point")
            self._fail(f"{name!r} must be {expected}, but is {_described(value)}")
        if value.layout is not torch.strided and not sparse:
            self._fail(f"{name!r} must be dense, but is {_described(value)}")

    def _check_codes(self, name: str, dtype: torch.dtype) -> None:
        self._check_elements(formats.codes_name(name), dtype, False)
        key = formats.scale_name(name)
        if self._shape is None:
            return
        scale, blocks = self._state[key], (formats.n_blocks(self._param),)
        if not isinstance(scale, Tensor) or scale.shape != blocks or scale.dtype != torch.float32:
            self._fail(f"{key!r} must be float32 of shape {blocks}, but is {_described(scale)}")
        if memory_layout.has_memory(scale) and not bool(
            (scale >= 0.0).all() & scale.isfinite().all()
        ):
            self._fail(f"{key!r} has an element that is negative, infinite or NaN")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} ({value.layout})"
    return f"{type(value).__name__} {value!r}"
