"""Rows: each row function, forward and backward, against torch in float64 on the same device.

Ours may err as torch does in the same dtype, half as much again, and by one rounding more. Sizes,
ranks, dims, layouts, options, values that are not finite, the same bits in every run and in any
batch, graphs, offsets beyond 32 bits, and the shapes that are timed (which also leaves their
kernels compiled on the disk).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_device import Device
from bench.gpu_functions import SPEED_CASES, SpeedCase
from bench.gpu_oracle import disagreement
from bench.gpu_rows import NotApplicableError, Row
from bench.row_ops import OPS, TOLERANCE, Function, Workload, check, torchs
from bench.row_providers import ours

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
QUICK_DTYPES = ("fp32", "bf16")
# Of the largest value: torch's error alone is no measure where it happens to be none.
SLACK_EPS = 4.0
BIG_ROWS, BIG_COLUMNS = 2**20 + 3, 2048
BIG_BYTES = 40 * 2**30

Shapes = Sequence[tuple[int, ...]]
ROWS: Shapes = ((1, 1), (7, 33), (1823, 781), (3, 131_073), (4099, 64), (5, 8192), (1, 2**20))
QUICK_ROWS: Shapes = ((1, 1), (3, 37))
BLOCKS: Shapes = ((2, 5, 37), (3, 781, 130), (1, 4099, 3))
QUICK_BLOCKS: Shapes = ((2, 5, 7),)


@dataclass(frozen=True)
class Call:
    """A public function with its options: call(function, x, *arguments) of tensors made for x.

    blocks: x has three dimensions and the reduction is over the one in the middle
    """

    name: str
    function: str
    arguments: Callable[[Tensor, torch.Generator], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    blocks: bool = False

    def shapes(self, quick: bool) -> Shapes:
        if self.blocks:
            return QUICK_BLOCKS if quick else BLOCKS
        return QUICK_ROWS if quick else ROWS


def _dim(dim: int) -> Callable[[Tensor, torch.Generator], tuple[Any, ...]]:
    return lambda x, random: (dim,)


def _targets(x: Tensor, random: torch.Generator) -> Tensor:
    shape = (x.shape[0], *x.shape[2:])
    return torch.randint(x.shape[1], shape, generator=random, device=x.device)


def _indices(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    return (_targets(x, random),)


def _weighted(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    target = _targets(x, random)
    target.view(-1)[1::7] = -100
    weight = torch.rand(x.shape[1], generator=random, device=x.device) + 0.5
    return (target, weight.to(x.dtype))


def _probabilities(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
    drawn = torch.randn(x.shape, generator=random, device=x.device)
    return (drawn.softmax(1).to(x.dtype),)


def _affine(n_weights: int, *rest: Any) -> Callable[[Tensor, torch.Generator], tuple[Any, ...]]:
    def make(x: Tensor, random: torch.Generator) -> tuple[Any, ...]:
        n = x.shape[-1:]
        drawn = [torch.randn(n, generator=random, device=x.device) for _ in range(n_weights)]
        return (n, *(w.to(x.dtype).requires_grad_() for w in drawn), *rest)

    return make


CALLS = (
    *[Call(f"{name} -1", name, _dim(-1)) for name in ("softmax", "log_softmax", "logsumexp")],
    *[Call(f"{name} 0", name, _dim(0)) for name in ("softmax", "log_softmax", "logsumexp")],
    *[Call(f"{name} 1 of 3", name, _dim(1), blocks=True)
      for name in ("softmax", "log_softmax", "logsumexp")],
    Call("cross_entropy", "cross_entropy", _indices),
    Call("cross_entropy of each row", "cross_entropy", _indices, {"reduction": "none"}),
    Call("cross_entropy weight, ignored, smoothing", "cross_entropy", _weighted,
         {"label_smoothing": 0.1}),
    Call("cross_entropy of 3 dimensions", "cross_entropy", _weighted, blocks=True),
    Call("cross_entropy of probabilities", "cross_entropy", _probabilities),
    Call("layer_norm", "layer_norm", _affine(2)),
    Call("layer_norm without weights", "layer_norm", _affine(0)),
    Call("rms_norm", "rms_norm", _affine(1, 1e-6)),
    Call("rms_norm without weight", "rms_norm", _affine(0)),
)  # fmt: skip


def rows(device: Device, quick: bool) -> Iterator[Row]:
    """quick: small sizes and few dtypes, for the interpreter."""
    for call, dtype in itertools.product(CALLS, QUICK_DTYPES if quick else DTYPES):
        yield Row(f"{call.name} {dtype}", partial(_sizes, device, call, dtype, quick), 30)
    for call in CALLS:
        yield Row(f"layouts: {call.name}", partial(_layouts, device, call), 20)
        yield Row(f"not finite: {call.name}", partial(_not_finite, device, call), 10)
        yield Row(f"same bits: {call.name}", partial(_bits, device, call, quick), 10)
        yield Row(f"graph: {call.name}", partial(_graph, device, call), 10)
    yield Row("a target out of range gives NaN", partial(_bad_target, device))
    yield Row("a wrong function is found out", partial(_teeth, device))
    if quick:
        return
    for name in ("softmax", "cross_entropy", "layer_norm", "softmax dim 0"):
        yield Row(f"{2**31} elements: {name}", partial(_big, device, name), 20)
    for case in SPEED_CASES:
        yield Row(f"as timed: {case.name}", partial(_as_timed, device, case), 10)


def _values(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device, dtype=torch.float64).to(dtype)


def _results(
    function: Function, call: Call, x: Tensor, arguments: Sequence[Any], dy: Tensor | None
) -> dict[str, Tensor]:
    """y and the gradient of x and of each weight, by name."""
    leaf = x.detach().requires_grad_()
    y = function(leaf, *arguments, **call.options)
    weights = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    grads = torch.autograd.grad(y, (leaf, *weights), torch.ones_like(y) if dy is None else dy)
    return {"y": y.detach(), **dict(zip(("dx", "dweight", "dbias"), grads, strict=False))}


def _double(argument: Any) -> Any:
    if not (isinstance(argument, Tensor) and argument.is_floating_point()):
        return argument
    return argument.detach().double().requires_grad_(argument.requires_grad)


def _wrong(
    function: Function,
    call: Call,
    x: Tensor,
    arguments: Sequence[Any],
    random: torch.Generator,
    truncates: bool,
) -> list[str]:
    """Every disagreement with torch: y and each gradient, for a random upstream gradient."""
    theirs = torchs(call.function)
    dy = _values(theirs(x, *arguments, **call.options).shape, x.dtype, random)
    before = x.clone()
    got = _results(function, call, x, arguments, dy)
    right = _results(theirs, call, x.double(), [_double(a) for a in arguments], dy.double())
    narrow = _results(theirs, call, x, arguments, dy)
    found = []
    for name, exact in right.items():
        if got[name].shape != exact.shape or got[name].dtype != narrow[name].dtype:
            found.append(f"{name}: {got[name].shape} {got[name].dtype}")
            continue
        theirs_at_least = _at_least(narrow[name], exact, dy, truncates)
        if text := disagreement(got[name], exact, theirs_at_least, truncates):
            found.append(f"{name}: {text}")
    if not torch.equal(x.nan_to_num(), before.nan_to_num()):
        found.append("x was written to")
    return found


def _at_least(narrow: Tensor, exact: Tensor, dy: Tensor, truncates: bool) -> Tensor:
    """Torch's result with an error of some roundings at least, of the result or of the upstream
    gradient: what is left of terms that cancel is as wrong as they are.

    truncates: a backward that reads a stored bf16 sees twice the error of one that was rounded
    """
    dtype = torch.float64 if narrow.dtype is torch.float64 else torch.float32
    sizes = [x[x.isfinite()].abs().double() for x in (exact, dy)]
    largest = max((float(x.max()) for x in sizes if x.numel()), default=0.0)
    least = SLACK_EPS * torch.finfo(dtype).eps * largest
    error = narrow.double() - exact
    if truncates and narrow.dtype is torch.bfloat16:
        error = 2 * error
    return torch.where(error.abs() <= least, exact + least, exact + error)


def _raise(found: list[str]) -> None:
    if found:
        raise AssertionError(f"{len(found)} disagreements: " + "; ".join(found[:4]))


def _generator(device: Device) -> torch.Generator:
    return torch.Generator(device.device).manual_seed(0)


def _sizes(device: Device, call: Call, dtype: str, quick: bool) -> dict[str, int]:
    random, found = _generator(device), []
    for shape in call.shapes(quick):
        x = _values(shape, DTYPES[dtype], random)
        arguments = call.arguments(x, random)
        function = ours(call.function)
        wrong = _wrong(function, call, x, arguments, random, device.truncates)
        found += [f"{shape} {text}" for text in wrong]
    _raise(found)
    return {"shapes": len(call.shapes(quick))}


def _layouts(device: Device, call: Call) -> None:
    """Views that no kernel may take for contiguous, and one that starts between alignments."""
    random, found = _generator(device), []
    flat = _values((12, 14, 15), torch.float32, random)
    blocks = {
        "transposed": flat.transpose(1, 2),
        "sliced": flat[1:, ::2, 1:],
        "expanded": flat[:, :1].expand(-1, 9, -1),
        "misaligned": flat.view(-1)[1:2501].view(10, 25, 10),
        "first dimension inside": flat.permute(1, 2, 0),
    }
    for layout, block in blocks.items():
        x = block if call.blocks else block[1]
        arguments = call.arguments(x, random)
        wrong = _wrong(ours(call.function), call, x, arguments, random, device.truncates)
        found += [f"{layout} {text}" for text in wrong]
    _raise(found)


def _not_finite(device: Device, call: Call) -> None:
    random = _generator(device)
    # Means of equal values are exact for a power of two columns, and so is what is left of them.
    x = _values((9, 32, 2) if call.blocks else (9, 32), torch.float32, random)
    arguments = call.arguments(x, random)
    x[0] = -torch.inf
    x[1, 3] = torch.inf
    x[2, 4] = torch.nan
    x[3] = 1024.0 if call.function.endswith("norm") else 1e30
    x[4] = 1e-30
    x[5, 5] = -torch.inf
    _raise(_wrong(ours(call.function), call, x, arguments, random, device.truncates))


def _bits(device: Device, call: Call, quick: bool) -> None:
    """The same in every run, and a row's forward the same in any batch."""
    random = _generator(device)
    shape = (5, 37) if quick else (1823, 781)
    x = _values((*shape, 2) if call.blocks else shape, torch.float32, random)
    arguments = call.arguments(x, random)
    function = ours(call.function)
    first, second = (_results(function, call, x, arguments, None) for _ in range(2))
    for name in first:
        if not torch.equal(first[name], second[name]):
            raise AssertionError(f"{name}: other bits in the second run")
    if call.function == "cross_entropy" or call.arguments(x, random) == (0,):
        return  # there y is a mean, or the batch is what is reduced over
    y = function(x[2:4].clone(), *arguments, **call.options)
    if not torch.equal(y, first["y"][2:4]):
        raise AssertionError("a row's forward depends on the batch it is in")


