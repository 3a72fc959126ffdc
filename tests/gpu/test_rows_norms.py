"""LayerNorm and RMSNorm in the interpreter, against torch in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastopt_kernels.gpu.rows import layer_norm, layer_norm_gradients, shared
from tests.gpu.row_launches import (
    DTYPES,
    INF,
    NAN,
    all_wrong,
    draw,
    recorded,
    same_bits,
    short_walks,
    unwritten,
    wide,
    wrong,
)

# Rows and columns, and the branches of the forward and the backward kernels that they take.
SHAPES = {
    "one column": (300, 1),
    "short": (21, 67),
    "short vectors": (33, 64),
    "row": (3, 781),
    "row vectors": (3, 2048),
    "walked": (1, 16901),
    "walked vectors": (1, 16896),
}
WALKS_BACK = ("walked", "walked vectors")
CASES = [
    (what, dtype, rms)
    for i, what in enumerate(SHAPES)
    for j, dtype in enumerate(DTYPES)
    for rms in ((False, True) if j == 0 else (bool((i + j) % 2),))
]
Values = dict[str, Tensor]


@dataclass
class Problem:
    """x, dy: (n_rows, n_cols); weight, bias: of any dtype each, or None"""

    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    rms: bool
    eps: float = 1e-5

    def run(self, wanted: str = "xwb") -> Values:
        """The kernels' output, statistics, and the gradients that are wanted."""
        x, weight = self.x, self.weight
        sizes = (*x.shape, x.stride(0))
        found = {"y": unwritten(*x.shape, dtype=x.dtype)}
        stats = unwritten(2, len(x), dtype=wide(x.dtype))
        mean, rstd = stats
        dx = unwritten(*x.shape, dtype=x.dtype) if "x" in wanted else None
        dweight, dbias = (
            None if like is None or key not in wanted else torch.full_like(like, -12345.0)
            for key, like in (("w", weight), ("b", self.bias))
        )
        if self.rms:
            layer_norm.rms_norm(x, weight, found["y"], rstd, sizes, self.eps)
            layer_norm.rms_norm_backward(self.dy, x, weight, rstd, dx, dweight, sizes)
        else:
            layer_norm.layer_norm(x, weight, self.bias, found["y"], stats, sizes, self.eps)
            layer_norm.layer_norm_backward(self.dy, x, weight, stats, dx, dweight, dbias, sizes)
            found["mean"] = mean
        made = {"rstd": rstd, "dx": dx, "dweight": dweight, "dbias": dbias}
        return found | {name: value for name, value in made.items() if value is not None}

    def exact(self, dtype: torch.dtype = torch.float64) -> Values:
        """torch's, in a dtype."""
        given = {"x": self.x, "weight": self.weight, "bias": self.bias}
        leaves = {
            key: value.to(dtype, copy=True).requires_grad_()
            for key, value in given.items()
            if value is not None
        }
        x, weight, bias = leaves["x"], leaves.get("weight"), leaves.get("bias")
        if self.rms:
            y = F.rms_norm(x, x.shape[1:], weight, self.eps)
            mean, var = torch.zeros(len(x)), x.detach().square().mean(1)
        else:
            y = F.layer_norm(x, x.shape[1:], weight, bias, self.eps)
            var, mean = torch.var_mean(x.detach(), 1, correction=0)
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(dtype), allow_unused=True)
        found = {"y": y.detach(), "mean": mean, "rstd": (var + self.eps).rsqrt()}
        return found | {f"d{key}": grad for key, grad in zip(leaves, grads, strict=True)}

    def wrong(self, **least: float) -> list[str]:
        """A one-column LayerNorm's gradient is 0: it is held against what cancels."""
        return all_wrong(self.run(), self.exact(), **({"dx": 1e-3} | least))


def make(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, rms: bool = False, **other: Any
) -> Problem:
    n_cols = shape[1]
    weight, bias = (draw(n_cols, dtype=dtype, seed=seed) for seed in (2, 3))
    x, dy = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    return replace(Problem(x, dy, weight, None if rms else bias, rms), **other)


@contextmanager
def walking_back() -> Iterator[None]:
    """Rows of more than 32 are walked, forward and backward."""
    kept = layer_norm_gradients.WIDEST
    layer_norm_gradients.WIDEST = dict.fromkeys(kept, 32)
    try:
        with short_walks():
            yield
    finally:
        layer_norm_gradients.WIDEST = kept


