"""weight_norm and spectral_norm as parametrizations: torch's in all but the kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils import parametrize

from fastopt import nn as fnn
from fastopt.functional import weight_norm
from fastopt.parametrizations import SpectralNorm, WeightNorm
from tests.rows import oracle
from tests.rows.cases import draw, same
from tests.rows.problem import plain
from tests.rows.test_determinism import threads

# torch's own forward derivatives are scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

ours = fnn.parametrizations
F64 = torch.float64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, F64)
# Shapes, and dims with norms of their own: rows, strips of columns, one norm of all.
SHAPES = [((37, 67), 0), ((300, 17), 1), ((9, 5, 7), 0), ((70, 5, 3), 1), ((20, 4, 3), 2)]
ALL = [((40,), -1), ((40,), 0), ((9, 11), -1), ((300, 40, 4), -1), ((1, 6), 1), ((5, 1, 1), 0)]


def sides(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """v, g and an upstream gradient."""
    v = draw(*shape, dtype=dtype, seed=1)
    g = torch.norm_except_dim(v.double(), 2, dim)
    return (
        v,
        (g * (1 + 0.3 * draw(*g.shape, dtype=F64, seed=2))).to(dtype),
        draw(*shape, dtype=dtype),
    )


def results(function: Any, v: Tensor, g: Tensor, dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [plain(x, dtype).requires_grad_() for x in (v, g)]
    w = function(*leaves)
    return [w.detach(), *torch.autograd.grad(w, leaves, dy.to(dtype))]


def check(shape: tuple[int, ...], dim: int, dtype: torch.dtype, function: Any) -> None:
    given = sides(shape, dim, dtype)

    def torchs(v: Tensor, g: Tensor) -> Tensor:
        return torch._weight_norm(v, g, dim)

    mine, exact = results(function, *given, dtype), results(torchs, *given, F64)
    # What a gradient is the difference of, element by element.
    terms = (given[1].double() / torch.norm_except_dim(given[0].double(), 2, dim)).abs().max()
    size = float(terms * given[2].double().abs().max())
    names = ("w", "grad v", "grad g")
    for name, x, y, right in zip(names, mine, results(torchs, *given, dtype), exact, strict=True):
        assert (x.shape, x.dtype) == (right.shape, dtype)
        # dg is a sum of dy times a unit vector: 1 is its size.
        floor = {"w": 0.0, "grad v": size, "grad g": 1.0}[name]
        bounds = oracle.Bounds(floor=floor, luck=1.5)
        oracle.assert_not_worse(f"{name} of {shape} {dim}", x, y, right, dtype, bounds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_norm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_norm, "ONE_ROW", 100)
    for shape, dim in [*SHAPES, *ALL]:
        check(shape, dim, dtype, lambda v, g, dim=dim: WeightNorm(dim)(g, v))


def test_weight_norm_of_what_is_not_contiguous() -> None:
    v, g, dy = sides((9, 12), 0, torch.float32)
    found = results(lambda v, g: WeightNorm(0)(g, v.t().contiguous().t()), v, g, dy, v.dtype)
    same(found, results(lambda v, g: WeightNorm(0)(g, v), v, g, dy, v.dtype))


def test_bits_do_not_depend_on_threads() -> None:
    for shape, dim in (((4000, 30), 1), ((4000, 30), -1), ((30, 4000), 0)):
        v, g, dy = sides(shape, dim, torch.float32)
        found = []
        for n in (1, 2):
            with threads(n):
                found.append(results(lambda v, g, d=dim: WeightNorm(d)(g, v), v, g, dy, v.dtype))
        assert all(map(oracle.same_bits, *found))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_derivatives_of_any_kind(dim: int) -> None:
    """torch's own second derivative is wrong for the first dim and the last (2.13)."""
    v, g, _ = sides((3, 4), dim, F64)
    leaves = [x.clone().requires_grad_() for x in (v, g)]

    def norm(v: Tensor, g: Tensor) -> Tensor:
        return WeightNorm(dim)(g, v)

    assert gradcheck(norm, leaves, check_batched_grad=True)
    assert gradgradcheck(norm, leaves)
    many = torch.stack([v, 2 * v])
    right = torch.stack([torch._weight_norm(v, g, dim) for v in many])
    same(torch.vmap(lambda v: norm(v, g))(many), right)
    same(torch.func.jvp(norm, (v, g), (v, g)), (norm(v, g), norm(v, g)))


def test_the_ops_pass_opcheck() -> None:
    v, g, dy = sides((4, 5), 0, torch.float32)
    args = (v.requires_grad_(), g.requires_grad_(), 0)
    torch.library.opcheck(torch.ops.fastopt.weight_norm.default, args)
    norms = weight_norm.run_weight_norm(v.detach(), g.detach(), 0)[1]
    args = (dy, v.detach(), g.detach(), norms, 0)
    torch.library.opcheck(torch.ops.fastopt.weight_norm_backward.default, args)


# As parametrizations.

