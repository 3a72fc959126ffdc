"""The models that ranks train, wrapped in what reduces or shards them, and their process group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastopt

WORLD = 2
Found = dict[str, Any]
# What gives a rank a part of the parameters, or of each of them.
WRAPPERS = ("fsdp1", "fsdp1 original", "fsdp2", "zero")


class Net(nn.Module):
    """A normalization with buffers, and two branches, of which a forward uses those named."""

    def __init__(self, reentrant: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.first = nn.Embedding(12, 6, sparse=True) if sparse else nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.a, self.b, self.last = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor, branches: str = "ab") -> Tensor:
        if isinstance(self.first, nn.Embedding):
            x = x[:, 0].mul(3).long().remainder(12)
        hidden = self._run(self.norm, self._run(self.first, x))
        both = sum(self._run(getattr(self, name), hidden) for name in branches)
        return self._run(self.last, torch.tanh(both))

    def _run(self, module: nn.Module, x: Tensor) -> Any:
        if not self.reentrant:
            return module(x)
        return checkpoint(
            module, x.requires_grad_(x.is_leaf or x.requires_grad), use_reentrant=True
        )


def make_net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * rank + step))


def local(tensor: Tensor) -> Tensor:
    """A copy of what this rank has of a tensor."""
    return getattr(tensor, "_local_tensor", tensor).detach().clone()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: local(param) for name, param in module.named_parameters()}


def refused(attempt: Callable[[], Any]) -> str:
    """The message of the error that an attempt raises, or nothing."""
    try:
        attempt()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def fsdp1(model: nn.Module, original: bool, strategy: str = "FULL_SHARD") -> Any:
    """original: its parameters are those of the model, not flat ones"""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    return FullyShardedDataParallel(
        model,
        use_orig_params=original,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
    )


def wrap(wrapper: str, package: Any = fastopt, **options: Any) -> tuple[nn.Module, Any]:
    """A model of which a rank has a part, and an optimizer over it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    if wrapper == "zero":
        model: nn.Module = DistributedDataParallel(make_model())
        optimizer: Any = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=package.optim.AdamW, lr=0.05, **options
        )
        return model, optimizer
    if wrapper == "fsdp2":
        model = fully_shard(make_model())
    else:
        model = fsdp1(make_model(), original=wrapper == "fsdp1 original")
    return model, package.optim.AdamW(model.parameters(), lr=0.05, **options)


@contextmanager
def process_group(folder: str, rank: int, world: int) -> Iterator[None]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
