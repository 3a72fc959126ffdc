"""Rows: what only a queue can get wrong: graphs, streams, syncs, a host that runs ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_device import Device
from bench.gpu_oracle import CASES, QUICK_WHOLE, Case, Checked, cases
from bench.gpu_rows import NotApplicableError, Row

SIZES = (5, 4097, 1, 70_001)
QUICK_SIZES = (5, 37)


def rows(device: Device, quick: bool) -> Iterator[Row]:
    maker = Maker(device, QUICK_SIZES if quick else SIZES)
    for case in cases(quick, QUICK_WHOLE):
        yield Row(f"graph: {case.name}", partial(_graph, maker, case), 15)
        yield Row(f"launches and syncs: {case.name}", partial(_launches, maker, case), 15)
    adamw, nadam = (
        next(case for case in CASES if case.name == name) for name in ("AdamW", "NAdam")
    )
    for case in (adamw,) if quick else (adamw, nadam):
        yield Row(f"a skipped replay: {case.name}", partial(_skipped_replay, maker, case))
        yield Row(f"a host that runs ahead: {case.name}", partial(_host_ahead, maker, case))
        yield Row(f"missing gradients in turn: {case.name}", partial(_in_turn, maker, case))
        yield Row(f"steps on streams in turn: {case.name}", partial(_streams_in_turn, maker, case))
    yield Row("two graphs of one optimizer", partial(_two_graphs, maker, adamw))
    yield Row("a graph outlives its plan", partial(_graph_and_eager, maker, adamw))
    yield Row("capture without capturable is refused", partial(_refused, maker, adamw))
    yield Row("two optimizers on two streams", partial(_two_streams, maker, adamw))
    yield Row("a device that is not the current one", partial(_second_device, maker, adamw))


class Maker:
    def __init__(self, device: Device, sizes: Sequence[int]) -> None:
        self.device, self.sizes = device, sizes

    def parameters(self, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        random = torch.Generator().manual_seed(0)
        values = [torch.randn(n, generator=random).to(dtype) for n in self.sizes]
        return [nn.Parameter(value.to(self.device.device)) for value in values]

    def gradients(self, step: int) -> list[Tensor]:
        random = torch.Generator().manual_seed(step + 1)
        return [torch.randn(n, generator=random).to(self.device.device) for n in self.sizes]

    def held(self, ours: Any) -> list[Tensor]:
        """Copies on the host of every parameter and everything in the state."""
        params = [p for group in ours.param_groups for p in group["params"]]
        states = [x for p in params for x in ours.__dict__["state"].get(p, {}).values()]
        return [x.detach().cpu().clone() for x in (*params, *states) if isinstance(x, Tensor)]


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor], what: str) -> None:
    if len(a) != len(b) or not all(map(torch.equal, a, b)):
        raise AssertionError(f"{what}: other bits than with the device waited for after each step")


class _Replayed:
    """An optimizer whose step is captured over gradients that stay where they are."""

    def __init__(self, maker: Maker, case: Case, **options: Any) -> None:
        self.maker = maker
        self.params = maker.parameters()
        self.grads = maker.gradients(0)
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad
        self.ours = case.ours(self.params, capturable=True, **options)
        with maker.device.stream():
            for _ in range(2):
                self.ours.step()
        self.replay = maker.device.graph(self.ours.step)
        self.checked = Checked(case, self.ours, maker.device.truncates)

    def step(self, k: int, replay: Callable[[], Any] | None = None) -> None:
        """Replay over new values of the gradients, compared with torch."""
        for grad, value in zip(self.grads, self.maker.gradients(k), strict=True):
            grad.copy_(value)
        self.checked.step(self.grads, run=replay or self.replay)


def _graph(maker: Maker, case: Case) -> None:
    """Replays count steps, see new gradients and a new learning rate, and outlive churn."""
    lr = torch.tensor(0.125, device=maker.device.device)
    replayed = _Replayed(maker, case, lr=lr)
    steps = 2
    for k in range(1, 9 if not maker.device.truncates else 3):
        replayed.step(k)
        maker.device.churn()
        lr.mul_(0.75)
        steps += 1
    state = replayed.ours.__dict__["state"].get(replayed.params[0], {})
    if "step" in state and state["step"].item() != steps:
        raise AssertionError(f"{state['step'].item()} steps counted, {steps} taken")


def _skipped_replay(maker: Maker, case: Case) -> None:
    """found_inf and grad_scale are read where they lie, at each replay."""
    device = maker.device.device
    params, grads = maker.parameters(), maker.gradients(0)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    ours = case.ours_fused(params, capturable=True)
    scale, found = torch.tensor(8.0, device=device), torch.tensor(0.0, device=device)

    def step() -> None:
        if device.type == "cpu" and found.item():
            return  # GradScaler's verdict on a CPU is the host's to see
        ours.grad_scale, ours.found_inf = scale, found
        ours.step()
        del ours.grad_scale, ours.found_inf

    with maker.device.stream():
        step()
        step()
    replay = maker.device.graph(step)
    checked = Checked(case, ours, maker.device.truncates)
    checked.step(grads, g_scale=1 / 8, run=replay)
    before = maker.held(ours)
    found.fill_(1.0)
    grads[0].fill_(torch.inf)
    replay()
    assert_same(before, maker.held(ours), "a skipped replay")
    found.fill_(0.0)
    scale.fill_(2.0)
    grads[0].fill_(3.0)
    checked.step(grads, g_scale=1 / 2, run=replay)


def _two_graphs(maker: Maker, case: Case) -> None:
    """Captured twice, replayed in turn: neither's tables are the other's."""
    first = _Replayed(maker, case)
    second = maker.device.graph(first.ours.step)
    for k in range(1, 6):
        first.step(k, (first.replay, second)[k % 2])
        maker.device.churn()


def _graph_and_eager(maker: Maker, case: Case) -> None:
    """Eager steps between replays, with missing gradients and a new plan."""
    replayed = _Replayed(maker, case)
    for k in range(1, 7):
        if k % 2:
            replayed.step(k)
        else:
            grads: list[Tensor | None] = [*maker.gradients(k)]
            grads[0] = None
            replayed.checked.step(grads)
            for p, grad in zip(replayed.params, replayed.grads, strict=True):
                p.grad = grad
        if k == 3:
            replayed.ours._plan = None
        maker.device.churn()


def _refused(maker: Maker, case: Case) -> None:
    if maker.device.device.type == "cpu":
        raise NotApplicableError("there are no graphs on a CPU")
    params = maker.parameters()
    for p, grad in zip(params, maker.gradients(0), strict=True):
        p.grad = grad
    ours = case.ours(params)
    ours.step()
    before = maker.held(ours)
    try:
        maker.device.graph(ours.step)
    except RuntimeError as error:
        if "capturable" not in str(error):
            raise
    else:
        raise AssertionError("a step with capturable=False was captured")
    maker.device.synchronize()
    assert_same(before, maker.held(ours), "a refused capture")


def _launches(maker: Maker, case: Case) -> dict[str, Any]:
    """One kernel a step, two where the device counts; no step waits for the device."""
    counts: dict[str, Any] = {}
    for name, make in (
        ("plain", case.ours),
        ("capturable", partial(case.ours, capturable=True)),
        ("fused", case.ours_fused),
    ):
        params = maker.parameters()
        ours = make(params)
        sets = [maker.gradients(k) for k in range(2)]

        def step(k: int, params: Any = params, sets: Any = sets, ours: Any = ours) -> None:
            for p, grad in zip(params, sets[k % 2], strict=True):
                p.grad = grad.detach()
            ours.step()

        step(0)
        step(1)
        maker.device.synchronize()
        with maker.device.no_synchronization():
            step(2)
            step(3)
        found = maker.device.launches(partial(step, 4))
        counts[name] = {"kernels": found.kernels, "copies": found.copies}
        expected = 1 if name == "plain" else 2
        if found.kernels != expected:
            raise AssertionError(
                f"{name}: {found.kernels} kernels for {expected}: {', '.join(found.names)}"
            )
    return counts


def _host_ahead(maker: Maker, case: Case) -> None:
    """Steps queued behind a busy device, each with gradients and a rate of its own: nothing the
    host rewrites or frees after a step may be what that step still reads."""
    for option in ({}, {"capturable": True}):
        results = []
        for wait in (True, False):
            ours = case.ours(maker.parameters(), **option)
            params = ours.param_groups[0]["params"]
            grads = [maker.gradients(k) for k in range(6)]
            maker.device.synchronize()
            if not wait:
                maker.device.busy()
            for k in range(6):
                for p, grad in zip(params, grads[k], strict=True):
                    p.grad = grad.clone()
                ours.param_groups[0]["lr"] = 0.1 / (k + 1)
                ours.step()
                ours.zero_grad()
                if wait:
                    maker.device.synchronize()
            maker.device.synchronize()
            results.append(maker.held(ours))
        assert_same(*results, "steps queued behind a busy device")


def _in_turn(maker: Maker, case: Case) -> None:
    """A different parameter without a gradient each step; right, and no waiting for the device."""
    for option in ({}, {"capturable": True}):
        checked = Checked(case, case.ours(maker.parameters(), **option), maker.device.truncates)
        checked.step(maker.gradients(0))

        def without_waiting(ours: Any = checked.ours) -> None:
            maker.device.synchronize()
            with maker.device.no_synchronization():
                ours.step()

        for k in range(1, 5):
            grads: list[Tensor | None] = [*maker.gradients(k)]
            grads[k % len(grads)] = None
            checked.step(grads, run=without_waiting)


def _streams_in_turn(maker: Maker, case: Case) -> None:
    """One optimizer stepped on another stream each time, each waiting for the one before."""
    results = []
    for move in (False, True):
        ours = case.ours(maker.parameters())
        params = ours.param_groups[0]["params"]
        for k in range(6):
            grads = maker.gradients(k)
            if k == 3:
                grads[0] = None  # type: ignore[call-overload]

            def step(params: Any = params, grads: Any = grads, ours: Any = ours) -> None:
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad
                ours.step()

            if move and k % 2:
                with maker.device.stream():
                    maker.device.busy()
                    step()
            else:
                step()
                if not move:
                    maker.device.synchronize()
            if move:
                maker.device.churn()
        maker.device.synchronize()
        results.append(maker.held(ours))
    assert_same(*results, "steps on streams in turn")


def _two_streams(maker: Maker, case: Case) -> None:
    """Two optimizers side by side, each on a stream of its own."""
    results = []
    for apart in (False, True):
        pair = [case.ours(maker.parameters()) for _ in range(2)]
        grads = [maker.gradients(k) for k in range(6)]

        def steps(ours: Any, grads: Any = grads) -> None:
            for k in range(6):
                for p, grad in zip(ours.param_groups[0]["params"], grads[k], strict=True):
                    p.grad = grad.clone()
                ours.step()

        maker.device.synchronize()
        if apart:
            with maker.device.stream():
                maker.device.busy()
                steps(pair[0])
                with maker.device.stream(waits=False):
                    steps(pair[1])
        else:
            for ours in pair:
                steps(ours)
                maker.device.synchronize()
        maker.device.synchronize()
        results.append([*maker.held(pair[0]), *maker.held(pair[1])])
    assert_same(*results, "two optimizers on two streams")


def _second_device(maker: Maker, case: Case) -> None:
    if maker.device.device.type == "cpu" or torch.cuda.device_count() < 2:
        raise NotApplicableError("there is one device")
    other = torch.device("cuda", 1)
    params = [nn.Parameter(p.detach().to(other)) for p in maker.parameters()]
    checked = Checked(case, case.ours(params), truncates=False)
    for k in range(3):
        checked.step([grad.to(other) for grad in maker.gradients(k)])
