"""What GradScaler tells a step."""

from __future__ import annotations

from torch import Tensor


class Scale:
    """GradScaler's word to a fused step; read on the host only where a launch needs it there."""

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.grad_scale, self.found_inf = grad_scale, found_inf
        self._skip: bool | None = None
        self._inverse: float | None = None

    def on_host(self) -> bool:
        """Whether the verdict can be read without waiting for a device."""
        return self.found_inf is not None and self.found_inf.device.type == "cpu"

    def skip(self) -> bool:
        if self._skip is None:
            self._skip = self.found_inf is not None and bool(self.found_inf.item())
        return self._skip

    def inverse(self) -> float:
        if self._inverse is None:
            self._inverse = 1.0 if self.grad_scale is None else 1.0 / self.grad_scale.item()
        return self._inverse


NO_SCALE = Scale(None, None)
