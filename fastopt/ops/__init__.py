"""Row functions as torch ops in the namespace `fastopt`, one module a family."""

from fastopt.ops import (
    channel_norms,
    linear_losses,
    losses,
    masked_softmax,
    norms,
    residual_norms,
    softmax,
    weight_norms,
)

__all__ = [
    "channel_norms",
    "linear_losses",
    "losses",
    "masked_softmax",
    "norms",
    "residual_norms",
    "softmax",
    "weight_norms",
]
