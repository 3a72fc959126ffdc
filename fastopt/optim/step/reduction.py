"""The reductions that make the gradients of a backward those of all ranks, and their end.

DistributedDataParallel copies gradients into buckets as they come, reduces each bucket when it is
full, and writes the results back in a callback at the end of the backward: only then is `.grad`
the same on all ranks. FSDP2 (`fully_shard`) gives a shard its gradient when that is reduced, and
runs the shard's hooks then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastopt.optim.step import memory_layout


class Reduction:
    """The reduction of one DistributedDataParallel.

    params: those it reduces, the ones that required a gradient when it was constructed
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        if getattr(model, "mixed_precision", None) or getattr(model, "_use_python_reducer", False):
            raise RuntimeError(
                "release_gradients() does not go with a DistributedDataParallel that casts its "
                "parameters (mixed_precision) or reduces in compiled autograd: the gradients it "
                "reduces are not those of the parameters. Call step() after backward."
            )
        self._model, self.params = model, frozenset(_reduced(model))
        self._delayed = self._has_delayed()

    def _has_delayed(self) -> bool:
        return getattr(self._model, "_static_graph_delay_allreduce_enqueued", False)

    def under_way(self) -> bool:
        """True once it has begun and until it has ended, while gradients are this rank's alone."""
        try:
            self.check()
        except RuntimeError:
            return True
        return False

    def check(self) -> None:
        """Raises torch's RuntimeError while it is under way: the reducer has no other sign."""
        self._model.reducer._check_reducer_finalized()

    def delayed(self) -> bool:
        """True once, after the first backward of a static graph: its reduction begins and ends in
        one callback, and is never found under way."""
        before, self._delayed = self._delayed, self._has_delayed()
        return self._delayed and not before


def _reduced(model: DistributedDataParallel) -> Iterable[Tensor]:
    """The parameters in a model's buckets, also those that were frozen since."""
    if not hasattr(model, "reducer"):
        return []
    try:
        buckets = model.reducer._get_zeros_like_grad_buckets()
    except RuntimeError:
        # There are none for sparse gradients. Take the trainable ones, if they are as many.
        params = [param for param in model._module_parameters if param.requires_grad]
        if len(params) != len(model.reducer.get_backward_stats()):
            raise RuntimeError(
                "the parameters that require a gradient are not those of which "
                "DistributedDataParallel was constructed. Freeze or unfreeze parameters first, "
                "then construct DistributedDataParallel, then call release_gradients()."
            ) from None
        return params
    return [param for bucket in buckets for param in bucket.parameters()]


def reductions(model: torch.nn.Module | None) -> list[Reduction]:
    """Of every DistributedDataParallel in a model."""
    modules = () if model is None else model.modules()
    return [Reduction(m) for m in modules if isinstance(m, DistributedDataParallel)]


def fsdp_modules(model: torch.nn.Module | None) -> list[Any]:
    """The modules of a model that FSDP2 shards."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or model is None:
        return []
    return [each for each in model.modules() if isinstance(each, module.FSDPModule)]


def fsdp_params(modules: Iterable[torch.nn.Module]) -> set[Tensor]:
    """The parameters of such modules, whose hooks FSDP2 runs once their gradients are reduced."""
    return {
        param for each in modules for param in each.parameters() if memory_layout.is_dtensor(param)
    }


def gathered(modules: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Each such parameter, and the gathered one in its place in a forward, if there was one."""
    for each in modules:
        state = each._get_fsdp_state()
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            for param in [] if group is None else group.fsdp_params:
                yield param.sharded_param, getattr(param, "_unsharded_param", None)


class Watch:
    """One backward, from a gradient that is there until all reductions of it have ended.

    A reduction ends in a callback that is queued by the last gradient, or by the callback that
    begins it: so this one goes to the end of the queue twice before it calls `ended`, with the
    reductions that this backward has made.
    """

    def __init__(
        self, among: Sequence[Reduction], ended: Callable[[list[Reduction]], None]
    ) -> None:
        self._among, self._ended, self._turns = among, ended, 2
        self._begun: set[Reduction] = set()
        self._queue()

    def _queue(self) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self._next)

    def _next(self) -> None:
        self._begun.update(each for each in self._among if each.delayed())
        if self._turns:
            waiting = [each for each in self._among if each not in self._begun]
            self._begun.update(each for each in waiting if each.under_way())
            self._turns -= 1
            self._queue()
        else:
            self._ended([each for each in self._begun if not each.under_way()])
