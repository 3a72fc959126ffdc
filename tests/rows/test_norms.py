"""layer_norm, rms_norm: never less precise than torch, weight gradients at rounding."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tests.rows import cases, oracle
from tests.rows.cases import draw, problem
from tests.rows.problem import Problem
from tests.rows.subject import DIFFERENTIABLE, DTYPES, MODULES, NORMS, OURS, TORCH, Function

LOW = (torch.bfloat16, torch.float16)
COLUMNS = (1, 2, 3, 7, 8, 16, 17, 63, 64, 65, 129, 781, 1025)


def without(made: Problem, *keys: str) -> Problem:
    return replace(made, inputs={key: x for key, x in made.inputs.items() if key not in keys})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_rows_of_every_width(name: str, dtype: torch.dtype) -> None:
    for n_cols in COLUMNS:
        x = draw(13, n_cols, dtype=dtype, scale=3.0, seed=n_cols)
        # One column has no variance: what is left of it is noise in torch's too.
        oracle.check(problem(name, x + 0.5, eps=1e-3))


@pytest.mark.parametrize("rows", [1, 2, 3, 31, 32, 33, 127, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_any_number_of_rows(name: str, dtype: torch.dtype, rows: int) -> None:
    """Weight gradients are sums over blocks of rows: below, at and above what a block holds."""
    oracle.check(problem(name, draw(rows, 37, dtype=dtype, seed=rows)))


@pytest.mark.parametrize("shape", [(3,), (5, 7), (4, 5, 7)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_normalized_shape_of_several_dims(name: str, shape: tuple[int, ...]) -> None:
    for outer, dtype in itertools.product([(), (6,), (2, 3)], (torch.float32, torch.bfloat16)):
        x = draw(*outer, *shape, dtype=dtype)
        for kind in (tuple, list, torch.Size):
            oracle.check(problem(name, x, normalized_shape=kind(shape)))


@pytest.mark.parametrize("wanted", [("input",), ("weight",), ("bias",), ("input", "bias")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_some_arguments_left_out_or_not_differentiated(
    name: str, dtype: torch.dtype, wanted: tuple[str, ...]
) -> None:
    made = problem(name, draw(11, 33, dtype=dtype))
    if set(wanted) <= set(DIFFERENTIABLE[name]):
        oracle.check(replace(made, wanted=wanted))
    oracle.check(without(made, "weight", "bias"))
    if name == "layer_norm":
        oracle.check(without(made, "bias"))
        oracle.check(without(made, "weight"))


# Numerics.


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_precision_over_many_elements(name: str, dtype: torch.dtype, scale: float) -> None:
    oracle.check(problem(name, draw(301, 129, dtype=dtype, scale=scale)))


@pytest.mark.parametrize("what", cases.PACK)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_adversarial_rows(name: str, dtype: torch.dtype, what: str) -> None:
    x = cases.pack(what, dtype)
    oracle.check(problem(name, x), luck=2.0 if what == "mean 1e4" else 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_mean_1e4_standard_deviation_1(name: str, dtype: torch.dtype) -> None:
    """A row has one error in all its elements, that of its mean: the root mean square over many
    rows decides."""
    x = (1e4 + draw(512, 67, dtype=torch.float64)).to(dtype)
    found = oracle.check(problem(name, x), luck=2.0)
    if name == "layer_norm" and dtype is torch.float32:
        y = without(problem(name, x), "weight", "bias").run(OURS[name])["output"]
        torch.testing.assert_close(y.std(1), torch.ones(512), rtol=0.02, atol=0.0)
    assert found["output"].isfinite().all()


@pytest.mark.parametrize("first", [-1e4, 0.0, 40.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_rows_that_begin_far_from_their_mean(name: str, dtype: torch.dtype, first: float) -> None:
    """Moments about the first elements' mean would cancel."""
    x = 30.0 + draw(33, 700, dtype=torch.float64)
    x[:, :64] += first - 30.0
    oracle.check(problem(name, x.to(dtype)), luck=2.0)


