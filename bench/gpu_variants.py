"""The ways to step that a GPU report times: plain, clipped, by storage; what each has to move, and
what its user would write with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastopt
from bench.providers import (
    FASTOPT,
    FOREACH,
    FUSED,
    HYPERPARAMETERS,
    OPTIMIZERS,
    STATES,
    import_peer,
)
from bench.row_providers import COMPILE
from fastopt_kernels.chunks import BLOCK_8BIT

BITSANDBYTES = "bitsandbytes"
LIMIT = 1.0
_FLAGS: dict[str, dict[str, Any]] = {
    FUSED: {"fused": True},
    FOREACH: {"foreach": True},
    COMPILE: {"foreach": True},
}
Step = Callable[[], Any]


@dataclass(frozen=True)
class Variant:
    """options: of fastopt's class; kept: bytes an element of what a rounding keeps"""

    name: str
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    kept: int = 0

    @property
    def clips(self) -> bool:
        return "max_grad_norm" in self.options

    @property
    def codes(self) -> bool:
        return self.options.get("state_dtype") == "8bit"

    def serves(self, optimizer: str) -> bool:
        """Whether the class takes these options, as it says itself."""
        try:
            self._ours(optimizer, [torch.nn.Parameter(torch.zeros(1, dtype=self.dtype))])
        except ValueError:
            return False
        return True

    def n_bytes(self, optimizer: str) -> float:
        """An element's, that no such step can avoid: read g, read and write p and the states; g
        once more for its norm."""
        width, states = self.dtype.itemsize, STATES[optimizer]
        state = 1 + 4 / BLOCK_8BIT if self.codes else width
        return width * (3 + self.clips) + 2 * (states * state + self.kept)

    def providers(self, compiled: bool) -> tuple[str, ...]:
        """Who takes turns; torch has no states of 8 bits, so its own stand beside ours."""
        own = (BITSANDBYTES,) * self.codes + (COMPILE,) * (compiled and not self.clips)
        return (FASTOPT, FUSED, FOREACH, *own)

    def _ours(self, optimizer: str, params: Sequence[Any], **more: Any) -> Any:
        options = HYPERPARAMETERS[optimizer] | self.options | more
        return getattr(fastopt.optim, optimizer)(params, **options)

    def optimizer(self, provider: str, name: str, params: Sequence[Any], **more: Any) -> Any:
        """The provider's optimizer; raises where it has none."""
        if provider == FASTOPT:
            return self._ours(name, params, **more)
        if provider == BITSANDBYTES:
            found = getattr(import_peer("bitsandbytes.optim"), f"{name}8bit")
            return found(params, **HYPERPARAMETERS[name] | more)
        options = HYPERPARAMETERS[name] | _FLAGS[provider] | more
        return getattr(torch.optim, name)(params, **options)

    def step(self, provider: str, name: str, params: list[Any], **more: Any) -> Step:
        """One whole step: with torch, the clipping stands before it."""
        optimizer = self.optimizer(provider, name, params, **more)
        if provider == COMPILE:
            return torch.compile(optimizer.step)
        if provider == FASTOPT or not self.clips:
            step: Step = optimizer.step
            return step

        def clip_and_step() -> Tensor:
            norm = torch.nn.utils.clip_grad_norm_(params, LIMIT, foreach=True)
            optimizer.step()
            return norm

        return clip_and_step


PLAIN = Variant("fp32")
_B16 = torch.bfloat16
VARIANTS = {
    variant.name: variant
    for variant in (
        PLAIN,
        Variant("bf16", _B16),
        Variant("fp32 clipped", options={"max_grad_norm": LIMIT}),
        Variant("fp32 8-bit", options={"state_dtype": "8bit"}),
        Variant("bf16 stochastic", _B16, {"param_rounding": "stochastic"}),
        Variant("bf16 kahan", _B16, {"param_rounding": "kahan"}, 2),
        Variant("bf16 master", _B16, {"param_rounding": "master"}, 2),
        Variant("bf16 master 8-bit", _B16, {"param_rounding": "master", "state_dtype": "8bit"}, 2),
        Variant("fp32 averaged", options={"ema_decay": 0.999}, kept=4),
        Variant("fp32 watched", options={"telemetry": True}),
    )
}
# Asked of every optimizer; the others of AdamW.
EVERY = ("fp32", "fp32 clipped", "fp32 8-bit", "bf16 stochastic")
ORDERED = ("AdamW", "SGD", *(name for name in OPTIMIZERS if name not in ("AdamW", "SGD")))
