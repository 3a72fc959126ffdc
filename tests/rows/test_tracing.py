"""Every function in the graphs of torch.jit.trace and torch.fx."""

from __future__ import annotations

import ctypes
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor, nn

from fastopt import functional
from fastopt.functional import layer_norm
from fastopt.parametrizations import spectral_norm, weight_norm
from tests.rows.cases import draw, probabilities, targets

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    # By checks of torch's own batch_norm and group_norm.
    "ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning:torch",
)
Function = Callable[..., Any]
COLUMNS, CLASSES = 8, 5


def x(n: int) -> Tensor:
    return draw(n, COLUMNS, seed=n)


def images(n: int) -> Tensor:
    return draw(n, COLUMNS, n + 1, seed=n)


def scores(n: int) -> Tensor:
    return draw(2, n, n, seed=n)


def logits(n: int) -> tuple[Tensor, Tensor]:
    return draw(n, CLASSES, seed=n), targets(n, classes=CLASSES, seed=n)


def weights(n: int, *shape: int) -> list[Tensor]:
    return [draw(*(shape or (COLUMNS,)), seed=20 + k) for k in range(n)]


def layer(n: int, *more: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of linear_cross_entropy."""
    return x(n), draw(CLASSES, *more, COLUMNS, seed=3), targets(n, *more, classes=CLASSES, seed=n)


# A call, and its tensors for a size; the size of the trace is another than that of the run.
CALLS: dict[str, tuple[Function, Callable[[int], Any]]] = {
    "softmax": (lambda a: functional.softmax(a, -1), lambda n: [x(n)]),
    "softmax in float64": (
        lambda a: functional.softmax(a, 0, dtype=torch.float64),
        lambda n: [x(n)],
    ),
    "log_softmax": (lambda a: functional.log_softmax(input=a, dim=1), lambda n: [x(n)]),
    "logsumexp": (lambda a: functional.logsumexp(a, (0, -1), keepdim=True), lambda n: [x(n)]),
    "cross_entropy": (functional.cross_entropy, logits),
    "cross_entropy with more": (
        lambda a, t: functional.cross_entropy(a, t, label_smoothing=0.1, z_loss=0.1, softcap=3.0),
        logits,
    ),
    "layer_norm": (
        lambda a, w, b: functional.layer_norm(a, (COLUMNS,), w, bias=b),
        lambda n: [x(n), *weights(2)],
    ),
    "layer_norm by name": (
        lambda a, w: layer_norm(a, a.shape[-1:], weight=w),
        lambda n: [x(n), *weights(1)],
    ),
    "rms_norm": (lambda a, w: functional.rms_norm(a, [COLUMNS], w), lambda n: [x(n), *weights(1)]),
    "rms_norm of an offset": (
        lambda a, w: functional.rms_norm(a, (COLUMNS,), w, weight_offset=1.0),
        lambda n: [x(n), *weights(1)],
    ),
    "batch_norm": (
        lambda a, w: functional.batch_norm(a, None, None, w, training=True),
        lambda n: [images(n), *weights(1)],
    ),
    "batch_norm by given statistics": (
        lambda a, m, w: functional.batch_norm(a, m.detach(), m.detach().exp(), w),
        lambda n: [images(n), *weights(2)],
    ),
    "instance_norm": (
        lambda a, w: functional.instance_norm(a, weight=w),
        lambda n: [images(n), *weights(1)],
    ),
    "group_norm": (
        lambda a, w, b: functional.group_norm(a, 2, w, b),
        lambda n: [images(n), *weights(2)],
    ),
    "scaled_masked_softmax": (
        lambda a, m: functional.scaled_masked_softmax(a, m, 0.5, is_causal=True),
        lambda n: [scores(n), draw(n, seed=1)],
    ),
    "add_layer_norm": (
        lambda a, b, w: functional.add_layer_norm(a, b, (COLUMNS,), w),
        lambda n: [x(n), x(n).cos(), *weights(1)],
    ),
    "add_rms_norm": (
        lambda a, b, w: functional.add_rms_norm(a, b, (COLUMNS,), w, weight_offset=1.0),
        lambda n: [x(n), x(n).cos(), *weights(1)],
    ),
    "linear_cross_entropy": (functional.linear_cross_entropy, layer),
    "linear_cross_entropy of more dimensions": (
        functional.linear_cross_entropy,
        lambda n: layer(n, 3),
    ),
    "linear_cross_entropy of probabilities": (
        lambda a, w, p: functional.linear_cross_entropy(a, w, p, reduction="none", z_loss=0.1),
        lambda n: [*layer(n)[:2], probabilities(draw(n, CLASSES))],
    ),
}


def test_every_function_is_among_the_calls() -> None:
    assert {name.split()[0] for name in CALLS} == set(functional.__all__)


def outputs(function: Function, tensors: Any, grad: bool) -> list[Tensor]:
    """And the gradients of what may have one."""
    given = [t.clone().requires_grad_(grad and t.is_floating_point()) for t in tensors]
    found = function(*given)
    found = list(found) if isinstance(found, tuple) else [found]
    if grad:
        upstream = [draw(*y.shape, dtype=y.dtype, seed=9) for y in found]
        wanted = [t for t in given if t.requires_grad]
        found += torch.autograd.grad(found, wanted, upstream, allow_unused=True)
    return [y.detach() for y in found if y is not None]


# torch.jit.trace.


def check_traced(function: Function, make: Callable[[int], Any], grad: bool) -> None:
    """Of torch's operators, and right for inputs of another size, also where it is loaded."""
    example = tuple(t.clone().requires_grad_(grad and t.is_floating_point()) for t in make(4))
    traced = torch.jit.trace(function, example)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert all(kind.startswith(("aten::", "prim::")) for kind in kinds)
    assert "prim::PythonOp" not in kinds
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for module in (traced, torch.jit.load(file)):
        for n in (4, 9):
            found, expected = (outputs(f, make(n), grad) for f in (module, function))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_traced_by_jit(name: str, grad: bool) -> None:
    check_traced(*CALLS[name], grad)


def test_a_write_that_a_trace_does_not_have_would_be_noticed() -> None:
    def softmax(a: Tensor) -> Tensor:
        y, result = torch.zeros_like(a), F.softmax(a, -1)
        ctypes.memmove(y.data_ptr(), result.data_ptr(), y.nbytes)
        return y

    with pytest.raises((AssertionError, torch.jit.TracerWarning)):
        check_traced(softmax, lambda n: [x(n)], False)


@pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm])
def test_parametrized_weights_traced_by_jit(parametrize: Any) -> None:
    linear = parametrize(nn.Linear(COLUMNS, 3)).eval().requires_grad_(False)
    traced = torch.jit.trace(linear, (x(4),))
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.mul_(1.5).add_(0.1)
    torch.testing.assert_close(traced(x(9)), linear(x(9)))