@pytest.mark.parametrize("shape", [(1100, 1024), (9, 17000)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_rows_larger_than_the_cache(name: str, shape: tuple[int, int]) -> None:
    oracle.check(problem(name, draw(*shape)))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_eps(name: str, dtype: torch.dtype, eps: float) -> None:
    """1e-12 is 0 in float16, and where the variance is 0 that is NaN or infinity."""
    for x in (draw(9, 33), 1e-4 * draw(9, 33), 1e-6 * draw(9, 33)):
        oracle.check(problem(name, x.to(dtype), eps=eps))
    if eps:
        for x in (torch.zeros(5, 33), torch.full((5, 33), 0.25)):
            found = oracle.check(problem(name, x.to(dtype), eps=eps))
            assert all(y.isfinite().all() for key, y in found.items() if key != "grad input")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_of_rms_norm_where_none_is_given(dtype: torch.dtype) -> None:
    """That of the type torch computes in, float32 for the half types."""
    for x in (draw(9, 33), 1e-4 * draw(9, 33)):
        oracle.check(problem("rms_norm", x.to(dtype)))
        oracle.check(problem("rms_norm", x.to(dtype), eps=None))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_weight_gradients_are_at_rounding(name: str, dtype: torch.dtype) -> None:
    """Summed in float32: torch's own is off by percents where it sums in the weight's dtype."""
    made = problem(name, draw(2000, 17, dtype=dtype))
    found, exact = made.run(OURS[name]), made.exact()
    for key in ("grad weight", "grad bias"):
        if key in found:
            rounding = 0.5 * torch.finfo(dtype).eps * exact[key].abs()
            off = (found[key].double() - exact[key]).abs() - rounding
            assert float(off.max()) <= 1e-6 * float(exact[key].abs().max()), key


@pytest.mark.parametrize("name", NORMS)
def test_gradients_that_are_not_finite(name: str) -> None:
    """NaN as torch has it; of an infinity what is left depends on the order of subtractions, and
    is finite where torch's is."""
    made = problem(name, draw(5, 9))
    assert made.upstream is not None
    made.upstream[1, 3] = cases.NAN
    oracle.check(made)
    made.upstream[0, 0] = cases.INF
    found, expected = made.run(OURS[name]), made.run(TORCH[name])
    for key, value in expected.items():
        assert torch.equal(found[key].isfinite(), value.isfinite()), key


@pytest.mark.parametrize("shape", [(1, 1_000_000), (1_000_000, 1)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_a_million(name: str, shape: tuple[int, int]) -> None:
    oracle.check(problem(name, draw(*shape), eps=1e-3))


# x and weight of different dtype.


# Every mixture is a kernel to compile: each dtype once on either side.
MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float16),
]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("dtype", "weight_dtype"), MIXED, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_input_and_weight_of_different_dtype(
    name: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """The output is of the input's dtype, each gradient of that of what it is of. torch's CPU
    layer_norm takes few of these: it is given the weight in the wider dtype."""
    x = draw(41, 33, dtype=dtype)
    made = problem(name, x.to(weight_dtype))
    made = cases.with_upstream(replace(made, inputs={**made.inputs, "input": x}))
    wide = max(dtype, torch.float32, key=lambda d: -torch.finfo(d).eps)
    theirs = replace(made.cast(None).cast(wide), upstream=oracle.plain(made.upstream, wide))
    mine = made.run(OURS[name])
    torchs = theirs.run(TORCH[name])
    oracle.compare(made, mine, {key: y.to(mine[key].dtype) for key, y in torchs.items()})


def test_a_bias_of_another_dtype_than_the_weight() -> None:
    made = problem("layer_norm", draw(41, 33, dtype=torch.bfloat16))
    mixed = replace(made, inputs={**made.inputs, "bias": draw(33)})
    torchs = mixed.cast(torch.float32).run(F.layer_norm)
    mine = mixed.run(OURS["layer_norm"])
    oracle.compare(mixed, mine, {key: y.to(mine[key].dtype) for key, y in torchs.items()})


# Empty, and other ways to ask.


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 5), (0,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_no_rows_and_no_columns(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Weight gradients of no rows are 0."""
    found = oracle.check(problem(name, torch.empty(shape, dtype=dtype)))
    for key in ("grad weight", "grad bias"):
        if key in found:
            assert found[key].eq(0).all()


def test_arguments_by_position() -> None:
    x, weight, bias = draw(3, 5), draw(5), draw(5)
    torch.testing.assert_close(
        OURS["layer_norm"](x, (5,), weight, bias, 0.1), F.layer_norm(x, (5,), weight, bias, 0.1)
    )
    torch.testing.assert_close(
        OURS["rms_norm"](x, (5,), weight, 0.1), F.rms_norm(x, (5,), weight, 0.1)
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LayerNorm", {}),
        ("LayerNorm", {"elementwise_affine": False}),
        ("LayerNorm", {"bias": False, "eps": 0.1}),
        ("LayerNorm", {"dtype": torch.float64}),
        ("RMSNorm", {}),
        ("RMSNorm", {"elementwise_affine": False, "eps": 0.1}),
        ("RMSNorm", {"dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_modules(name: str, arguments: dict[str, Any]) -> None:
    ours = MODULES[name]((3, 5), **arguments)
    theirs = getattr(torch.nn, name)((3, 5), **arguments)
    assert isinstance(ours, type(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = draw(4, 3, 5, dtype=arguments.get("dtype", torch.float32))
    torch.testing.assert_close(ours(x), theirs(x))
    assert repr(ours) == repr(theirs)


# Bugs that others had.


def test_variance_is_not_a_difference_of_squares() -> None:
    """E[x^2] - E[x]^2 at a mean of 1e4 is negative for some rows, and NaN once rooted."""
    x = 1e4 + 0.01 * draw(200, 64)
    made = problem("layer_norm", x)
    found = oracle.check(made, luck=2.0)
    assert found["output"].isfinite().all()


@pytest.mark.parametrize("name", NORMS)
def test_bf16_input_with_float32_weight(name: str) -> None:
    """Others refuse it, or give a gradient of the wrong dtype."""
    x, weight = draw(9, 33, dtype=torch.bfloat16), draw(33)
    x.requires_grad_()
    weight.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = OURS[name](x, (33,), weight)
    y.backward(draw(9, 33, dtype=torch.bfloat16, seed=1))
    assert y.dtype is torch.bfloat16
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NORMS)
def test_statistics_are_not_kept_in_bf16(name: str) -> None:
    """A mean of 300 is 300 or 302 in bf16: rows of values about it would all be off by that."""
    x = (300 + 2 * draw(64, 129).round()).bfloat16()
    oracle.check(problem(name, x))
    y = without(problem(name, x), "weight", "bias").run(OURS[name])["output"].float()
    if name == "layer_norm":
        assert float(y.mean(1).abs().max()) < 0.01


@pytest.mark.parametrize("name", NORMS)
def test_backward_does_not_write_what_forward_saved(name: str) -> None:
    made = problem(name, draw(6, 33))
    leaves = [x.clone().requires_grad_() for x in made.inputs.values() if x is not None]
    y = OURS[name](**dict(zip(made.inputs, leaves, strict=True)), **made.options)
    first, second = (
        torch.autograd.grad(y, leaves, made.upstream, retain_graph=True) for _ in range(2)
    )
    assert all(map(oracle.same_bits, first, second))


# Deliberately wrong candidates.


def _single_pass(
    input: Tensor, normalized_shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    mean, square = input.mean(-1, keepdim=True), input.square().mean(-1, keepdim=True)
    return (input - mean) * (square - mean.square() + eps).rsqrt() * weight + bias


def _statistics_in_its_dtype(
    input: Tensor, normalized_shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    mean = input.mean(-1, keepdim=True)
    variance = (input - mean).square().mean(-1, keepdim=True)
    return (input - mean) * (variance + eps).rsqrt() * weight + bias


def _unbiased(
    input: Tensor, normalized_shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    n = input.shape[-1]
    scaled = input * ((n - 1) / n) ** 0.5
    return F.layer_norm(scaled, normalized_shape, weight, bias, eps)


class _Rounded(torch.autograd.Function):
    """A weight whose gradient is added up in its own dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: int) -> Tensor:
        return weight.expand(rows, -1).clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        total = torch.zeros_like(dy[0])
        for row in dy:
            total = total + row
        return total, None


def _low_weight_gradient(
    input: Tensor, normalized_shape: Any, weight: Tensor, bias: Tensor
) -> Tensor:
    y = F.layer_norm(input, normalized_shape)
    return y * _Rounded.apply(weight, len(input)) + bias


def _opposite(input: Tensor, normalized_shape: Any, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.layer_norm(input, normalized_shape, weight, bias)
    return 2 * y.detach() - y


WRONG: dict[str, tuple[Function, Problem]] = {
    "no-op": (
        lambda input, normalized_shape, weight, bias: input.clone() + 0 * (weight + bias),
        problem("layer_norm", draw(9, 67)),
    ),
    "single pass": (_single_pass, problem("layer_norm", cases.pack("mean 1e4", torch.float32))),
    "statistics in bf16": (
        _statistics_in_its_dtype, problem("layer_norm", draw(64, 67, dtype=torch.bfloat16) + 3),
    ),
    "unbiased variance": (_unbiased, problem("layer_norm", draw(9, 67), eps=1e-3)),
    "weight gradient in bf16": (
        _low_weight_gradient, problem("layer_norm", draw(500, 67, dtype=torch.bfloat16)),
    ),
    "sign of the gradients": (_opposite, problem("layer_norm", draw(9, 67))),
    "eps of the input's dtype": (
        lambda input, normalized_shape, weight: F.rms_norm(
            input, normalized_shape, weight, torch.finfo(input.dtype).eps
        ),
        problem("rms_norm", 1e-4 * draw(9, 67, dtype=torch.bfloat16)),
    ),
    "mean taken off": (
        lambda input, normalized_shape, weight: F.layer_norm(input, normalized_shape, weight),
        problem("rms_norm", draw(9, 67) + 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_candidate_is_refused(kind: str) -> None:
    candidate, made = WRONG[kind]
    with pytest.raises(AssertionError):
        oracle.check(made, ours=candidate)
