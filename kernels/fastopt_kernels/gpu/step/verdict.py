"""What the measuring of gradients leaves on a device for the update."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Numbers before those of the groups, in `Verdict.wide` and `narrow`; 16 bytes of either.
HEAD = 4


@dataclass
class Verdict:
    """What a look has left on a device, for the update and for whoever asks.

    wide:   float64: norm, elements that are not finite, two unused; (groups,) factors; (groups,)
            clip coefficients; (families, 2) what was measured
    narrow: float32: whether to skip, three unused; (groups,) factors
    skips:  whether anything may say so
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
        """(families * 2,) float64."""
        return self.wide[HEAD + 2 * self.n_groups :]

    @property
    def skip(self) -> torch.Tensor:
        """(1,) float32, not 0 where nothing is to be updated."""
        return self.narrow[:1]

    def to(self, device: torch.device) -> Verdict:
        """The same on another device."""
        wide, narrow = (x.to(device, non_blocking=True) for x in (self.wide, self.narrow))
        return Verdict(wide, narrow, self.n_groups, self.skips)
