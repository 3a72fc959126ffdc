"""Swapped models under torch.jit, torch.fx and torch.export."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter import _flags

import fastopt
from fastopt import swap, swap_report
from tests.rows.cases import draw, targets

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    # By a check of torch's own batch_norm in training.
    "ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning:torch",
    # By torch's own run_decompositions.
    "ignore:.*LeafSpec:FutureWarning",
)
CLASSES = 5
Batch = tuple[Tensor, Tensor]


class Model(nn.Module):
    """Every module that a swap replaces, some of them in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Sequential(nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, True, track_running_stats=True)),
        )
        self.norms = nn.ModuleList([nn.BatchNorm1d(8), nn.LayerNorm(8), nn.RMSNorm(8)])
        self.head = nn.Linear(8, CLASSES)
        self.softmax = nn.ModuleDict({"plain": nn.Softmax(-1), "log": nn.LogSoftmax(0)})
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x = self.images(x).sigmoid().square().mean((2, 3))
        for norm in self.norms:
            x = norm(x)
        logits = self.head(x)
        loss = self.loss(logits, target)
        return loss, self.softmax["plain"](logits) + self.softmax["log"](logits)


def model(training: bool) -> Model:
    """With weights and statistics that differ from those it starts with."""
    made = Model()
    with torch.no_grad():
        for seed, tensor in enumerate([*made.parameters(), *made.buffers()]):
            if tensor.is_floating_point():
                tensor.copy_(draw(*tensor.shape, seed=seed).abs() + 0.2)
    return made.train(training)


def batch(n: int) -> Batch:
    return draw(n, 3, 6, 6, seed=n), targets(n, classes=CLASSES, seed=n)


def dynamic() -> Any:
    size = torch.export.Dim("size", min=2)
    return {"x": {0: size}, "target": {0: size}}


def exported(given: nn.Module, strict: bool) -> torch.export.ExportedProgram:
    torch._dynamo.reset()
    return torch.export.export(given, batch(4), dynamic_shapes=dynamic(), strict=strict)


def reloaded(given: Any, save: Any, load: Any) -> Any:
    file = io.BytesIO()
    save(given, file)
    file.seek(0)
    return load(file)


TRACERS: dict[str, Callable[[nn.Module], Any]] = {
    "jit.trace": lambda m: torch.jit.trace(m, batch(4), check_trace=not m.training),
    "jit.trace, saved": lambda m: reloaded(
        torch.jit.trace(m, batch(4), check_trace=False), torch.jit.save, torch.jit.load
    ),
    "jit.trace_module": lambda m: torch.jit.trace_module(
        m, {"forward": batch(4)}, check_trace=False
    ),
    "jit.script": torch.jit.script,
    "jit.script, saved": lambda m: reloaded(torch.jit.script(m), torch.jit.save, torch.jit.load),
    "fx": torch.fx.symbolic_trace,
    "export": lambda m: exported(m, strict=False).module(),
    "export, strict and saved": lambda m: reloaded(
        exported(m, strict=True), torch.export.save, torch.export.load
    ).module(),
    "export, decomposed": lambda m: exported(m, strict=False).run_decompositions().module(),
}


def run(given: Any, n: int) -> dict[str, Tensor]:
    """Outputs, the input's gradient, and buffers afterwards."""
    x, target = batch(n)
    x.requires_grad_()
    loss, rest = given(x, target)
    (grad,) = torch.autograd.grad(loss + (rest * draw(*rest.shape, seed=7)).sum(), x)
    buffers = {name: b.clone() for name, b in given.named_buffers() if b.is_floating_point()}
    return {"loss": loss.detach(), "rest": rest.detach(), "grad": grad, **buffers}


