"""A process that trains and is interrupted at random times: what test_interrupts runs."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from typing import Any

import torch
from torch import Tensor, nn

import fastopt

INTERRUPTS = 100
# Three dtypes are three launches a step.
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
OPTIONS: dict[str, dict[str, Any]] = {
    "dtypes": {},
    "clipped and averaged": {"max_grad_norm": 1.0, "ema_decay": 0.9, "telemetry": True},
    "rounded by chance": {"param_rounding": "stochastic"},
    "gradients missing": {"skip_nonfinite": True},
    "in backward": {},
}


class Run:
    """Some parameters and an optimizer, stepped with gradients that follow from the count."""

    def __init__(self, name: str, cls: type) -> None:
        torch.manual_seed(0)
        self.name, self.done = name, 0
        self.past: dict[int, list[tuple[Tensor, ...]]] = {}
        self.params = [nn.Parameter(torch.randn(50).to(dtype)) for dtype in DTYPES]
        self.optimizer = cls(self.params, lr=0.01, **OPTIONS[name])
        if name == "in backward":
            self.optimizer.release_gradients()

    def step(self) -> None:
        missing = self.done % 3 if self.name == "gradients missing" else None
        for k, param in enumerate(self.params):
            param.grad = None
            if self.name != "in backward" and k != missing:
                param.grad = torch.full_like(param, 0.1 * k + 0.01 * (self.done % 7))
        if self.name == "in backward":
            sum((p * (0.1 * k + self.done % 7)).sum() for k, p in enumerate(self.params)).backward()
        self.optimizer.step()
        self.done += 1

    def values(self) -> list[tuple[Tensor, ...]]:
        """Each parameter with its count, states and average; those of count 0 count as none."""
        found = []
        for param in self.params:
            state = self.optimizer.state.get(param, {})
            kept = state.values() if state and state["step"] > 0 else ()
            found.append(tuple(tensor.detach().clone() for tensor in (param, *kept)))
        return found

    def values_at(self, count: int) -> list[tuple[Tensor, ...]]:
        """The values after so many steps, of which the last two are kept."""
        while self.done < count:
            self.step()
            self.past = {self.done - 1: self.past.get(self.done - 1, [])}
            self.past[self.done] = self.values()
        return self.past[count]


def alike(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(run: Run, twin: Run) -> str:
    """Nothing where the interrupted run is where its twin is before or after a step; counts on."""
    found, before, after = run.values(), twin.values_at(run.done), twin.values_at(run.done + 1)
    stepped = [alike(x, y) for x, y in zip(found, after, strict=True)]
    waiting = [alike(x, y) for x, y in zip(found, before, strict=True)]
    if run.name == "in backward":
        # Each parameter is a step of its own; to go on, the rest of them is stepped here.
        if not all(map(max, stepped, waiting)):
            return "half a step of one parameter"
        for k, there in enumerate(stepped):
            if not there:
                run.params[k].grad = None
                (run.params[k] * (0.1 * k + run.done % 7)).sum().backward()
        run.done += 1
        return ""
    if all(stepped):
        run.done += 1
    elif not all(waiting):
        return f"half a step: {stepped}"
    return ""


def lock_is_free(run: Run) -> bool:
    thread = threading.Thread(target=run.optimizer.step)
    for param in run.params:
        param.grad = None
    thread.start()
    thread.join(timeout=10)
    return not thread.is_alive()


def interrupt(run: Run, chance: random.Random) -> bool:
    """Step until an interrupt arrives; false where it never does."""
    main = threading.get_ident()

    def send() -> None:
        time.sleep(chance.random() * 0.002)
        signal.pthread_kill(main, signal.SIGINT)

    sender = threading.Thread(target=send)
    deadline = time.monotonic() + 10
    try:
        sender.start()
        while time.monotonic() < deadline:
            run.step()
    except KeyboardInterrupt:
        sender.join()
        return True
    return False


def main(name: str, cls: type = fastopt.optim.AdamW) -> str:
    """What went wrong, or nothing."""
    # A process that was started in the background ignores the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    chance = random.Random(name)
    run, twin = Run(name, cls), Run(name, cls)
    run.step()
    for _ in range(INTERRUPTS):
        if not interrupt(run, chance):
            return "an interrupt was lost"
        if wrong := check(run, twin):
            return wrong
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return "the handler was not put back"
    return "" if lock_is_free(run) else "a lock is held"


if __name__ == "__main__":
    for case in sys.argv[1:]:
        print(f"{case}: {main(case) or 'whole'}", flush=True)
