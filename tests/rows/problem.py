"""A call of an op, what it gives in float64, and how large the terms are that it adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.rows.subject import DIFFERENTIABLE, NORMS, TORCH, Function

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A call and the gradient of what it returns.

    inputs: tensors (or None) by torch's argument names; options: the other arguments; upstream:
    the gradient of the output, None where it is not differentiated; wanted: the inputs to
    differentiate by, those torch takes unless said otherwise
    """

    name: str
    inputs: Mapping[str, Tensor | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    upstream: Tensor | None = None
    wanted: Sequence[str] | None = None

    @property
    def differentiated(self) -> list[str]:
        wanted = DIFFERENTIABLE[self.name] if self.wanted is None else self.wanted
        return [key for key in wanted if self.inputs.get(key) is not None]

    def run(self, function: Function) -> Values:
        """The output, and the gradients as "grad input" and so on."""
        given = {
            key: x.detach().requires_grad_() if key in self.differentiated and x is not None else x
            for key, x in self.inputs.items()
        }
        output = function(**given, **self.options)
        found = {"output": output.detach()}
        leaves = [given[key] for key in self.differentiated]
        if self.upstream is not None and leaves:
            grads = torch.autograd.grad(output, leaves, self.upstream)
            names = [f"grad {key}" for key in self.differentiated]
            found.update(zip(names, grads, strict=True))
        return found

    def cast(self, dtype: torch.dtype | None) -> Problem:
        """The same with floating tensors as contiguous copies, in `dtype` if there is one."""
        return replace(
            self,
            inputs={key: plain(x, dtype) for key, x in self.inputs.items()},
            upstream=plain(self.upstream, dtype),
        )

    def exact(self) -> Values:
        """What there is in float64, from the values that the dtype asked for can hold."""
        wide = self.cast(torch.float64)
        options = dict(wide.options)
        dtype = options.pop("dtype", None)
        inputs = dict(wide.inputs)
        if dtype is not None:
            inputs["input"] = plain(plain(self.inputs["input"], dtype), torch.float64)
        if self.name == "rms_norm" and options.get("eps") is None:
            options["eps"] = epsilon(computed(self.inputs["input"]))
        found = replace(wide, inputs=inputs, options=options).run(TORCH[self.name])
        if self.name == "logsumexp" and "grad input" in found:
            found["grad input"] = self._by_softmax(found["grad input"])
        return found

    def _by_softmax(self, torchs: Tensor) -> Tensor:
        """dx = dlse softmax(x): torch's exp(x - lse) is no softmax where lse is rounded."""
        x = plain(self.inputs["input"], torch.float64)
        dlse = plain(self.upstream, torch.float64)
        if not x.dim():
            return torchs
        dims = self.row_dims("grad input")
        if not self.options.get("keepdim"):
            for dim in sorted(d % x.dim() for d in dims):
                dlse = dlse.unsqueeze(dim)
        e = (x - x.amax(dims, keepdim=True)).exp() if x.numel() else x
        right = dlse * e / e.sum(dims, keepdim=True)
        return torch.where(right.isfinite() & torchs.isfinite(), right, torchs)

    def terms(self) -> Values:
        """How large what is added up to each gradient is, element by element: it may cancel."""
        wide = self.cast(torch.float64)
        x, dy = wide.inputs["input"], wide.upstream
        if x is None or dy is None:
            return {}
        if self.name in ("softmax", "log_softmax") and x.dim():
            # dx = y (dy - sum dy y); of the logarithm, dx = dy - exp(y) sum dy
            dim = self.options["dim"]
            y = x.softmax(dim)
            inner, outer = (y, y) if self.name == "softmax" else (torch.ones_like(y), y)
            total = (dy * inner).norm(dim=dim, keepdim=True)
            return {"grad input": torch.maximum(dy.abs() * inner, total * outer)}
        # A gradient is linear in its upstream: with random signs little cancels.
        generator = torch.Generator().manual_seed(7)
        signs = torch.randint(0, 2, dy.shape, generator=generator) * 2 - 1
        found = replace(self, upstream=dy * signs).exact()
        if self.name in NORMS and "grad input" in found:
            # dx = rstd (w dy - ...), and in a row of one or two numbers next to nothing is left.
            weight = wide.inputs.get("weight")
            scaled = dy if weight is None else dy * weight
            found["grad input"] = scaled * self._rstd(x)
        if self.name in NORMS and "grad weight" in found:
            rows = tuple(range(x.dim() - len(self.options["normalized_shape"])))
            found["grad weight"] = torch.maximum(found["grad weight"].abs(), typical(dy, rows))
        return found

    def _rstd(self, x: Tensor) -> Tensor:
        """1 / sqrt(mean square + eps) of a norm's rows."""
        dims = self.row_dims("output")
        if self.name == "layer_norm":
            x = x - x.mean(dims, keepdim=True)
        eps = self.options.get("eps")
        if eps is None:
            eps = 1e-5 if self.name == "layer_norm" else epsilon(computed(self.inputs["input"]))
        return (x.square().mean(dims, keepdim=True) + eps).rsqrt()

    def moved(self) -> Values:
        """How far float64 goes where its input is off by one rounding of float64."""
        wide, step = self.cast(torch.float64), 1e-9
        exact = wide.exact()
        x = wide.inputs["input"]
        assert x is not None
        found = {key: torch.zeros_like(value) for key, value in exact.items()}
        generator = torch.Generator().manual_seed(7)
        signs = torch.randint(0, 2, x.shape, generator=generator).double() * 2 - 1
        alternating = (1 - torch.arange(x.numel()) % 2 * 2).double().view(x.shape)
        for sign in (signs, alternating):
            near = replace(wide, inputs={**wide.inputs, "input": x * (1 + step * sign)}).exact()
            for key, most in found.items():
                there = (near[key] - exact[key]).abs().nan_to_num(0.0, 0.0)
                torch.maximum(most, there * (epsilon(torch.float64) / step), out=most)
        if self.name == "layer_norm" and x.numel():
            # A mean that is off by a rounding moves the row as a whole.
            dims = self.row_dims("output")
            share = x.abs().amax(dims, keepdim=True) * self._rstd(x) * epsilon(torch.float64)
            terms = {"output": torch.ones_like(x), **self.terms()}
            for key in ("output", "grad input"):
                if key in found:
                    found[key] += (share * terms[key].abs()).nan_to_num(0.0, 0.0)
            if "grad weight" in found and wide.upstream is not None:
                rows = tuple(range(x.dim() - len(dims)))
                each = (wide.upstream * share).nan_to_num(0.0, 0.0)
                found["grad weight"] += typical(each, rows)
        return found

    def row_dims(self, key: str) -> tuple[int, ...]:
        """The dims of one row, of the output or of a gradient."""
        x = self.inputs["input"]
        assert x is not None
        if key in ("grad weight", "grad bias") or x.dim() == 0:
            return ()
        if self.name in NORMS:
            return tuple(range(-len(self.options["normalized_shape"]), 0))
        if self.name == "cross_entropy":
            return () if key == "output" else (min(1, x.dim() - 1),)
        if self.name == "logsumexp" and key == "output":
            return ()
        dims = self.options["dim"]
        return (dims,) if isinstance(dims, int) else tuple(dims)

    def floor(self, key: str) -> float:
        """The least that a row counts as large: what cancels on the way was larger.

        A loss is the log of a sum whose largest term is 1, its gradient p_c - [c = t].
        """
        if self.name != "cross_entropy" or key not in ("output", "grad input"):
            return 0.0
        weight = self.inputs.get("weight")
        heaviest = 1.0 if weight is None else float(weight.double().abs().max())
        if key == "output" or self.upstream is None:
            return heaviest
        mean = self.options.get("reduction", "mean") == "mean"
        dloss = largest(self.upstream) / (max(self._denominator(), 1e-9) if mean else 1.0)
        return heaviest * dloss

    def _denominator(self) -> float:
        """What reduction="mean" divides by."""
        x, target = self.inputs["input"], self.inputs["target"]
        assert x is not None
        assert target is not None
        if target.is_floating_point():
            return x.numel() / x.shape[min(1, x.dim() - 1)]
        target = target.long()
        kept = target[target != self.options.get("ignore_index", -100)]
        weight = self.inputs.get("weight")
        return float(len(kept) if weight is None else weight.double()[kept].sum())


def computed(x: Tensor | None) -> torch.dtype:
    """What torch and ours compute in."""
    return torch.float64 if x is not None and x.dtype is torch.float64 else torch.float32


def typical(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The size of a sum over rows, of terms with any signs."""
    return torch.linalg.vector_norm(x, dim=rows) if rows else x.abs()


def epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def plain(x: Any, dtype: torch.dtype | None = None) -> Any:
    """A contiguous copy with memory of its own, floating values in dtype; None as it is."""
    if x is None:
        return None
    x = x.detach().clone(memory_format=torch.contiguous_format)
    return x.to(dtype) if dtype is not None and x.is_floating_point() else x


def largest(x: Tensor) -> float:
    return float(x.detach().double().abs().max()) if x.numel() else 0.0
