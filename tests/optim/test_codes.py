"""Codes and the values they stand for, however the codes lie in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastopt
from fastopt.optim.state import formats
from fastopt_kernels.chunks import BLOCK_8BIT
from tests.optim.pairs import give_grads, make_params

SHAPE = (6, 5, 11, 3)


def with_gaps(x: Tensor) -> Tensor:
    """The same elements in the same order of memory, each beside another number."""
    order = sorted(range(x.dim()), key=lambda k: -x.stride(k))
    wide = torch.stack([x.permute(order), torch.full_like(x.permute(order), 77)], -1)
    inverse = [order.index(k) for k in range(x.dim())]
    return wide[..., 0].permute(inverse)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
}


def expected_values(codes: Tensor, scale: Tensor) -> Tensor:
    """One by one, in float64: 16 codes an octave of (|x| / s + 2^-15), from 0 on."""
    order = sorted(range(codes.dim()), key=lambda k: -codes.stride(k))
    flat = codes.permute(order).reshape(-1).tolist()
    values = []
    for k, q in enumerate(flat):
        octave, sixteenth = divmod(abs(q), 16)
        size = 2.0**-15 * (2.0**octave * (1 + sixteenth / 16) - 1)
        values.append((-size if q < 0 else size) * float(scale[k // BLOCK_8BIT]))
    shaped = torch.tensor(values, dtype=torch.float64).view([codes.shape[k] for k in order])
    return shaped.permute([order.index(k) for k in range(codes.dim())])


def check_codec(
    dtype: torch.dtype,
    lay: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor, Tensor], Tensor] = formats.decode,
) -> None:
    """Values are within half a code of what was encoded, and what the codes stand for."""
    torch.manual_seed(0)
    values = torch.randn(SHAPE)
    values = values if dtype == torch.int8 else values.square()
    codes = lay(torch.zeros(SHAPE, dtype=dtype))
    scale = formats.encode(values, codes)
    assert len(scale) == -(-values.numel() // BLOCK_8BIT)
    found = decode(codes, scale)
    torch.testing.assert_close(found.double(), expected_values(codes, scale), rtol=1e-6, atol=0)
    octaves = 8 if dtype == torch.int8 else 16
    room = (values.abs() + 4.0 * 2.0**-octaves * values.abs().max()) / 32
    assert ((found - values).abs() <= room).all()


@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_codes_lie_in_any_order_and_with_gaps(dtype: torch.dtype, layout: str, gaps: bool) -> None:
    lay = LAYOUTS[layout]
    check_codec(dtype, (lambda x: with_gaps(lay(x))) if gaps else lay)


def test_neighbours_in_memory_are_left_alone() -> None:
    wide = torch.full((300, 2), 77, dtype=torch.int8)
    formats.encode(torch.randn(300), wide[:, 0])
    assert (wide[:, 1] == 77).all()


def in_logical_order(codes: Tensor, scale: Tensor) -> Tensor:
    """Wrong: takes scales to be of 256 elements as they are counted, not as they lie."""
    return formats.decode(codes.contiguous(), scale)


def test_scales_of_the_wrong_elements_would_be_noticed() -> None:
    with pytest.raises(AssertionError):
        check_codec(torch.int8, LAYOUTS["transposed"], in_logical_order)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_with_gaps_are_loaded_bit_for_bit(layout: str) -> None:
    params = [torch.nn.Parameter(LAYOUTS[layout](p.data)) for p in make_params((SHAPE,))]
    optimizer = fastopt.optim.AdamW(params, lr=1e-2, state_dtype="8bit")
    for seed in range(3):
        give_grads(params, seed)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("exp_avg_codes", "exp_avg_sq_codes"):
        saved["state"][0][name] = with_gaps(saved["state"][0][name])
    scale = saved["state"][0]["exp_avg_scale"]
    saved["state"][0]["exp_avg_scale"] = torch.stack([scale, scale], -1)[:, 0]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = fastopt.optim.AdamW(others, lr=1e-2, state_dtype="8bit")
    again.load_state_dict(saved)
    for owned, each in ((params, optimizer), (others, again)):
        give_grads(owned, 3)
        each.step()
    assert torch.equal(params[0], others[0])
    mine, theirs = optimizer.state[params[0]], again.state[others[0]]
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
