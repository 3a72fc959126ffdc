"""A sample of the gate for row kernels (`run_gate` runs all of it), and its teeth."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fastopt_kernels.gpu.machine_code import compiling, driving
from fastopt_kernels.gpu.rows import (
    add_layer_norm,
    channel_norm_gradients,
    channel_norms,
    cross_entropy,
    cross_entropy_gradients,
    layer_norm,
    layer_norm_gradients,
    masked_softmax,
    shared,
    softmax,
    weight_norm,
)
from tests.gpu import gate, row_gate
from tests.gpu.row_gate import Arguments

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
PUBLIC = (
    softmax,
    cross_entropy,
    layer_norm,
    add_layer_norm,
    masked_softmax,
    channel_norms,
    weight_norm,
)
MODULES = (*PUBLIC, cross_entropy_gradients, layer_norm_gradients, channel_norm_gradients)
# Each function once, with branches, dtypes and targets in turn, and the longest walks on sm_90.
SAMPLE = [
    (name, branch, dtype, target)
    for name, branch, dtype, target in zip(
        row_gate.FUNCTIONS,
        itertools.cycle([*row_gate.ROWS, "odd", "odd walked"]),
        itertools.cycle((FLOAT32, BFLOAT16, torch.float16, BFLOAT16, torch.float64)),
        itertools.cycle(gate.TARGETS),
        strict=False,
    )
]
SAMPLE += [
    ("softmax", "long", BFLOAT16, "sm_90"),
    ("softmax_backward", "columns", BFLOAT16, "sm_100"),
    ("cross_entropy", "walked", BFLOAT16, "sm_90"),
    ("cross_entropy weighted", "columns walked", FLOAT32, "gfx942"),
    ("cross_entropy_probs", "long", torch.float64, "sm_90"),
    ("cross_entropy_backward weighted", "strips walked", BFLOAT16, "sm_90"),
    ("cross_entropy_probs_backward", "widest", FLOAT32, "sm_90"),
    ("layer_norm_backward", "wide", FLOAT32, "sm_90"),
]


def kernels() -> set[str]:
    found = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel")
    }
    assert found
    return found


def test_every_function_and_every_kernel_is_checked() -> None:
    public = {
        name
        for module in PUBLIC
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert {name.split()[0] for name in row_gate.FUNCTIONS} - {
        "log_softmax",
        "log_softmax_backward",
    } == public
    launched = set()
    walking = row_gate.NORMS | row_gate.RESIDUAL_NORMS | row_gate.MASKED
    for name, branch in itertools.product(walking, ("short", "walked")):
        launched |= set(names_launched(name, branch))
    for name in (*row_gate.OVER_DIM, *row_gate.CHANNEL_NORMS):
        launched |= set(names_launched(name, "short"))
    assert launched == kernels()


def names_launched(name: str, branch: str) -> list[str]:
    """Without compiling them."""
    kept, found = shared.launch, []
    shared.launch = lambda kernel, *rest, **constants: found.append(kernel.fn.__name__)
    try:
        with driving("sm_90"):
            row_gate.FUNCTIONS[name][0](Arguments(row_gate.BRANCHES[branch], FLOAT32))
    finally:
        shared.launch = kept
    return found


@pytest.mark.parametrize(("name", "branch", "dtype", "target"), SAMPLE)
def test_a_row_kernel_passes(name: str, branch: str, dtype: torch.dtype, target: str) -> None:
    faults = row_gate.faults(name, branch, dtype, target)
    assert faults == []


def compiled(function: Any, shape: tuple[int, int, int], dtype: torch.dtype = FLOAT32) -> list[Any]:
    with compiling("sm_90") as launched:
        function(Arguments(shape, dtype))
    return [each.compiled for each in launched]


def test_the_batch_compiles_nothing_anew() -> None:
    """Nor do strides and the class that is ignored: Triton would tell 1 and multiples of 16."""
    made = set()
    for n_outer, ignored in ((1, -100), (2, 1), (16, 16), (77, 0), (2**20, 2**20)):

        def function(a: Arguments, n_outer: int = n_outer, ignored: int = ignored) -> None:
            # Triton asks no more of them than their dtype and their address.
            shape, strides = (n_outer, *a.shape[1:]), (a.strides[0] * 4, 1)
            terms = (0.1, 0.0, 0.0)
            cross_entropy.cross_entropy(
                a.x, a.target, None, a.wide, a.wide, shape, strides, ignored, terms
            )
            sizes = (n_outer, a.n_cols, a.n_cols)
            layer_norm.layer_norm(a.x, a.weight, a.weight, a.x, a.both, sizes, 1e-5)

        made |= {id(kernel) for kernel in compiled(function, (1, 1024, 1))}
    assert len(made) == 2


def test_widths_of_one_block_share_a_kernel() -> None:
    function, _ = row_gate.FUNCTIONS["softmax"]
    made = {id(compiled(function, (1, n_cols, 1))[0]) for n_cols in (516, 1000, 1024)}
    assert len(made) == 1


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_row_held_in_too_few_registers_fails(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 elements a thread."""
    monkeypatch.setitem(shared.WIDEST, tl.float32, 65536)
    monkeypatch.setitem(row_gate.BRANCHES, "row", (1, 65536, 1))
    faults = row_gate.faults("cross_entropy_probs_backward", "row", FLOAT32, target)
    assert any("spills" in text for text in faults), faults


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("branch", ["row", "walked", "columns"])
def test_a_kernel_without_vectors_fails(
    branch: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "vector_of", lambda *_: 1)
    faults = row_gate.faults("softmax", branch, BFLOAT16, target)
    kinds = {text.split()[2] for text in faults if "128 bits" in text}
    assert kinds == {"loads", "stores"}, faults


