"""torch.amp.GradScaler without its pass over the gradients, where the step makes one anyway."""

from __future__ import annotations

from typing import Any

import torch

from fastopt.optim.base import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler: same arguments, methods and state_dict.

    `step` of an optimizer with max_grad_norm or skip_nonfinite learns from that optimizer's own
    look at its gradients whether one is infinite or NaN. For any other it is torch's.
    """

    # The optimizer that is being stepped: what it sees holds until its own step, which comes next.
    _stepped: torch.optim.Optimizer | None = None

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """optimizer.step(*args, **kwargs), unless a gradient is infinite or NaN."""
        self._stepped = optimizer
        try:
            return super().step(optimizer, *args, **kwargs)
        finally:
            self._stepped = None
            if isinstance(optimizer, FusedOptimizer):
                optimizer.forget_look()

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if (
            optimizer is not self._stepped
            or not isinstance(optimizer, FusedOptimizer)
            or not optimizer.looks()
        ):
            return super()._check_inf_per_device(optimizer)
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        found = torch.full((), float(optimizer.look()), dtype=torch.float32, device=scale.device)
        state: dict[str, Any] = self._per_optimizer_states[id(optimizer)]
        state["found_inf_per_device"] = {scale.device: found}
        return state["found_inf_per_device"]  # type: ignore[no-any-return]
