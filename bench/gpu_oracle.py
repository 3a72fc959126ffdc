"""What a step on the GPU must give: torch.optim in float64, from where ours stands before it.

The oracle takes each step anew from the values that lie in memory, so an error cannot hide behind
the drift of the steps before, and a low-precision store has one rounding and no more. Beside it
torch.optim takes the same step in the type ours computes in (float32, float64 for float64
parameters): that error is the measure of what arithmetic may cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastopt
from fastopt.optim.update import Update


@dataclass(frozen=True)
class Case:
    """An optimizer and the options that choose its rule; none of the rule's terms is zero."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        flags = [key for key, value in self.options.items() if value is True]
        flags += ["momentum"] if self.options.get("momentum") else []
        if "betas" in self.options:
            flags.append(f"beta2={self.options['betas'][1]}")
        return " ".join([self.optimizer, *flags])

    def ours(self, params: Iterable[Any], **more: Any) -> Any:
        return getattr(fastopt.optim, self.optimizer)(params, **self.options | more)

    def ours_fused(self, params: Sequence[Any], **more: Any) -> Any:
        """With the group option `fused`, also where the constructor has no such argument."""
        return self.ours([{"params": list(params), "fused": True}], **more)

    def torchs(self, params: Iterable[Any], **more: Any) -> torch.optim.Optimizer:
        cls = getattr(torch.optim, self.optimizer)
        optimizer: torch.optim.Optimizer = cls(params, **self.options | more)
        return optimizer

    @property
    def update(self) -> Update:
        ours = self.ours([nn.Parameter(torch.zeros(1))])
        update: Update = ours.update_of(ours.param_groups[0])
        return update


