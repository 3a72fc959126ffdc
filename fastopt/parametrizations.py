"""weight_norm and spectral_norm of torch.nn.utils.parametrizations, by fused kernels.

They are registered by torch's own functions and have its classes as bases: buffers, state_dict
keys, errors and what happens on removal are torch's, and checkpoints go both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm

from fastopt.functional.routing import AS_OP, BY_TORCH, DIRECT, DTYPES, enter
from fastopt.functional.weight_norm import (
    WHOLE,
    apply_weight_norm,
    composed,
    fits,
    run_unit,
    run_weight_norm,
)

__all__ = ["spectral_norm", "weight_norm"]


class WeightNorm(_WeightNorm):
    """w = g v / ||v||, the norm over all dimensions but `dim` (-1: over all)."""

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        dim = self.dim
        route, (g, v) = enter("weight_norm", weight_g, weight_v)
        if route == BY_TORCH:
            return composed(v, g, dim)
        if not _fits(g, v, dim):
            return torch._weight_norm(v, g, dim)
        dim = dim if dim == WHOLE else dim % v.dim()
        if route == AS_OP:
            w: Tensor = torch.ops.fastopt.weight_norm(v, g, dim)[0]
            return w
        if torch.is_grad_enabled() and (v.requires_grad or g.requires_grad):
            return apply_weight_norm(v, g, dim)  # type: ignore[no-any-return]
        return run_weight_norm(v, g, dim)[0]


def _fits(g: Tensor, v: Tensor, dim: int) -> bool:
    """True where kernels take these: what they do not is torch's to do, or to refuse."""
    if v.dtype not in DTYPES or g.dtype != v.dtype or not v.dim():
        return False
    if dim == WHOLE:
        return g.numel() == 1 and fits(v, dim)
    if not -v.dim() <= dim < v.dim():
        return False
    dim %= v.dim()
    shape = [size if k == dim else 1 for k, size in enumerate(v.shape)]
    return list(g.shape) == shape and fits(v, dim)


class SpectralNorm(_SpectralNorm):
    """w / sigma, where sigma = u . W v is the largest singular value of W, by power iteration."""

    @torch.autograd.no_grad()
    def _power_method(self, weight_mat: Tensor, n_power_iterations: int) -> None:
        """u = W v / max(||W v||, eps), v = W^H u / max(||W^H u||, eps), in the buffers' memory."""
        u, v = self._u, self._v
        if not self._by_kernels(weight_mat):
            super()._power_method(weight_mat, n_power_iterations)
            return
        for _ in range(n_power_iterations):
            run_unit(torch.mv(weight_mat, v), u, self.eps)
            run_unit(torch.mv(weight_mat.t(), u), v, self.eps)
            torch.autograd.graph.increment_version((u, v))

    def _by_kernels(self, weight_mat: Tensor) -> bool:
        tensors = (weight_mat, self._u, self._v)
        route, given = enter("spectral_norm", *tensors)
        return (
            route == DIRECT
            and all(x is y for x, y in zip(given, tensors, strict=True))
            and weight_mat.dtype in DTYPES
            and all(x.dtype == weight_mat.dtype and x.is_contiguous() for x in tensors[1:])
            and 0 not in weight_mat.shape
        )


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """Make module.<name> g v / ||v||, with parameters g and v in its place.

    dim: the one with a norm of its own for each index; None (or -1): one norm of all. As
    torch.nn.utils.parametrizations.weight_norm; float32, bfloat16, float16, float64.
    Salimans & Kingma 2016, equation 2.
    """
    parametrizations.weight_norm(module, name, dim)  # type: ignore[arg-type]
    module.parametrizations[name][-1].__class__ = WeightNorm  # type: ignore[index]
    return module


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> nn.Module:
    """Make module.<name> w / sigma(w), where sigma is the largest singular value of w as a matrix.

    In training every access makes n_power_iterations steps of the power method in the buffers _u
    and _v. dim: the rows of the matrix; None: 0, or 1 for transposed convolutions. As
    torch.nn.utils.parametrizations.spectral_norm. Miyato et al. 2018, algorithm 1.
    """
    parametrizations.spectral_norm(module, name, n_power_iterations, eps, dim)
    module.parametrizations[name][-1].__class__ = SpectralNorm  # type: ignore[index]
    return module
