"""batch_norm, instance_norm, group_norm: never less precise than torch, in every layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastopt import functional, nn, swap, swap_report, unswap
from tests.rows import oracle
from tests.rows.cases import INF, NAN, draw
from tests.rows.channels import CALLS, LAYOUTS, OWN, check, make, run
from tests.rows.subject import DTYPES

# torch.func.jvp's own, the first time it decomposes an operator.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_every_layout(name: str, dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](draw(5, 6, 4, 7, dtype=dtype, scale=2.0) + 1)
    given = make(x)
    check(name, given)
    upstream = LAYOUTS["pixels" if "planes" in layout else "elements apart"]
    check(name, given, upstream(draw(*x.shape, dtype=dtype, seed=32)))


SHAPES = [(9, 6), (64, 3, 2), (3, 6, 5), (2, 6, 4, 4, 4), (2, 300, 3, 3), (70, 3, 30, 31),
          (2, 3, 131, 129), (1, 6, 100), (600, 9, 1)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    """One element a channel and many, blocks that are not full, lots of images."""
    if name == "instance_norm" and (len(shape) == 2 or shape[2:] == (1,)):
        pytest.skip("one element a channel")
    for layout in ("planes", "pixels"):
        check(name, make(LAYOUTS[layout](draw(*shape))))


@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("name", CALLS)
def test_arguments_left_out(name: str, layout: str) -> None:
    x, weight, bias, mean, var = make(LAYOUTS[layout](draw(3, 6, 5, 5)))
    running = [mean, var] if "eval" in name else [None, None]
    for rest in ([None, None], [weight, None], [None, bias]):
        if "group" in name and rest[1] is not None:
            continue  # torch's own has no such gradient (2.13)
        check(name, [x, *rest, *running])
    assert x is not None
    dy = draw(*x.shape, seed=31)
    whole = run(name, functional, [x, weight, bias, mean, var], dy)
    for i, key in enumerate(("x", "weight", "bias")):
        given = [t if j == i or t is None else t.detach() for j, t in enumerate((x, weight, bias))]
        leaf = given[i].clone().requires_grad_()  # type: ignore[union-attr]
        given[i] = leaf
        y = CALLS[name](functional, *given, mean, var)
        assert oracle.same_bits(torch.autograd.grad(y, leaf, dy)[0], whole[key]), key


# Numerics.


@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("name", OWN)
def test_mean_1e4_standard_deviation_1(name: str, layout: str) -> None:
    x = (1e4 + draw(6, 9, 13, 11, dtype=torch.float64)).float()
    found = check(name, make(LAYOUTS[layout](x)), luck=4.0)
    assert found["y"].isfinite().all()


@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("name", OWN)
def test_channels_that_begin_far_from_their_mean(name: str, layout: str) -> None:
    """Moments about the first elements' mean would cancel."""
    for first in (-1e4, 1e4):
        x = draw(4, 6, 40, 41)
        x[:, :, :4] += first
        check(name, make(LAYOUTS[layout](x)), luck=2.0)


@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e18, 1e30])
def test_squares_beyond_float32(name: str, layout: str, scale: float) -> None:
    """torch's batch_norm sums in float64, and so do we where it matters."""
    x = LAYOUTS[layout](draw(4, 6, 9, 9, dtype=torch.float64) * scale).float()
    found = CALLS[name](functional, x, None, None, None, None, eps=1e-38)
    right = CALLS[name](F, x.double(), None, None, None, None, eps=1e-38)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("name", CALLS)
def test_constant_channels_and_what_is_not_finite(name: str, layout: str) -> None:
    x = draw(3, 6, 5, 5)
    x[:, 1], x[:, 2] = 3.3, 0.0
    x[0, 3, 1, 1], x[1, 4, 2, 2], x[2, 5, 0, 0] = NAN, INF, -INF
    given = make(LAYOUTS[layout](x))
    dy = draw(*x.shape, seed=31)
    mine = run(name, functional, given, dy)
    exact = run(name, F, [oracle.plain(t, torch.float64) for t in given], dy.double())
    for key in ("y", "x", "bias", "running mean"):
        found, right = mine[key].nan_to_num(7, 8, 9), exact[key].float().nan_to_num(7, 8, 9)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-3, msg=lambda t, k=key: k + t)


@pytest.mark.parametrize("name", OWN)
def test_weight_gradients_are_at_rounding(name: str) -> None:
    """Summed in float32: torch's own is off by percents where it sums in bfloat16."""
    x = draw(40, 6, 9, 9, dtype=torch.bfloat16)
    given, dy = make(x), draw(*x.shape, dtype=torch.bfloat16, seed=31)
    for layout in ("planes", "pixels"):
        found = run(name, functional, [LAYOUTS[layout](x), *given[1:]], dy)
        wide = [oracle.plain(t, torch.float64) for t in given]
        exact = run(name, F, wide, dy.double())
        for key in ("weight", "bias"):
            off = (found[key].double() - exact[key]).abs()
            assert float((off - 2**-8 * exact[key].abs()).max()) <= 1e-5 * float(exact[key].max())


