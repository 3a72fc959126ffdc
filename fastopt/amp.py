"""torch.amp.GradScaler without its pass over the gradients, where the step makes one anyway."""

from __future__ import annotations

from typing import Any

import torch

from fastopt.optim.optimizer import FusedOptimizer
from fastopt.optim.step import scaled_losses, sharding
from fastopt.optim.step.grad_scale import step_is_replaced


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler: same arguments, methods and state_dict.

    `step` of an optimizer with max_grad_norm or skip_nonfinite takes from that optimizer's own
    measurement of its gradients if one is infinite or NaN: on a device in the step itself, and
    nothing waits for it. For any other it is torch's, as for one whose `step` was replaced on the
    instance (accelerate does so), which is not called for a step that is skipped.
    """

    # The optimizer that is being stepped: what it measures holds until its own step, which is next.
    _stepped: FusedOptimizer | None = None

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """optimizer.step(*args, **kwargs), unless a gradient is infinite or NaN.

        Raises RuntimeError, before anything is stepped, where a rank would decide by its own part
        of the gradients (FullyShardedDataParallel, what is inside a ZeroRedundancyOptimizer), and
        where the optimizer steps in backward (release_gradients).
        """
        if self._enabled:
            sharding.check_scaler(optimizer)
            if getattr(optimizer, "_released", None) is not None:
                raise scaled_losses.refusal()
        if (
            not self._enabled
            or not isinstance(optimizer, FusedOptimizer)
            or not optimizer.measures_gradients()
            or step_is_replaced(optimizer)
        ):
            return super().step(optimizer, *args, **kwargs)
        self._stepped, optimizer.unscales = optimizer, True
        try:
            result = super().step(optimizer, *args, **kwargs)
            if (found := optimizer.found_inf_of_step()) is not None:
                state = self._per_optimizer_states[id(optimizer)]
                # A copy: `update` adds what other optimizers found to the first it is given.
                state["found_inf_per_device"] = {found.device: found.clone()}
            return result
        finally:
            self._stepped, optimizer.unscales = None, False
            optimizer.forget_measured()

    def _maybe_opt_step(
        self,
        optimizer: torch.optim.Optimizer,
        optimizer_state: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> float | None:
        """torch's; an optimizer of ours notes that its step is skipped."""
        if not sum(found.item() for found in optimizer_state["found_inf_per_device"].values()):
            return optimizer.step(*args, **kwargs)  # type: ignore[no-any-return]
        if isinstance(optimizer, FusedOptimizer):
            optimizer.note_skip()
        return None

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if self._stepped is None or optimizer is not self._stepped or not _has_gradient(optimizer):
            return super()._check_inf_per_device(optimizer)
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        # Where only the device will know, the step's own flag takes the place of this one.
        nonfinite = float(self._stepped.measure_gradients() or 0.0)
        found = torch.full((), nonfinite, dtype=torch.float32, device=scale.device)
        state: dict[str, Any] = self._per_optimizer_states[id(optimizer)]
        state["found_inf_per_device"] = {scale.device: found}
        return state["found_inf_per_device"]  # type: ignore[no-any-return]


def _has_gradient(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
