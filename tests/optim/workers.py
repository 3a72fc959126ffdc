"""What the processes of test_processes and test_distributed run: a module of its own, so that a
spawned child imports it without the tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fastopt
from tests.optim.pairs import construct

PACKAGES = {"torch": torch, "fastopt": fastopt}
DDP_CASES = ("SGD-momentum", "AdamW")
SHARDED_CASES = ("SGD-momentum", "AdamW", "NAdam")
WORLD = 2


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2))


def batch(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(4, 6, generator=generator)


def whole(tensor: Any) -> Any:
    """A copy of a tensor, gathered where it is distributed."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().clone() if isinstance(tensor, torch.Tensor) else tensor


def result(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Parameters and states by name."""
    names = {param: name for name, param in model.named_parameters()}
    states = {
        f"{names[param]}.{key}": whole(value)
        for param, state in optimizer.state.items()
        for key, value in state.items()
    }
    return {name: whole(param) for name, param in model.named_parameters()} | states


def train(
    model: nn.Module, optimizer: Any, rank: int, steps: int = 5, to_none: bool = True
) -> None:
    for step in range(steps):
        optimizer.zero_grad(set_to_none=to_none)
        model(batch(rank, step)).square().sum().backward()
        optimizer.step()


def run_ddp(rank: int) -> dict[str, Any]:
    results = {}
    for package in PACKAGES:
        for case in DDP_CASES:
            for as_view in (False, True):
                module = make_model()
                model = nn.parallel.DistributedDataParallel(
                    module, gradient_as_bucket_view=as_view, bucket_cap_mb=0.0002
                )
                optimizer = construct(PACKAGES[package], case, module.parameters())
                # Gradients that persist stay views of the buckets.
                train(model, optimizer, rank, to_none=not as_view)
                results[f"ddp {case} {as_view} {package}"] = result(module, optimizer)
    return results


def run_zero(rank: int) -> dict[str, Any]:
    """Each rank steps its part of the parameters and broadcasts them."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    results = {}
    for package, source in PACKAGES.items():
        model = nn.parallel.DistributedDataParallel(make_model())
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=source.optim.AdamW, lr=0.02, weight_decay=0.1
        )
        train(model, optimizer, rank)
        results[f"zero {package}"] = {n: whole(p) for n, p in model.module.named_parameters()}
    return results


def run_sharded(rank: int) -> dict[str, Any]:
    """DTensor parameters: FSDP's shards (uneven, some ranks hold none of a row) and replicas."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    results = {}
    for package in PACKAGES:
        for case in SHARDED_CASES:
            model = make_model()
            fully_shard(model, mesh=mesh)
            optimizer = construct(PACKAGES[package], case, model.parameters())
            train(model, optimizer, rank)
            assert all(type(param).__name__ == "DTensor" for param in optimizer.state)
            results[f"fsdp {case} {package}"] = result(model, optimizer)

        values = [torch.arange(21.0).view(7, 3), torch.arange(5.0), torch.ones(())]
        places = [[Shard(0)], [Replicate()], [Replicate()]]
        params = [
            nn.Parameter(distribute_tensor(value, mesh, place))
            for value, place in zip(values, places, strict=True)
        ]
        optimizer = construct(PACKAGES[package], "AdamW-amsgrad", params)
        for step in range(3):
            for param, value in zip(params, values, strict=True):
                # A gradient that is placed otherwise than its parameter: a sharded layer's weight
                # gradient arrives so.
                place = [Replicate()] if step == 1 else param.placements
                param.grad = distribute_tensor((value + step).sin(), mesh, place)
            optimizer.step()
        results[f"placed {package}"] = {str(k): whole(param) for k, param in enumerate(params)}
    return results


def run_clipped(rank: int) -> dict[str, Any]:
    """Steps that look at gradients of which a rank has a part, or all."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    results: dict[str, Any] = {}
    for name, place in (("shard", Shard(0)), ("replica", Replicate())):
        for options in ({"max_grad_norm": 0.5}, {"skip_nonfinite": True}):
            param = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [place]))
            param.grad = distribute_tensor(torch.arange(6.0), mesh, [place])
            key = f"{name} {next(iter(options))}"
            try:
                fastopt.optim.SGD([param], lr=1.0, **options).step()
            except RuntimeError as error:
                results[f"{key} refused"] = str(error)
            results[key] = whole(param)
    return results


def distributed_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results: dict[str, Any] = {}
    for run in (run_ddp, run_zero, run_sharded, run_clipped):
        try:
            results |= run(rank)
        except Exception as error:
            results[f"error in {run.__name__}"] = repr(error)
            break
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# Hogwild: processes that step shared parameters.


def hogwild_worker(rank: int, params: list[nn.Parameter], case: str, shared: Any) -> None:
    """Steps the parameters whose turn it is, from fresh states or on shared ones."""
    torch.set_num_threads(1)
    mine = params[rank::WORLD]
    optimizer = construct(fastopt, case, mine)
    if shared is not None:
        for param, state in zip(mine, shared[rank::WORLD], strict=True):
            optimizer.state[param] = state
    hogwild_steps(optimizer, mine)


def hogwild_steps(optimizer: Any, params: list[nn.Parameter], steps: int = 4) -> None:
    for step in range(steps):
        for param in params:
            param.grad = torch.full_like(param, 0.5 - 0.2 * step) * param.detach().cos()
        optimizer.step()


def environment(**more: str) -> dict[str, str]:
    """What a script of its own needs to import the packages and the tests."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "kernels")]
    if before := os.environ.get("PYTHONPATH"):
        paths.append(before)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}
