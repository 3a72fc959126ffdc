"""Rows: each row function, forward and backward, against torch in float64 on the same device.

Ours may err as torch does in the same dtype, half as much again, and by one rounding more. Sizes,
ranks, dims, layouts, options, values that are not finite, the same bits in every run and in any
batch, graphs, the CPU's kernels on the same values, and the shapes that are timed (which also
leaves their kernels compiled on the disk). What the kernels write to held NaN before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_calls import CALLS, Call, Function, call_of, missing
from bench.gpu_device import Device
from bench.gpu_interpret import numba_on_cpu
from bench.gpu_oracle import disagreement
from bench.gpu_rows import Row
from bench.gpu_timed import TimedCase, cases
from bench.row_ops import PEERS_TOLERANCE, TOLERANCE, check, difference

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
# Of the largest value: torch's error alone is no measure where it happens to be none.
SLACK_EPS = 4.0
# In float64 the oracle is as wrong itself: x - mean of one column is, by what 1 / sqrt(eps) makes
# of a rounding.
SLACK_EPS_WIDE = 1024.0
# The CPU's kernels and the GPU's: each may err so much of its size.
BESIDE_CPU = {"fp32": 2e-5, "bf16": 2e-2}
# In the interpreter one of each kind is looked at from every side: it is the same code for all.
QUICK_CALLS = ("softmax -1", "cross_entropy", "add_layer_norm", "group_norm")
QUICK_DTYPES = {"softmax -1": ("fp32", "bf16"), "group_norm": ("bf16",)}


def rows(device: Device, quick: bool) -> Iterator[Row]:
    """quick: small sizes and few dtypes, for the interpreter.

    What is timed comes early, so that its kernels are there; the rarer dtypes come late.
    """
    yield Row("every public function is called here", _covered)
    yield from _of_dtypes(device, quick, ("fp32",))
    for case in cases(quick):
        yield Row(f"as timed: {case.name}", partial(_as_timed, device, case), 5)
    yield from _of_dtypes(device, quick, ("bf16",))
    for call in map(call_of, QUICK_CALLS) if quick else CALLS:
        yield Row(f"not finite: {call.name}", partial(_not_finite, device, call))
        yield Row(f"same bits: {call.name}", partial(_bits, device, call, quick))
        yield Row(f"graph: {call.name}", partial(_graph, device, call))
        yield Row(f"layouts: {call.name}", partial(_layouts, device, call, quick), 10)
    yield Row("a target out of range gives NaN", partial(_bad_target, device))
    yield Row("a wrong function is found out", partial(_teeth, device))
    yield from _of_dtypes(device, quick, ("fp16", "fp64"))
    for call, dtype in [(CALLS[0], "fp32")] if quick else itertools.product(CALLS, BESIDE_CPU):
        run = partial(_beside_cpu, device, call, dtype)
        yield Row(f"beside the CPU's kernels: {call.name} {dtype}", run, 10)


def _of_dtypes(device: Device, quick: bool, dtypes: Sequence[str]) -> Iterator[Row]:
    for dtype, call in itertools.product(dtypes, CALLS):
        if not quick or dtype in QUICK_DTYPES.get(call.name, ("fp32",)):
            yield Row(f"{call.name} {dtype}", partial(_sizes, device, call, dtype, quick), 10)


def _covered() -> None:
    if names := missing():
        raise AssertionError(f"no call in gpu_calls.py for {', '.join(names)}")


def _values(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device, dtype=torch.float64).to(dtype)


def _poison(device: Device, x: Tensor) -> None:
    """Leave NaN in what the allocator gives next for results of x's size."""
    junk = [torch.full_like(x, torch.nan) for _ in range(4)]
    del junk
    device.synchronize()


