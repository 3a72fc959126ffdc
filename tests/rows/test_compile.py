"""Registered ops, fake tensors, torch.compile, torch.export, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastopt import functional
from tests.rows.cases import draw, probabilities, problem, targets, with_upstream
from tests.rows.problem import Problem
from tests.rows.subject import DTYPES, MODULES, NAMES, NORMS, OURS, OVER_DIM, TORCH

PREFIX = "fastopt::"
# Checked beside their functions, in test_residual_norms.py and others.
ELSEWHERE = {
    PREFIX + name + suffix
    for name in ("add_norm", "linear_cross_entropy", "masked_softmax", "weight_norm")
    for suffix in ("", "_backward")
}


def some_of_everything() -> list[Problem]:
    """Calls that between them reach every op."""
    x = draw(4, 5)
    found = [problem(name, x) for name in NAMES]
    found += [problem(name, x, dim=0) for name in OVER_DIM]
    ask = problem("cross_entropy", x)
    for options in ({"reduction": "mean"}, {"reduction": "sum", "label_smoothing": 0.1}):
        found.append(with_upstream(replace(ask, options=options)))
        for target in (ask.inputs["target"], probabilities(x)):
            inputs = {**ask.inputs, "target": target, "weight": draw(5).abs()}
            found.append(with_upstream(replace(ask, inputs=inputs, options=options)))
    for name in NORMS:
        made = problem(name, x)
        found += [replace(made, wanted=wanted) for wanted in (("input",), ("weight",))]
        found.append(replace(made, inputs={"input": x}))
    return found


class Recorder(TorchDispatchMode):
    """Every call of an op of ours, with what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, Any, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith(PREFIX):
            copies = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.setdefault(name, []).append((func, copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def channel_norms() -> None:
    """Own statistics and given ones, in planes and in pixels, with and without weights."""
    x, weight, mean = draw(4, 6, 3, 2).requires_grad_(), draw(6).requires_grad_(), draw(6)
    functional.batch_norm(x, None, None, training=True).sum().backward()
    functional.group_norm(x.movedim(1, -1), 1, eps=1e-3).sum().backward()
    functional.batch_norm(x, mean, mean.abs(), weight, weight).sum().backward()


def recorded() -> dict[str, list[tuple[Any, Any, Any]]]:
    with Recorder() as recorder:
        for made in some_of_everything():
            made.run(OURS[made.name])
        channel_norms()
    return recorder.calls


def test_every_op_passes_opcheck() -> None:
    """Schema, autograd registration, fake kernel, and dispatch under AOT with dynamic shapes."""
    calls = recorded()
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith(PREFIX)}
    assert registered, "no op is registered"
    names = {n.partition(".")[0] for n in registered} - ELSEWHERE
    assert {name.partition(".")[0] for name in calls} == names
    for name, those in calls.items():
        # The first and the last: with as few arguments as may be, and with all.
        for func, args, kwargs in {id(those[0]): those[0], id(those[-1]): those[-1]}.values():
            wanted = "backward" not in name
            given = tuple(
                a.detach().requires_grad_(wanted and a.is_floating_point())
                if isinstance(a, Tensor) else a
                for a in args
            )  # fmt: skip
            torch.library.opcheck(func, given, kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors(name: str, dtype: torch.dtype) -> None:
    """Shape, dtype and strides of what a run gives, without one."""
    for layout in (lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[:, ::2]):
        made = problem(name, layout(draw(6, 6, 8, dtype=dtype)))
        real = made.run(OURS[name])
        with FakeTensorMode() as mode:
            fakes = {k: None if v is None else mode.from_tensor(v) for k, v in made.inputs.items()}
            dy = mode.from_tensor(made.upstream)
            fake = replace(made, inputs=fakes, upstream=dy).run(OURS[name])
        for key, value in real.items():
            assert fake[key].shape == value.shape, key
            assert fake[key].dtype == value.dtype, key
            assert fake[key].stride() == value.stride(), key
            assert fake[key].device == value.device, key


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors(name: str) -> None:
    made = problem(name, draw(4, 5))
    meta = {k: None if v is None else v.to("meta") for k, v in made.inputs.items()}
    found = OURS[name](**meta, **made.options)
    expected = OURS[name](**made.inputs, **made.options)
    assert found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


# torch.compile and torch.export.


class Model(nn.Module):
    """All of it: norms, softmax over two dims, logsumexp and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = MODULES["LayerNorm"](8)
        self.rms = MODULES["RMSNorm"](8)
        self.last = nn.Linear(8, 5)
        self.softmax = MODULES["Softmax"](-1)
        self.log_softmax = MODULES["LogSoftmax"](1)
        self.loss = MODULES["CrossEntropyLoss"](label_smoothing=0.1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.rms(self.norm(self.first(x)))
        h = h * self.softmax(h) + self.log_softmax(h)
        y = self.last(h)
        spread = OURS["logsumexp"](y, 1).square().mean() + OURS["softmax"](y, 0).square().sum()
        return self.loss(y, target) + 0.1 * spread  # type: ignore[no-any-return]


class Counter:
    """A backend that counts what it is given to compile."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, example: Any) -> Any:
        self.graphs += 1
        return aot_eager(graph, example)


@pytest.fixture
def model() -> Iterator[Model]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield Model()
    torch._dynamo.reset()


def batch(n: int) -> tuple[Tensor, Tensor]:
    return draw(n, 6, seed=n), targets(n, classes=5, seed=n)


def check_compiled(model: nn.Module, compiled: Any, n: int) -> None:
    losses, grads = [], []
    for function in (model, compiled):
        model.zero_grad()
        loss = function(*batch(n))
        loss.backward()
        losses.append(loss.detach())
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(grads[1], grads[0])


def graphs_made(model: nn.Module, sizes: tuple[int, ...], **options: Any) -> list[int]:
    """How often the backend has been called after each size; torch calls it more than once for a
    first graph that takes floats."""
    counter, found = Counter(), []
    compiled = torch.compile(model, fullgraph=True, backend=counter, **options)
    for n in sizes:
        check_compiled(model, compiled, n)
        found.append(counter.graphs)
    return found


def test_compiled_in_one_graph_once_for_all_batch_sizes(model: Model) -> None:
    graphs = graphs_made(model, (4, 9, 33), dynamic=True)
    assert graphs == graphs[:1] * 3


def test_compiled_again_once_when_the_batch_size_changes(model: Model) -> None:
    """Without dynamic=True torch makes a size dynamic when it first changes, and then never
    again."""
    graphs = graphs_made(model, (4, 9, 33, 5))
    assert graphs[0] < graphs[1] == graphs[3]


@pytest.mark.parametrize("name", NAMES)
def test_each_function_compiled(name: str) -> None:
    """Every kind of call, forward and backward, in one graph."""
    torch._dynamo.reset()
    for made in some_of_everything():
        if made.name == name:
            torch._dynamo.reset()
            compiled = torch.compile(OURS[name], fullgraph=True, backend="aot_eager")
            found, expected = made.run(compiled), made.run(OURS[name])
            torch.testing.assert_close(found, expected)


def test_exported_with_a_dynamic_batch(model: Model) -> None:
    size = torch.export.Dim("size", min=2)
    program = torch.export.export(
        model, batch(4), dynamic_shapes={"x": {0: size}, "target": {0: size}}
    )
    for n in (4, 9):
        torch.testing.assert_close(program.module()(*batch(n)), model(*batch(n)))


# Autocast.


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_as_torchs_op_of_that_name(name: str, dtype: torch.dtype, to: torch.dtype) -> None:
    """The output's dtype, and its values at that precision."""
    made = problem(name, draw(6, 33, dtype=dtype))
    with torch.autocast("cpu", dtype=to):
        expected = TORCH[name](**made.inputs, **made.options)
        found = OURS[name](**made.inputs, **made.options)
    assert found.dtype == expected.dtype
    eps = max(torch.finfo(d).eps for d in (found.dtype, dtype))
    torch.testing.assert_close(found, expected, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("name", NORMS)
def test_autocast_of_mixed_dtypes(name: str) -> None:
    """bfloat16 activations with float32 weights, what a matrix product before leaves."""
    made = problem(name, draw(6, 33))
    x = made.inputs["input"].bfloat16()  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            expected = TORCH[name](**{**made.inputs, "input": x}, **made.options).dtype
        except UserWarning:
            expected = torch.bfloat16
        found = OURS[name](**{**made.inputs, "input": x}, **made.options)
    assert found.dtype == expected


TO_FLOAT32: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x: functional.softmax(x, -1),
    "log_softmax": lambda x: functional.log_softmax(x, -1),
    "logsumexp": lambda x: functional.logsumexp(x, -1),
    "cross_entropy": lambda x: functional.cross_entropy(x, torch.empty_like(x)),
    "layer_norm": lambda x: functional.layer_norm(x, (6,)),
    "rms_norm": lambda x: functional.rms_norm(x, (6,)),
    "group_norm": lambda x: functional.group_norm(x, 2),
    "scaled_masked_softmax": functional.scaled_masked_softmax,
    "add_layer_norm": lambda x: functional.add_layer_norm(x, x, (6,))[1],
}


@pytest.mark.parametrize("name", TO_FLOAT32)
def test_cuda_autocast_runs_in_float32_what_torchs_does(name: str) -> None:
    """On meta tensors, which are asked as those on a GPU are."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        result = TO_FLOAT32[name](torch.empty(4, 6, dtype=torch.bfloat16, device="meta"))
    finally:
        torch.set_autocast_enabled("cuda", before)
    assert result.dtype is torch.float32


def test_training_under_autocast(model: Model) -> None:
    """Gradients are the parameters' dtype, and near those without."""
    losses = []
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        model.zero_grad()
        with context:
            loss = model(*batch(9))
        loss.backward()
        losses.append((loss.float(), [p.grad.clone() for p in model.parameters()]))  # type: ignore[union-attr]
        assert all(p.grad.dtype is torch.float32 for p in model.parameters())  # type: ignore[union-attr]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0.05)


# Deliberately wrong candidates.


def test_a_graph_break_or_a_recompile_would_be_noticed(model: Model) -> None:
    """By size: a branch on the batch compiles for each."""

    class Branching(Model):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return super().forward(x * (2.0 if len(x) > 8 else 1.0), target)

    graphs = graphs_made(Branching(), (4, 9), dynamic=True)
    assert graphs[0] < graphs[1]

    class Breaking(Model):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x, target)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Breaking(), fullgraph=True, backend=Counter())(*batch(4))


def test_a_model_that_ignores_its_norm_would_be_noticed(model: Model) -> None:
    other = Model()
    other.load_state_dict(model.state_dict())
    other.norm = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(other(*batch(4)), model(*batch(4)))
