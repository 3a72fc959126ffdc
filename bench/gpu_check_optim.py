"""Rows: whole optimizers, step by step against torch.optim in float64, in every way to step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastopt
from bench.gpu_device import Device
from bench.gpu_oracle import CASES, QUICK_WHOLE, Case, Checked, cases
from bench.gpu_rows import Row

SHAPES = ((17, 5), (3,), (), (0,), (4097,), (64, 3, 3), (129, 1031))
QUICK_SHAPES = ((17, 5), (3,), (), (0,), (37,))
IN_DTYPES = ("SGD momentum", "AdamW", "NAdam")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rows(device: Device, quick: bool) -> Iterator[Row]:
    """quick: small tensors and few steps, for the interpreter."""
    maker = _Maker(device, QUICK_SHAPES if quick else SHAPES, 3 if quick else 8)
    for case in cases(quick, QUICK_WHOLE):
        yield Row(f"steps: {case.name}", partial(_steps, maker, case), 30)
        yield Row(f"counted on the device: {case.name}", partial(_capturable, maker, case), 20)
        yield Row(f"not finite: {case.name}", partial(_not_finite, maker, case))
        yield Row(f"GradScaler: {case.name}", partial(_scaler, maker, case), 10)
        yield Row(f"state_dict: {case.name}", partial(_state_dict, maker, case))
    adamw = next(case for case in CASES if case.name == "AdamW")
    for case in [adamw] if quick else [case for case in CASES if case.name in IN_DTYPES]:
        yield Row(f"dtypes: {case.name}", partial(_dtypes, maker, case), 30)
    yield Row("layouts", partial(_layouts, maker, adamw))
    yield Row("wide states", partial(_wide_states, maker, adamw))
    yield Row("tensor learning rates", partial(_tensor_lr, maker, adamw))
    yield Row("a default device", partial(_default_device, maker, adamw))
    yield Row("a stale backward raises", partial(_stale_backward, maker, adamw))
    yield Row("from torch and back", partial(_from_torch_and_back, maker, adamw))
    yield Row("a wrong optimizer is found out", partial(_teeth, maker, adamw))


class _Maker:
    """Parameters and gradients on a device."""

    def __init__(self, device: Device, shapes: Any, n_steps: int) -> None:
        self.device, self.shapes, self.n_steps = device, shapes, n_steps

    def parameters(self, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        random = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, dtype=dtype, generator=random) for shape in self.shapes]
        return [nn.Parameter(value.to(self.device.device)) for value in values]

    def gradients(self, params: list[nn.Parameter], step: int) -> list[Tensor | None]:
        """Random, and none for the second parameter in the steps it is frozen for."""
        random = torch.Generator().manual_seed(step + 1)
        grads: list[Tensor | None] = [
            torch.randn(p.shape, dtype=p.dtype, generator=random).to(p.device) for p in params
        ]
        if step in (2, 3):
            grads[1] = None
        return grads

    def checked(self, case: Case, ours: Any) -> Checked:
        return Checked(case, ours, self.device.truncates)

    def run(self, checked: Checked, **options: Any) -> None:
        for step in range(self.n_steps):
            checked.step(self.gradients(checked.params, step), **options)


def _in_two_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]


def _steps(maker: _Maker, case: Case) -> None:
    checked = maker.checked(case, case.ours(_in_two_groups(maker.parameters())))
    schedule = torch.optim.lr_scheduler.ExponentialLR(checked.ours, 0.9)
    for step in range(maker.n_steps):
        checked.step(maker.gradients(checked.params, step))
        schedule.step()


def _capturable(maker: _Maker, case: Case) -> None:
    params = maker.parameters()
    maker.run(maker.checked(case, case.ours(_in_two_groups(params), capturable=True)))


def _not_finite(maker: _Maker, case: Case) -> None:
    random = torch.Generator().manual_seed(1)
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e20, -1e20, 1e-30, 0.0, 1.0])
    first = (values * (1 + torch.rand((64, 8), generator=random))).to(maker.device.device)
    params = [nn.Parameter(torch.ones_like(first))]
    checked = maker.checked(case, case.ours(params))
    for grad in (first, first.roll(1, 1), torch.ones_like(first)):
        checked.step([grad])


def _scaler(maker: _Maker, case: Case) -> None:
    """torch.amp.GradScaler with fused=True: unscales inside, skips, and does not count a skip."""
    params = maker.parameters()
    checked = maker.checked(case, case.ours_fused(params))
    kind = maker.device.device.type
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**10, growth_interval=2)

    def through_scaler() -> None:
        scaler.step(checked.ours)

    for step in range(maker.n_steps):
        scaler.scale(torch.zeros(1, device=maker.device.device))
        scale = scaler.get_scale()
        scaled = [None if g is None else g * scale for g in maker.gradients(params, step)]
        if step == 1:
            before = [x.clone() for x in _all_tensors(checked.ours, params)]
            scaled[0][0, 0] = torch.inf  # type: ignore[index]
            for p, grad in zip(params, scaled, strict=True):
                p.grad = grad
            through_scaler()
            after = _all_tensors(checked.ours, params)
            if not all(map(torch.equal, before, after)):
                raise AssertionError("a step GradScaler skips wrote something")
        else:
            checked.step(scaled, g_scale=1 / scale, run=through_scaler)
        scaler.update()
        if step == 1 and not scaler.get_scale() < scale:
            raise AssertionError("GradScaler did not see the infinity")


def _all_tensors(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    """Parameters and everything in the state, steps too."""
    held = [x for p in params for x in optimizer.__dict__["state"].get(p, {}).values()]
    return [*(p.detach() for p in params), *(x for x in held if isinstance(x, Tensor))]


def _state_dict(maker: _Maker, case: Case) -> None:
    dicts = []
    for make in (case.ours, case.torchs):
        params = maker.parameters()
        optimizer = make(params)
        for p, grad in zip(params, maker.gradients(params, 0), strict=True):
            p.grad = grad
        optimizer.step()
        dicts.append(optimizer.state_dict())
    mine, right = dicts
    if [set(g) for g in mine["param_groups"]] != [set(g) for g in right["param_groups"]]:
        raise AssertionError(f"groups {mine['param_groups']} for {right['param_groups']}")
    for key, state in right["state"].items():
        got = mine["state"][key]
        if list(got) != list(state):
            raise AssertionError(f"state {list(got)} for {list(state)}")
        for name, value in state.items():
            if value is not None:
                here = got[name].shape, got[name].dtype, got[name].device
                there = value.shape, value.dtype, value.device
                if here != there:
                    raise AssertionError(f"{name} is {here} for {there}")
                torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def _dtypes(maker: _Maker, case: Case) -> None:
    """Each alone, complex ones, and all in one optimizer."""
    for dtype in (*DTYPES, torch.complex64, torch.complex128):
        maker.run(maker.checked(case, case.ours(_in_two_groups(maker.parameters(dtype)))))
    mixed = [maker.parameters(dtype)[k] for dtype in DTYPES for k in (0, 4)]
    maker.run(maker.checked(case, case.ours(mixed)))


def _layouts(maker: _Maker, case: Case) -> None:
    """Transposed, channels last beside a contiguous gradient, a slice with gaps, an odd offset."""
    device = maker.device.device
    random = torch.Generator().manual_seed(3)
    base = torch.randn((37, 5, 2), generator=random).to(device)
    odd = torch.randn((1001,), generator=random).to(device)
    values = [
        torch.randn((13, 7), generator=random).to(device).t(),
        torch.randn((4, 3, 5, 5), generator=random)
        .to(device)
        .to(memory_format=torch.channels_last),
        base[..., 0],
        odd[1:],
    ]
    neighbour = base[..., 1].clone()
    params = [nn.Parameter(value) for value in values]
    if params[2].data_ptr() != base.data_ptr():
        raise AssertionError("the slice was copied: this checks nothing")
    checked = maker.checked(case, case.ours(params))
    for step in range(3):
        random.manual_seed(step)
        checked.step([torch.randn(p.shape, generator=random).to(device) for p in params])
    if not torch.equal(base[..., 1], neighbour):
        raise AssertionError("the neighbour of a strided parameter was written to")


class _WideStates(fastopt.optim.AdamW):
    def initial_state(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.zeros_like(param, dtype=torch.float32)


def _wide_states(maker: _Maker, case: Case) -> None:
    params = maker.parameters(torch.bfloat16)
    maker.run(maker.checked(case, _WideStates(params, **case.options)))


def _tensor_lr(maker: _Maker, case: Case) -> None:
    """On the device and on the host, plain, fused and capturable; changed in place in between."""
    for device in dict.fromkeys((maker.device.device, torch.device("cpu"))):
        for option in ({}, {"fused": True}, {"capturable": True}):
            lr = torch.tensor(0.125, device=device)
            checked = maker.checked(case, case.ours(maker.parameters(), lr=lr, **option))
            for step in range(3):
                checked.step(maker.gradients(checked.params, step))
                lr.mul_(0.5)


def _default_device(maker: _Maker, case: Case) -> None:
    params = maker.parameters()
    for option in ({}, {"capturable": True}):
        checked = maker.checked(case, case.ours(params, **option))

        def under_a_default_device(ours: Any = checked.ours) -> None:
            with torch.device(maker.device.device):
                ours.step()

        for step in range(2):
            checked.step(maker.gradients(params, step), run=under_a_default_device)


def _stale_backward(maker: _Maker, case: Case) -> None:
    params = maker.parameters()
    optimizer = case.ours(params)
    loss = params[0].square().sum()
    for p, grad in zip(params, maker.gradients(params, 0), strict=True):
        p.grad = grad
    optimizer.step()
    try:
        loss.backward()
    except RuntimeError:
        return
    raise AssertionError("a backward through a parameter that has changed since did not raise")


def _from_torch_and_back(maker: _Maker, case: Case) -> None:
    """torch, then ours, then torch on one state, beside torch throughout."""
    switched, plain = maker.parameters(), maker.parameters()
    optimizer: Any = case.torchs(switched, foreach=False)
    reference = case.torchs(plain, foreach=False)
    for step in range(6):
        for params in (switched, plain):
            for p, grad in zip(params, maker.gradients(params, step), strict=True):
                p.grad = grad
        if step == 2:
            optimizer = fastopt.swap(optimizer)
        if step == 4:
            saved = optimizer.state_dict()
            optimizer = case.torchs(switched, foreach=False)
            optimizer.load_state_dict(saved)
        optimizer.step()
        reference.step()
    for p, q in zip(switched, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class _NoOp(fastopt.optim.AdamW):
    def step(self, closure: Any = None) -> None:
        before = [p.detach().clone() for p in self._all_params()]
        super().step(closure)
        for p, old in zip(self._all_params(), before, strict=True):
            p.data.copy_(old)


def _teeth(maker: _Maker, case: Case) -> None:
    for wrong in (_NoOp, fastopt.optim.Adam):
        checked = maker.checked(case, wrong(maker.parameters(), **case.options))
        try:
            maker.run(checked)
        except AssertionError:
            continue
        raise AssertionError(f"{wrong.__name__} passed for AdamW")
