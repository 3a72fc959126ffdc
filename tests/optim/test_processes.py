"""Processes: Hogwild on shared memory, workers forked after a step, a forked child that steps.

GNU OpenMP does not survive a fork: each of these ends within its time or fails.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import fastopt
from tests.optim import workers
from tests.optim.pairs import assert_params_close, construct, make_params

# Python 3.12 says so of every fork beside threads, and torch's and OpenMP's are always there.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

TIMEOUT = 60
HOGWILD_SHAPES = [(7, 5), (11,), (3, 4), ()]


def start(method: str, work: Any, *args: Any) -> None:
    """Run work(rank, *args) in two processes, and wait for them at most TIMEOUT seconds."""
    context = mp.get_context(method)
    processes = [context.Process(target=work, args=(rank, *args)) for rank in range(workers.WORLD)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(TIMEOUT)
        assert [process.exitcode for process in processes] == [0] * workers.WORLD
    finally:
        for process in processes:
            process.kill()


def shared_params() -> list[nn.Parameter]:
    params = make_params(HOGWILD_SHAPES)
    for param in params:
        param.share_memory_()
    return params


def check_hogwild(method: str, case: str, package: Any = fastopt) -> None:
    """Each process steps its own half of the shared parameters: the parent sees every update."""
    params = shared_params()
    addresses = [param.data_ptr() for param in params]
    start(method, workers.hogwild_worker, params, case, None)
    expected = make_params(HOGWILD_SHAPES)
    workers.hogwild_steps(construct(package, case, expected), expected)
    assert [param.data_ptr() for param in params] == addresses
    assert_params_close(params, expected)


@pytest.mark.parametrize(("method", "case"), [("spawn", "AdamW"), ("fork", "SGD-momentum")])
def test_hogwild_processes_step_shared_parameters(method: str, case: str) -> None:
    check_hogwild(method, case, torch)


class Slower(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] *= 0.5
        return super().step(closure)


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError):
        check_hogwild("fork", "AdamW", Slower)


def test_hogwild_processes_step_shared_states() -> None:
    """As A3C shares Adam's moments: made by the parent, moved to shared memory, stepped by
    children, their counts included."""
    sides = []
    for package in (torch, fastopt):
        params = shared_params()
        states = []
        for param in params:
            moments = {
                k: torch.zeros_like(param).share_memory_() for k in ("exp_avg", "exp_avg_sq")
            }
            states.append({"step": torch.zeros(()).share_memory_(), **moments})
        if package is fastopt:
            start("fork", workers.hogwild_worker, params, "Adam", states)
        else:
            optimizer = construct(torch, "Adam", params)
            optimizer.state.update(zip(params, states, strict=True))
            workers.hogwild_steps(optimizer, params)
        sides.append((params, states))
    (theirs, their_states), (ours, our_states) = sides
    assert_params_close(ours, theirs)
    for mine, state in zip(our_states, their_states, strict=True):
        for name, value in state.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=name)


# Scripts of their own: what they fork has stepped on many threads before, and a hang must not take
# the tests along.

PRELUDE = """
    import os, sys
    import numpy as np
    import torch
    import fastopt

    SIZE = 200_000

    def make(name=fastopt.optim.AdamW):
        torch.set_num_threads(2)
        p = torch.nn.Parameter(torch.from_numpy(np.linspace(-1, 1, SIZE, dtype=np.float32)))
        return p, name([p], lr=0.1)

    def steps(p, optimizer, n):
        # numpy alone: after a fork torch's own operators on large tensors hang.
        for _ in range(n):
            p.grad = torch.from_numpy(np.linspace(1, 2, SIZE, dtype=np.float32))
            optimizer.step()
        return p.detach().numpy().copy()

    expected = steps(*make(), 4)
"""


def run_script(body: str) -> str:
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=workers.environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_child_steps_by_itself_and_its_parent_goes_on() -> None:
    """Bit for bit what a process that never forked gets, in both; and in the child's child."""
    printed = run_script("""
        plain = steps(*make(fastopt.optim.SGD), 3)
        p, optimizer = make()
        steps(p, optimizer, 2)
        child = os.fork()
        if child == 0:
            ok = (steps(p, optimizer, 2) == expected).all()
            ok = ok and (steps(*make(fastopt.optim.SGD), 3) == plain).all()
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if (steps(*make(fastopt.optim.SGD), 3) == plain).all() else 5)
            ok = ok and os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0
            os._exit(0 if ok else 3)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, (steps(p, optimizer, 2) == expected).all())
    """)
    assert printed.split() == ["0", "True"]


def test_data_loader_workers_forked_between_steps() -> None:
    """They come and go each epoch, and step an optimizer of their own while they are there."""
    printed = run_script("""
        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                p = torch.nn.Parameter(torch.ones(3))
                own = fastopt.optim.SGD([p], lr=0.5)
                p.grad = torch.full((3,), float(index))
                own.step()
                return p.detach()

        p, optimizer = make()
        for epoch in range(2):
            steps(p, optimizer, 1)
            loader = torch.utils.data.DataLoader(
                Data(), num_workers=2, multiprocessing_context="fork"
            )
            rows = torch.cat(list(loader))
            assert torch.equal(rows[:, 0], 1 - 0.5 * torch.arange(4.0)), rows
            result = steps(p, optimizer, 1)
        print((result == expected).all())
    """)
    assert printed.split() == ["True"]
