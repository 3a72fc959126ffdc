"""The gate for the row kernels: softmax, losses and norms, compiled ahead of time and read.

Every function for every dtype, target and branch there is in the tables of
`fastopt_kernels.gpu.rows`. A kernel fails with

- a spill, a stack frame or local memory;
- an offset in 32 bits that may not fit them (`ranges`);
- fewer 128-bit loads or stores than its tiles need, where the input is aligned;
- float64 arithmetic in anything but a float64 kernel;
- an approximate or denormal-flushing instruction but exp2 (see `rows.exp`) and those that CUDA's
  logarithm, good to 1 ulp, is made of; a division that is not correctly rounded;
- a tile that goes through shared memory in a walk along a row.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt_kernels.channels import Channels
from fastopt_kernels.gpu.machine_code import TARGETS, Launched, compiling
from fastopt_kernels.gpu.rows import (
    add_layer_norm,
    channel_norms,
    cross_entropy,
    layer_norm,
    masked_softmax,
    softmax,
    weight_norm,
)
from tests.gpu.checked import Case, Checked, checked
from tests.gpu.gate import Checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (n_outer, n_cols, n_inner)
ROWS = {
    "short": (5, 64, 1),
    "row": (3, 1024, 1),
    "wide": (2, 8192, 1),
    "widest": (2, 16384, 1),
    "walked": (2, 20480, 1),
    "long": (2, 131072, 1),
}
COLUMNS = {
    "columns": (1, 20, 32768),
    "columns walked": (1, 1000, 48),
    "strips walked": (1, 1000, 32768),
}
# No extent of these is a multiple of 16 bytes.
ODD = {"odd": (3, 781, 1), "odd walked": (2, 50257, 1), "odd columns": (3, 333, 7)}
BRANCHES = ROWS | COLUMNS | ODD
# exp2, and the logarithm's fused multiply-adds.
APPROXIMATE = {"ex2.approx.ftz.f32", "fma.rn.ftz.f32"}


class Needs(NamedTuple):
    """How often a thread reads and writes a tile of x's dtype: of a line it holds, or walks."""

    held: int
    walked: int
    stores: int


