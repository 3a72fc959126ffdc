"""States of 8 bits through the Triton engine in the interpreter, against the CPU's own codes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

import fastopt
from bench.gpu_interpret import is_interpreted
from fastopt.optim.state import formats
from fastopt.optim.step.rng_keys import keys_of
from fastopt_kernels.chunks import BLOCK_8BIT, StepOptions
from fastopt_kernels.cpu.step import eight_bit as cpu
from fastopt_kernels.cpu.step import launch as cpu_launch
from fastopt_kernels.gpu.step import eight_bit, engine
from fastopt_kernels.gpu.step import launch as step_launch
from tests.gpu.test_passes import bits, give, given_in_turn, gradients, same
from tests.optim import pairs

assert is_interpreted()
CPU = torch.device("cpu")
EIGHT = "8bit"
INF, NAN = math.inf, math.nan
SIZES = (1, 255, 256, 257, engine.CHUNK + 3)
SERVED: dict[str, dict[str, Any]] = {
    "Adam": {"weight_decay": 0.1},
    "AdamW": {},
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9},
}
CODES = {"int8": torch.int8, "uint8": torch.uint8}


def parameters(sizes: Any = SIZES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=random).to(dtype)) for n in sizes]


def make(name: str, params: Any, **options: Any) -> Any:
    more = {"lr": 0.01, "state_dtype": EIGHT} | SERVED[name] | options
    return getattr(fastopt.optim, name)(params, **more)


# The codec.


@triton.jit
def _codec_kernel(x_ptr, code_ptr, scale_ptr, back_ptr, n, first, key, BLOCK: tl.constexpr):  # noqa: N803
    lanes = tl.arange(0, BLOCK)
    mask = lanes < n
    x = tl.load(x_ptr + lanes, mask=mask, other=float("inf"))
    drawn = eight_bit.draw(first + lanes, key)
    codes, scale = eight_bit.encode(x, mask, drawn, code_ptr.dtype.element_ty)
    tl.store(code_ptr + lanes, codes, mask=mask)
    tl.store(scale_ptr, scale)
    tl.store(back_ptr + lanes, eight_bit.decode(codes, scale), mask=mask)


def by_triton(x: Tensor, kind: str, first: int, key: int) -> tuple[Tensor, float, Tensor]:
    """Codes of at most one block, its scale, and what they stand for."""
    codes, scale = torch.zeros(len(x), dtype=CODES[kind]), torch.zeros(1)
    back = torch.zeros(len(x))
    _codec_kernel[(1,)](x, codes, scale, back, len(x), first, key, BLOCK=BLOCK_8BIT)
    return codes, float(scale), back


def by_numba(x: Tensor, kind: str, first: int, key: int) -> tuple[Tensor, float, Tensor]:
    """The same, element by element, with what the CPU's kernels are made of."""
    decode, scale_of, code, _ = cpu._CODEC[kind]
    values = x.numpy()
    if kind == "uint8":
        values = np.where(values == np.inf, np.finfo(np.float32).max, values)
    finite = values[np.isfinite(values)]
    scale, inverse = scale_of(np.float32(np.abs(finite).max(initial=0.0)))
    draws = [cpu.draw(cpu.chance_of(first + i, np.uint32(key))) for i in range(len(x))]
    codes = [code(v, inverse, draw) for v, draw in zip(x.numpy(), draws, strict=True)]
    # Codes reach decode as the bits of a float32.
    back = [decode(np.int32(q).view(np.float32), scale) for q in codes]
    return torch.tensor(codes, dtype=CODES[kind]), float(scale), torch.tensor(back)