CASES = (
    Case("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    Case(
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
    ),
    Case("RMSprop", {"lr": 0.05, "weight_decay": 0.1}),
    Case("RMSprop", {"lr": 0.05, "centered": True}),
    Case("RMSprop", {"lr": 0.05, "momentum": 0.9}),
    Case("RMSprop", {"lr": 0.05, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    Case("Adadelta", {"lr": 1.0, "eps": 1e-2, "weight_decay": 0.1}),
    Case("Adam", {"lr": 0.1, "weight_decay": 0.1}),
    Case("Adam", {"lr": 0.1, "amsgrad": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    Case("AdamW", {"lr": 0.1, "weight_decay": 0.1}),
    Case("AdamW", {"lr": 0.1, "amsgrad": True, "maximize": True}),
    Case("Adamax", {"lr": 0.1, "weight_decay": 0.1}),
    Case("NAdam", {"lr": 0.1, "weight_decay": 0.1}),
    Case("NAdam", {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("RAdam", {"lr": 0.1, "weight_decay": 0.1}),
    Case(
        "RAdam",
        {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.9, 0.6)},
    ),
)
# One of each kind of state, for the interpreter.
QUICK_NAMES = ("SGD momentum", "RMSprop centered momentum", "AdamW", "NAdam")
# Of those, where what is looked at stands around the rule: uncounted, and with a carried number.
QUICK_WHOLE = ("SGD momentum", "NAdam")
# States that are numbers, one a parameter.
NUMBERS = ("step", "mu_product")
# Roundings to the stored type. Triton's interpreter truncates to bfloat16: one ulp there.
STORES = {torch.float32: 1.0, torch.float64: 4.0, torch.float16: 0.51, torch.bfloat16: 0.51}
TRUNCATED = 1.0
# Of the largest value, for what has no measure: ours computes in the oracle's own type.
FLOAT64_SLACK = 1e-14


def cases(quick: bool, names: Sequence[str] = QUICK_NAMES) -> list[Case]:
    """All, or for the interpreter those of these names."""
    return [case for case in CASES if not quick or case.name in names]


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def computed(dtype: torch.dtype) -> torch.dtype:
    """The type a rule is computed in for parameters of this one."""
    if dtype.is_complex:
        return dtype
    return torch.float64 if dtype is torch.float64 else torch.float32


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbours in dtype around each value of x (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().clamp(info.tiny, info.max)).exponent
    return torch.ldexp(torch.full_like(x, info.eps), exponent - 1)


def disagreement(ours: Tensor, right: Tensor, theirs: Tensor, truncates: bool) -> str | None:
    """What is wrong with ours (in its stored dtype) beside the oracle; None where nothing is.

    theirs: torch's own result in the type ours computes in. Allowed are 1.5 times its error and
    one rounding to the stored type.
    """
    if ours.is_complex():
        ours, right, theirs = map(torch.view_as_real, (ours, right, theirs))
    dtype = ours.dtype
    ours, right, theirs = (x.detach().cpu().double().reshape(-1) for x in (ours, right, theirs))
    if not ours.numel():
        return None
    stored = right.to(dtype).double()
    odd = ~stored.isfinite()
    if not torch.equal(odd, ~ours.isfinite()) or not torch.equal(
        stored[odd].nan_to_num(), ours[odd].nan_to_num()
    ):
        k = int((odd != ~ours.isfinite()).double().argmax())
        return f"not finite where torch is, or the reverse: {ours[k]} for {stored[k]} at {k}"
    ours, right = ours[~odd], right[~odd]
    if not ours.numel():
        return None
    roundings = TRUNCATED if truncates and dtype is torch.bfloat16 else STORES[dtype]
    arithmetic = (theirs[~odd] - right).abs()
    arithmetic = arithmetic[arithmetic.isfinite()]
    allowed = roundings * ulp(right, dtype)
    if len(arithmetic):
        allowed = allowed + 1.5 * arithmetic.max()
    if dtype is torch.float64:
        allowed = allowed + FLOAT64_SLACK * right.abs().max()
    excess = (ours - right).abs() - allowed
    if excess.max() <= 0:
        return None
    k = int(excess.argmax())
    return (
        f"{int((excess > 0).sum())} of {len(ours)} off, the worst at {k}: got {ours[k].item():.9g}"
        f" for {right[k].item():.9g}, allowed {allowed[k].item():.2g}"
    )


class Mirror:
    """torch.optim on the CPU in a wider type, set to where ours stands before each step."""

    def __init__(self, case: Case, ours: Any, wide: bool) -> None:
        self.ours = ours
        self._dtype = widened if wide else computed
        self.params: list[Tensor] = []
        groups = []
        for group in ours.param_groups:
            mine = [nn.Parameter(self._copy(p)) for p in group["params"]]
            self.params += mine
            options = {key: group[key] for key in case.options if key in group}
            groups.append({"params": mine} | options | {"lr": float(group["lr"])})
        self.optimizer = case.torchs(groups, foreach=False)

    def _copy(self, x: Tensor) -> Tensor:
        return x.detach().cpu().to(self._dtype(x.dtype)).clone()

    def take(self, grads: Sequence[Tensor | None], g_scale: float = 1.0) -> None:
        """Stand where ours stands, with these gradients, and step."""
        theirs = [p for group in self.ours.param_groups for p in group["params"]]
        held = self.ours.__dict__["state"]
        for group, mine in zip(self.ours.param_groups, self.optimizer.param_groups, strict=True):
            mine["lr"] = float(group["lr"])
        for p, q, grad in zip(theirs, self.params, grads, strict=True):
            q.data.copy_(self._copy(p))
            q.grad = None if grad is None else self._copy(grad).to(q.dtype) * g_scale
            if state := held.get(p):
                self.optimizer.state[q] = {name: self._state(name, x) for name, x in state.items()}
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # what torch makes step counts and products in
        try:
            self.optimizer.step()
        finally:
            torch.set_default_dtype(default)

    def _state(self, name: str, x: Any) -> Any:
        if name in NUMBERS:
            return torch.as_tensor(x).detach().cpu().double().clone()
        return self._copy(x) if isinstance(x, Tensor) else x


class Checked:
    """An optimizer of ours every step of which is compared with the oracle's."""

    def __init__(self, case: Case, ours: Any, truncates: bool) -> None:
        self.ours, self.truncates = ours, truncates
        self.params = [p for group in ours.param_groups for p in group["params"]]
        self.right = Mirror(case, ours, wide=True)
        self.theirs = Mirror(case, ours, wide=False)

    def step(self, grads: Sequence[Tensor | None], g_scale: float = 1.0, run: Any = None) -> None:
        """One step of ours (or `run`, which makes one happen); AssertionError where it is wrong.

        g_scale: what the step itself multiplies the gradients by (1 / GradScaler's scale)
        """
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        self.right.take(grads, g_scale)
        self.theirs.take(grads, g_scale)
        (run or self.ours.step)()
        if wrong := self.wrong():
            raise AssertionError("; ".join(wrong[:3]))

    def wrong(self) -> list[str]:
        """Every disagreement, by the name and dtype of what disagrees.

        Tensors of one name are judged together: torch's own error on one number says little.
        """
        found = []
        held = self.ours.__dict__["state"]
        rows: dict[tuple[str, torch.dtype], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for p, q, r in zip(self.params, self.right.params, self.theirs.params, strict=True):
            right, theirs = self.right.optimizer.state[q], self.theirs.optimizer.state[r]
            rows.setdefault(("p", p.dtype), []).append((p, q, r))
            mine = held.get(p) or {}
            if set(right) != set(mine):
                found.append(
                    f"the state of {tuple(p.shape)} has {sorted(mine)} for {sorted(right)}"
                )
                continue
            for name, value in right.items():
                if isinstance(value, Tensor):
                    row = (mine[name], value, theirs[name])
                    rows.setdefault((name, mine[name].dtype), []).append(row)
        for (name, dtype), tensors in rows.items():
            flat = [
                torch.cat([x.detach().cpu().reshape(-1) for x in column])
                for column in zip(*tensors, strict=True)
            ]
            if text := disagreement(*flat, truncates=self.truncates):
                found.append(f"{name} {dtype}: {text}")
        return found
