"""fastopt: the optimizers of torch.optim as fused kernels, one launch for the whole model.

    import fastopt
    optimizer = fastopt.optim.AdamW(model.parameters(), lr=1e-3)   # torch's signature
    optimizer = fastopt.swap(optimizer)                            # or turn a live one into ours
    model = fastopt.swap(model)                                    # its norms, softmax and losses

Importing this costs little: a backend (Numba on CPU, Triton on GPU) is imported by the first step
on its device.
"""

from fastopt import functional, nn, optim
from fastopt.amp import GradScaler
from fastopt.swap import SwapReport, swap, swap_report, unswap
from fastopt.wrappers import of

__all__ = [
    "GradScaler",
    "SwapReport",
    "functional",
    "nn",
    "of",
    "optim",
    "swap",
    "swap_report",
    "unswap",
]
__version__ = "0.1.0"
