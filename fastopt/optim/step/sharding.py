"""Parameters of which this rank has only a part, and the options that are refused for them.

    DTensor                       a shard of the tensor, or a part of the sum that it is (FSDP2)
    FullyShardedDataParallel      a shard of a flat parameter, or what of a parameter lies in it
    ZeroRedundancyOptimizer       some of the parameters, each of them whole

An option that is about all gradients at once would be about another part on each rank. This
module alone decides where that is so. In a process group of one rank nothing is a part.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch import distributed as dist

from fastopt.optim import options
from fastopt.optim.contract import Stepped
from fastopt.optim.step import memory_layout

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def many_processes() -> bool:
    """True in a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_part(param: Tensor) -> bool:
    """True for a parameter of which this rank has only a part."""
    return is_shard(param) or (is_flattened(param) and many_processes() and not _is_whole(param))


def is_shard(tensor: Tensor) -> bool:
    """True for a DTensor of which this rank has only a shard, or a part of the sum that it is."""
    return memory_layout.is_dtensor(tensor) and any(
        tensor.device_mesh.size(dim) > 1 and not placement.is_replicate()  # type: ignore[attr-defined]
        for dim, placement in enumerate(tensor.placements)  # type: ignore[attr-defined]
    )


def is_flattened(param: Tensor) -> bool:
    """True for a parameter of FullyShardedDataParallel, which marks its flat ones and those that
    lie in them (use_orig_params=True)."""
    return getattr(param, "_fsdp_flattened", False)


def _is_whole(flat: Tensor) -> bool:
    """True for a flat parameter that is not sharded (NO_SHARD). One in it does not say."""
    whole = getattr(flat, "_unpadded_unsharded_size", None)
    # A single element is padded to one a rank.
    return whole is not None and whole == getattr(flat, "_sharded_size", whole) and whole[0] > 1


def check(optimizer: Stepped) -> None:
    """Raises RuntimeError where an option is about all gradients, of which this rank has a part."""
    if not many_processes():
        return
    optimizer._in_zero = optimizer._in_zero or _called_by_zero(optimizer)
    if not options.measures(optimizer.param_groups):
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    clip = "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)"
    if any(map(is_shard, params)):
        what = "some parameters are DTensors of which this rank has a shard"
    elif any(map(is_part, params)):
        what = "some parameters are FullyShardedDataParallel's, of which this rank has a shard"
        clip = "clip_grad_norm_(max_norm) of the FullyShardedDataParallel model"
    elif optimizer._in_zero:
        what = "ZeroRedundancyOptimizer gives this rank a part of the parameters"
    else:
        return
    raise RuntimeError(
        f"max_grad_norm and skip_nonfinite are about whole gradients, but {what}: each rank would "
        f"clip, or skip, by its own part. Leave these options unset. To clip, call {clip} before "
        "step(); to skip, leave out step() where the norm that this returns is not finite "
        "(max_norm=math.inf measures without clipping)."
    )


def _called_by_zero(optimizer: Stepped) -> bool:
    """True where a ZeroRedundancyOptimizer of several ranks constructs or steps this optimizer, as
    the one over its rank's parameters. It leaves no mark: it is found among the callers."""
    module = sys.modules.get(_ZERO)
    frame = sys._getframe(1) if module is not None else None
    while frame is not None:
        if frame.f_globals.get("__name__") == _ZERO:
            zero = frame.f_locals.get("self")
            if isinstance(zero, module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
                # While it is constructed, it has none yet.
                return getattr(zero, "optim", optimizer) is optimizer and zero.world_size > 1
        frame = frame.f_back
    return False


def finds_inf_alone(optimizer: torch.optim.Optimizer) -> bool:
    """True where a GradScaler sees an infinity on one rank alone: the rank has a part of the
    gradients, and they are no DTensors, whose operators ask all ranks."""
    if not many_processes():
        return False
    params = (param for group in optimizer.param_groups for param in group["params"])
    return getattr(optimizer, "_in_zero", False) or any(
        is_flattened(p) and is_part(p) for p in params
    )


def check_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Raises RuntimeError where a GradScaler would skip on one rank and step on another."""
    if finds_inf_alone(optimizer):
        raise RuntimeError(
            "fastopt.GradScaler looks for infinities in the gradients of this rank, but it has "
            "only a part of them: one rank would skip where another steps. With "
            "FullyShardedDataParallel use ShardedGradScaler (of "
            "torch.distributed.fsdp.sharded_grad_scaler), which asks all ranks; with "
            "ZeroRedundancyOptimizer give the scaler that optimizer, not the one inside it."
        )
