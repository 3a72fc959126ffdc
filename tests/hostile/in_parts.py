"""What the processes of test_ranks run of parameters of which a rank has a part; each `run_*` gives
what its rank found, by name."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import fastopt
from tests.hostile.ranks import (
    WORLD,
    WRAPPERS,
    Found,
    batch,
    fsdp1,
    local,
    make_model,
    refused,
    values,
    wrap,
)

NORM_OPTIONS: dict[str, Found] = {
    "max_grad_norm": {"max_grad_norm": 0.5},
    "skip_nonfinite": {"skip_nonfinite": True},
}


def step_refused(model: nn.Module, optimizer: Any, rank: int) -> str:
    """The message of a step that must leave parameters, states and counts as they are; empty
    where it does not raise."""
    model(batch(rank, 0)).square().mean().backward()
    before = values(model)
    message = refused(optimizer.step)
    if message:
        assert all(torch.equal(value, before[name]) for name, value in values(model).items())
        assert not any(getattr(optimizer, "optim", optimizer).state.values())
    return message


def run_norms(rank: int) -> Found:
    """By wrapper, option and how the option gets there: the refusal, or nothing."""
    found = {}
    for wrapper in WRAPPERS:
        for name, options in NORM_OPTIONS.items():
            key = f"norm {wrapper} {name}"
            found[f"{key} constructed"] = refused(lambda w=wrapper, o=options: wrap(w, **o))

            model, optimizer = wrap(wrapper)
            optimizer.param_groups[0].update(options)
            found[f"{key} set later"] = step_refused(model, optimizer, rank)

            model, optimizer = wrap(wrapper)
            inner = getattr(optimizer, "optim", optimizer)
            group = {"params": [nn.Parameter(torch.ones(2)) for _ in range(2)], **options}
            found[f"{key} group"] = refused(lambda o=optimizer, g=group: o.add_param_group(g))
            assert len(inner.param_groups) == 1
        found[f"norm {wrapper} without"] = refused(lambda w=wrapper: wrap(w))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = fsdp1(make_model(), original=False, strategy="NO_SHARD")
    optimizer = fastopt.optim.AdamW(model.parameters(), lr=0.05, max_grad_norm=0.5)
    found["norm of the whole"] = step_refused(model, optimizer, rank)
    (flat,) = model.parameters()
    found["norm of the whole found"] = optimizer.last_step.grad_norm, flat.grad.norm()
    return found


def run_wrapped_later(rank: int) -> Found:
    """Models that are sharded after the optimizer was constructed, and a step before that; and an
    optimizer that is swapped inside a ZeroRedundancyOptimizer."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name, options in NORM_OPTIONS.items():
        model = make_model()
        optimizer = fastopt.optim.AdamW(model.parameters(), **options)
        model(batch(rank, 0)).square().mean().backward()
        optimizer.step()
        optimizer.state.clear()
        optimizer.zero_grad()
        sharded = fsdp1(model, original=True)
        found[f"norm fsdp1 original {name} wrapped later"] = step_refused(sharded, optimizer, rank)

        model = make_model()
        optimizer = fastopt.optim.AdamW(model.parameters(), **options)
        fully_shard(model)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        found[f"norm fsdp2 {name} wrapped later"] = step_refused(model, optimizer, rank)

        model, zero = wrap("zero", package=torch)
        fastopt.swap(zero.optim)
        zero.param_groups[0].update(options)
        found[f"norm zero {name} wrapped later"] = step_refused(model, zero, rank)
    return found


# What is about elements, or about whole tensors of this rank.

KEPT_OPTIONS: dict[str, Found] = {
    "clip_value": {"clip_value": 0.05},
    "ema_decay": {"ema_decay": 0.9},
    "8bit": {"state_dtype": "8bit"},
    "telemetry": {"telemetry": True},
}
# DTensors keep no states in 8 bits.
KEPT = [(w, name) for w in WRAPPERS for name in KEPT_OPTIONS if (w, name) != ("fsdp2", "8bit")]


def run_elementwise(rank: int) -> Found:
    """Each rank's part, beside the same optimizer over plain copies of what it is given."""
    found = {}
    for wrapper, name in KEPT:
        options = KEPT_OPTIONS[name]
        model, optimizer = wrap(wrapper, **options)
        inner = getattr(optimizer, "optim", optimizer)
        parts = [param for group in inner.param_groups for param in group["params"]]
        plain = [nn.Parameter(local(param)) for param in parts]
        beside = fastopt.optim.AdamW(plain, lr=0.05, **options)
        for step in range(3):
            model(batch(rank, step)).square().mean().backward()
            for part, param in zip(parts, plain, strict=True):
                param.grad = None if part.grad is None else local(part.grad)
            optimizer.step()
            beside.step()
            optimizer.zero_grad()
        key = f"kept {wrapper} {name}"
        found[f"{key} sharded"] = [local(part) for part in parts]
        found[f"{key} plain"] = [param.detach() for param in plain]
        if name == "telemetry":
            seen = inner.telemetry()
            found[f"{key} shards"] = {n: row.shard for n, row in seen.items()}
            found[f"{key} table"] = str(seen)
    return found


def run_scalers(rank: int) -> Found:
    """One infinity, on the last rank: what each rank does about it."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    found = {}
    kinds = {"plain": {}, "clip_value": {"clip_value": 1.0}, "fused": {"fused": True}}
    for wrapper in ("fsdp1", "fsdp1 original", "fsdp2"):
        for name, options in kinds.items():
            ours = fastopt.GradScaler("cpu", init_scale=8.0)
            asking: Any = ours if wrapper == "fsdp2" else ShardedGradScaler("cpu", init_scale=8.0)
            key = f"scaler {wrapper} {name}"
            found[key] = move_with_infinity(*wrap(wrapper, **options), asking, rank)
            if wrapper != "fsdp2":
                found[f"{key} ours"] = refused(
                    lambda w=wrapper, o=options, s=ours: move_with_infinity(*wrap(w, **o), s, rank)
                )
    # Sharded after the optimizer was constructed.
    model = make_model()
    optimizer = fastopt.optim.AdamW(model.parameters(), lr=0.05, clip_value=1.0)
    asking = ShardedGradScaler("cpu", init_scale=8.0)
    found["scaler wrapped later"] = move_with_infinity(
        fsdp1(model, original=True), optimizer, asking, rank
    )
    return found


def move_with_infinity(
    model: nn.Module, optimizer: Any, scaler: Any, rank: int
) -> tuple[int, float]:
    """How many parameters a step has moved, and the scale after it."""
    scaler.scale(model(batch(rank, 0)).square().mean()).backward()
    before = [local(param) for param in model.parameters()]
    if rank == WORLD - 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        parts = [getattr(grad, "_local_tensor", grad) for grad in grads]
        next(part for part in parts if part.numel()).view(-1)[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    after = map(local, model.parameters())
    moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return moved, scaler.get_scale()