def results_of(
    function: Function, x: Tensor, others: Sequence[Any], dys: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """Every output and the gradient of x and of each argument that wants one, by name.

    dys: upstream gradients of the outputs, of which the first ones have one; None: ones
    """
    leaf = x.detach().requires_grad_()
    y = function(leaf, *others)
    outputs = y if isinstance(y, tuple) else (y,)
    found = {f"y{k}": output.detach() for k, output in enumerate(outputs)}
    wanted = {"dx": leaf}
    wanted |= {
        f"d{k}": a for k, a in enumerate(others) if isinstance(a, Tensor) and a.requires_grad
    }
    hang_on = [output for output in outputs if output.requires_grad]
    upstream = map(torch.ones_like, hang_on) if dys is None else dys[: len(hang_on)]
    grads = torch.autograd.grad(hang_on, list(wanted.values()), list(upstream), allow_unused=True)
    return found | {k: g for k, g in zip(wanted, grads, strict=True) if g is not None}


def _upstream(results: dict[str, Tensor], random: torch.Generator) -> list[Tensor]:
    return [_values(tuple(y.shape), y.dtype, random) for y in outputs_of(results)]


def _double(argument: Any) -> Any:
    if not (isinstance(argument, Tensor) and argument.is_floating_point()):
        return argument
    return argument.detach().double().requires_grad_(argument.requires_grad)


def _wrong(
    device: Device,
    function: Function,
    call: Call,
    x: Tensor,
    others: Sequence[Any],
    random: torch.Generator,
    unjudged: Sequence[str] = (),
) -> list[str]:
    """Every disagreement with torch: outputs and gradients, for random upstream gradients.

    unjudged: names that are left out
    """
    dys = _upstream(results_of(call.theirs, x, others, None), random)
    narrow = results_of(call.narrow or call.theirs, x, others, dys)
    wide = [dy.double() for dy in dys]
    right = results_of(call.theirs, x.double(), [_double(a) for a in others], wide)
    before = x.clone()
    _poison(device, x)
    got = results_of(function, x, others, dys)
    found = []
    for name, exact in right.items():
        if name in unjudged:
            continue
        if name not in got:
            found.append(f"{name}: none")
            continue
        if got[name].shape != exact.shape or got[name].dtype != narrow[name].dtype:
            found.append(f"{name}: {got[name].shape} {got[name].dtype}")
            continue
        theirs_at_least = _at_least(narrow[name], exact, dys[0], device.truncates)
        if text := disagreement(got[name], exact, theirs_at_least, device.truncates):
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
    slack = SLACK_EPS_WIDE if dtype is torch.float64 else SLACK_EPS
    least = slack * torch.finfo(dtype).eps * largest
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
    shapes = call.quick if quick else call.shapes
    for shape in shapes:
        x = _values(shape, DTYPES[dtype], random)
        wrong = _wrong(device, call.ours, call, x, call.others(x, random), random)
        found += [f"{shape} {text}" for text in wrong]
    _raise(found)
    return {"shapes": len(shapes)}


def _layouts(device: Device, call: Call, quick: bool) -> None:
    """Views that no kernel may take for contiguous, and one that starts between alignments."""
    random, found = _generator(device), []
    shape = (4, 6, 5) if quick else (12, 14, 15)
    flat = _values(shape, torch.float32, random)
    inner = flat.numel() // 20
    blocks = {
        "transposed": flat.transpose(1, 2),
        "sliced": flat[1:, ::2, 1:],
        "expanded": flat[:, :1].expand(-1, 9, -1),
        "misaligned": flat.view(-1)[1 : 1 + 10 * inner].view(-1, inner, 2),
        "first dimension inside": flat.permute(1, 2, 0),
    }
    for layout, block in blocks.items():
        x = {2: block[1], 3: block, 4: block.unsqueeze(-2)}[call.rank]
        wrong = _wrong(device, call.ours, call, x, call.others(x, random), random)
        found += [f"{layout} {text}" for text in wrong]
    _raise(found)


def _not_finite(device: Device, call: Call) -> None:
    random = _generator(device)
    # Means of equal values are exact for a power of two columns, and so is what is left of them.
    x = _values((9, 32, 2, 2)[: call.rank], torch.float32, random)
    others = call.others(x, random)
    x[0] = -torch.inf
    x[1, 3] = torch.inf
    x[2, 4] = torch.nan
    x[3] = call.large
    x[4] = call.tiny
    x[5, 5] = -torch.inf
    _raise(_wrong(device, call.ours, call, x, others, random, call.statistics))


def outputs_of(results: dict[str, Tensor]) -> list[Tensor]:
    return [value for name, value in results.items() if name.startswith("y")]


def _bits(device: Device, call: Call, quick: bool) -> None:
    """The same in every run, and a row's forward the same in any batch."""
    random = _generator(device)
    shape = (5, 37) if quick else (1823, 781)
    x = _values((*shape, 2, 2)[: call.rank], torch.float32, random)
    others = call.others(x, random)
    first, second = (results_of(call.ours, x, others, None) for _ in range(2))
    for name in first:
        if not torch.equal(first[name], second[name]):
            raise AssertionError(f"{name}: other bits in the second run")
    if not call.alone:
        return
    some = call.ours(x[2:4].clone(), *(rows_of(a, x, slice(2, 4)) for a in others))
    parts = some if isinstance(some, tuple) else (some,)
    for part, whole in zip(parts, outputs_of(first), strict=True):
        if not torch.equal(part, whole[2:4]):
            raise AssertionError("a row's forward depends on the batch it is in")


def rows_of(argument: Any, x: Tensor, some: slice) -> Any:
    """An argument for some of x's rows: one that has as many is cut likewise."""
    if not isinstance(argument, Tensor) or argument.shape[:1] != x.shape[:1]:
        return argument
    return argument.detach()[some].clone().requires_grad_(argument.requires_grad)


def _graph(device: Device, call: Call) -> None:
    """Captured without waiting for the device; a replay reads what lies there then."""
    random = _generator(device)
    x = _values((6, 66, 2, 2)[: call.rank], torch.float32, random)
    others = call.others(x, random)
    results: dict[str, Tensor] = {}
    dys = _upstream(results_of(call.theirs, x, others, None), random)

    def step() -> None:
        results.update(results_of(call.ours, x, others, dys))

    with device.stream():
        step()
    with device.no_synchronization():
        step()
    replay = device.graph(step)
    x.copy_(_values(tuple(x.shape), torch.float32, random))
    replay()
    device.synchronize()
    torch.testing.assert_close(
        results, results_of(call.theirs, x, others, dys), rtol=1e-4, atol=1e-4
    )


def _bad_target(device: Device) -> None:
    x = _values((4, 9), torch.float32, _generator(device))
    target = torch.tensor([3, 9, -1, 0], device=device.device)
    loss = call_of("cross_entropy of each row").ours(x, target)
    if loss.isnan().tolist() != [False, True, True, False]:
        raise AssertionError(f"loss {loss.tolist()} for targets {target.tolist()} of 9 classes")


def _as_timed(device: Device, case: TimedCase) -> dict[str, float]:
    """The largest part of its size by which a result differs from torch's in float32."""
    allowed = PEERS_TOLERANCE if case.coarse else TOLERANCE[case.dtype]
    work = case.work(device)
    try:
        found = check(work.results(case.ours, True), work.oracle(torch.float32), allowed)
    finally:
        del work
        device.free_bytes()  # other processes check beside this one
    return {"difference": found}


def _on_cpu(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().cpu().clone().requires_grad_(argument.requires_grad)


def _beside_cpu(device: Device, call: Call, dtype: str) -> dict[str, float]:
    random = _generator(device)
    x = _values((6, 66, 4, 4)[: call.rank], DTYPES[dtype], random)
    others = call.others(x, random)
    dys = _upstream(results_of(call.theirs, x, others, None), random)
    mine = {k: y.cpu() for k, y in results_of(call.ours, x, others, dys).items()}
    with numba_on_cpu():
        given = [_on_cpu(dy) for dy in dys]
        theirs = results_of(call.ours, _on_cpu(x), [_on_cpu(a) for a in others], given)
    theirs = {k: y.double() for k, y in theirs.items() if y.abs().sum() > 0}
    found = difference(mine, theirs)
    if not found <= BESIDE_CPU[dtype]:
        raise AssertionError(f"{found:.1e} of its size from what the CPU's kernels give")
    return {"difference": found}


def _no_op(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return 0 * x


def _negated(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return -torch.nn.functional.softmax(x, *arguments)


def _half_gradient(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    y = torch.nn.functional.softmax(x, *arguments)
    return y.detach() + 0.5 * (y - y.detach())


def _teeth(device: Device) -> None:
    call, random = CALLS[0], _generator(device)
    for wrong, dtype in itertools.product((_no_op, _negated, _half_gradient), ("fp32", "bf16")):
        x = _values((7, 33), DTYPES[dtype], random)
        if not _wrong(device, wrong, call, x, (-1,), random):
            raise AssertionError(f"{wrong.__name__} passed in {dtype}")
