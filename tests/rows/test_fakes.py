"""Every op's fake kernel says what the real one gives: shape, dtype, strides, device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastopt import functional as F  # noqa: N812
from fastopt.parametrizations import WeightNorm
from tests.rows.cases import draw, targets
from tests.rows.subject import DTYPES

PREFIX = "fastopt::"
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "channels of channels_last": lambda x: torch.cat([x, x], 1).contiguous(
        memory_format=torch.channels_last
    )[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand(x.shape),
    "columns apart": lambda x: torch.stack([x, x], -1)[..., 0],
}
SHAPES = ((2, 4, 3, 5), (1, 4, 1, 2), (2, 1, 3, 2), (0, 4, 3, 5), (2, 4, 0, 5))


class Compared(TorchDispatchMode):
    """Runs each op of ours as well as its fake."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        real = func(*args, **(kwargs or {}))
        if func.name().startswith(PREFIX):
            self.names.add(func.name())
            compare(func, args, real)
        return real


def compare(func: Any, args: Any, real: Any) -> None:
    args = tree_map_only(Tensor, lambda t: t.detach(), args)
    with FakeTensorMode() as mode:
        fake = func(*tree_map_only(Tensor, mode.from_tensor, args))
    given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
    reals, fakes = tree_leaves(real), tree_leaves(fake)
    assert len(reals) == len(fakes), func
    for k, (a, b) in enumerate(zip(reals, fakes, strict=True)):
        what = f"output {k} of {func}"
        for key in ("shape", "dtype", "device"):
            assert getattr(a, key) == getattr(b, key), f"{what}: {key}"
        assert strides(a) == strides(b), f"{what}: {a.stride()}, and the fake's {b.stride()}"
        assert a.storage_offset() == b.storage_offset(), what
        assert not a.numel() or a.untyped_storage().data_ptr() not in given, what


def strides(x: Tensor) -> list[int]:
    """Those that matter; in others torch's own functions differ from their fakes."""
    return [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1 and x.numel()]


Calls = Iterator[tuple[Callable[..., Any], tuple[Tensor, ...]]]


def rows(x: Tensor, other: torch.dtype) -> Calls:
    """Softmax and norms over the last dimensions; other: the dtype of weights."""
    for dim in range(x.dim()) if x.numel() else ():
        yield lambda x, d=dim: F.softmax(x, d), (x,)
        yield lambda x, d=dim: F.logsumexp(x, d), (x,)
    yield lambda x: F.logsumexp(x, (0, 2)), (x,)
    yield lambda x: F.logsumexp(x, (1, 2), True), (x,)
    yield F.scaled_masked_softmax, (x, draw(*x.shape[2:], dtype=other))
    for n in (1, 2, 3):
        shape = x.shape[-n:]
        w, b = (draw(*shape, dtype=other, seed=seed) for seed in (1, 2))
        residual = draw(*x.shape, dtype=other, seed=3)
        yield lambda x, w, b, s=shape: F.layer_norm(x, s, w, b), (x, w, b)
        yield lambda x, w, s=shape: F.rms_norm(x, s, w), (x, w)
        yield lambda x, r, w, b, s=shape: F.add_layer_norm(x, r, s, w, b), (x, residual, w, b)
        yield (
            lambda x, r, w, s=shape: F.add_rms_norm(x, r, s, w, dropout_p=0.5),
            (x, residual, w),
        )
    for dim in (0, 1, -1) if x.numel() else ():
        g = torch.norm_except_dim(x, 2, dim).detach()
        yield lambda g, v, d=dim: WeightNorm(d)(g, v), (g, x)


def channels(x: Tensor, other: torch.dtype) -> Calls:
    n = x.shape[1]
    w, b, mean = (draw(n, dtype=other, seed=seed) for seed in (1, 2, 3))
    yield lambda x, w, b: F.batch_norm(x, mean, mean.abs(), w, b), (x, w, b)
    yield lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (x, w, b)
    yield lambda x, w, b: F.group_norm(x, 1, w, b), (x, w, b)
    yield lambda x, w, b: F.instance_norm(x, None, None, w, b), (x, w, b)