@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("name", CALLS)
def test_weights_and_statistics_of_other_dtypes(name: str, layout: str) -> None:
    """float32 beside bfloat16 elements; gradients are of the dtype of what they are of."""
    for dtype, other in itertools.permutations((torch.bfloat16, torch.float32), 2):
        x = LAYOUTS[layout](draw(5, 6, 4, 4, dtype=dtype))
        given, dy = make(x, other), draw(*x.shape, dtype=dtype, seed=31)
        found = run(name, functional, given, dy)
        wide = [oracle.plain(t, torch.float64) for t in given]
        for key, right in run(name, F, wide, dy.double()).items():
            assert found[key].dtype is (dtype if key in ("x", "y") else other), key
            eps = 2 * torch.finfo(found[key].dtype).eps
            torch.testing.assert_close(
                found[key].double(), right, rtol=eps, atol=eps * float(right.abs().max())
            )


# Running statistics.


@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics(name: str, layout: str) -> None:
    """Unbiased variance, in the buffers' own dtype, and autograd is told."""
    x = LAYOUTS[layout](draw(5, 6, 4, 4) + 2)
    for dtype, momentum in itertools.product(DTYPES, (0.0, 0.3, 1.0)):
        _, _, _, mean, var = make(x, dtype)
        assert mean is not None
        assert var is not None
        versions, right = (mean._version, var._version), [oracle.plain(t) for t in (mean, var)]
        CALLS[name](functional, x, None, None, mean, var, momentum=momentum)
        assert mean._version > versions[0]
        assert var._version > versions[1]
        right = [t.double() for t in right]
        CALLS[name](F, x.double(), None, None, *right, momentum=momentum)
        for found, exact in zip((mean, var), right, strict=True):
            torch.testing.assert_close(found, exact.to(dtype), rtol=1e-6, atol=1e-7)


def test_statistics_that_a_graph_has_saved_are_noticed() -> None:
    mean, var, leaf = torch.zeros(6), torch.ones(6), torch.ones(6).requires_grad_()
    kept = (leaf * mean).sum()
    functional.batch_norm(draw(5, 6, 4), mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_modules_count_batches() -> None:
    for momentum, track in itertools.product((0.1, None), (True, False)):
        options = {"momentum": momentum, "track_running_stats": track}
        ours, theirs = (m.BatchNorm2d(6, **options) for m in (nn, torch.nn))
        for step in range(4):
            for module in (ours, theirs):
                module.train(step != 2)
            x = draw(3, 6, 4, 4, seed=step)
            torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
        assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_modules_swapped_and_back(dims: int) -> None:
    names = f"BatchNorm{dims}d", f"InstanceNorm{dims}d"
    model = torch.nn.Sequential(
        getattr(torch.nn, names[0])(6),
        getattr(torch.nn, names[1])(6, affine=True, track_running_stats=True),
        torch.nn.GroupNorm(3, 6),
    )
    x = draw(4, 6, *(3, 4, 5)[:dims])
    expected, keys = model(x), list(model.state_dict())
    swap(model)
    assert [type(m).__name__ for m in model] == [*names, "GroupNorm"]
    assert len(swap_report(model).replaced) == 3
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)
    if dims > 1:
        torch.testing.assert_close(model[1](x[0]), model[1](x[:1])[0])
    assert type(unswap(model)[0]) is getattr(torch.nn, names[0])


def test_sync_batch_norm_conversion() -> None:
    model = swap(torch.nn.Sequential(torch.nn.BatchNorm2d(6), torch.nn.ReLU()))
    model[0].running_mean.fill_(0.5)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is torch.nn.SyncBatchNorm
    assert converted[0].running_mean.eq(0.5).all()
    assert "fastopt has no SyncBatchNorm" in swap_report(swap(converted)).kept["0"]


# Determinism, autograd, compile.


@pytest.mark.parametrize("layout", ["planes", "pixels"])
@pytest.mark.parametrize("name", OWN)
def test_bits_do_not_depend_on_threads(name: str, layout: str) -> None:
    given = make(LAYOUTS[layout](draw(5, 6, 61, 53)))
    dy, kept, found = draw(5, 6, 61, 53, seed=31), torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            found.append(run(name, functional, given, dy))
    finally:
        torch.set_num_threads(kept)
    for other in found[1:]:
        for key, value in found[0].items():
            assert oracle.same_bits(other[key], value), key


@pytest.mark.parametrize("name", CALLS)
def test_derivatives_of_derivatives_and_transforms(name: str) -> None:
    x, weight, bias, mean, var = make(draw(3, 6, 2, 2, dtype=torch.float64))
    assert x is not None
    running = (mean, var) if "eval" in name else (None, None)

    def call(f: Any, *leaves: Tensor) -> Tensor:
        return CALLS[name](f, *leaves, *running)

    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    torch.autograd.gradgradcheck(lambda *a: call(functional, *a), leaves)
    tangents = tuple(torch.randn_like(t) for t in leaves)
    plain = tuple(t.detach() for t in leaves)
    for transform in (
        lambda f: torch.func.jvp(lambda *a: call(f, *a), plain, tangents)[1],
        lambda f: torch.func.vmap(lambda a: call(f, a, *plain[1:]))(torch.stack([x, x + 1])),
    ):
        torch.testing.assert_close(transform(functional), transform(F))


