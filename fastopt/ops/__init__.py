"""Row functions as torch ops in the namespace `fastopt`, one module a family."""

from fastopt.ops import linear_losses, losses, norms, softmax, weight_norms

__all__ = ["linear_losses", "losses", "norms", "softmax", "weight_norms"]
