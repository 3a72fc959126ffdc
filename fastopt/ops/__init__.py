"""Row functions as torch ops in the namespace `fastopt`, one module a family."""

from fastopt.ops import (
    channel_norms,
    losses,
    masked_softmax,
    norms,
    residual_norms,
    softmax,
)

__all__ = ["channel_norms", "losses", "masked_softmax", "norms", "residual_norms", "softmax"]