MODULES: dict[str, Any] = {
    "linear": lambda: nn.Linear(7, 5),
    "conv": lambda: nn.Conv1d(4, 6, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
}
CALLS: dict[str, dict[str, Any]] = {
    "weight_norm": {},
    "weight_norm dim 1": {"dim": 1},
    "weight_norm dim None": {"dim": None},
    "spectral_norm": {},
    "spectral_norm dim 1": {"dim": 1, "n_power_iterations": 2},
}


def pair(call: str, module: str) -> tuple[nn.Module, nn.Module]:
    """The same module by ours and by torch's."""
    made = []
    for side in (ours, theirs):
        torch.manual_seed(0)
        layer = MODULES[module]()
        made.append(getattr(side, call.split()[0])(layer, **CALLS[call]))
    return made[0], made[1]


def assert_alike(mine: nn.Module, right: nn.Module) -> None:
    assert list(mine.state_dict()) == list(right.state_dict())
    torch.testing.assert_close(dict(mine.state_dict()), dict(right.state_dict()))
    x = (
        draw(3, 7)
        if isinstance(mine, nn.Linear)
        else draw(*(2, 4, 9, 9)[: 2 + len(mine.kernel_size)])
    )
    found = []
    for layer in (mine, right):
        y = layer(x)
        parameters = list(layer.parameters())
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), parameters)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("call", CALLS)
def test_as_torchs(call: str, module: str) -> None:
    """Values, gradients, buffers after steps of the power method, and state_dicts both ways."""
    mine, right = pair(call, module)
    kind = SpectralNorm if "spectral" in call else WeightNorm
    assert type(mine.parametrizations.weight[0]) is kind  # type: ignore[union-attr, index]
    for _ in range(3):
        assert_alike(mine, right)
    mine.eval()
    right.eval()
    before = copy.deepcopy(mine.state_dict())
    assert_alike(mine, right)
    same(dict(mine.state_dict()), dict(before))
    torch.manual_seed(1)
    for target, source in ((mine, pair(call, module)[1]), (right, pair(call, module)[0])):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.1)
        target.load_state_dict(source.state_dict())
        assert_alike(target.eval(), source.eval())
    parametrize.remove_parametrizations(mine, "weight")
    parametrize.remove_parametrizations(right, "weight")
    assert_alike(mine, right)


def test_keys_of_the_old_weight_norm_are_read() -> None:
    mine, _ = pair("weight_norm", "linear")
    state = {"weight_g": torch.ones(5, 1), "weight_v": draw(5, 7), "bias": torch.zeros(5)}
    mine.load_state_dict(dict(state))
    torch.testing.assert_close(mine.weight, F.normalize(state["weight_v"], dim=1))


@pytest.mark.parametrize("call", ["weight_norm", "spectral_norm"])
def test_compiled_in_one_graph(call: str) -> None:
    torch._dynamo.reset()
    mine, right = pair(call, "linear")
    x = draw(3, 7)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), right(x))
    torch.testing.assert_close(dict(mine.state_dict()), dict(right.state_dict()))


def test_two_forwards_before_a_backward() -> None:
    """The buffers move between them, and the first backward does not see it."""
    mine, right = pair("spectral_norm", "linear")
    losses = [(layer(draw(3, 7)) - layer(draw(3, 7, seed=1))).sum() for layer in (mine, right)]
    found = [
        torch.autograd.grad(loss, list(layer.parameters()))
        for loss, layer in zip(losses, (mine, right), strict=True)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_vectors(dtype: torch.dtype) -> None:
    for n, scale in ((1, 1.0), (67, 3.0), (1030, 0.01)):
        x = draw(n, dtype=dtype, scale=scale)
        out = torch.empty_like(x)
        weight_norm.run_unit(x, out, 1e-12)
        right = F.normalize(x.double(), dim=0)
        torchs = F.normalize(x, dim=0)
        oracle.assert_not_worse("unit", out, torchs, right, dtype, oracle.Bounds())
    zero = torch.zeros(9, dtype=dtype)
    weight_norm.run_unit(zero, zero, 1e-6)
    assert not zero.any()


@pytest.mark.parametrize(
    ("call", "options", "error", "says"),
    [
        ("weight_norm", {"name": "wait"}, ValueError, "wait"),
        ("spectral_norm", {"name": "wait"}, ValueError, "wait"),
        ("spectral_norm", {"dim": 5}, IndexError, "Dimension out of range"),
        ("spectral_norm", {"n_power_iterations": 0}, ValueError, "positive"),
    ],
)
def test_bad_input_is_refused(call: str, options: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        getattr(ours, call)(nn.Linear(7, 5), **options)


# Deliberately wrong candidates.


@pytest.mark.parametrize(
    "candidate",
    [
        lambda v, g: v,
        lambda v, g: v * (g / v.norm()),
        lambda v, g: v * (g / v.detach().norm(dim=1, keepdim=True)),
    ],
    ids=["no-op", "one norm of all", "the norm is no constant"],
)
def test_a_wrong_candidate_is_refused(candidate: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check((37, 67), 0, torch.float32, candidate)
