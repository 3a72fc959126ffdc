"""The row functions on a GPU: which cases are timed, and who computes them beside fastopt."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.providers import FASTOPT, NoStepError, import_peer
from bench.row_ops import (
    CROSS_ENTROPY,
    LAYER_NORM,
    OPS,
    RMS_NORM,
    SHAPES,
    SOFTMAX,
    Function,
    Shape,
)
from bench.row_providers import ATEN, COMPILE, PROVIDERS

# The CPU's shapes and two that are larger than a GPU's caches.
GPU_SHAPES = SHAPES | {"32768x4096": (32768, 4096), "4096x131072": (4096, 131072)}
EVERY_OP = ("32768x4096", "4096x4096")
EVERY_SHAPE = (SOFTMAX, CROSS_ENTROPY, LAYER_NORM, RMS_NORM)
QUICK = "5x37"

LIGER, QUACK, FLAG_GEMS = "Liger", "quack", "FlagGems"


@dataclass(frozen=True)
class SpeedCase:
    """An op on one shape and dtype, forward alone and forward + backward."""

    op: str
    shape_name: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape_name} {self.dtype}"

    @property
    def shape(self) -> Shape:
        return (5, 37) if self.shape_name == QUICK else GPU_SHAPES[self.shape_name]


def _cases() -> list[SpeedCase]:
    """The most wanted first: what does not fit the time is what stands last."""
    dtypes = ("bf16", "fp32")
    cases = [SpeedCase(op, s, d) for s, d, op in itertools.product(EVERY_OP, dtypes, OPS)]
    others = ("4096x131072", "512x32000", "8192x1024", "65536x128", "256x1024", "32x768")
    return cases + [
        SpeedCase(op, s, d) for s, d, op in itertools.product(others, dtypes, EVERY_SHAPE)
    ]


SPEED_CASES = _cases()


# From arguments as `row_ops` has them to those of the peer; the op's name, then the function.
PEERS: dict[str, dict[str, Callable[[Any], Function]]] = {
    LIGER: {
        SOFTMAX: lambda liger: lambda x, dim: liger.liger_softmax(x),
        CROSS_ENTROPY: lambda liger: lambda x, target: liger.liger_cross_entropy(x, target),
        LAYER_NORM: lambda liger: lambda x, n, w, b: liger.liger_layer_norm(x, w, b, 1e-5),
        RMS_NORM: lambda liger: lambda x, n, w, eps: liger.liger_rms_norm(x, w, eps),
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


def provided(provider: str, op: str) -> Function:
    """The provider's function for this op; raises NoStepError where it has none."""
    if provider not in PEERS:
        return PROVIDERS[ATEN if provider == FLAG_GEMS else provider](OPS[op].function)
    module = import_peer(MODULES[provider])
    if op not in PEERS[provider]:
        raise NoStepError(f"{provider} has no {op}")
    return PEERS[provider][op](module)


def together(compiled: bool) -> tuple[str, ...]:
    """Those who take turns."""
    return (*TOGETHER, COMPILE) if compiled else TOGETHER
