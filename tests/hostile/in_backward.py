"""What the processes of test_ranks run of steps in backward; each `run_*` gives what its rank
found, by name."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastopt
from tests.hostile.ranks import (
    Found,
    batch,
    fsdp1,
    local,
    make_model,
    make_net,
    refused,
    values,
)

# What DistributedDataParallel, the network and the optimizer are made with.
DDP_CASES: dict[str, tuple[Found, Found, Found]] = {
    "plain": ({}, {}, {}),
    "views": ({"gradient_as_bucket_view": True}, {}, {}),
    "static": ({"static_graph": True}, {}, {}),
    "static views": ({"static_graph": True, "gradient_as_bucket_view": True}, {}, {}),
    "unused": ({"find_unused_parameters": True}, {}, {}),
    "unused views": ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, {}, {}),
    "one branch": ({"find_unused_parameters": True}, {}, {}),
    "frozen": ({}, {}, {}),
    "no_sync": ({}, {}, {}),
    "no_sync views": ({"gradient_as_bucket_view": True}, {}, {}),
    "no_sync outside": ({}, {}, {}),
    "hook": ({}, {}, {}),
    "built-in hook": ({}, {}, {}),
    "reentrant": ({}, {"reentrant": True}, {}),
    "sparse": ({}, {"sparse": True}, {}),
    "inside": ({}, {}, {}),
    "clipped": ({}, {}, {"max_grad_norm": 0.05}),
    "8bit": ({}, {}, {"state_dtype": "8bit"}),
}


def run_released_ddp(rank: int) -> Found:
    """The same training twice: stepped in backward, and by step()."""
    found = {}
    for case in DDP_CASES:
        for released in (True, False):
            key = f"ddp {case} {'released' if released else 'plain'}"
            found[key] = train_ddp(case, rank, released)
    return found


def train_ddp(case: str, rank: int, released: bool) -> dict[str, Tensor]:
    ddp_options, net_options, options = DDP_CASES[case]
    net = make_net(**net_options)
    if case == "frozen":
        net.a.requires_grad_(False)
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.0001, **ddp_options)
    if case == "hook":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        ddp.register_comm_hook(None, fp16_compress_hook)
    if case == "built-in hook":
        ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    params = net.b.parameters() if case == "one branch" else net.parameters()
    limit = options.get("max_grad_norm")
    # Adam makes a step of what rounding leaves of a gradient that is 0.
    cls = fastopt.optim.AdamW if case not in ("sparse", "clipped") else fastopt.optim.SGD
    optimizer = cls(params, lr=0.05, **options)
    if released:
        model = nn.ModuleDict({"inner": ddp}) if case == "inside" else ddp
        optimizer.release_gradients(model=model, per_tensor=limit is not None)
    elif limit is not None:
        optimizer.param_groups[0]["max_grad_norm"] = None
    for step in range(6):
        branches = "ab"
        if "unused" in case or case == "one branch":
            # Another branch on each rank, then one that no rank uses.
            branches = ("a", "b")[(step + rank) % 2] if step < 4 else "a"
        quiet = case.startswith("no_sync") and step % 3 < 2
        with ddp.no_sync() if quiet else nullcontext():
            loss = ddp(batch(rank, step), branches).square().mean()
            if case != "no_sync outside":
                loss.backward()
        if case == "no_sync outside":
            # DistributedDataParallel goes by where forward was.
            loss.backward()
        if quiet:
            continue
        if released:
            assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        elif limit is not None:
            for param in net.parameters():
                nn.utils.clip_grad_norm_([param], limit)
        optimizer.step()
        optimizer.zero_grad()
        net.zero_grad()
    return values(net)


def run_released_fsdp(rank: int) -> Found:
    """As `run_released_ddp`, of shards."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for released in (True, False):
        model = make_model()
        for each in (model[0], model[2], model):
            fully_shard(each)
        model[2].bias.requires_grad_(False)
        optimizer = fastopt.optim.AdamW(model.parameters(), lr=0.05, clip_value=0.1)
        if released:
            optimizer.release_gradients(model=model)
        for step in range(5):
            if step == 2:
                model[2].bias.requires_grad_(True)
            model.set_requires_gradient_sync(step != 3)
            loss = model(batch(rank, step)).square().mean()
            if released:
                scaler = torch.amp.GradScaler("cpu")
                found["scale of fsdp2"] = refused(lambda s=scaler, x=loss: s.scale(x))
            loss.backward()
            if released:
                assert all(param.grad is None for param in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        full = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        found[f"fsdp {'released' if released else 'plain'}"] = full
    return found


def run_refused_releases(rank: int) -> Found:
    from torch.distributed.fsdp import fully_shard

    net = make_net()
    net.b.requires_grad_(False)
    ddp = DistributedDataParallel(net)
    extra = nn.Parameter(torch.ones(3))
    trained = [param for param in net.parameters() if param.requires_grad]
    mine = fastopt.optim.SGD(trained, lr=0.1)
    outside = fastopt.optim.SGD([*trained, extra], lr=0.1)
    found: Found = {
        "release of ddp without model": refused(mine.release_gradients),
        "release of ddp by another model": refused(
            lambda: mine.release_gradients(model=DistributedDataParallel(make_net()))
        ),
        "release of ddp by its module": refused(lambda: mine.release_gradients(model=net)),
        "release of what is outside": refused(lambda: outside.release_gradients(model=ddp)),
    }
    handle = outside.release_gradients(model=ddp, local=True)
    (ddp(batch(rank, 0), "a").square().mean() + (rank + 1.0) * extra.sum()).backward()
    found["local step"] = extra.detach().clone()
    handle.remove()

    mine.release_gradients(model=ddp)
    more = {"params": [nn.Parameter(torch.ones(2))]}
    found["release of a group outside"] = refused(lambda: mine.add_param_group(more))
    mine.add_param_group({"params": list(net.b.parameters())})
    net.b.requires_grad_(True)
    before = local(net.b.weight)
    found["release of what ddp never reduces"] = refused(
        lambda: ddp(batch(rank, 1)).square().mean().backward()
    )
    assert torch.equal(before, net.b.weight)

    sharded = make_model()
    fully_shard(sharded)
    shards = fastopt.optim.SGD(sharded.parameters(), lr=0.1)
    found["release of fsdp2 without model"] = refused(shards.release_gradients)
    for name, original in (("fsdp1", False), ("fsdp1 original", True)):
        flat = fsdp1(make_model(), original)
        optimizer = fastopt.optim.SGD(flat.parameters(), lr=0.1)
        found[f"release of {name}"] = refused(
            lambda o=optimizer, m=flat: o.release_gradients(model=m, local=True)
        )
    return found | run_unreduced(rank)


def run_unreduced(rank: int) -> Found:
    """step() between a backward in no_sync() and the one that reduces."""
    net = make_net()
    ddp = DistributedDataParallel(net)
    optimizer = fastopt.optim.SGD(net.parameters(), lr=0.1)
    optimizer.release_gradients(model=ddp)
    with ddp.no_sync():
        ddp(batch(rank, 0)).square().mean().backward()
    before = local(net.last.weight)
    found = {"step of what is not reduced": refused(optimizer.step)}
    assert torch.equal(before, net.last.weight)
    optimizer.zero_grad()
    optimizer.step()
    for scaler in (torch.amp.GradScaler("cpu"), fastopt.GradScaler("cpu")):
        loss = ddp(batch(rank, 1)).square().mean()
        key = f"scale of ddp by {type(scaler).__module__.split('.')[0]}"
        found[key] = refused(lambda s=scaler, x=loss: s.scale(x))
        loss.backward()
    # A parameter that got no gradient, which this model must be told to expect.
    ddp(batch(rank, 2), "a").square().mean().backward()
    found["step of what never ends"] = refused(optimizer.step)
    return found
