"""fastopt.swap on whole models: they train, copy, save, compile and distribute as before."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastopt import SwapReport, swap, swap_report, unswap
from tests.rows.cases import draw, targets


class Attention(nn.Module):
    """The attention of a model as others write it, with its softmax as a module."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        # The gradient of the keys' bias is rounding alone, and AdamW makes whole steps of it.
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.softmax = nn.Softmax(dim=-1)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        heads = self.c_attn(x).view(n, length, 3, self.n_heads, width // self.n_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (width // self.n_heads) ** 0.5
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        weights = self.softmax(scores.masked_fill(~mask, -torch.inf))
        return self.c_proj((weights @ v).transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = Attention(width, 2)
        self.ln_2 = nn.RMSNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """As a library lays one out: tied embeddings, weights set by class, the loss inside."""

    def __init__(self, n_words: int = 11, width: int = 8, n_blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(n_words, width)
        self.h = nn.ModuleList(Block(width) for _ in range(n_blocks))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, n_words, bias=False)
        self.lm_head.weight = self.wte.weight
        self.loss = nn.CrossEntropyLoss()
        self.gradient_checkpointing = False
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            if self.gradient_checkpointing:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return self.loss(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


SWAPPED = {
    "h.0.ln_1": "LayerNorm",
    "h.0.attn.softmax": "Softmax",
    "h.0.ln_2": "RMSNorm",
    "h.1.ln_1": "LayerNorm",
    "h.1.attn.softmax": "Softmax",
    "h.1.ln_2": "RMSNorm",
    "ln_f": "LayerNorm",
    "loss": "CrossEntropyLoss",
}


def ids(seed: int = 0) -> Tensor:
    return targets(3, 6, classes=11, seed=seed)


def scrambled(model: nn.Module) -> Any:
    """With parameters that differ from those it starts with."""
    with torch.no_grad():
        for seed, param in enumerate(model.parameters()):
            param.add_(draw(*param.shape, seed=seed, scale=0.1))
    return model


def losses(model: nn.Module, optimizer: Any = None, n_steps: int = 4) -> list[Tensor]:
    """Of some training steps."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.05)
    found = []
    for seed in range(n_steps):
        optimizer.zero_grad()
        loss = model(ids(seed))
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


def same_training(model: nn.Module, optimizer: Any = None) -> None:
    """Of this model and torch's own."""
    torchs, untrained = Transformer(), dict(Transformer().named_parameters())
    torch.testing.assert_close(losses(model, optimizer), losses(torchs), rtol=1e-4, atol=1e-4)
    found = dict(unwrapped(model).named_parameters())
    for name, param in torchs.named_parameters():
        torch.testing.assert_close(found[name], param, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(param, untrained[name], rtol=1e-2, atol=1e-2)


def unwrapped(model: Any) -> nn.Module:
    return getattr(model, "_orig_mod", getattr(model, "module", model))


def test_a_transformer_trains_as_before() -> None:
    model = swap(Transformer())
    assert swap_report(model) == SwapReport(SWAPPED)
    same_training(model)


def test_a_swap_that_changes_the_model_is_seen() -> None:
    model = swap(Transformer())
    model.ln_f.eps = 0.01
    with pytest.raises(AssertionError):
        same_training(model)


def test_the_whole_swap_with_an_optimizer_made_before() -> None:
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    swap(model)
    swap(optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in model.parameters()
    ]
    same_training(model, optimizer)


def test_swapped_and_back_amid_training() -> None:
    model, torchs = Transformer(), Transformer()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, torchs)]
    for change in (swap, swap, unswap, unswap, swap):
        change(model)
        found, expected = (
            losses(m, optimizer, 1)
            for m, optimizer in zip((model, torchs), optimizers, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert swap_report(model).replaced == SWAPPED
    assert not swap_report(unswap(model)).replaced
    assert not [m for m in model.modules() if type(m).__module__.startswith("fastopt")]


def test_gradient_checkpointing_and_weights_set_by_class() -> None:
    model = swap(Transformer())
    model.gradient_checkpointing = True
    with torch.no_grad():
        model.ln_f.weight.zero_()
    model.apply(model._init_weights)
    assert model.ln_f.weight.eq(1).all()
    assert model.lm_head.weight is model.wte.weight
    model.load_state_dict(Transformer().state_dict())
    same_training(model)


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_encoder_layer_goes_on(norm_first: bool) -> None:
    """In eval mode torch runs it as one function of its own, which reads the norms' weights."""
    options = {"batch_first": True, "norm_first": norm_first, "dtype": torch.float64}
    torchs = scrambled(nn.TransformerEncoderLayer(8, 2, 16, 0.0, **options))
    layers = [torchs, copy.deepcopy(torchs)]
    report = swap_report(swap(layers[1]))
    assert report.replaced == {"norm1": "LayerNorm", "norm2": "LayerNorm"}
    assert report.kept == {"self_attn": "fastopt has no MultiheadAttention"}
    x = draw(3, 5, 8, dtype=torch.float64)
    trained = [layer(x) for layer in layers]
    torch.testing.assert_close(trained[1], trained[0])
    grads = [
        torch.autograd.grad(y, list(layer.parameters()), draw(3, 5, 8, seed=1, dtype=torch.float64))
        for y, layer in zip(trained, layers, strict=True)
    ]
    torch.testing.assert_close(grads[1], grads[0])
    with torch.no_grad():
        evaluated = [layer.eval()(x) for layer in layers]
    torch.testing.assert_close(evaluated[1], evaluated[0])


# Copies and checkpoints.


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
def test_a_copy_of_a_swapped_model_is_swapped(how: Callable[[Any], Any]) -> None:
    model = swap(Transformer())
    other = how(model)
    assert swap_report(other).replaced == SWAPPED
    assert torch.equal(other(ids()), model(ids()))


def test_state_dicts_go_both_ways() -> None:
    model, torchs = swap(scrambled(Transformer())), Transformer()
    state = model.state_dict()
    assert list(state) == list(torchs.state_dict())
    assert torchs.load_state_dict(state) == model.load_state_dict(torchs.state_dict())
    loss = scrambled(torchs)(ids())
    model.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(model(ids()), loss)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert list(torch.load(file, weights_only=True)) == list(state)


def test_the_loss_keeps_its_weight_in_the_state_dict() -> None:
    weight = draw(5).abs()
    loss = swap(nn.CrossEntropyLoss(weight=weight))
    assert loss.weight is loss.state_dict(keep_vars=True)["weight"] is weight
    assert loss.double().weight.dtype is torch.float64


def test_functional_call_and_another_dtype() -> None:
    model = swap(Transformer()).double()
    parameters = dict(scrambled(Transformer()).double().named_parameters())
    found = torch.func.functional_call(model, parameters, (ids(),))
    torch.testing.assert_close(found, scrambled(Transformer()).double()(ids()))


# Compilers and wrappers.


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
def test_a_swapped_model_compiles_in_one_graph() -> None:
    model = swap(Transformer())
    same_training(torch.compile(model, fullgraph=True, backend="aot_eager"))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_had_been_compiled_is_compiled_again(in_place: bool) -> None:
    graphs: list[list[str]] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    model: Any = Block(8)
    if in_place:
        model.compile(backend=backend, fullgraph=True)
    else:
        model = torch.compile(model, backend=backend, fullgraph=True)
    x = draw(3, 5, 8)
    found = [change(model)(x) for change in (lambda m: m, swap, unswap)]
    torch.testing.assert_close(found[1], found[0])
    assert torch.equal(found[2], found[0])
    with_ours = [any("fastopt.layer_norm" in target for target in graph) for graph in graphs]
    assert with_ours[:2] == [False, True]


@pytest.fixture
def process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_distributed_data_parallel(wrapped_first: bool) -> None:
    model: Any = Transformer()
    if not wrapped_first:
        swap(model)
    model = nn.parallel.DistributedDataParallel(model)
    if wrapped_first:
        swap(model)
    assert swap_report(model).replaced == {f"module.{k}": v for k, v in SWAPPED.items()}
    same_training(model)
