"""The row functions that a GPU report times: shapes, bytes, and who computes them beside fastopt.

Bytes are those that no such function can avoid, counted in tensors of x's size: `row_ops` says so
of the plain ones, LAYERS of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.gpu_device import Device
from bench.gpu_layers import LAYERS, QUICK_LAYERS, Layer, LayerWork
from bench.providers import FASTOPT, NoStepError, import_peer
from bench.row_ops import (
    CROSS_ENTROPY,
    LAYER_NORM,
    OPS,
    RMS_NORM,
    SHAPES,
    SOFTMAX,
    Function,
    Workload,
    torchs,
)
from bench.row_providers import ATEN, COMPILE, ours

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The CPU's shapes and some larger than a GPU's caches, or wider than a program's registers.
GPU_SHAPES = SHAPES | {
    "5x37": (5, 37),
    "32768x4096": (32768, 4096),
    "4096x131072": (4096, 131072),
    "1024x262144": (1024, 262144),
}
EVERY_OP = ("32768x4096", "4096x4096")
EVERY_SHAPE = (SOFTMAX, CROSS_ENTROPY, LAYER_NORM, RMS_NORM)
OTHERS = (
    "1024x262144", "4096x131072", "512x32000", "8192x1024", "65536x128", "256x1024", "32x768"
)  # fmt: skip
# Where torch.compile takes turns: Inductor compiles each case for seconds.
COMPILED = ("32768x4096", "bf16")
QUICK = "5x37"

LIGER, QUACK, FLAG_GEMS = "Liger", "quack", "FlagGems"


class Work(Protocol):
    """A function on one input; every provider gets the same values."""

    def step(self, function: Function, backward: bool) -> Callable[[], Any]: ...

    def results(self, function: Function, backward: bool) -> dict[str, Tensor]: ...

    def oracle(self, dtype: torch.dtype) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class TimedCase:
    """op: whose peers; n_bytes: forward, and forward + backward; compiled: with torch.compile

    coarse: a matrix product stands in it, whose rounding is the BLAS's
    """

    name: str
    op: str
    dtype: str
    n_elements: int
    n_bytes: tuple[int, int]
    ours: Function
    eager: Function
    make: Callable[[torch.device], Work]
    compiled: bool
    coarse: bool = False

    def work(self, device: Device) -> Work:
        return self.make(device.device)


def _op_case(name: str, shape_name: str, dtype: str) -> TimedCase:
    op, shape, width = OPS[name], GPU_SHAPES[shape_name], DTYPES[dtype]
    return TimedCase(
        f"{name} {shape_name} {dtype}",
        name,
        dtype,
        prod(shape),
        (op.traffic(width, False) * prod(shape), op.traffic(width, True) * prod(shape)),
        ours(op.function),
        torchs(op.function),
        partial(Workload, op, shape, width),
        (shape_name, dtype) == COMPILED,
    )


def _layer_case(layer: Layer, dtype: str) -> TimedCase:
    width = DTYPES[dtype]
    moved = prod(layer.shape) * width.itemsize
    forward, backward = layer.tensors
    return TimedCase(
        f"{layer.name} {'x'.join(map(str, layer.shape))} {dtype}",
        layer.name,
        dtype,
        prod(layer.shape),
        (int(moved * forward), int(moved * (forward + backward))),
        layer.call.ours,
        layer.eager or layer.call.theirs,
        partial(LayerWork, layer, width),
        layer.compiled and dtype == COMPILED[1],
        layer.coarse,
    )


def cases(quick: bool) -> Iterator[TimedCase]:
    """The most wanted first: what does not fit the time is what stands last."""
    if quick:
        yield _op_case(SOFTMAX, QUICK, "fp32")
        yield from (_layer_case(layer, "fp32") for layer in QUICK_LAYERS)
        return
    dtypes = ("bf16", "fp32")
    yield from (_op_case(op, EVERY_OP[0], dtype) for dtype, op in itertools.product(dtypes, OPS))
    yield from (_layer_case(*which) for which in itertools.product(LAYERS, dtypes))
    yield from (_op_case(op, EVERY_OP[1], dtype) for dtype, op in itertools.product(dtypes, OPS))
    for shape, dtype, op in itertools.product(OTHERS, dtypes, EVERY_SHAPE):
        yield _op_case(op, shape, dtype)


# From arguments as ours has them to those of the peer; the op's name, then the function.
PEERS: dict[str, dict[str, Callable[[Any], Function]]] = {
    LIGER: {
        SOFTMAX: lambda liger: lambda x, dim: liger.liger_softmax(x),
        CROSS_ENTROPY: lambda liger: lambda x, target: liger.liger_cross_entropy(x, target),
        LAYER_NORM: lambda liger: lambda x, n, w, b: liger.liger_layer_norm(x, w, b, 1e-5),
        RMS_NORM: lambda liger: lambda x, n, w, eps: liger.liger_rms_norm(x, w, eps),
        "add_rms_norm": lambda liger: lambda x, r, w: liger.liger_fused_add_rms_norm(x, r, w, 1e-5),
        "linear_cross_entropy": lambda liger: (
            lambda x, w, t, b: liger.liger_fused_linear_cross_entropy(x, w, t, b)
        ),
    },
    QUACK: {
        SOFTMAX: lambda quack: lambda x, dim: quack.softmax(x),
        CROSS_ENTROPY: lambda quack: lambda x, t: quack.cross_entropy(x, t, reduction="mean"),
        RMS_NORM: lambda quack: lambda x, n, w, eps: quack.rmsnorm(x, w, eps=eps),
    },
}
MODULES = {LIGER: "liger_kernel.transformers.functional", QUACK: "quack"}
# FlagGems takes ATen's place for a while: it is timed on its own, after the others.
TOGETHER = (FASTOPT, ATEN, LIGER, QUACK)


def provided(provider: str, case: TimedCase) -> Function:
    """The provider's function for this case; raises NoStepError where it has none."""
    if provider == FASTOPT:
        return case.ours
    if provider == COMPILE:
        return compiled(case.eager)
    if provider not in PEERS:
        return case.eager
    module = import_peer(MODULES[provider])
    if case.op not in PEERS[provider]:
        raise NoStepError(f"{provider} has no {case.op}")
    return PEERS[provider][case.op](module)


def compiled(function: Function) -> Function:
    """For one shape, as Inductor does best."""
    # It counts the compilations of a function over the whole process, and soon refuses more.
    torch.compiler.reset()

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    found: Function = torch.compile(call, dynamic=False)
    return found


def together(case: TimedCase) -> tuple[str, ...]:
    """Those who take turns."""
    return (*TOGETHER, COMPILE) if case.compiled else TOGETHER
