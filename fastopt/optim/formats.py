"""How a state is stored: in its parameter's dtype, in another, or in 8 bits.

    state_dtype  None: the parameter's dtype, as torch has it
                 torch.float32, beside parameters of 16 bits too
                 torch.bfloat16: first moments; second moments stay float32, since in bf16 they
                     stand still (a step of 0.1 % is rounded away)
                 "8bit": blocks of 256 elements with a float32 scale each
                 or a dict of these by the names of states: {"exp_avg": torch.bfloat16}

A state of 8 bits is an int8 tensor (of either sign) or a uint8 one (never below zero) of the
parameter's shape, beside it `<name>_scale`, one float32 for 256 elements as they lie in memory.
Dettmers et al. 2022 (arXiv:2110.02861); the codes are described in fastopt_kernels/cpu/eightbit.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastopt.optim import layout
from fastopt.optim.update import Update
from fastopt_kernels.chunks import BASE, BLOCK_8BIT, LAST, LEAST_SCALE, ORIGIN, SHIFT, value_of

EIGHT = "8bit"
Format: TypeAlias = torch.dtype | str | None
_CODES = {torch.int8: "int8", torch.uint8: "uint8"}
_WIDE = (torch.float32, torch.bfloat16)
_SERVED = (torch.float32, torch.bfloat16, torch.float16)


def scale_name(name: str) -> str:
    """Where the scales of an 8-bit state are."""
    return f"{name}_scale"


def n_blocks(param: Tensor) -> int:
    return -(-layout.local(param).numel() // BLOCK_8BIT)


def formats_of(update: Update, group: Mapping[str, Any]) -> tuple[Format, ...]:
    """The format of each state of an update; empty where all are of the parameter's dtype."""
    wanted = group.get("state_dtype")
    if wanted is None:
        return ()
    if isinstance(wanted, Mapping):
        return tuple(wanted.get(name) for name in update.state_names)
    return tuple(
        torch.float32 if wanted is torch.bfloat16 and name in update.nonnegative else wanted
        for name in update.state_names
    )


def check(update: Update, group: Mapping[str, Any], owner: str) -> None:
    """Refuse, before any state is made, a format that there is not or that a state cannot have."""
    wanted = group.get("state_dtype")
    if wanted is None:
        return
    for name, given in wanted.items() if isinstance(wanted, Mapping) else [("", wanted)]:
        if given is not None and given not in (*_WIDE, EIGHT):
            raise ValueError(
                f"Invalid state_dtype: {given!r} (supported: torch.float32, torch.bfloat16, "
                "'8bit', None for the parameter's dtype, or a dict of these by state)"
            )
        if name and name not in update.state_names:
            raise ValueError(
                f"state_dtype names the state {name!r}, but {owner} keeps {update.state_names}"
            )
    if group.get("differentiable"):
        raise ValueError(
            "differentiable=True steps by torch's operators, which keep states in the parameter's "
            "dtype: leave state_dtype unset."
        )
    formats = dict(zip(update.state_names, formats_of(update, group), strict=True))
    eight = [name for name, each in formats.items() if each == EIGHT]
    if refused := [name for name in eight if name not in update.eight_bit]:
        raise ValueError(
            f"{owner} cannot keep {refused} in 8 bits: it would lose what the update rests on "
            f"(it can: {list(update.eight_bit) or 'none of its states'}). Use "
            "state_dtype=torch.bfloat16, or a dict with '8bit' for single states."
        )
    for param in group["params"]:
        if eight and (param.dtype not in _SERVED or layout.is_dtensor(param)):
            raise ValueError(
                f"state_dtype='8bit' is for plain parameters of float32, bfloat16 and float16, but "
                f"got a {type(param).__name__} of dtype {param.dtype}. Give it a group of its own "
                "with state_dtype=None."
            )


def names_of(update: Update, formats: tuple[Format, ...]) -> tuple[str, ...]:
    """The scales that are kept beside the states of an update."""
    return tuple(
        scale_name(name)
        for name, each in zip(update.state_names, formats, strict=False)
        if each == EIGHT
    )


def is_eight_bit(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _CODES


def conform(
    state: dict[str, Any], name: str, wanted: Format, update: Update, param: Tensor
) -> None:
    """Convert a state that is there to the wanted format, where it is of another.

    None: whatever floating dtype it has.
    """
    value, scale = state[name], scale_name(name)
    fits = layout.reference(layout.local(param))
    if is_eight_bit(value):
        if wanted == EIGHT and layout.same_layout(value, fits):
            return
        value = decode(value, state.pop(scale))
        if wanted is None:
            value = value.to(param.dtype)
    if wanted == EIGHT:
        codes = torch.empty_like(fits, dtype=_code_dtype(update, name))
        state[scale] = encode(value.detach(), codes)
        value = codes
    elif wanted is not None:
        value = value.to(wanted)
    state[name] = value


def _code_dtype(update: Update, name: str) -> torch.dtype:
    return torch.uint8 if name in update.nonnegative else torch.int8


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of an 8-bit state, laid out alike."""
    flat = _flat(codes)
    size = flat.to(torch.int32).abs()
    x = ((size << SHIFT) + ORIGIN).view(torch.float32) - BASE
    x *= scale.repeat_interleave(BLOCK_8BIT)[: len(x)]
    values = torch.empty_like(codes, dtype=torch.float32)
    _flat(values).copy_(torch.where(flat < 0, -x, x) if codes.dtype == torch.int8 else x)
    return values


def encode(values: Tensor, codes: Tensor) -> Tensor:
    """Write the nearest codes of values into `codes`, which says how they lie; gives the scales."""
    laid = torch.empty_like(codes, dtype=torch.float32)
    laid.copy_(values)
    x = _flat(laid)
    last = LAST[_CODES[codes.dtype]]
    padded = torch.nn.functional.pad(x.abs(), (0, -len(x) % BLOCK_8BIT)).view(-1, BLOCK_8BIT)
    finite = torch.where(padded.isfinite(), padded, 0.0)
    scale = finite.amax(1).clamp(min=LEAST_SCALE) / value_of(last)
    bits = (finite / scale[:, None] + BASE).view(torch.int32) - ORIGIN + (1 << (SHIFT - 1))
    q = (bits >> SHIFT).clamp(0, last).view(-1)[: len(x)]
    _flat(codes).copy_(torch.where(x < 0, -q, q) if codes.dtype == torch.int8 else q)
    return scale


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))