# torch.fx.


def calling(function: Function, n_tensors: int) -> nn.Module:
    """A model that calls a function, not a module."""
    forwards = (
        lambda self, a: function(a),
        lambda self, a, b: function(a, b),
        lambda self, a, b, c: function(a, b, c),
    )
    return type("Calling", (nn.Module,), {"forward": forwards[n_tensors - 1]})()


@pytest.mark.parametrize("name", CALLS)
def test_traced_by_fx(name: str) -> None:
    """As one node of the function itself, which goes through a pickle."""
    function, make = CALLS[name]
    graph = torch.fx.symbolic_trace(calling(function, len(make(4))))
    public = getattr(functional, name.split()[0])
    assert [node.target for node in graph.graph.nodes if node.target is public]
    for module in (graph, pickle.loads(pickle.dumps(graph))):
        found, expected = (outputs(f, make(9), True) for f in (module, function))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_dropout_draws_anew_in_a_graph() -> None:
    def dropped(a: Tensor, b: Tensor) -> Any:
        return functional.add_rms_norm(a, b, (COLUMNS,), dropout_p=0.5)[1]

    model = calling(dropped, 2)
    zeros = torch.zeros_like(x(9))
    for module in (torch.fx.symbolic_trace(model), model):
        torch.manual_seed(3)
        found = [module(x(9), zeros) for _ in range(2)]
        assert not torch.equal(*found)
        torch.manual_seed(3)
        assert torch.equal(dropped(x(9), zeros), found[0])
