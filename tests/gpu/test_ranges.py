"""Integers that may wrap on the way to an address are found, and those that may not are not."""

from __future__ import annotations

from typing import Any

import pytest
import triton
import triton.language as tl

from fastopt_kernels.gpu.machine_code import driving
from tests.gpu import ranges


@triton.jit
def block_in_32_bits(x_ptr, n, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def block_in_64_bits(x_ptr, n, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def stride_in_32_bits(x_ptr, stride, BLOCK: tl.constexpr):  # noqa: N803
    x_ptr += tl.program_id(0) * stride
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


@triton.jit
def stride_widened_too_late(x_ptr, stride, BLOCK: tl.constexpr):  # noqa: N803
    x_ptr += (tl.program_id(0) * stride).to(tl.int64)
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


@triton.jit
def stride_in_64_bits(x_ptr, stride, BLOCK: tl.constexpr):  # noqa: N803
    x_ptr += tl.program_id(0) * stride.to(tl.int64)
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


@triton.jit
def walk(x_ptr, n_cols, BLOCK: tl.constexpr):  # noqa: N803
    for first in range(0, n_cols, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        tl.store(x_ptr + cols, 0.0, mask=cols < n_cols)


@triton.jit
def running_offset(x_ptr, n_cols, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    for _ in range(0, n_cols, BLOCK):
        tl.store(x_ptr + at, 0.0)
        at += BLOCK


@triton.jit
def cut_off(x_ptr, place_ptr, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.load(place_ptr).to(tl.int32)
    tl.store(x_ptr + place + tl.arange(0, BLOCK).to(tl.int64), 0.0)


@triton.jit
def cut_off_within_bounds(x_ptr, place_ptr, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.load(place_ptr)
    inside = (place >= 0) & (place < 1000)
    place = tl.where(inside, place, 0).to(tl.int32)
    tl.store(x_ptr + place + tl.arange(0, BLOCK), 0.0)


@triton.jit
def hashed(x_ptr, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, (at.to(tl.uint32) * 0x9E3779B1 >> 9).to(tl.float32))


def faults(kernel: Any, second: str = "i32", **limits: int) -> list[str]:
    with driving("sm_90"):
        names = [name for name in kernel.arg_names if name != "BLOCK"]
        signature = dict(zip(names, ("*fp32", second), strict=False)) | {"BLOCK": "constexpr"}
        source = triton.compiler.ASTSource(kernel, signature, {"BLOCK": 1024})
        compiled = triton.compile(source, options={"enable_fp_fusion": True})
    return ranges.faults_of(compiled.asm["ttir"], limits)


@pytest.mark.parametrize(
    ("kernel", "operation"),
    [
        (block_in_32_bits, "arith.muli"),
        (stride_in_32_bits, "arith.muli"),
        (stride_widened_too_late, "arith.muli"),
        (walk, "scf.for"),
        (running_offset, "arith.addi"),
    ],
)
def test_an_offset_that_may_wrap_is_a_fault(kernel: Any, operation: str) -> None:
    assert any(operation in text for text in faults(kernel))


def test_an_offset_that_is_cut_off_is_a_fault() -> None:
    assert any("arith.trunci" in text for text in faults(cut_off, "*i64"))


@pytest.mark.parametrize("kernel", [block_in_64_bits, stride_in_64_bits, hashed])
def test_an_offset_of_64_bits_and_a_hash_pass(kernel: Any) -> None:
    assert faults(kernel) == []


def test_what_is_compared_first_may_be_cut_off() -> None:
    assert faults(cut_off_within_bounds, "*i64") == []


def test_a_limit_that_the_launch_keeps_is_counted_on() -> None:
    assert faults(walk, n_cols=2**31 - 1024) == []
    assert faults(walk, n_cols=2**31 - 1023) != []
    assert faults(walk, n_rows=1) != []


def test_extents_of_64_bits_pass() -> None:
    assert faults(walk, "i64") == []
