"""Whatever a tensor's layout: torch's result, and not a byte outside the tensor is written."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastopt
from fastopt_kernels.chunks import chunk_table
from tests import oracle

SHAPE = (4, 6, 5, 3)
Lay = Callable[[Tensor], Tensor]


def _into(base: Tensor, view: Tensor, values: Tensor) -> Tensor:
    view.copy_(values)
    return view


def _padded(values: Tensor, *extra: int) -> Tensor:
    """Memory to cut a view from: random, so that a write outside the view shows."""
    shape = [n + more for n, more in zip(values.shape, extra, strict=True)]
    return torch.randn(*shape).to(values.dtype)


def _last_slice(values: Tensor) -> Tensor:
    base = torch.randn(*values.shape, 2).to(values.dtype)
    return _into(base, base[..., 0], values)


def _misaligned(values: Tensor) -> Tensor:
    base = torch.randn(values.numel() + 2).to(values.dtype)
    return _into(base, base[1:-1].view(values.shape), values)


def _every_other(values: Tensor) -> Tensor:
    base = torch.randn(2 * values.shape[0], *values.shape[1:]).to(values.dtype)
    return _into(base, base[::2], values)


def _inner_columns(values: Tensor) -> Tensor:
    base = _padded(values, 0, 2, 0, 0)
    return _into(base, base[:, 1:-1], values)


def _odd_strides(values: Tensor) -> Tensor:
    """Dimensions of size 1 may have any stride."""
    view = torch.empty_strided((1, *values.shape), (7, *values.contiguous().stride()))
    return view.to(values.dtype).copy_(values.unsqueeze(0)).squeeze(0)


LAYOUTS: dict[str, Lay] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "last slice": _last_slice,
    "every other row": _every_other,
    "inner columns": _inner_columns,
    "misaligned": _misaligned,
    "odd strides": _odd_strides,
}


def storage_of(tensor: Tensor) -> Tensor:
    """All the memory behind a tensor, flat."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())  # type: ignore[no-any-return]


def outside(tensor: Tensor) -> Tensor:
    """What lies in the tensor's storage but not in the tensor."""
    memory = storage_of(tensor)
    mine = torch.zeros(memory.shape, dtype=torch.bool)
    mine.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return memory[~mine].clone()


def check_untouched(
    name: str, options: dict[str, Any], params: list[Tensor], grads: list[list[Any]]
) -> None:
    """torch's trajectory, the memory around every parameter bitwise as before."""
    before = [outside(param) for param in params]
    strides = [param.stride() for param in params]
    oracle.check(name, options, params, grads)
    for k, (param, was) in enumerate(zip(params, before, strict=True)):
        assert oracle.same_bits(outside(param), was), f"wrote beside parameter {k}"
    assert [param.stride() for param in params] == strides


def laid(values: Any, lay: Lay) -> Any:
    return lay(values) if isinstance(values, Tensor) else values


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_parameter_and_gradient(layout: str, grad_layout: str) -> None:
    params, grads = oracle.inputs([SHAPE, SHAPE, SHAPE])
    params = [LAYOUTS[layout](param) for param in params]
    grads = [[laid(grad, LAYOUTS[grad_layout]) for grad in row] for row in grads]
    check_untouched("AdamW", {"lr": 0.05}, params, grads)


@pytest.mark.parametrize("name", oracle.NAMES)
def test_all_layouts_in_one_optimizer(name: str) -> None:
    """A tensor that must be staged takes nothing from the others."""
    params, grads = oracle.inputs([SHAPE] * len(LAYOUTS))
    params = [lay(param) for lay, param in zip(LAYOUTS.values(), params, strict=True)]
    check_untouched(name, {"lr": 0.05}, params, grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_layouts_in_other_dtypes(dtype: torch.dtype) -> None:
    params, grads = oracle.inputs([SHAPE] * len(LAYOUTS), dtype)
    params = [lay(param) for lay, param in zip(LAYOUTS.values(), params, strict=True)]
    grads = [[laid(grad, LAYOUTS["last slice"]) for grad in row] for row in grads]
    check_untouched("AdamW", {"lr": 0.05}, params, grads)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "last slice"])
