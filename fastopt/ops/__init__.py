"""Row functions as torch ops in the namespace `fastopt`, one module a family."""

from fastopt.ops import losses, norms, residual_norms, softmax

__all__ = ["losses", "norms", "residual_norms", "softmax"]
