"""What two gloo processes run: tensor parallelism of a swapped model, and DTensors in functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor, nn

import fastopt
from tests.hostile import gpt
from tests.rows.operands import CALLS, Call

WORLD, STEPS = 2, 5
PLANS = ("halves", "sequence")


def plan_of_blocks(name: str) -> dict[str, Any]:
    """halves: each linear layer in two parts, and between them whole tensors; sequence: norms on
    parts of the sequence, too."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    between = Shard(1) if name == "sequence" else Replicate()
    halves = {
        "attention": tp.PrepareModuleInput(
            input_layouts=(between,), desired_input_layouts=(Replicate(),)
        ),
        "feed": tp.PrepareModuleInput(
            input_layouts=(between,), desired_input_layouts=(Replicate(),)
        ),
        **{f"attention.{k}": tp.ColwiseParallel() for k in "qkv"},
        "attention.out": tp.RowwiseParallel(output_layouts=between),
        "feed.up": tp.ColwiseParallel(),
        "feed.down": tp.RowwiseParallel(output_layouts=between),
    }
    if name == "halves":
        return halves
    # The second and the fourth join local tensors.
    local = {f"norm{k}": tp.SequenceParallel(use_local_output=k % 2 == 0) for k in range(1, 5)}
    return halves | local


def plan_of_model(name: str) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    if name == "halves":
        return {"head": tp.ColwiseParallel(output_layouts=Replicate())}
    return {
        "tokens": tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "positions": tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "norm": tp.SequenceParallel(),
        "head": tp.ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


def train(plan: str | None, swapped: bool, seen: set[str]) -> list[Tensor]:
    """The losses of some steps, and the last gradients. seen: classes of what norms were given."""
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    torch.manual_seed(0)
    model: nn.Module = gpt.GPT()
    if swapped:
        fastopt.swap(model)
    if plan is not None:
        mesh = init_device_mesh("cpu", (WORLD,))
        for block in model.blocks:  # type: ignore[union-attr]
            parallelize_module(block, mesh, plan_of_blocks(plan))
        parallelize_module(model, mesh, plan_of_model(plan))
    for layer in model.modules():
        if isinstance(layer, (nn.LayerNorm, nn.RMSNorm, nn.CrossEntropyLoss)):
            layer.register_forward_pre_hook(lambda _, given: seen.add(type(given[0]).__name__))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, foreach=False)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(*gpt.batch(step))
        loss.backward()
        optimizer.step()
        losses.append(whole(loss.detach()))
    return [*losses, *(whole(p.grad) for p in model.parameters())]


def whole(x: Any) -> Tensor:
    """A plain copy, gathered where it is distributed."""
    if hasattr(x, "full_tensor"):
        x = x.full_tensor()
    return torch.empty(x.shape, dtype=x.dtype).copy_(x.detach())


def run_parallel() -> dict[str, Any]:
    """Of each plan: (what ours gives, torch's, torch's without a plan, classes seen)."""
    found: dict[str, Any] = {}
    for plan in PLANS:
        seen: set[str] = set()
        torchs, alone = train(plan, False, set()), train(None, False, set())
        found[plan] = train(plan, True, seen), torchs, alone, sorted(seen)
    return found


# Functions of DTensors.

_NAMES = ("cross_entropy", "layer_norm", "rms_norm", "batch_norm", "instance_norm", "group_norm")
TORCHS: dict[str, Callable[..., Any]] = {
    "softmax": F.softmax,
    "log_softmax": F.log_softmax,
    "logsumexp": torch.logsumexp,
    **{name: getattr(F, name) for name in _NAMES},
}


def torchs(call: Call) -> Call:
    """The same call of torch's function, where torch has one."""
    theirs = TORCHS.get(getattr(call.function, "__name__", ""))
    return call if theirs is None else call._replace(function=theirs)


def outcome(call: Call, tensors: dict[str, Tensor]) -> dict[str, Tensor] | str:
    """Results, what was written and the gradients of the sum of their squares, gathered; or the
    exception."""
    names = call.differentiable()
    leaves = [tensors[name].requires_grad_() for name in names]
    try:
        results = call(**tensors)
        loss = sum(y.square().sum() for y in results if y.requires_grad)
        grads = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
        found = {str(k): y for k, y in enumerate(results)} | {k: tensors[k] for k in call.written}
        return {k: whole(x) for k, x in (found | grads).items()}
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def run_functions() -> dict[str, Any]:
    """(ours, torch's, ours of plain tensors): with rows on either process, with whole tensors on
    both, and with a plain one among those."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, found = init_device_mesh("cpu", (WORLD,)), {}

    def distributed(call: Call, how: str) -> dict[str, Tensor]:
        tensors = {key: x.clone() for key, x in call.tensors.items()}
        n_rows, last = len(next(iter(tensors.values()))), list(tensors)[-1]
        for key, x in tensors.items():
            if how == "mixed" and key == last:
                continue
            sharded = how == "sharded" and x.dim() > 0 and len(x) == n_rows
            tensors[key] = distribute_tensor(x, mesh, [Shard(0) if sharded else Replicate()])
        return tensors

    for name, call in CALLS.items():
        if name == "add_layer_norm":
            call = call._replace(options=call.options | {"dropout_p": 0.0})
        plain = outcome(call, {key: x.clone() for key, x in call.tensors.items()})
        for how in ("sharded", "whole", "mixed"):
            if how != "mixed" or len(call.tensors) > 1:
                both = (outcome(c, distributed(c, how)) for c in (call, torchs(call)))
                found[f"{name}, {how}"] = (*both, plain)
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    found = {"parallel": run_parallel(), "functions": run_functions()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
