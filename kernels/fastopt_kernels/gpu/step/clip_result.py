"""Norms, clip coefficients and the skip flag of a step, left on a device for its update."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Numbers before those of the groups, in `ClipResult.wide` and `narrow`; 16 bytes of either.
HEAD = 4


@dataclass
class ClipResult:
    """Norms, clip coefficients and the skip flag of a step, left on a device for the update.

    wide:   float64: norm, elements that are not finite, two unused; (groups,) factors; (groups,)
            clip coefficients; (norm_groups, 2) what was measured
    narrow: float32: whether to skip, three unused; (groups,) factors
    skips:  true where anything may set the flag
    """

    wide: torch.Tensor
    narrow: torch.Tensor
    n_groups: int
    skips: bool

    def factors(self, wide: bool) -> torch.Tensor:
        """(groups,) what each group's gradients are multiplied by."""
        return (self.wide if wide else self.narrow)[HEAD : HEAD + self.n_groups]

    @property
    def coefficients(self) -> torch.Tensor:
        """(groups,) float64, without the scale."""
        return self.wide[HEAD + self.n_groups : HEAD + 2 * self.n_groups]

    @property
    def measured(self) -> torch.Tensor:
        """(norm_groups * 2,) float64."""
        return self.wide[HEAD + 2 * self.n_groups :]

    @property
    def skip(self) -> torch.Tensor:
        """(1,) float32, not 0 where nothing is to be updated."""
        return self.narrow[:1]

    def to(self, device: torch.device) -> ClipResult:
        """The same on another device."""
        wide, narrow = (x.to(device, non_blocking=True) for x in (self.wide, self.narrow))
        return ClipResult(wide, narrow, self.n_groups, self.skips)
