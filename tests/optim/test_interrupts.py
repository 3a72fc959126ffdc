"""Ctrl-C: a step that has begun to write ends before KeyboardInterrupt is raised."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

import fastopt
from tests.optim import interrupted
from tests.optim.workers import environment


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """A hundred interrupts at random times for each set of options, in a process of their own."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.optim.interrupted", *interrupted.OPTIONS],
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return dict(line.split(": ", 1) for line in ran.stdout.splitlines())


@pytest.mark.parametrize("options", interrupted.OPTIONS)
def test_no_step_is_left_half_done(answers: dict[str, str], options: str) -> None:
    assert answers[options] == "whole"


def interrupted_step(monkeypatch: pytest.MonkeyPatch, writes: Any) -> tuple[Any, list[str]]:
    """A step of two launches, interrupted between them; what happened, in order."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float64)]
    optimizer = fastopt.optim.SGD(params, lr=1.0)
    happened: list[str] = []
    run = type(optimizer)._run

    def interrupting(self: Any, *args: Any) -> None:
        run(self, *args)
        happened.append("launch")
        if len(happened) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(type(optimizer), "_run", interrupting)
    for param in params:
        param.grad = torch.ones_like(param)
    before = signal.signal(signal.SIGINT, writes(happened))
    try:
        optimizer.step()
    except KeyboardInterrupt:
        happened.append("raised")
    finally:
        signal.signal(signal.SIGINT, before)
    return params, happened


def test_the_interrupt_comes_after_the_last_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    params, happened = interrupted_step(monkeypatch, lambda _: signal.default_int_handler)
    assert happened == ["launch", "launch", "raised"]
    assert all((param == 0).all() for param in params)


def test_a_handler_of_the_users_own_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler_of(happened: list[str]) -> Any:
        return lambda signum, frame: happened.append(f"handled {signum}")

    _, happened = interrupted_step(monkeypatch, handler_of)
    assert happened == ["launch", "launch", "handled 2"]


def test_these_checks_see_an_interrupt_that_is_not_deferred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastopt.optim.step.interrupts.hold", lambda: None)
    params, happened = interrupted_step(monkeypatch, lambda _: signal.default_int_handler)
    assert happened == ["launch", "raised"]
    assert [int(param[0].item()) for param in params] == [0, 1]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_is_no_python_handler_stays(handler: Any) -> None:
    from fastopt.optim.step import interrupts

    before = signal.signal(signal.SIGINT, handler)
    try:
        with interrupts.deferred():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_other_than_the_main_one_step_without_a_handler() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fastopt.optim.SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join(timeout=60)
    assert (param == 0).all()


def test_the_handler_is_put_back_where_a_step_raises() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fastopt.optim.SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = "fast"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert signal.getsignal(signal.SIGINT) is before
