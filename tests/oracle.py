"""What a trajectory of steps must give: torch.optim in float64, judged by torch's own loop.

    max|ours - float64| <= 1.5 max|theirs - float64| + one rounding

for every parameter and every state after every step, where theirs is torch.optim's loop in the
dtype under test, on the same gradients. A rare element may be beyond that where float64 itself
goes as far when what it is given is off by one rounding (g / sqrt(v) where g + decay p cancels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastopt


class Tolerance(NamedTuple):
    """How far ours may be from float64."""

    ratio: float  # in multiples of the distance of torch's loop
    rounding: float  # and this share of the largest value more: the spacing of the dtype
    smallest: float  # or the spacing of its subnormals, where that is more


def _tolerance(dtype: torch.dtype, roundings: int = 1) -> Tolerance:
    facts = torch.finfo(dtype)
    return Tolerance(1.5, roundings * facts.eps, facts.smallest_normal * facts.eps)


# float64 has no wider oracle: torch's loop is the oracle itself, and since either is rounded some
# times a step, they may be apart by a few roundings.
TOLERANCES = {
    torch.float64: _tolerance(torch.float64, roundings=8),
    torch.float32: _tolerance(torch.float32),
    torch.float16: _tolerance(torch.float16),
    torch.bfloat16: _tolerance(torch.bfloat16),
}
# The largest distance over a few elements is a matter of luck, and torch's may be none at all:
# tensors smaller than this are granted a rounding a step.
FEW = 256
# A share of elements may be so ill-conditioned that they are judged one by one: an error in the
# update shows in most of them.
RARE = 0.01
WIDE = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}
NAMES = ("SGD", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam")
STEPS = 9

# In place of a gradient: the parameter requires none for this step.
FROZEN = "frozen"

Edit = Callable[[torch.optim.Optimizer, int], None]
Make = Callable[[list[Tensor]], torch.optim.Optimizer]
Grads = Sequence[Sequence[Any]]
# (parameter, "param" or the name of a state) -> a copy
Snapshot = dict[tuple[int, str], Tensor]


def inputs(
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    steps: int = STEPS,
    scale: float = 1.0,
    decades: int = 4,
    seed: int = 0,
    gaps: bool = True,
) -> tuple[list[Tensor], list[list[Any]]]:
    """Parameters and, for each step, their gradients.

    scale, decades: gradients are of size scale for the first parameter, ten times smaller for each
    one after it, and of size scale again after so many

    With gaps, and three parameters or more: the first has every gradient, the second is frozen
    and thawed midway, the third begins late and misses a step; one step has no gradient at all.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = WIDE.get(dtype, torch.float64)

    def draw(shape: Sequence[int], size: float) -> Tensor:
        return (torch.randn(tuple(shape), generator=generator, dtype=wide) * size).to(dtype)

    params = [draw(shape, 1.0) for shape in shapes]
    grads: list[list[Any]] = [
        [draw(shape, scale * 10.0 ** -(k % decades)) for k, shape in enumerate(shapes)]
        for _ in range(steps)
    ]
    if gaps and len(shapes) >= 3:
        for step in (2, 3, 4):
            grads[step][1] = FROZEN
        for step in (0, 1, 6):
            grads[step][2] = None
        grads[5] = [None] * len(shapes)
    return params, grads


def torch_loop(name: str, split: Any = None, **options: Any) -> Make:
    """torch.optim's class of that name, running its own loop.

    split(params): the parameters as groups, the list itself where it is None
    """
    cls = getattr(torch.optim, name)
    return lambda params: cls(split(params) if split else params, foreach=False, **options)


def fused(name: str, split: Any = None, **options: Any) -> Make:
    """fastopt.optim's class of that name."""
    cls = getattr(fastopt.optim, name)
    return lambda params: cls(split(params) if split else params, **options)


def plain(tensor: Any, dtype: torch.dtype | None = None) -> Any:
    """A contiguous copy with memory of its own; None and FROZEN as they are."""
    if not isinstance(tensor, Tensor):
        return tensor
    tensor = tensor.detach().to(dtype or tensor.dtype).resolve_conj().resolve_neg()
    return tensor.clone(memory_format=torch.contiguous_format)