def check(trace: Callable[[nn.Module], Any], training: bool, change: Any = swap) -> None:
    """Of a swapped model, against torch's that is not traced; the model stays as it was."""
    torchs = model(training)
    swapped = change(copy.deepcopy(torchs))
    kinds = [type(module) for module in swapped.modules()]
    traced = trace(swapped)
    assert [type(module) for module in swapped.modules()] == kinds
    assert fastopt.nn.LayerNorm in kinds
    state = torchs.state_dict()
    with torch.no_grad():  # A trace in training has moved statistics already.
        for name, buffer in traced.named_buffers():
            buffer.copy_(state[name])
    for n in (4, 9):
        found, expected = run(traced, n), run(torchs, n)
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_swapped_model_traced(tracer: str, training: bool) -> None:
    check(TRACERS[tracer], training)


def off(given: Any) -> Any:
    swap(given).norms[1].eps = 0.1
    return given


def unswapped_by_the_trace(given: nn.Module) -> Any:
    return torch.jit.script(fastopt.unswap(given))


def test_these_checks_see_a_wrong_trace() -> None:
    for wrong in ({"change": off}, {"change": lambda m: m}, {"trace": unswapped_by_the_trace}):
        with pytest.raises(AssertionError):
            check(**{"trace": torch.fx.symbolic_trace, "training": False, **wrong})


# torch.jit.


def test_a_trace_without_gradients_is_of_torchs_operators() -> None:
    swapped = swap(model(False)).requires_grad_(False)
    traced = torch.jit.trace(swapped, batch(4))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert {"aten::batch_norm", "aten::layer_norm", "aten::softmax"} <= kinds
    assert all(kind.startswith(("aten::", "prim::")) for kind in kinds)
    with torch.no_grad():
        torch.testing.assert_close(traced(*batch(9)), swapped(*batch(9)))


def test_a_scripted_model_shares_its_tensors_and_has_its_own_mode() -> None:
    swapped = swap(model(True))
    scripted = torch.jit.script(swapped)
    scripted(*batch(4))
    norm = dict(scripted.named_modules())["images.1"]
    assert norm.running_mean.data_ptr() == swapped.images[1].running_mean.data_ptr()
    assert norm.weight.data_ptr() == swapped.images[1].weight.data_ptr()
    assert norm.num_batches_tracked == swapped.images[1].num_batches_tracked == 1
    scripted.eval()
    assert not norm.training
    assert swapped.images[1].training
    torch.testing.assert_close(scripted(*batch(9)), copy.deepcopy(swapped).eval()(*batch(9)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm1d(8, momentum=None),
        lambda: nn.BatchNorm1d(8, affine=False),
        lambda: nn.BatchNorm1d(8, track_running_stats=False),
        lambda: nn.LayerNorm(8, bias=False),
        lambda: nn.LayerNorm(8, elementwise_affine=False),
        lambda: nn.RMSNorm(8, eps=0.1, elementwise_affine=False),
        lambda: nn.GroupNorm(4, 8, affine=False),
    ],
)
def test_options_of_modules_scripted(make: Any, training: bool) -> None:
    torchs = make().train(training)
    scripted = torch.jit.script(swap(copy.deepcopy(torchs)))
    for n in (4, 9):
        torch.testing.assert_close(scripted(draw(n, 8)), torchs(draw(n, 8)))
    for found, expected in zip(scripted.buffers(), torchs.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


class OwnForward(fastopt.nn.AddLayerNorm):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return x, residual


def loss_with(**options: Any) -> nn.Module:
    loss = fastopt.nn.CrossEntropyLoss()
    vars(loss).update(options)
    return loss


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (fastopt.nn.AddLayerNorm(4), "no fastopt.nn.AddLayerNorm: torch has no such module"),
        (fastopt.nn.AddRMSNorm(4), "no fastopt.nn.AddRMSNorm: torch has no such module"),
        (loss_with(z_loss=0.1), "no fastopt.nn.CrossEntropyLoss with z_loss=0.1"),
        (loss_with(softcap=30.0), "no fastopt.nn.CrossEntropyLoss with softcap=30.0"),
    ],
)
def test_what_torchscript_would_change_is_refused_in_one_line(module: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words) as caught:
        torch.jit.script(nn.Sequential(nn.Linear(4, 4), module))
    assert "torch.jit.trace" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_modules_derived_from_ours_are_scripted_as_they_are_written() -> None:
    a, b = draw(2, 4), draw(2, 4, seed=1)
    torch.testing.assert_close(torch.jit.script(OwnForward(4))(a, b), (a, b))
    assert torch.jit.script(loss_with(z_loss=0.0, softcap=None))(a, targets(2, classes=4)) > 0