def blocks(kind: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    plain = torch.randn(BLOCK_8BIT, generator=random)
    plain = plain if kind == "int8" else plain.square()
    odd = plain.clone()
    odd[3], odd[7] = INF, NAN
    return {
        "normal": plain,
        "a partial block": plain[:57],
        "octaves": plain * 2.0 ** -torch.arange(BLOCK_8BIT).div(12, rounding_mode="floor"),
        "zeros": torch.zeros(9),
        "huge": plain * 1e37,
        "below what is divided by": plain * 1e-38,
        "not finite": odd,
        "an infinity alone": torch.tensor([INF]),
    }


def differing(a: tuple[Tensor, float, Tensor], b: tuple[Tensor, float, Tensor]) -> list[str]:
    same = (torch.equal(a[0], b[0]), a[1] == b[1], torch.equal(a[2], b[2]))
    return [n for n, equal in zip(("codes", "scale", "values"), same, strict=True) if not equal]


@pytest.mark.parametrize("block", blocks("int8"))
@pytest.mark.parametrize("kind", CODES)
def test_codes_and_scales_are_the_cpus(kind: str, block: str) -> None:
    x = blocks(kind)[block]
    for first, key in ((0, 0), (2**32 - 100, 0xDEADBEEF)):
        assert differing(by_triton(x, kind, first, key), by_numba(x, kind, first, key)) == []


def test_another_key_or_scale_would_be_noticed() -> None:
    x = blocks("int8")["normal"]
    right = by_numba(x, "int8", 0, 5)
    assert differing(by_triton(x, "int8", 0, 5 + 2**30), right) == ["codes", "values"]
    assert differing(by_triton(x * 2, "int8", 0, 5), right) == ["scale", "values"]


# A launch.


def _exact(p, g, m, v, step, half):
    """Of dyadic numbers: there is no rounding that a fused multiply-add would leave out."""
    return p - step * m, half * m + g, half * v + g * g


def launch_of(module: Any) -> list[Tensor]:
    """Three steps of that rule with an average; everything that was written."""
    kinds = ("fp32", "fp32", "int8", "uint8", "fp32", "fp32", "fp32")
    launch = module.Launch(_exact, kinds, list(SIZES), 4, CPU, StepOptions(averaged=True))
    random = torch.Generator().manual_seed(3)

    def dyadic(n: int) -> Tensor:
        return torch.randint(-8, 9, (n,), generator=random) / 8

    rows = []
    for n in SIZES:
        states = [torch.zeros(n, dtype=code) for code in CODES.values()]
        scales = [torch.ones(-(-n // BLOCK_8BIT)) for _ in CODES]
        rows.append([dyadic(n), dyadic(n), *states, torch.zeros(n), *scales])
    launch.tensors[:] = [[x.data_ptr() for x in row] for row in rows]
    launch.scalars[:] = [1.0, 0.25, 0.5, 0.5]
    for step in range(3):
        launch.keys[:] = keys_of(7, np.full(len(SIZES), step), np.arange(len(SIZES)))
        launch.run(1)
        for row in rows:
            row[1].copy_(dyadic(len(row[1])))
    return [x for row in rows for x in row]


def test_a_launch_gives_the_bits_of_the_cpus() -> None:
    found, right = launch_of(step_launch), launch_of(cpu_launch)
    assert same(found, right)
    assert {x.dtype for x in found} >= set(CODES.values())


def test_a_launch_without_chance_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "draw", _to_nearest)
    assert not same(launch_of(step_launch), launch_of(cpu_launch))


@triton.jit
def _to_nearest(i, key):
    return i.to(tl.int32) * 0 + (1 << 18) - eight_bit._ORIGIN


# Whole optimizers.


def follow(name: str, dtype: torch.dtype, wrong: bool = False, **options: Any) -> list[str]:
    """What is off after each step, which the same optimizer with float32 states takes from where
    the one with codes stands."""
    params, others = parameters((257, 700), dtype), parameters((257, 700), dtype)
    ours, wide = make(name, params, **options), make(name, others, state_dtype=torch.float32)
    found = []
    for step in range(3):
        for owned, optimizer in ((params, ours), (others, wide)):
            give(owned, gradients(owned, step))
            optimizer.step()
        for p, q in zip(params, others, strict=True):
            if not torch.equal(p.detach(), q.detach()):
                found.append(f"step {step}: a parameter")
            for key, value in wide.state[q].items():
                if key == "step":
                    assert value == ours.state[p][key]
                    continue
                got = formats.value_in(ours.state[p], key)
                block = torch.nn.functional.pad(value.abs(), (0, -len(value) % BLOCK_8BIT))
                largest = block.view(-1, BLOCK_8BIT).amax(1).repeat_interleave(BLOCK_8BIT)
                octaves = 16 if ours.state[p][f"{key}_codes"].dtype is torch.uint8 else 8
                room = (value.abs() + largest[: len(value)] * 2.0**-octaves) / 16
                if ((got - value).abs() > 1.001 * room).any():
                    found.append(f"step {step}: {key}")
                value.copy_(2 * got if wrong else got)
            q.data.copy_(p.data)
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in SERVED]
    + [("AdamW", torch.bfloat16), ("SGD", torch.float16)],
    ids=str,
)
def test_a_step_is_that_of_the_states_its_codes_stand_for(name: str, dtype: torch.dtype) -> None:
    assert follow(name, dtype) == []


def test_states_that_are_off_do_not_pass() -> None:
    assert "step 1: exp_avg" in follow("AdamW", torch.float32, wrong=True)


STEP_OPTIONS: dict[str, dict[str, Any]] = {
    "counted on the device": {},
    "clipped by value, averaged": {"clip_value": 0.5, "ema_decay": 0.75},
    "clipped by norm": {"max_grad_norm": 0.7},
    "stochastic": {"param_rounding": "stochastic", "ema_decay": 0.75},
    "kahan": {"param_rounding": "kahan"},
    "master": {"param_rounding": "master", "skip_nonfinite": True},
}


@pytest.mark.parametrize("extra", STEP_OPTIONS)
def test_counted_on_the_device_the_bits_are_the_same(extra: str) -> None:
    """Keys, and so codes, are of the count that the device keeps; one gradient is missing."""
    dtype = torch.bfloat16 if "param_rounding" in STEP_OPTIONS[extra] else torch.float32
    sides = []
    for options in ({}, {"capturable": True}):
        params = parameters((3, 300, 257), dtype)
        optimizer = make("AdamW", params, rounding_seed=2**40 + 5, **STEP_OPTIONS[extra], **options)
        for _ in given_in_turn(params, 3):
            optimizer.step()
        sides.append(bits(optimizer, params))
    assert same(*sides)
    assert sum(x.dtype in CODES.values() for x in sides[0]) == 6


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.7, "capturable": True}], ids=len)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_skipped_step_leaves_every_bit(name: str, options: dict[str, Any]) -> None:
    params = parameters((5, 600))
    optimizer = make(name, params, skip_nonfinite=True, **options)
    for step in range(3):
        give(params, gradients(params, step))
        if step == 1:
            params[1].grad[599] = NAN  # type: ignore[index]
        before = bits(optimizer, params)
        optimizer.step()
        assert same(before, bits(optimizer, params)) == (step == 1)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_what_is_not_finite_stays_where_it_is(value: float) -> None:
    pairs.assert_one_is_lost(
        lambda param, dtype: make("AdamW", [param], state_dtype=dtype), EIGHT, value
    )