def widened(tensor: Any) -> Any:
    """The same values in float64 (complex128)."""
    wide = WIDE.get(tensor.dtype, torch.float64) if isinstance(tensor, Tensor) else None
    return plain(tensor, wide)


def run(
    make: Make,
    params: list[Tensor],
    grads: Grads,
    edit: Edit | None = None,
    states_from: int | None = None,
    watch_from: int = 0,
) -> list[Snapshot]:
    """Step `params` in place on the gradients; what there is after each step.

    edit(optimizer, step): called before each step, counted from 0, as a scheduler would change its
    groups; states_from: the first step whose states are read, half way unless said otherwise: until
    somebody reads them fastopt need not look whether one was replaced, and it must be right both
    ways; watch_from: the snapshots of steps before this one are empty
    """
    first = len(grads) // 2 if states_from is None else states_from
    optimizer = make(params)
    history = []
    for step, row in enumerate(grads):
        give(params, row)
        if edit is not None:
            edit(optimizer, step)
        optimizer.step()
        watched = step >= watch_from
        history.append(snapshot(optimizer, params, states=step >= first) if watched else {})
    return history


def give(params: Sequence[Tensor], row: Sequence[Any]) -> None:
    """Give each parameter its gradient, of whatever dtype it is."""
    for param, grad in zip(params, row, strict=True):
        param.requires_grad_(grad is not FROZEN)
        param.grad = None
        if isinstance(grad, Tensor):
            if param.grad_dtype is not grad.dtype:
                param.grad_dtype = grad.dtype
            param.grad = grad


