"""Formats of states: in its parameter's dtype, in another, or in 8 bits.

    state_dtype  None: the parameter's dtype, as torch has it
                 torch.float32, beside parameters of 16 bits too
                 torch.bfloat16: first moments; second moments stay float32, since in bf16 they
                     stand still (a step of 0.1 % is rounded away)
                 "8bit": blocks of 256 elements with a float32 scale each
                 or a dict of these by the names of states: {"exp_avg": torch.bfloat16}

A state of 8 bits is `<name>_codes`, an int8 tensor (of either sign) or a uint8 one (never below
zero) of the parameter's shape, and `<name>_scale`, one float32 for 256 elements as they lie in
memory. torch's name of the state is not used: torch would take codes for the state itself.
Dettmers et al. 2022 (arXiv:2110.02861); the codes are described in
fastopt_kernels/cpu/step/eight_bit.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastopt.optim.options import KEPT, options_of_param
from fastopt.optim.step import memory_layout
from fastopt.optim.update import Update
from fastopt_kernels.chunks import (
    BASE,
    BLOCK_8BIT,
    LAST,
    LEAST_SCALE,
    ORIGIN,
    SHIFT,
    StepOptions,
    value_of,
)

EIGHT = "8bit"
Format: TypeAlias = torch.dtype | str | None
_CODES = {torch.int8: "int8", torch.uint8: "uint8"}
_WIDE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _WIDE.items()}
_SERVED = (torch.float32, torch.bfloat16, torch.float16)


def codes_name(name: str) -> str:
    """The entry of an 8-bit state's codes: not the one torch would take for the state."""
    return f"{name}_codes"


def scale_name(name: str) -> str:
    """The entry of an 8-bit state's scales."""
    return f"{name}_scale"