class Arguments:
    """Tensors of one shape and dtype; nothing of them is ever read."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        n_outer, self.n_cols, n_inner = self.shape = shape
        self.strides = (self.n_cols * n_inner, n_inner)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        self.x = torch.empty(shape, dtype=dtype)
        self.line = torch.empty(n_outer, n_inner, dtype=dtype)
        self.wide = torch.empty(n_outer, n_inner, dtype=wide)
        self.both = torch.empty(2, n_outer, dtype=wide)
        self.target = torch.empty(n_outer, n_inner, dtype=torch.int64)
        self.class_weight = torch.empty(self.n_cols, dtype=wide)
        self.weight = torch.empty(self.n_cols, dtype=dtype)
        self.flags = torch.empty(n_outer, self.n_cols, dtype=torch.bool)
        self.dropout = (torch.empty((), dtype=torch.int64), 2**31, 2.0)

    def over_dim(self, function: Callable[..., None], *tensors: Tensor, **options: Any) -> None:
        function(*tensors, self.shape, self.strides, **options)

    def norm(self, function: Callable[..., None], *tensors: Tensor | None, **eps: float) -> None:
        function(*tensors, (self.shape[0], self.n_cols, self.n_cols), **eps)


def _softmax_backward(a: Arguments, log: bool) -> None:
    softmax.softmax_backward(a.x, a.x, a.x, a.shape, log)


def _entropy(
    a: Arguments, weighted: bool, backward: bool, z_loss: float = 0.0, softcap: float = 0.0
) -> None:
    weight, smoothing = (a.class_weight, 0.1) if weighted else (None, 0.0)
    share = a.wide.new_empty(1) if weighted and z_loss else None
    tail = (a.shape, a.strides, -100, (smoothing, z_loss, softcap), share)
    if backward:
        cross_entropy.cross_entropy_backward(a.x, a.target, weight, a.wide, a.wide, a.x, *tail)
    else:
        cross_entropy.cross_entropy(a.x, a.target, weight, a.wide, a.wide, *tail)


def _probs(a: Arguments, backward: bool, z_loss: float = 0.0, softcap: float = 0.0) -> None:
    tail = (a.shape, a.strides, (0.1, z_loss, softcap))
    if backward:
        cross_entropy.cross_entropy_probs_backward(
            a.x, a.x, a.class_weight, a.wide, a.wide, a.x, *tail
        )
    else:
        cross_entropy.cross_entropy_probs(a.x, a.x, a.class_weight, a.wide, a.wide, *tail)


def _layer_norm_backward(a: Arguments, sums: bool) -> None:
    out = (a.x, a.weight, a.weight) if sums else (a.x, None, None)
    a.norm(layer_norm.layer_norm_backward, a.x, a.x, a.weight, a.both, *out)


def _channels(a: Arguments, pixels: bool, batch: bool) -> Channels:
    """Planes as long as a row, of eight channels; or pixels of as many channels."""
    images, n_cols, _ = a.shape
    channels, length = (n_cols, 3136) if pixels else (8, n_cols)
    strides = (channels * length, *((1, channels) if pixels else (length, 1)))
    return Channels(images, channels, length, *strides, channels if batch else 1, batch, pixels)


def _channel_norm(a: Arguments, pixels: bool) -> None:
    for batch in (True, False):
        c = _channels(a, pixels, batch)
        running = (a.wide, a.wide) if batch else (None, None)
        stats = a.wide.new_empty(3, c.n_sets)
        channel_norms.channel_norm(a.x, a.weight, a.weight, a.x, stats, running, c, 1e-5, 0.1)
    channel_norms.channel_norm(a.x, a.weight, a.weight, a.x, None, (a.wide, a.wide), c, 1e-5, None)


def _channel_norm_backward(a: Arguments, pixels: bool) -> None:
    for batch, given in ((True, False), (True, True), (False, False)):
        c = _channels(a, pixels, batch)
        out = a.x, a.weight, a.weight
        stats = a.wide.new_empty(3, c.n_sets)
        channel_norms.channel_norm_backward(a.x, a.x, a.weight, stats, *out, c, 1e-5, given)


def _add_norm(a: Arguments, centered: bool, drops: bool) -> None:
    sizes, stats = (a.shape[0], a.n_cols, a.n_cols, a.n_cols), a.both if centered else a.wide
    weights = (a.weight, a.weight if centered else None)
    options = (1e-5, 0.0 if centered else 1.0, a.dropout if drops else None, centered)
    add_layer_norm.add_norm(a.x, a.x, *weights, a.x, a.x, stats, sizes, *options)


def _add_norm_backward(a: Arguments, centered: bool, drops: bool) -> None:
    stats, dropout = a.both if centered else a.wide, a.dropout if drops else None
    outputs = (a.x if drops else None, a.x, a.weight, a.weight if centered else None)
    options = ((a.shape[0], a.n_cols), 0.0 if centered else 1.0, dropout, centered)
    add_layer_norm.add_norm_backward(a.x, a.x, a.x, a.weight, stats, *outputs, *options)


def _masked_softmax(a: Arguments, mask: Tensor | None, n_queries: int = 0) -> None:
    sizes, walk = (a.shape[0], a.n_cols, a.n_cols), (1, a.shape[0], 0, 0, a.n_cols)
    masked_softmax.masked_softmax(a.x, mask, a.x, sizes, walk, 0.125, n_queries)


def _weight_norm(a: Arguments, backward: bool) -> None:
    n_outer, n_cols, n_inner = a.shape
    sizes = (1, n_outer, n_cols) if n_inner == 1 else (n_cols, n_outer * n_inner, 1)
    if backward:
        weight_norm.weight_norm_backward(a.x, a.x, a.line, a.wide, a.x, a.line, sizes)
    else:
        weight_norm.weight_norm(a.x, a.line, a.x, a.wide, sizes)


def _unit(a: Arguments) -> None:
    weight_norm.unit(a.x, a.x, 1e-12)


# What each function launches, and the needs of its kernels.
ONCE = Needs(1, 1, 1)
OVER_DIM: dict[str, tuple[Callable[[Arguments], None], Needs]] = {
    "softmax": (lambda a: a.over_dim(softmax.softmax, a.x, a.x, log=False), Needs(1, 2, 1)),
    "log_softmax": (lambda a: a.over_dim(softmax.softmax, a.x, a.x, log=True), Needs(1, 2, 1)),
    "softmax_backward": (lambda a: _softmax_backward(a, False), Needs(2, 4, 1)),
    "log_softmax_backward": (lambda a: _softmax_backward(a, True), Needs(2, 3, 1)),
    "logsumexp": (lambda a: a.over_dim(softmax.logsumexp, a.x, a.wide), Needs(1, 1, 0)),
    "logsumexp_backward": (
        lambda a: a.over_dim(softmax.logsumexp_backward, a.line, a.x, a.wide, a.x),
        ONCE,
    ),
    "cross_entropy": (lambda a: _entropy(a, False, False), Needs(1, 1, 0)),
    "cross_entropy weighted": (lambda a: _entropy(a, True, False), Needs(1, 1, 0)),
    "cross_entropy_probs": (lambda a: _probs(a, False), Needs(2, 2, 0)),
    "cross_entropy_backward": (lambda a: _entropy(a, False, True), Needs(1, 2, 1)),
    "cross_entropy_backward weighted": (lambda a: _entropy(a, True, True), Needs(1, 2, 1)),
    "cross_entropy_probs_backward": (lambda a: _probs(a, True), Needs(2, 4, 1)),
    "cross_entropy capped": (lambda a: _entropy(a, False, False, 1e-4, 30.0), Needs(1, 1, 0)),
    "cross_entropy_probs capped": (lambda a: _probs(a, False, 1e-4, 30.0), Needs(2, 2, 0)),
    "cross_entropy_backward capped": (
        lambda a: _entropy(a, True, True, 1e-4, 30.0),
        Needs(1, 2, 1),
    ),
    "cross_entropy_probs_backward capped": (lambda a: _probs(a, True, 1e-4, 30.0), Needs(2, 4, 1)),
}
OVER_DIM |= {
    "weight_norm": (lambda a: _weight_norm(a, False), Needs(1, 2, 1)),
    "weight_norm_backward": (lambda a: _weight_norm(a, True), Needs(2, 4, 1)),
    "unit": (_unit, Needs(1, 2, 1)),
}
NORMS: dict[str, tuple[Callable[[Arguments], None], Needs]] = {
    "layer_norm": (
        lambda a: a.norm(layer_norm.layer_norm, a.x, a.weight, a.weight, a.x, a.both, eps=1e-5),
        Needs(1, 2, 1),
    ),
    "rms_norm": (
        lambda a: a.norm(layer_norm.rms_norm, a.x, a.weight, a.x, a.wide, eps=1e-5),
        Needs(1, 2, 1),
    ),
    "layer_norm_backward": (lambda a: _layer_norm_backward(a, True), Needs(2, 4, 1)),
    "layer_norm_backward dx": (lambda a: _layer_norm_backward(a, False), Needs(2, 4, 1)),
    "rms_norm_backward": (
        lambda a: a.norm(layer_norm.rms_norm_backward, a.x, a.x, a.weight, a.wide, a.x, a.weight),
        Needs(2, 4, 1),
    ),
}
# Their kernels' needs stand in BESIDE.
NONE = Needs(0, 0, 0)
CHANNEL_NORMS: dict[str, tuple[Callable[[Arguments], None], Needs]] = {
    "channel_norm": (lambda a: _channel_norm(a, False), NONE),
    "channel_norm pixels": (lambda a: _channel_norm(a, True), NONE),
    "channel_norm_backward": (lambda a: _channel_norm_backward(a, False), NONE),
    "channel_norm_backward pixels": (lambda a: _channel_norm_backward(a, True), NONE),
}
RESIDUAL_NORMS: dict[str, tuple[Callable[[Arguments], None], Needs]] = {
    "add_norm": (lambda a: _add_norm(a, True, False), Needs(2, 4, 2)),
    "add_norm dropout": (lambda a: _add_norm(a, True, True), Needs(2, 4, 2)),
    "add_norm rms": (lambda a: _add_norm(a, False, False), Needs(2, 4, 2)),
    "add_norm_backward": (lambda a: _add_norm_backward(a, True, False), Needs(3, 5, 1)),
    "add_norm_backward dropout": (lambda a: _add_norm_backward(a, True, True), Needs(3, 5, 2)),
    "add_norm_backward rms": (lambda a: _add_norm_backward(a, False, False), Needs(3, 5, 1)),
}
MASKED: dict[str, tuple[Callable[[Arguments], None], Needs]] = {
    "masked_softmax": (lambda a: _masked_softmax(a, a.flags), Needs(1, 2, 1)),
    "masked_softmax added": (lambda a: _masked_softmax(a, a.x), Needs(2, 4, 1)),
    "masked_softmax causal": (lambda a: _masked_softmax(a, None, 4), Needs(1, 2, 1)),
}
FUNCTIONS = OVER_DIM | NORMS | RESIDUAL_NORMS | MASKED | CHANNEL_NORMS
# Kernels beside the one the table speaks of: loads and stores of theirs in tiles of x's dtype.
BESIDE = {
    "norm_weight_kernel": Needs(2, 2, 0),
    "norm_sum_kernel": NONE,
    "channel_moments_kernel": Needs(1, 1, 0),
    "channel_merge_kernel": NONE,
    "channel_norm_kernel": ONCE,
    "channel_sums_kernel": Needs(2, 2, 0),
    "channel_totals_kernel": NONE,
    "channel_dx_kernel": ONCE,  # of dy; x is not read where statistics were given
}


def checked_rows(
    launched: Launched, needs: Needs, dtype: torch.dtype, target: str, branch: str
) -> Checked:
    """What keeps a kernel from passing."""
    found = checked(launched)
    needs = BESIDE.get(launched.name, needs)
    constants = launched.constants
    size = constants["LINES"] * constants["COLS"]
    threads = constants["num_warps"] * TARGETS[target].warp_size
    walked = not constants.get("WHOLE", launched.name != "norm_dx_kernel")
    if branch not in ODD:
        vectors = size * dtype.itemsize // (16 * threads)
        found.wide((needs.walked if walked else needs.held) * vectors, needs.stores * vectors)
        if walked and branch in ROWS and found.read.shared >= size:
            found.faults.append(f"{found.read.shared} bytes of shared memory")
    if dtype is not torch.float64:
        if found.read.float64:
            found.faults.append(f"{found.read.float64} float64 instructions")
        divisions = re.findall(r"\bdiv\.full\S*", launched.compiled.asm.get("ptx", ""))
        if approximate := {*found.read.approximate, *divisions} - APPROXIMATE:
            found.faults.append(f"approximate: {' '.join(sorted(approximate))}")
    return found


def check(name: str, branch: str, dtype: torch.dtype, target: str) -> list[Checked]:
    """Compile what a function launches there."""
    function, needs = FUNCTIONS[name]
    with compiling(target) as launched:
        function(Arguments(BRANCHES[branch], dtype))
    assert launched
    return [checked_rows(each, needs, dtype, target, branch) for each in launched]


def faults(name: str, branch: str, dtype: torch.dtype, target: str) -> list[str]:
    """What is wrong with any of them."""
    found = check(name, branch, dtype, target)
    return [f"{each.kernel}: {fault}" for each in found for fault in each.faults]


def all_checks(targets: Sequence[str]) -> Checks:
    """Every kernel there is, by name."""
    for target, name in itertools.product(targets, FUNCTIONS):
        branches = [b for b, shape in BRANCHES.items() if name in OVER_DIM or shape[2] == 1]
        for branch, dtype in itertools.product(branches, DTYPES):
            case = Case(target, name, str(dtype)[6:], branch)
            yield case, lambda n=name, b=branch, d=dtype, t=target: check(n, b, d, t)