# torch.fx.


class Deep(torch.fx.Tracer):
    """Records what torch's modules call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear)


def test_modules_are_leaves_and_functions_nodes() -> None:
    swapped = swap(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8), nn.Softmax(1)))
    graph = torch.fx.symbolic_trace(swapped)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0", "1", "2", "3"]
    assert type(graph.get_submodule("1")) is fastopt.nn.LayerNorm
    deep = torch.fx.GraphModule(swapped, Deep().trace(swapped))
    called = [node.target for node in deep.graph.nodes if node.op == "call_function"]
    functional = fastopt.functional
    assert called == [functional.layer_norm, functional.rms_norm, functional.softmax]
    for traced in (graph, deep, pickle.loads(pickle.dumps(graph))):
        assert torch.equal(traced(draw(5, 8)), swapped(draw(5, 8)))


def test_modes_and_hooks_of_leaves() -> None:
    """The graph holds the modules: their mode may change, and their hooks run once."""
    torchs = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    swapped = swap(copy.deepcopy(torchs))
    for each in (torchs, swapped):
        each[1].register_forward_hook(lambda module, args, y: 2 * y)
    graph = torch.fx.symbolic_trace(swapped)
    assert swapped[1].num_batches_tracked == 0
    for training in (True, False):
        torch.testing.assert_close(
            graph.train(training)(draw(5, 8)), torchs.train(training)(draw(5, 8))
        )
    torch.testing.assert_close(graph.state_dict(), torchs.state_dict())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps])
def test_leaves_are_pickled_by_the_name_of_their_class(dumps: Any, protocol: int) -> None:
    for name in fastopt.nn.__all__:
        cls = getattr(fastopt.nn, name)
        assert cls.__module__ == "fastopt.nn"
        assert pickle.loads(dumps(cls, protocol)) is cls
    norm = pickle.loads(dumps(fastopt.nn.LayerNorm(4), protocol))
    assert type(norm) is fastopt.nn.LayerNorm
    assert b"_LeafModule" not in dumps(norm, protocol)


# torch.export.


def targets_of(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


OPS = {f"fastopt.{n}.default" for n in ("channel_norm", "layer_norm", "rms_norm", "softmax")}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_exported_program_keeps_our_ops(training: bool, strict: bool) -> None:
    program = exported(swap(model(training)), strict)
    for each in (program, program.run_decompositions()):
        assert OPS | {"fastopt.cross_entropy.default"} <= targets_of(each)
        assert not [t for t in targets_of(each) if "aten" in t and "norm" in t]


def test_an_exported_program_of_functions_keeps_our_ops() -> None:
    class Functions(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            masked = fastopt.functional.scaled_masked_softmax(a, b)
            y, total = fastopt.functional.add_rms_norm(masked, b, (8,))
            return fastopt.functional.logsumexp(y + total, -1)

    program = torch.export.export(Functions(), (draw(4, 8), draw(4, 8, seed=1)), strict=False)
    ops = {f"fastopt.{n}.default" for n in ("masked_softmax", "add_norm", "logsumexp")}
    assert ops <= targets_of(program)


def test_an_onnx_export_gets_torchs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no translation for ours. The flag is what torch.onnx.export sets."""
    monkeypatch.setattr(_flags, "_is_onnx_exporting", True)
    program = exported(swap(model(False)), strict=False)
    assert not [target for target in targets_of(program) if "fastopt" in target]
    torch.testing.assert_close(program.module()(*batch(9)), model(False)(*batch(9)))


def test_a_report_after_all_of_it() -> None:
    """Nothing above changes a model that is swapped: the report is what it was."""
    swapped = swap(model(False))
    report = swap_report(swapped)
    for tracer in ("jit.trace", "jit.script", "fx"):
        TRACERS[tracer](swapped)
    assert swap_report(swapped) == report