def n_blocks(param: Tensor) -> int:
    return -(-memory_layout.local(param).numel() // BLOCK_8BIT)


def named(wanted: Any) -> Any:
    """A state_dtype by names alone, as groups hold it: checkpoints are of plain values."""
    if isinstance(wanted, Mapping):
        return {name: named(given) for name, given in wanted.items()}
    return _NAMES.get(wanted, wanted) if isinstance(wanted, torch.dtype) else wanted


def formats_of(update: Update, group: Mapping[str, Any]) -> tuple[Format, ...]:
    """The format of each state of an update; empty where all are of the parameter's dtype."""
    wanted = group.get("state_dtype")
    if wanted is None:
        return ()
    if isinstance(wanted, Mapping):
        return tuple(_format(wanted.get(name)) for name in update.state_names)
    wide = _format(wanted)
    return tuple(
        torch.float32 if wide is torch.bfloat16 and name in update.nonnegative else wide
        for name in update.state_names
    )


def _format(given: Any) -> Format:
    return _WIDE.get(given, given) if isinstance(given, str) else given


def check_given(wanted: Any) -> None:
    """Refuse a state_dtype that there is not."""
    for given in wanted.values() if isinstance(wanted, Mapping) else [wanted]:
        if given is not None and _format(given) not in (*_WIDE.values(), EIGHT):
            raise ValueError(
                f"Invalid state_dtype: {given!r} (supported: torch.float32, torch.bfloat16, "
                "'8bit', None for the parameter's dtype, or a dict of these by state)"
            )


def check(update: Update, group: Mapping[str, Any], owner: str) -> None:
    """Refuse, before any state is made, a format that there is not or that a state cannot have."""
    wanted = group.get("state_dtype")
    if wanted is None:
        return
    check_given(wanted)
    for name in wanted if isinstance(wanted, Mapping) else ():
        if name not in update.state_names:
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
        if eight and (param.dtype not in _SERVED or memory_layout.is_dtensor(param)):
            raise ValueError(
                f"state_dtype='8bit' is for plain parameters of float32, bfloat16 and float16, but "
                f"got a {type(param).__name__} of dtype {param.dtype}. Give it a group of its own "
                "with state_dtype=None."
            )


def _eight_bit_names(update: Update, formats: tuple[Format, ...]) -> list[str]:
    pairs = zip(update.state_names, formats, strict=False)
    return [name for name, each in pairs if each == EIGHT]


def names_of(update: Update, formats: tuple[Format, ...]) -> tuple[str, ...]:
    """The entries of an update's states: under their own names, or as codes."""
    eight = _eight_bit_names(update, formats)
    return tuple(codes_name(name) if name in eight else name for name in update.state_names)


def scales_of(update: Update, formats: tuple[Format, ...]) -> tuple[str, ...]:
    """The scales that are kept beside the states of an update, in the order of their codes."""
    return tuple(map(scale_name, _eight_bit_names(update, formats)))


def coded_names(stored: tuple[str, ...]) -> list[str]:
    """The states among `names_of` and `scales_of` that are kept as codes."""
    names = [name.removesuffix("_codes") for name in stored if name.endswith("_codes")]
    return [name for name in names if scale_name(name) in stored]


def coded_in(state: Mapping[str, Any]) -> list[str]:
    """The states that are there as codes with scales."""
    names = coded_names(tuple(key for key in state if isinstance(key, str)))
    return [
        name
        for name in names
        if is_eight_bit(state[codes_name(name)]) and isinstance(state[scale_name(name)], Tensor)
    ]


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of version 1, where codes had the state's own name, as one of version 2."""
    old = {k: codes_name(k) for k, v in state.items() if is_eight_bit(v) and scale_name(k) in state}
    new = set(old.values())
    return {old.get(key, key): value for key, value in state.items() if key not in new}


def is_eight_bit(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _CODES


def holds(state: Mapping[str, Any], name: str) -> bool:
    """True for a state that is there, in whatever format."""
    return state.get(name) is not None or state.get(codes_name(name)) is not None


def value_in(state: Mapping[str, Any], name: str) -> Tensor:
    """A state in floating point."""
    if state.get(name) is not None:
        value: Tensor = state[name]
        return value
    return decode(state[codes_name(name)], state[scale_name(name)])


def conform(
    state: dict[str, Any], name: str, wanted: Format, update: Update, param: Tensor
) -> None:
    """Convert a state that is there to the wanted format, where it is of another.

    None: whatever floating dtype it has.
    """
    value, codes = state.get(name), state.get(codes_name(name))
    fits = memory_layout.reference(memory_layout.local(param))
    if value is None:
        if wanted == EIGHT and memory_layout.same_layout(state[codes_name(name)], fits):
            return
        value = value_in(state, name)
        value = value.to(param.dtype) if wanted is None else value
    if codes is not None:
        del state[codes_name(name)], state[scale_name(name)]
    if wanted == EIGHT:
        state.pop(name, None)
        state[codes_name(name)] = torch.empty_like(fits, dtype=code_dtype(update, name))
        state[scale_name(name)] = encode(value.detach(), state[codes_name(name)])
    else:
        state[name] = value if wanted is None else value.to(wanted)


def code_dtype(update: Update, name: str) -> torch.dtype:
    """The dtype of a state's codes."""
    return torch.uint8 if name in update.nonnegative else torch.int8


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of an 8-bit state, laid out alike."""
    order = _memory_order(codes)
    flat = codes.permute(order).reshape(-1)
    size = flat.to(torch.int32).abs()
    x = ((size << SHIFT) + ORIGIN).view(torch.float32) - BASE
    x *= scale.repeat_interleave(BLOCK_8BIT)[: len(x)]
    values = torch.empty_like(codes, dtype=torch.float32)
    signed = torch.where(flat < 0, -x, x) if codes.dtype == torch.int8 else x
    values.permute(order).copy_(_shaped(signed, codes, order))
    return values


def encode(values: Tensor, codes: Tensor) -> Tensor:
    """Write the nearest codes of values into `codes`, which says how they lie; gives the scales."""
    order = _memory_order(codes)
    x = values.to(torch.float32).permute(order).reshape(-1)
    last = LAST[_CODES[codes.dtype]]
    padded = torch.nn.functional.pad(x.abs(), (0, -len(x) % BLOCK_8BIT)).view(-1, BLOCK_8BIT)
    finite = torch.where(padded.isfinite(), padded, 0.0)
    scale = finite.amax(1).clamp(min=LEAST_SCALE) / value_of(last)
    bits = (finite / scale[:, None] + BASE).view(torch.int32) - ORIGIN + (1 << (SHIFT - 1))
    q = (bits >> SHIFT).clamp(0, last).view(-1)[: len(x)]
    signed = torch.where(x < 0, -q, q) if codes.dtype == torch.int8 else q
    codes.permute(order).copy_(_shaped(signed, codes, order))
    return scale


def packed(codes: Tensor, device: torch.device) -> Tensor:
    """A copy of codes without gaps, in the same order: the one their scales are of."""
    order = _memory_order(codes)
    flat = codes.detach().permute(order).contiguous().to(device, copy=True)
    return flat.permute([order.index(k) for k in range(len(order))])


def _memory_order(tensor: Tensor) -> list[int]:
    """The dimensions from the slowest in memory to the fastest: blocks are of elements in that
    order, whatever gaps there are between them."""
    sizes, strides = tensor.shape, tensor.stride()
    if any(n > 1 and stride == 0 for n, stride in zip(sizes, strides, strict=True)):
        return list(range(tensor.dim()))
    return sorted(range(tensor.dim()), key=lambda k: -strides[k] if sizes[k] > 1 else -math.inf)


def _shaped(flat: Tensor, like: Tensor, order: list[int]) -> Tensor:
    return flat.view([like.shape[k] for k in order])


def check_state(name: str, state: Any, param: Tensor) -> None:
    """A state is written at its address: one that is not of this parameter would be torn memory."""
    came = type(state).__name__
    if isinstance(state, Tensor):
        came = f"shape {tuple(state.shape)} on {state.device} ({state.layout})"
        if (
            state.layout is torch.strided
            and memory_layout.has_memory(state)
            and state.shape == param.shape
            and state.device == param.device
            and state.is_complex() == param.is_complex()
            and torch._debug_has_internal_overlap(memory_layout.local(state)) != 1
        ):
            return
    raise RuntimeError(
        f"The size of a parameter {tuple(param.shape)} on {param.device} must match its state "
        f"{name!r}, a tensor with memory of its own, but that is {came}. Load a state_dict that "
        "fits, or delete optimizer.state[parameter] to begin anew."
    )


def check_scale(name: str, scale: Any, param: Tensor) -> None:
    blocks = n_blocks(param)
    if not (
        isinstance(scale, Tensor)
        and scale.shape == (blocks,)
        and scale.dtype is torch.float32
        and scale.is_contiguous()
        and scale.device == param.device
    ):
        came = f"{tuple(scale.shape)} {scale.dtype}" if isinstance(scale, Tensor) else repr(scale)
        raise RuntimeError(
            f"The state {name!r} of a parameter of shape {tuple(param.shape)} must be {blocks} "
            f"contiguous float32 on {param.device}, but is {came}. Load a state_dict that fits, or "
            "delete optimizer.state[parameter] to begin anew."
        )


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