def snapshot(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], states: bool = True
) -> Snapshot:
    """Copies of the parameters, and of their states if asked for."""
    found = {(k, "param"): plain(param) for k, param in enumerate(params)}
    if states:
        for k, param in enumerate(params):
            for name, value in optimizer.state.get(param, {}).items():
                if value is not None:
                    found[k, name] = plain(torch.as_tensor(value))
    return found


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """NAdam's mu_product and the step counts are of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def exact(
    make: Make,
    params: Sequence[Tensor],
    grads: Grads,
    edit: Edit | None = None,
    watch_from: int = 0,
) -> list[Snapshot]:
    """The trajectory in float64."""
    with default_dtype(torch.float64):
        wide_grads = [[widened(grad) for grad in row] for row in grads]
        wide = [widened(param) for param in params]
        return run(make, wide, wide_grads, edit, states_from=0, watch_from=watch_from)


def check(
    name: str,
    options: dict[str, Any],
    params: list[Tensor],
    grads: Grads,
    *,
    ours: Make | None = None,
    split: Any = None,
    edit: Edit | None = None,
    grads_as_params: bool = False,
    watch_from: int = 0,
) -> list[Snapshot]:
    """Step `params` with fastopt's class of that name and hold all of it against torch's.

    ours: another candidate in its place; split: see `fused`; edit, watch_from: see `run`;
    grads_as_params: cast torch's gradients to the dtype of their parameters, where its loop takes
    no other
    """
    torch_make = torch_loop(name, split, **options)
    reference = exact(torch_make, params, grads, edit, watch_from)
    dtypes = [param.dtype if grads_as_params else None for param in params]
    plain_grads = [[plain(grad, dtypes[k]) for k, grad in enumerate(row)] for row in grads]
    theirs = run(
        torch_make, [plain(param) for param in params], plain_grads, edit, watch_from=watch_from
    )
    given = [[plain(grad) for grad in row] for row in grads]
    start = [plain(param) for param in params]
    mine = run(ours or fused(name, split, **options), params, grads, edit, watch_from=watch_from)

    def again(seed: int) -> list[Snapshot]:
        nearby = _nearby(start, grads, seed)
        return exact(torch_make, *nearby, edit, watch_from)

    assert_history_not_worse(mine, theirs, reference, start, name, again)
    for step, (row, before) in enumerate(zip(grads, given, strict=True)):
        for k, (grad, was) in enumerate(zip(row, before, strict=True)):
            assert grad is was or same_bits(grad, was), f"step {step} wrote gradient {k}"
    return mine


def _nearby(params: Sequence[Tensor], grads: Grads, seed: int) -> tuple[Any, Any]:
    """Parameters and gradients in float64, each element off by one rounding of its dtype."""
    generator = torch.Generator().manual_seed(seed)

    def off(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        size = TOLERANCES[tensor.dtype.to_real()].rounding
        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        return widened(tensor) * (1 + size * signs)

    return [off(param) for param in params], [[off(grad) for grad in row] for row in grads]


def assert_history_not_worse(
    ours: list[Snapshot],
    theirs: list[Snapshot],
    reference: list[Snapshot],
    start: Sequence[Tensor],
    label: str = "",
    again: Callable[[int], list[Snapshot]] | None = None,
) -> None:
    """Every parameter and state after every step, by name.

    start: the parameters before; again(seed): the reference with what it is given off by one
    rounding, called only where something is beyond its tolerance
    """
    runs: list[list[Snapshot]] = []

    def moved(step: int, key: tuple[int, str]) -> Tensor:
        if again is not None and not runs:
            runs.extend(again(seed) for seed in range(4))
        right = _real(reference[step - 1][key])
        there = [(_real(other[step - 1][key]) - right).abs() for other in runs]
        return torch.stack([torch.zeros_like(right), *there]).amax(0)

    largest = {(k, "param"): _magnitude(param) for k, param in enumerate(start)}
    for step, (mine, torchs, right) in enumerate(zip(ours, theirs, reference, strict=True), 1):
        for key, value in right.items():
            largest[key] = max(largest.get(key, 0.0), _magnitude(value))
        assert mine.keys() == torchs.keys(), f"{label} step {step}: other states than torch's"
        for (k, name), value in mine.items():
            other = torchs[k, name]
            what = f"{label} {name} of parameter {k} after step {step}"
            assert value.shape == other.shape, f"{what}: shape {value.shape}, torch {other.shape}"
            assert value.dtype == other.dtype, f"{what}: {value.dtype}, torch has {other.dtype}"
            assert_not_worse(
                what,
                value,
                other,
                right[k, name],
                value.dtype,
                steps=step,
                largest=largest[k, name],
                moved=partial(moved, step, (k, name)),
            )


def assert_not_worse(
    what: str,
    ours: Tensor,
    theirs: Tensor,
    reference: Tensor,
    dtype: torch.dtype,
    *,
    steps: int = 1,
    largest: float = 0.0,
    moved: Callable[[], Tensor] | None = None,
) -> None:
    """max|ours - reference| <= ratio max|theirs - reference| + rounding max|reference|.

    what: its name, for the message; reference: the values in float64; dtype: what `ours` and
    `theirs` were stored in; steps: how often they were rounded; largest: how large the values have
    been before, since every rounding stays; moved: see assert_history_not_worse. All must be
    finite.
    """
    if reference.numel() == 0:
        return
    tolerance = TOLERANCES[dtype.to_real()]
    ours, theirs, reference = (_real(x) for x in (ours, theirs, reference))
    for who, x in (("ours", ours), ("torch", theirs), ("float64", reference)):
        assert bool(torch.isfinite(x).all()), f"{what}: {who} is not finite"
    distances = (ours - reference).abs()
    torchs = float((theirs - reference).abs().max())
    rounding = max(tolerance.rounding * max(largest, _magnitude(reference)), tolerance.smallest)
    rounding *= steps if reference.numel() < FEW else 1
    beyond = distances - (tolerance.ratio * torchs + rounding)
    n_beyond = int((beyond > 0).sum())
    if moved is not None and 0 < n_beyond <= max(1, RARE * beyond.numel()):
        beyond -= moved()
    at = int(beyond.argmax())
    assert float(beyond.flatten()[at]) <= 0, (
        f"{what} ({dtype}): off by {float(distances.flatten()[at]):.3e} at element {at} (ours "
        f"{float(ours.flatten()[at]):.9g}, float64 {float(reference.flatten()[at]):.9g}); allowed "
        f"is {tolerance.ratio} x torch's {torchs:.3e} + rounding {rounding:.3e}"
    )


def _magnitude(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _real(tensor: Tensor) -> Tensor:
    wide = widened(tensor)
    return torch.view_as_real(wide) if wide.is_complex() else wide


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal: NaN equals NaN, and 0 is not -0."""
    a, b = plain(a), plain(b)
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )
