"""Steps in the backward pass: a parameter as soon as its gradient is there, which is then freed.

A gradient must be that of all ranks. Those of a DistributedDataParallel are so at the end of a
backward (`reduction`): its parameters are stepped there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.hooks import RemovableHandle

from fastopt.optim import options
from fastopt.optim.step import interrupts, scaled_losses, sharding
from fastopt.optim.step.backward_steps import BackwardOptimizer, BackwardSteps
from fastopt.optim.step.group_key import ParamRef
from fastopt.optim.step.plan import Plan
from fastopt.optim.step.reduction import (
    Reduction,
    Watch,
    fsdp_modules,
    fsdp_params,
    gathered,
    reductions,
)


class Released:
    """The hooks of an optimizer that steps in backward; `remove()` ends it."""

    def __init__(
        self,
        optimizer: BackwardOptimizer,
        per_tensor: bool,
        model: torch.nn.Module | None = None,
        local: bool = False,
    ) -> None:
        self._optimizer, self._per_tensor, self._local = optimizer, per_tensor, local
        self._reductions = reductions(model)
        self._reduction_of = {param: each for each in self._reductions for param in each.params}
        self._sharded = fsdp_modules(model)
        self._by_fsdp = fsdp_params(self._sharded)
        self.averages = BackwardSteps(optimizer)
        self.plans: dict[Tensor, Plan] = {}
        self._param_refs: dict[Tensor, ParamRef] = {}
        self._handles: dict[Tensor, RemovableHandle] = {}
        # Backwards that have a `Watch`, by autograd's numbers for them.
        self._copied_telemetry: set[int] = set()
        # Reductions that gradients in `.grad` still wait for.
        self._awaited: set[Reduction] = set()
        # Parameters this backward has stepped, where DistributedDataParallel may refill `.grad`.
        self._stepped: list[Tensor] = []
        self.follow()
        scaled_losses.refuse_for(self)

    def leaves(self) -> Iterator[Tensor]:
        """The leaves of a graph whose backward steps: the parameters, or what FSDP2 gathers."""
        yield from self._param_refs
        for param, whole in gathered(self._sharded):
            if param in self._param_refs and whole is not None:
                yield whole

    def follow(self) -> None:
        """Hook every parameter that has no hook yet, as those of a group that was added; frozen
        ones too, which may be unfrozen later.

        Raises RuntimeError, before any is hooked, for a norm of all gradients and for a parameter
        whose gradient in backward is not that of all ranks.
        """
        self._check_norms(options.measures(self._optimizer.param_groups))
        param_refs = {ref.param: ref for ref in self._optimizer.param_refs()}
        for param in param_refs:
            if param not in self._handles and (param.requires_grad or sharding.is_flattened(param)):
                self._check_reduced(param)
        self._param_refs = param_refs
        for param in (*param_refs, *self._reduction_of):
            if param not in self._handles and _can_require_grad(param):
                self._handles[param] = _hook(param, self._receive)

    def _check_norms(self, measures: bool) -> None:
        if measures and not self._per_tensor:
            raise RuntimeError(
                "max_grad_norm and skip_nonfinite look at all gradients before any parameter is "
                "written, but with release_gradients() the first ones are stepped and freed before "
                "the last ones are there. Leave them unset, or call "
                "release_gradients(per_tensor=True): each tensor is then clipped, or skipped, by "
                "its own norm."
            )

    def _check_reduced(self, param: Tensor) -> None:
        """Refuse a parameter whose gradient is not that of all ranks when its hook runs."""
        if sharding.is_flattened(param):
            raise RuntimeError(
                "release_gradients() does not go with FullyShardedDataParallel: hooks run before "
                "it reduces a gradient. Use torch.distributed.fsdp.fully_shard, or call step() "
                "after backward."
            )
        reduced = param in self._by_fsdp or param in self._reduction_of
        if not reduced and not self._local and sharding.many_processes():
            raise RuntimeError(
                f"release_gradients() steps in backward, where the gradient of a {param.dtype} "
                f"parameter of shape {tuple(param.shape)} is that of this rank alone: replicas "
                "would drift apart. Pass the DistributedDataParallel or fully_shard model that "
                "reduces it: release_gradients(model=model). (DistributedDataParallel does not "
                "reduce a parameter that was frozen when it was constructed.) If each rank is to "
                "train by itself, pass local=True."
            )

    def _receive(self, param: Tensor) -> None:
        """The hook: a gradient is there, this rank's own under DistributedDataParallel."""
        reduction = self._reduction_of.get(param)
        if reduction is not None:
            self._awaited.add(reduction)
            self._watch()
            return
        if dist.is_available() and dist.is_initialized() and param not in self._by_fsdp:
            self._check_reduced(param)
            # A DistributedDataParallel of one rank need not be named; it puts zeros in what is
            # freed, and step() would take them.
            self._stepped.append(param)
            self._watch()
        self._step(param)

    def _watch(self) -> None:
        backward = torch._C._current_graph_task_id()
        if backward not in self._copied_telemetry:
            self._copied_telemetry.add(backward)
            Watch(self._reductions, lambda made: self._end(backward, made))

    def _end(self, backward: int, made: list[Reduction]) -> None:
        """Step all parameters this backward has reduced; their hooks may have run on other ranks
        only (find_unused_parameters)."""
        self._copied_telemetry.discard(backward)
        if self._optimizer._released is not self:
            return
        self._awaited.difference_update(made)
        for param in self._param_refs:
            if self._reduction_of.get(param) in made and param.grad is not None:
                self._step(param)
        for param in self._stepped:
            param.grad = None
        self._stepped.clear()

    def _step(self, param: Tensor) -> None:
        optimizer = self._optimizer
        self.averages.add(param)
        with optimizer._lock, torch.no_grad():
            # Out of the table while it is checked: an interrupt leaves it half updated.
            plan = optimizer.plan_of(self._param_refs[param], self.plans.pop(param, None))
            self._check_norms(plan.measures_gradients)
            self.plans[param] = plan
            # A gradient that was stepped and stays would be stepped again.
            with interrupts.deferred():
                optimizer.run_plan(plan)
                param.grad = None

    def check_step(self) -> None:
        """Raises RuntimeError where step() must not step the gradients that are left: a GradScaler
        calls it, or they are not reduced yet."""
        if {"grad_scale", "found_inf"} & self._optimizer.__dict__.keys():
            raise scaled_losses.refusal()
        left = {self._reduction_of.get(p) for p in self._param_refs if p.grad is not None}
        for reduction in self._awaited & left:
            reduction.check()
            raise RuntimeError(
                "gradients of a backward in no_sync() are those of this rank alone, and are "
                "stepped by the next backward outside of it. Call step() after that one, or "
                "zero_grad() to drop them."
            )

    def remove(self) -> None:
        """Gradients stay again, for step()."""
        for handle in self._handles.values():
            handle.remove()
        scaled_losses.allow_for(self)
        self._optimizer.end_release(self)


def _can_require_grad(param: Tensor) -> bool:
    return param.requires_grad or (
        param.is_leaf
        and not param.is_inference()
        and (param.is_floating_point() or param.is_complex())
    )


def _hook(param: Tensor, receive: Callable[[Tensor], None]) -> RemovableHandle:
    """A hook that runs when a gradient was accumulated; torch takes none for a frozen parameter,
    but keeps one while it is frozen."""
    frozen = not param.requires_grad
    if frozen:
        param.requires_grad_(True)
    try:
        handle = param.register_post_accumulate_grad_hook(receive)  # type: ignore[no-untyped-call]
        return cast(RemovableHandle, handle)
    finally:
        if frozen:
            param.requires_grad_(False)
