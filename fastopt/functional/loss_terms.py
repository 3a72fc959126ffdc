"""Reductions, class weights, z_loss and softcap of cross entropy."""

from __future__ import annotations

from math import inf

from torch import Tensor


def terms_of(z_loss: float, softcap: float | None) -> tuple[float, float]:
    """Both as kernels take them: a softcap of 0 is none."""
    if not 0.0 <= z_loss < inf:
        raise ValueError(f"z_loss is {z_loss}: it must be a positive number, or 0.0 for none.")
    if softcap is not None and not 0.0 < softcap < inf:
        raise ValueError(f"softcap is {softcap}: it must be a positive number, or None for none.")
    return float(z_loss), float(softcap or 0.0)


NONE, MEAN, SUM = 0, 1, 2


REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


NAMES = {number: name for name, number in REDUCTIONS.items()}


def refuse_target(outside: int, n_classes: int, ignore_index: int) -> None:
    raise IndexError(
        f"Target {outside} is out of bounds: targets are in [0, {n_classes}) for "
        f"{n_classes} classes, or ignore_index={ignore_index}."
    )


def z_share_of(divisor: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The weights of the targets that count over their number: z_loss is multiplied by it in a sum
    that is divided by the weights, so that z_loss is divided by the number."""
    return divisor / (target != ignore_index).sum().clamp(min=1)


def weights_of(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The weight of each target in a mean: 0 where it is ignored; any where it is no class, which
    the kernels find."""
    counts = target != ignore_index
    if weight is None:
        return counts
    return weight[target.where(counts, 0).clamp(0, len(weight) - 1)] * counts