def _graph(device: Device, call: Call) -> None:
    """Captured without waiting for the device; a replay reads what lies there then."""
    random = _generator(device)
    x = _values((6, 65, 2) if call.blocks else (6, 65), torch.float32, random)
    arguments = call.arguments(x, random)
    results: dict[str, Tensor] = {}
    function = ours(call.function)
    dy = torch.ones_like(torchs(call.function)(x, *arguments, **call.options)).detach()

    def step() -> None:
        results.update(_results(function, call, x, arguments, dy))

    with device.stream():
        step()
    with device.no_synchronization():
        step()
    replay = device.graph(step)
    x.copy_(_values(tuple(x.shape), torch.float32, random))
    replay()
    device.synchronize()
    right = _results(torchs(call.function), call, x, arguments, dy)
    torch.testing.assert_close(results, right)


def _bad_target(device: Device) -> None:
    x = _values((4, 9), torch.float32, _generator(device))
    target = torch.tensor([3, 9, -1, 0], device=device.device)
    loss = ours("cross_entropy")(x, target, reduction="none")
    if loss.isnan().tolist() != [False, True, True, False]:
        raise AssertionError(f"loss {loss.tolist()} for targets {target.tolist()} of 9 classes")


def _big(device: Device, name: str) -> None:
    """The last rows of more elements than 32 bits count, against the same rows alone."""
    if device.free_bytes() < BIG_BYTES:
        raise NotApplicableError(f"needs {BIG_BYTES / 2**30:.0f} GiB of free device memory")
    over_rows = name.endswith("dim 0")
    shape = (BIG_COLUMNS, BIG_ROWS) if over_rows else (BIG_ROWS, BIG_COLUMNS)
    op, random = OPS[name], _generator(device)
    x = torch.randn(shape, generator=random, device=device.device, dtype=torch.bfloat16)
    arguments = op.arguments(x, random)
    call = Call(name, op.function, op.arguments, {"reduction": "none"} if "cross" in name else {})
    got = _results(ours(op.function), call, x, arguments, None)
    last = (slice(None), slice(-8, None)) if over_rows else (slice(-8, None),)
    tail = [a[-8:] if isinstance(a, Tensor) and len(a) == BIG_ROWS else a for a in arguments]
    right = _results(ours(op.function), call, x[last].clone(), tail, None)
    for key in ("y", "dx"):
        if not torch.equal(got[key][last], right[key]):
            raise AssertionError(f"{key}: the last rows are not what they are alone")


def _as_timed(device: Device, case: SpeedCase) -> dict[str, float]:
    """The largest part of its size by which a result differs from torch's in float32."""
    work = Workload(OPS[case.op], case.shape, DTYPES[case.dtype], device.device)
    results = work.results(ours(work.op.function), backward=True)
    return {"difference": check(results, work.oracle(torch.float32), TOLERANCE[case.dtype])}


def _no_op(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return 0 * x


def _negated(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return -torch.nn.functional.softmax(x, *arguments)


def _half_gradient(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    y = torch.nn.functional.softmax(x, *arguments)
    return y.detach() + 0.5 * (y - y.detach())


def _teeth(device: Device) -> None:
    call, random = CALLS[0], _generator(device)
    for wrong, dtype in itertools.product((_no_op, _negated, _half_gradient), QUICK_DTYPES):
        x = _values((7, 33), DTYPES[dtype], random)
        if not _wrong(wrong, call, x, (-1,), random, device.truncates):
            raise AssertionError(f"{wrong.__name__} passed in {dtype}")