@triton.jit
def _with_a_double(x):
    return tl.exp(x.to(tl.float64)).to(x.dtype)


@triton.jit
def _approximate(x):
    return 1.0 / x


@pytest.mark.usefixtures("kept_apart")
@pytest.mark.parametrize(
    ("name", "replacement", "fault", "target"),
    [
        ("exp", _with_a_double, "float64", "sm_90"),
        ("exp", _with_a_double, "float64", "gfx942"),
        ("reciprocal", _approximate, "approximate", "sm_90"),
    ],
)
def test_bad_arithmetic_fails(
    name: str, replacement: Any, fault: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, name, replacement)
    # Triton remembers a kernel by the source of what it calls: a fresh one sees the replacement.
    fresh = triton.jit(softmax.softmax_kernel.fn, do_not_specialize=shared.EXTENTS)
    monkeypatch.setattr(softmax, "softmax_kernel", fresh)
    faults = row_gate.faults("softmax", "row", FLOAT32, target)
    assert any(fault in text for text in faults), faults


@pytest.mark.usefixtures("kept_apart")
def test_a_tile_that_goes_through_shared_memory_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running maximum of neighbouring halves instead of what one thread has loaded."""

    @triton.jit
    def tiled(x, WIDTH: tl.constexpr):  # noqa: N803
        half = tl.reshape(x, (x.shape[0], WIDTH, x.shape[1] // WIDTH))
        return tl.trans(half, (0, 2, 1))

    monkeypatch.setattr(shared, "tiled", tiled)
    for name in ("online", "statistics"):
        monkeypatch.setattr(shared, name, triton.jit(getattr(shared, name).fn))
    fresh = triton.jit(softmax.logsumexp_kernel.fn, do_not_specialize=shared.EXTENTS)
    monkeypatch.setattr(softmax, "logsumexp_kernel", fresh)
    faults = row_gate.faults("logsumexp", "walked", BFLOAT16, "sm_90")
    assert any("shared memory" in text for text in faults), faults


@triton.jit
def _place_in_32_bits(n_lines, LINES: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    program = tl.program_id(0)
    return program * 0, program * LINES + tl.arange(0, LINES)


@pytest.mark.usefixtures("kept_apart")
def test_instructions_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what else the file holds: lines of the source, here."""
    counts = []
    for without_lines in "01":
        monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", without_lines)
        fresh = triton.jit(softmax.softmax_kernel.fn, do_not_specialize=shared.EXTENTS)
        monkeypatch.setattr(softmax, "softmax_kernel", fresh)
        counts.append(row_gate.check("softmax", "row", FLOAT32, "sm_90")[0].read.instructions)
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("kept_apart")
def test_offsets_in_32_bits_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 2^31 elements in all, where no row is long."""
    monkeypatch.setattr(shared, "place", _place_in_32_bits)
    fresh = triton.jit(softmax.softmax_kernel.fn, do_not_specialize=shared.EXTENTS)
    monkeypatch.setattr(softmax, "softmax_kernel", fresh)
    faults = row_gate.faults("softmax", "row", FLOAT32, "sm_90")
    assert any("32 bits" in text and "arith.muli" in text for text in faults), faults
