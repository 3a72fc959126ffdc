"""The loss of a linear layer and normalized weights, beside torch's own, and the memory they take.

Traffic is what cannot be left out: of linear_cross_entropy x, the weight and their gradients
(its time is that of three matrix products); of weight_norm v and w, then dw, v and dv.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from bench.function_cases import FunctionCase
from fastopt import functional
from fastopt.parametrizations import WeightNorm

N_TOKENS, N_CLASSES, WIDTH = 4096, 32000, 512


def _layer(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(N_TOKENS, WIDTH, generator=random).to(dtype)
    weight = (torch.randn(N_CLASSES, WIDTH, generator=random) * WIDTH**-0.5).to(dtype)
    target = torch.randint(N_CLASSES, (N_TOKENS,), generator=random)
    return x.requires_grad_(), weight.requires_grad_(), target


def _unfused(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def _linear_case(dtype: torch.dtype) -> FunctionCase:
    n_bytes = dtype.itemsize * (N_TOKENS + N_CLASSES) * WIDTH
    return FunctionCase(
        name=f"linear_cross_entropy {N_TOKENS} x {N_CLASSES} x {WIDTH}",
        dtype=dtype,
        inputs=lambda: _layer(dtype),
        ours=functional.linear_cross_entropy,
        theirs=_unfused,
        bytes_moved=(n_bytes, 2 * n_bytes),
        goal=(1.0, 1.0),
    )


def _weight(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return v.requires_grad_(), torch.norm_except_dim(v.detach(), 2, dim).requires_grad_()


def _norm_case(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> FunctionCase:
    norm, n_bytes = WeightNorm(dim), dtype.itemsize * torch.Size(shape).numel()
    return FunctionCase(
        name=f"weight_norm {' x '.join(map(str, shape))}, dim {dim if dim >= 0 else None}",
        dtype=dtype,
        inputs=lambda: _weight(shape, dim, dtype),
        ours=lambda v, g: norm(g, v),
        theirs=lambda v, g: torch._weight_norm(v, g, dim),
        bytes_moved=(2 * n_bytes, 5 * n_bytes),
        goal=(1.0, 1.0),
    )


CASES: list[FunctionCase] = [
    _linear_case(torch.float32),
    _linear_case(torch.bfloat16),
    *[
        _norm_case(shape, dim, dtype)
        for shape, dim in [
            ((1024, 4096), 0),
            ((1024, 4096), 1),
            ((1024, 4096), -1),
            ((512, 256, 7), 0),
            ((512, 256, 7), 1),
        ]
        for dtype in (torch.float32, torch.bfloat16)
    ],
]


def _step(case: FunctionCase, function: Callable[..., Tensor]) -> Callable[[], object]:
    inputs = case.inputs()
    leaves = [x for x in inputs if x.requires_grad]

    def step() -> object:
        y = function(*inputs)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return step


def peak_bytes(name: str, which: str, dtype: str = "float32") -> int:
    """By how much the resident memory of a fresh process grows at its peak, over forward and
    backward; kernels are compiled, and libraries loaded, on a small problem before."""
    code = f"from bench.linear_cases import _peak; print(_peak({name!r}, {which!r}, {dtype!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _peak(name: str, which: str, dtype: str) -> int:
    case = next(c for c in CASES if c.name.startswith(name) and str(c.dtype) == f"torch.{dtype}")
    function = case.ours if which == "ours" else case.theirs
    if name == "linear_cross_entropy":
        x, weight, target = _layer(case.dtype)
        small = x[:64].detach().requires_grad_(), weight[:64].detach().requires_grad_()
        function(*small, target[:64] % 64).backward()
    step = _step(case, function)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