def test_gradient_layout_may_change_between_steps(layout: str) -> None:
    params, grads = oracle.inputs([SHAPE, SHAPE, SHAPE])
    ways = list(LAYOUTS.values())
    grads = [[laid(grad, ways[step % len(ways)]) for grad in row] for step, row in enumerate(grads)]
    check_untouched("AdamW", {"lr": 0.05}, [LAYOUTS[layout](param) for param in params], grads)


# Gradients that are not what their memory says.

GRADIENTS: dict[str, Lay] = {
    "conjugate": lambda g: g.conj(),
    "negative bit": torch._neg_view,
    "negated imaginary part": lambda g: torch.complex(g, g).conj().imag,
    "zero tensor": lambda g: torch._efficientzerotensor(g.shape, dtype=g.dtype),
    "expanded": lambda g: g.flatten()[0].expand(g.shape),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("layout", ["contiguous", "last slice"])
def test_gradients_that_are_not_what_their_memory_says(kind: str, layout: str) -> None:
    """Plain and special gradients in turns: a plan made for either must see the other."""
    dtype = torch.complex64 if kind == "conjugate" else torch.float32
    for first in (0, 1):
        params, grads = oracle.inputs([SHAPE, SHAPE, SHAPE], dtype)
        for step in range(first, len(grads), 2):
            grads[step] = [laid(grad, GRADIENTS[kind]) for grad in grads[step]]
        params = [LAYOUTS[layout](param) for param in params]
        check_untouched("AdamW", {"lr": 0.05}, params, grads)


def test_parameters_that_are_not_what_their_memory_says() -> None:
    """A conjugate or negated view as a parameter: the base holds the other values."""
    base = torch.randn(5, 7, dtype=torch.complex64)
    for view in (base.conj(), base.conj().imag):
        grads = [[torch.randn(5, 7).to(view.dtype)] for _ in range(7)]
        check_untouched("SGD", {"lr": 0.05, "weight_decay": 0.1}, [view.detach()], grads)


def test_one_gradient_may_serve_two_parameters() -> None:
    params, grads = oracle.inputs([(50,), (50,)], gaps=False)
    check_untouched("AdamW", {}, params, [[row[0], row[0]] for row in grads])


# States.


@pytest.mark.parametrize("state_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "last slice"])
def test_states_may_lie_otherwise_than_their_parameter(layout: str, state_layout: str) -> None:
    """As when a checkpoint of a channels_last model is loaded into a contiguous one."""
    beside: list[tuple[Tensor, Tensor]] = []

    def relay(optimizer: torch.optim.Optimizer, step: int) -> None:
        if step != 4:
            return
        for state in optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = LAYOUTS[state_layout](state[name])
                beside.append((state[name], outside(state[name])))

    params, grads = oracle.inputs([SHAPE, SHAPE, SHAPE])
    params = [LAYOUTS[layout](param) for param in params]
    oracle.check("AdamW", {"lr": 0.05}, params, grads, edit=relay)
    assert beside
    assert all(oracle.same_bits(outside(state), was) for state, was in beside)


# Sizes.


SIZES: dict[str, list[tuple[int, ...]]] = {
    "0-dim": [(), (), ()],
    "one element": [(1,), (1, 1, 1)],
    "empty": [(0,), (3, 0, 2)],
    "empty last": [(3,), (5,), (0,)],
    "empty first and between": [(0,), (3,), (0, 4), (5,)],
    "one chunk": [(16383,), (16384,), (16385,)],
    "serial and parallel": [(16384,), (16383,)],
    "at the boundary": [(16384,), (16384,)],
    "many small": [(k % 7,) for k in range(300)],
}


@pytest.mark.parametrize("sizes", SIZES)
def test_any_size(sizes: str) -> None:
    """Chunks are of 16384 elements; from 32768 in all a step is parallel."""
    params, grads = oracle.inputs(SIZES[sizes], steps=7, decades=1)
    check_untouched("AdamW", {"lr": 0.05, "weight_decay": 0.1}, params, grads)


def test_an_odd_large_size() -> None:
    params, grads = oracle.inputs([(1823, 781), (3,)], steps=7, decades=1)
    oracle.check("AdamW", {"lr": 0.05, "weight_decay": 0.1}, params, grads, watch_from=6)


def test_missing_gradients_move_a_step_between_serial_and_parallel() -> None:
    params, grads = oracle.inputs([(20_000,), (20_000,), (20_000,)], decades=1)
    check_untouched("AdamW", {"lr": 0.05}, params, grads)


def test_views_of_0_dim_and_of_one_element() -> None:
    memory = torch.randn(6)
    params = [memory[2], memory[4:5], memory[5]]
    grads = [[torch.randn(()), torch.randn(1), torch.randn(())] for _ in range(7)]
    start = memory.clone()
    oracle.check("AdamW", {"lr": 0.05}, params, grads)
    assert oracle.same_bits(memory[[0, 1, 3]], start[[0, 1, 3]])
    assert not bool((memory[[2, 4, 5]] == start[[2, 4, 5]]).any())


# Python names it from 3.13 on; this is Linux's.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def test_chunks_are_counted_in_int64() -> None:
    numels = np.array([2**31 + 5, 0, 3, 2**32], dtype=np.int64)
    table = chunk_table(numels, 1 << 20)
    assert table.dtype == np.int64
    for tensor, numel in enumerate(numels):
        mine = table[table[:, 0] == tensor]
        assert (mine[1:, 1] == mine[:-1, 2]).all()
        assert int((mine[:, 2] - mine[:, 1]).sum()) == numel
        assert numel == 0 or (mine[0, 1], mine[-1, 2]) == (0, numel)


def test_elements_beyond_2_to_the_31_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last chunk is stepped: the memory before it is reserved and never touched."""
    from fastopt_kernels.cpu.step import launch

    numel = 2**31 + 100
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = [mmap.mmap(-1, numel * 4, flags=flags) for _ in range(2)]
    param, grad = (torch.frombuffer(m, dtype=torch.float32) for m in memory)
    param[-50:], grad[-50:] = 2.0, 1.0
    param.requires_grad_(True)
    param.grad = grad
    monkeypatch.setattr(launch, "chunk_table", lambda *args: chunk_table(*args)[-1:])
    fastopt.optim.SGD([param], lr=0.5).step()
    assert param[-50:].tolist() == [1.5] * 50
    assert param[-100:-50].tolist() == param[:50].tolist() == [0.0] * 50


# Memory that moves.


@pytest.mark.parametrize("layout", ["contiguous", "last slice"])
def test_data_swapped_between_steps(layout: str) -> None:
    """`p.data = ...`: the old memory is written no more, the new one is."""
    old: list[tuple[Tensor, Tensor]] = []

    def swap(optimizer: torch.optim.Optimizer, step: int) -> None:
        for param in optimizer.param_groups[0]["params"]:
            if step in (3, 4, 6):
                old.append((param.data, param.data.clone()))
                param.data = LAYOUTS[layout](param.data.clone())

    params, grads = oracle.inputs([SHAPE, SHAPE, SHAPE])
    oracle.check("AdamW", {"lr": 0.05}, params, grads, edit=swap)
    assert all(oracle.same_bits(data, was) for data, was in old)


# Teeth.


def test_a_kernel_that_ignores_strides_would_be_noticed() -> None:
    """torch's fused CPU step takes a strided parameter for a flat array."""

    def torch_fused(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.05, fused=True)

    params, grads = oracle.inputs([SHAPE])
    param = _last_slice(params[0])
    before = outside(param)
    with pytest.raises(AssertionError, match="param of parameter 0"):
        oracle.check("AdamW", {"lr": 0.05}, [param], grads, ours=torch_fused)
    assert not oracle.same_bits(outside(param), before)