def losses(x: Tensor, other: torch.dtype) -> Calls:
    n = x.shape[1]
    target, weight = targets(x.shape[0], *x.shape[2:], classes=n), draw(n, dtype=other).abs()
    for reduction in ("none", "mean", "sum"):
        options: dict[str, Any] = {"reduction": reduction, "z_loss": 0.1}
        yield lambda x, o=options: F.cross_entropy(x, target, weight, **o), (x,)
        yield lambda x, o=options: F.cross_entropy(x, x.detach().softmax(1), weight, **o), (x,)


def linear(dtype: torch.dtype, other: torch.dtype) -> Calls:
    for reduction, n in product(("none", "mean", "sum"), (0, 3)):
        x, w, b = (draw(*s, dtype=dtype) for s in ((5, n), (4, 5), (4,)))
        options: dict[str, Any] = {"reduction": reduction, "z_loss": 0.1}
        options["weight"] = draw(4, dtype=other).abs()
        for target in (targets(n, classes=4), draw(n, 4, dtype=dtype).abs()):

            def call(x: Tensor, w: Tensor, b: Tensor, t: Tensor = target, o: Any = options) -> Any:
                return F.linear_cross_entropy(x, w, t, linear_bias=b, **o)

            yield call, (x.t(), w, b)


def run(call: Callable[..., Any], tensors: tuple[Tensor, ...], dy_layout: str) -> None:
    """Forward and backward by all tensors, by none, and by each of them alone."""
    every = tuple(range(len(tensors)))
    for wanted in {every, (), *((k,) for k in every)}:
        given = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
        found = call(*given)
        outputs = [y for y in (found if isinstance(found, tuple) else (found,)) if y.requires_grad]
        leaves = [given[k] for k in wanted]
        dy = [torch.randn(y.shape).to(y.dtype) for y in outputs]
        dy = [LAYOUTS[dy_layout](d) if d.dim() == 4 else d for d in dy]
        if outputs:
            torch.autograd.grad(outputs, leaves, dy, allow_unused=True)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_fake_says(dtype: torch.dtype, mixed: bool) -> None:
    """By layout, dtypes beside each other, empty input, and gradients that are not wanted."""
    other = dtype
    if mixed:
        other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    with Compared() as compared:
        for layout, shape in product(LAYOUTS.values(), SHAPES):
            x = layout(draw(*shape, dtype=dtype))
            for calls in (rows, channels, losses):
                for k, (call, tensors) in enumerate(calls(x, other)):
                    run(call, tensors, list(LAYOUTS)[k % 3] if x.numel() else "contiguous")
        for call, tensors in linear(dtype, other):
            run(call, tensors, "contiguous")
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith(PREFIX)}
    assert {name.partition(".")[0] for name in compared.names} == {
        name.partition(".")[0] for name in registered
    }


@pytest.mark.parametrize("wanted", [[True] * 3, [False, True, False]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_cross_entropy_in_half_precision_passes_opcheck(
    dtype: torch.dtype, wanted: list[bool]
) -> None:
    """Its gradients are summed in float32, and what is not wanted is empty."""
    x, w, b = (draw(*s, dtype=dtype).requires_grad_() for s in ((5, 4), (3, 4), (3,)))
    tensors = (x, w, targets(5, classes=3), b, draw(3).abs())
    numbers = (-100, 0.1, 0.02, 5.0, 2)
    for reduction in (0, 1):
        args = (*tensors, reduction, *numbers, dtype, wanted)
        torch.library.opcheck(torch.ops.fastopt.linear_cross_entropy.default, args)
    plain = [t.detach() for t in tensors]
    args = (draw(5), *plain, *numbers, wanted)
    torch.library.opcheck(torch.ops.fastopt.linear_cross_entropy_backward.default, args)


# A deliberately wrong candidate.


def test_a_fake_that_says_something_else_is_seen() -> None:
    x = draw(2, 4, 3, 5)
    real = torch.ops.fastopt.softmax(x, 1, False)
    for wrong in (real.double(), real[:1], real.transpose(0, 1), x.clone()[None]):
        with pytest.raises(AssertionError):
            compare(torch.ops.fastopt.softmax.default, (x, 1, False), wrong)
