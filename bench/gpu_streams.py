"""One launch of the engine over memory laid out by hand: any dtypes, any alignment, poisoned gaps.

Every stream of every tensor (p, g, each state) lies in one arena of its dtype with a gap on either
side; a gap that has changed afterwards is a write out of bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.gpu_oracle import Case, disagreement

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
POISON = -12345.0
GAP_BYTES = 64
# Where carried numbers stand before the step; any value does.
CARRIED = 0.9
# States that are never negative, away from zero so that quotients stay moderate.
POSITIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf")
# Small, so that the variance square_avg - grad_avg ^ 2 of centered RMSprop stays positive.
SMALL = ("grad_avg",)


class Arena:
    """Tensors cut from one poisoned buffer.

    offset: elements past a 16-byte boundary at which each tensor starts
    """

    def __init__(self, kind: str, offsets: Sequence[int], device: torch.device) -> None:
        self.dtype, self.device, self.offsets = DTYPES[kind], device, offsets
        self.buffer = torch.empty(0)

    def cut(self, values: Sequence[Tensor]) -> list[Tensor]:
        itemsize = self.dtype.itemsize
        gap, step = GAP_BYTES // itemsize, 16 // itemsize
        starts, end = [], gap
        for value, offset in zip(values, self.offsets, strict=True):
            starts.append(end + offset)
            end = -(-(starts[-1] + len(value) + gap) // step) * step
        self.buffer = torch.full((end,), POISON, dtype=self.dtype, device=self.device)
        self.inside = torch.zeros(end, dtype=torch.bool, device=self.device)
        views = []
        for value, start in zip(values, starts, strict=True):
            view = self.buffer[start : start + len(value)]
            view.copy_(value)
            self.inside[start : start + len(value)] = True
            views.append(view)
        return views

    def intact(self) -> bool:
        return bool((self.buffer[~self.inside] == POISON).all())


class Streams:
    """The memory of one launch and what torch says must lie there after it.

    kinds: of p, g and each state; sizes and offsets: of each tensor; steps: the step each takes,
    counted from 1
    """

    def __init__(
        self,
        engine: ModuleType,
        case: Case,
        kinds: tuple[str, ...],
        sizes: Sequence[int],
        offsets: Sequence[int],
        steps: Sequence[int],
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.case, self.kinds, self.steps, self.device = case, kinds, list(steps), device
        self.update = case.update
        random = torch.Generator().manual_seed(seed)
        names = ("p", "g", *self.update.state_names)
        self.arenas = [Arena(kind, offsets, device) for kind in kinds]
        self.streams = [
            arena.cut(
                [_values(name, n, step, random) for n, step in zip(sizes, steps, strict=True)]
            )
            for name, arena in zip(names, self.arenas, strict=True)
        ]
        self.before = [[x.clone() for x in stream] for stream in self.streams]
        self.launch = engine.Launch(
            self.update.rule, kinds, list(sizes), self.update.n_scalars + 1, device
        )
        for column, stream in enumerate(self.streams):
            self.launch.tensors[:, column] = [x.data_ptr() for x in stream]
        n_numbers = 1 + len(self.update.carried)
        self.numbers = torch.full((len(sizes), n_numbers), CARRIED, dtype=torch.float32)
        self.numbers[:, 0] = torch.tensor(self.steps) - 1
        self.numbers = self.numbers.to(device)
        self.numbers_before = self.numbers.clone()

    @property
    def group(self) -> dict[str, Any]:
        return self.case.ours([nn.Parameter(torch.zeros(1))]).param_groups[0]

    @property
    def sign(self) -> float:
        return -1.0 if self.group.get("maximize") else 1.0

    def run(self) -> None:
        """Scalars by the host, a row for each tensor."""
        hypers = [float(x) for x in self.update.hypers(self.group)]
        self.launch.index[:] = range(len(self.steps))
        for row, numbers in enumerate(self.numbers.tolist()):
            values = self.update.scalars(numbers[0] + 1.0, *numbers[1:], *hypers)
            self.launch.scalars[row] = (self.sign, *values[: self.update.n_scalars])
        self.launch.run(1)

    def run_on_device(
        self,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        active: Sequence[bool] | None = None,
    ) -> None:
        """Scalars by the device, from its own counts."""
        addresses = np.asarray(
            [[x.data_ptr() for x in row.unbind()] for row in self.numbers], dtype=np.int64
        )
        if active is not None:
            mask = np.asarray(active)
            addresses[~mask] = 0
            self.launch.select(mask)
        rows = [[self.sign, *self.update.hypers(self.group)]]
        groups = np.zeros(len(self.steps), dtype=np.int64)
        self.launch.run_on_device(
            self.update.scalars, addresses, groups, rows, grad_scale, found_inf
        )

    def wrong(
        self, truncates: bool, g_scale: float = 1.0, active: Sequence[bool] | None = None
    ) -> list[str]:
        """Every disagreement with torch, and every gap written to."""
        found = []
        names = ("p", "g", *self.update.state_names)
        for name, arena in zip(names, self.arenas, strict=True):
            if not arena.intact():
                found.append(f"{name}: written out of bounds")
        narrow = torch.float64 if self.kinds[0] == "fp64" else torch.float32
        for k in range(len(self.steps)):
            if active is not None and not active[k]:
                right = theirs = [stream[k].double().cpu() for stream in self.before]
            else:
                right, _ = self._torch(k, g_scale, torch.float64)
                theirs, _ = self._torch(k, g_scale, narrow)
            for name, stream, a, b in zip(names, self.streams, right, theirs, strict=True):
                if text := disagreement(stream[k], a, b, truncates):
                    found.append(f"{name}[{k}] {stream[k].dtype}: {text}")
        return found

    def wrong_numbers(self, active: Sequence[bool] | None = None) -> list[str]:
        """Where the device counted otherwise than torch: step and carried numbers."""
        found = []
        for k, step in enumerate(self.steps):
            stepped = active is None or active[k]
            right = [float(step) if stepped else step - 1.0]
            for name in self.update.carried:
                right.append(
                    self._torch(k, 1.0, torch.float64)[1][name].item() if stepped else CARRIED
                )
            got = self.numbers[k].tolist()
            if not np.allclose(got, right, rtol=2.0**-23, atol=0.0):
                found.append(f"numbers[{k}]: got {got} for {right}")
        return found

    def unchanged(self) -> bool:
        """Whether every bit is as it was, steps too."""
        if not torch.equal(self.numbers, self.numbers_before):
            return False
        return all(
            torch.equal(x.view(torch.uint8), y.view(torch.uint8))
            for stream, before in zip(self.streams, self.before, strict=True)
            for x, y in zip(stream, before, strict=True)
        )

    def _torch(
        self, k: int, g_scale: float, dtype: torch.dtype
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Streams and state of tensor k after torch's step from the values before."""
        p, g, *states = (stream[k].cpu().to(dtype, copy=True) for stream in self.before)
        param = nn.Parameter(p)
        optimizer = self.case.torchs([param], foreach=False)
        held: dict[str, Any] = dict(zip(self.update.state_names, states, strict=True))
        if self.update.counted:
            held["step"] = torch.tensor(self.steps[k] - 1.0, dtype=torch.float64)
        elif self.steps[k] == 1:
            held = {}
        for name in self.update.carried:
            held[name] = torch.tensor(CARRIED, dtype=torch.float32).double()
        optimizer.state[param] = held
        param.grad = g * g_scale
        optimizer.step()
        state = optimizer.state[param]
        return [param.detach(), g, *(state[name] for name in self.update.state_names)], state


def _values(name: str, n: int, step: int, random: torch.Generator) -> Tensor:
    if name == "momentum_buffer" and step == 1:
        return torch.zeros(n, dtype=torch.float64)  # torch's first buffer is the gradient
    if name in POSITIVE:
        return torch.rand(n, generator=random, dtype=torch.float64) + 0.5
    values = torch.randn(n, generator=random, dtype=torch.float64)
    return values * 0.1 if name in SMALL else values