@pytest.mark.parametrize("training", [True, False])
def test_compile_without_a_graph_break(training: bool) -> None:
    torch._dynamo.reset()
    build = (lambda: nn.BatchNorm2d(6), lambda: nn.GroupNorm(3, 6),
             lambda: nn.InstanceNorm2d(6, track_running_stats=True))  # fmt: skip
    eager, compiled = (torch.nn.Sequential(*(b() for b in build)).train(training) for _ in "ab")
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for shape, layout in (((3, 6, 5, 4), "planes"), ((2, 6, 3, 4), "pixels")):
        xs = [LAYOUTS[layout](draw(*shape)).requires_grad_() for _ in "ab"]
        ys = [f(x) for f, x in zip((eager, function), xs, strict=True)]
        torch.testing.assert_close(*ys)
        assert ys[0].stride() == ys[1].stride()
        for y in ys:
            y.square().sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad)
    torch.testing.assert_close(dict(eager.state_dict()), dict(compiled.state_dict()))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_fake_and_meta_tensors(name: str) -> None:
    for layout in LAYOUTS.values():
        given = make(layout(draw(4, 6, 3, 5)))
        real = CALLS[name](functional, *given)
        meta = CALLS[name](functional, *(t.to("meta") for t in given if t is not None))
        assert meta.is_meta
        with torch._subclasses.FakeTensorMode() as mode:
            fake = CALLS[name](functional, *map(mode.from_tensor, given))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


# Refusals, and nothing at all.


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f.batch_norm(draw(1, 6), None, None, training=True),
        lambda f: f.batch_norm(draw(4, 6), None, None, training=False),
        lambda f: f.batch_norm(draw(4, 6), torch.zeros(5), torch.ones(5), training=True),
        lambda f: f.instance_norm(draw(4, 6, 1)),
        lambda f: f.group_norm(draw(4, 6, 2), 4),
        lambda f: f.group_norm(draw(6), 2),
        lambda f: f.group_norm(draw(4, 6), 3, draw(5)),
        lambda f: f.batch_norm(torch.ones(4, 6, dtype=torch.int64), None, None, training=True),
    ],
)
def test_what_torch_refuses_is_refused_and_says_what_came(call: Callable[[Any], Tensor]) -> None:
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        call(F)
    with pytest.raises(type(theirs.value), match=r"fastopt\.functional\.\w+ got \(") as ours:
        call(functional)
    assert str(ours.value).startswith(str(theirs.value))


@pytest.mark.parametrize("name", CALLS)
def test_no_images(name: str) -> None:
    given = make(torch.empty(0, 6, 4, 4))
    if "instance" in name:  # torch refuses, by accident
        assert CALLS[name](functional, *given).shape == (0, 6, 4, 4)
        return
    found, right = (run(name, f, given, torch.empty(0, 6, 4, 4)) for f in (functional, F))
    for key, value in right.items():
        assert oracle.same_bits(found[key].abs(), value.abs()), key


# Deliberately wrong candidates.


class SinglePass:
    """E[x^2] - E[x]^2"""

    @staticmethod
    def batch_norm(x: Tensor, m: Any, v: Any, w: Tensor, b: Tensor, training: bool) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        var = (x.square().mean((0, 2, 3), keepdim=True) - mean.square()).clamp(min=0)
        return (x - mean) * (var + 1e-5).rsqrt() * w.view(-1, 1, 1) + b.view(-1, 1, 1)


class Biased:
    """Moves the running variance to the biased one."""

    @staticmethod
    def batch_norm(x: Tensor, m: Any, v: Tensor, w: Tensor, b: Tensor, training: bool) -> Tensor:
        y = F.batch_norm(x, m, v.clone(), w, b, True)
        v.mul_(0.9).add_(0.1 * x.detach().var((0, 2, 3), correction=0))
        return y


class Negated:
    """The gradients' sign."""

    @staticmethod
    def batch_norm(x: Tensor, m: Any, v: Any, w: Tensor, b: Tensor, training: bool) -> Tensor:
        y = F.batch_norm(x, m, v, w, b, training)
        return 2 * y.detach() - y


@pytest.mark.parametrize(
    ("wrong", "shift", "what"), [(SinglePass, 1e4, " y"), (Biased, 0, "var"), (Negated, 0, " x")]
)
def test_wrong_candidates_are_refused(wrong: Any, shift: float, what: str) -> None:
    given = make(draw(4, 6, 9, 9) + shift)
    with pytest.raises(AssertionError, match=what):
        check("batch_norm", given, f=wrong, luck=4.0)