@pytest.mark.parametrize(("what", "dtype", "rms"), CASES)
def test_norms(what: str, dtype: torch.dtype, rms: bool) -> None:
    problem = make(SHAPES[what], dtype, rms)
    # A mean cancels, and in one column so does all that is subtracted.
    least = {"dx": 1e-3, "mean": 0.1} | ({"dweight": 1.0} if what == "one column" else {})
    # Of sums over rows so long the interpreter would make a thousand programs.
    wanted = "x" if what in WALKS_BACK else "xwb"
    with recorded() as launched:
        found = problem.run(wanted)
    assert all_wrong(found, problem.exact(), **least) == []
    forward = launched[0].constants
    assert forward["WHOLE"] == (what not in WALKS_BACK)
    assert (forward["VECTOR"] > 1) == ("vectors" in what)
    assert (forward["LINES"] > 1) == (2 * SHAPES[what][1] <= shared.LEAST[forward["COMPUTE"]])
    backward = ["norm_backward_kernel", "norm_sum_kernel"]
    if what in WALKS_BACK:
        backward = ["norm_dx_kernel"]
    assert [each.name for each in launched] == ["norm_kernel", *backward]


@pytest.mark.parametrize("walked", [False, True], ids=["whole", "walked"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_a_row_between_the_forward_and_the_backward_limit(rms: bool, walked: bool) -> None:
    """Forward in registers and backward walked, and both walked."""
    problem = make((19, 67), rms=rms)
    with walking_back(), recorded() as launched:
        if not walked:
            shared.WIDEST = dict.fromkeys(shared.WIDEST, 128)
        assert problem.wrong() == []
    assert launched[0].constants["WHOLE"] is not walked
    names = [each.name for each in launched[1:]]
    assert names == ["norm_dx_kernel", "norm_weight_kernel", "norm_sum_kernel"]


@pytest.mark.parametrize("walked", [False, True], ids=["whole", "walked"])
@pytest.mark.parametrize("wanted", ["x", "w", "b", "wb", "xb"])
def test_only_what_is_wanted_is_computed(wanted: str, walked: bool) -> None:
    problem = make((9, 67))
    with walking_back() if walked else nullcontext():
        found = problem.run(wanted)
        assert all_wrong(found, problem.exact()) == []
    names = {"x": "dx", "w": "dweight", "b": "dbias"}
    assert found.keys() == {"y", "mean", "rstd"} | {names[key] for key in wanted}


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_without_weight_and_bias(rms: bool) -> None:
    assert make((9, 67), rms=rms, weight=None, bias=None).wrong() == []
    if not rms:
        assert make((9, 67), bias=None).wrong() == []
        assert make((9, 67), weight=None).wrong() == []


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_without_statistics(rms: bool) -> None:
    problem = make((9, 67), rms=rms)
    y, sizes = unwritten(9, 67, dtype=torch.float32), (9, 67, 67)
    if rms:
        layer_norm.rms_norm(problem.x, problem.weight, y, None, sizes, problem.eps)
    else:
        layer_norm.layer_norm(problem.x, problem.weight, problem.bias, y, None, sizes, problem.eps)
    assert same_bits(y, problem.run()["y"])


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float64, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("n_cols", [64, 67])
def test_weight_and_bias_have_dtypes_of_their_own(
    n_cols: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    problem = make((9, n_cols), dtypes[0])
    problem.weight, problem.bias = (
        x.to(d) for x, d in zip((problem.weight, problem.bias), dtypes[1:], strict=True)
    )
    found, right = problem.run(), problem.exact()
    for name, value in found.items():
        # float64 weights get gradients that were summed in float32.
        counted = torch.float32 if value.dtype is torch.float64 else value.dtype
        assert wrong(name, value, right[name], dtype=counted) == []


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_weight_gradients_of_many_rows(rms: bool) -> None:
    """Summed by several programs; in bfloat16 to one rounding, where torch's are off by more."""
    problem = make((1500, 24), torch.bfloat16, rms)
    with recorded() as launched:
        assert problem.wrong() == []
    backward, total = launched[1:]
    tile = backward.constants
    assert 1 < backward.grid[0] <= layer_norm_gradients.SUMMING_THREADS // (32 * tile["num_warps"])
    assert backward.grid[0] * tile["LINES"] * layer_norm_gradients.TILES_EACH >= 1500
    assert total.name == "norm_sum_kernel"


def test_weight_gradients_are_the_same_bits_in_every_run() -> None:
    problem = make((300, 67))
    first, second = problem.run(), problem.run()
    assert all(same_bits(first[name], second[name]) for name in first)
    # dx alone is computed in other programs; the rows in them are the same.
    assert same_bits(problem.run("x")["dx"], first["dx"])


def test_the_shares_of_a_sum_are_those_of_the_shape() -> None:
    for n_rows in (1, 7, 1000, 10**6):
        for lines, programs in ((1, 256), (32, 512), (8, 1)):
            n_shares, each = layer_norm_gradients._share(n_rows, lines, programs)
            assert n_shares <= programs
            assert each % lines == 0
            assert (n_shares - 1) * each < n_rows <= n_shares * each
    assert layer_norm_gradients._share(0, 8, 4) == (0, 8)


@pytest.mark.parametrize("walked", [False, True], ids=["whole", "walked"])
def test_mean_1e4_and_standard_deviation_1(walked: bool) -> None:
    """The mean in float32 is off by 1e-3 there: torch's output is too, ours is not."""
    problem = make((9, 67), x=draw(9, 67) + 1e4)
    with walking_back() if walked else nullcontext():
        found = problem.run()
    right, torchs = problem.exact(), problem.exact(torch.float32)
    assert all_wrong({key: found[key] for key in ("y", "mean", "rstd", "dbias")}, right) == []
    for name in ("dx", "dweight"):
        ours, theirs = ((x[name].double() - right[name]).abs().max() for x in (found, torchs))
        assert ours <= 1.5 * theirs
    with walking_back() if walked else nullcontext():
        assert replace(problem, rms=True, bias=None).wrong() == []


ROWS = {
    "equal": [3.3] * 67,
    "equal and large": [-12345.0] * 67,
    "zero": [0.0] * 67,
    "-inf": [-INF] * 67,
    "+inf": [INF, *[0.25] * 66],
    "NaN": [*[1.0] * 66, NAN],
    "1e30": [1e30, -1e30, 2e30] * 23,
    "1e-30": [1e-30, -1e-30, 2e-30] * 23,
    "denormals": [1e-40, -1e-40, 0.0] * 23,
    "an outlier": [1e4, *[0.5, -0.5, 1.5] * 22],
}


@pytest.mark.parametrize("walked", [False, True], ids=["whole", "walked"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_adversarial_rows(rms: bool, walked: bool) -> None:
    for eps in (1e-5,) if walked else (1e-5, 1e-12):
        for name, row in ROWS.items():
            x = torch.tensor(row[:67])[None]
            problem = make((1, 67), rms=rms, x=x, eps=eps)
            with walking_back() if walked else nullcontext():
                found = problem.run()
            # float32 itself overflows at 1e30 squared: there torch's is the reference.
            exact = problem.exact(torch.float32 if name == "1e30" else torch.float64)
            size = float(exact["rstd"].nan_to_num(1.0, 1.0)) if "equal" in name else 1e-3
            least = {"y": 1.0 if "equal" in name else 1e-3, "dx": size, "dweight": 1.0}
            assert [name, *all_wrong(found, exact, **least)] == [name]


def test_eps_1e_12_in_float16_is_not_0() -> None:
    problem = make((5, 67), torch.float16, x=torch.full((5, 67), 0.5).half(), eps=1e-12)
    found = problem.run()
    assert torch.allclose(found["rstd"], torch.full((5,), 1e6))
    assert wrong("y", found["y"], problem.exact()["y"]) == []


def test_eps_of_float64_is_not_rounded_to_float32() -> None:
    problem = make((3, 67), torch.float64, x=draw(3, 67, dtype=torch.float64, scale=1e-4), eps=0.1)
    assert problem.wrong() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_cols", [64, 67])
def test_strided_input(n_cols: int, dtype: torch.dtype) -> None:
    base = draw(18, n_cols + 8, dtype=dtype)
    for x in (base[:9, 3 : 3 + n_cols], base[:9, 8:], base[::2, :n_cols]):
        before = x.clone()
        assert make((9, n_cols), dtype, x=x).wrong() == []
        assert torch.equal(x, before)


@pytest.mark.parametrize("walked", [False, True], ids=["whole", "walked"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_a_row_is_computed_alike_in_every_batch(rms: bool, walked: bool) -> None:
    problem = make((21, 67), rms=rms)
    with walking_back() if walked else nullcontext():
        together = problem.run("x")
        for row in (0, 5, 20):
            span = slice(row, row + 1)
            alone = replace(problem, x=problem.x[span], dy=problem.dy[span]).run("x")
            for name, value in alone.items():
                assert same_bits(value[0], together[name][row])


def test_offsets_are_64_bit() -> None:
    """Rows 2**31 elements apart: of the memory between them nothing is touched."""
    x = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 67), (2**31, 1))
    x.copy_(draw(2, 67, dtype=torch.bfloat16))
    assert make((2, 67), torch.bfloat16, x=x).wrong() == []


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_no_rows_give_weight_gradients_of_0(rms: bool) -> None:
    found = make((0, 67), rms=rms).run()
    assert not found["dweight"].any()
    assert rms or not found["dbias"].any()


def _one_pass(x: Tensor, mask: Tensor, n: Any, compute: Any, centered: Any) -> Any:
    """E[x^2] - E[x]^2"""
    import triton.language as tl

    mean = tl.sum(x, 1) / n
    return mean, mean * 0.0, tl.sum(x * x, 1) / n - mean * mean


def test_a_variance_in_one_pass_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_norm, "_moments", _one_pass)
    problem = make((9, 67), x=draw(9, 67) + 1e4)
    found = problem.run()
    assert wrong("rstd", found["rstd"], problem.exact()["rstd"]) != []


@pytest.mark.parametrize("name", ["dx", "dweight", "dbias", "y"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_results_do_not_pass(name: str, dtype: torch.dtype) -> None:
    problem = make((9, 67), dtype)
    found, right = problem.run(), problem.exact()
    for bad in (-found[name], torch.zeros_like(found[name]), found[name].roll(1, 0)):
        assert wrong(name, bad, right[name]) != []
