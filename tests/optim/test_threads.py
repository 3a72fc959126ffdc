"""Threads: their number may change between steps, and two optimizers may step at once."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastopt
from tests.optim.pairs import assert_params_close, construct, give_grads, make_params
from tests.optim.workers import environment

# 150,000 elements: many chunks, so every thread count divides them another way.
LARGE = [(300, 250), (75_001,), (5,)]


@pytest.fixture(autouse=True)
def _as_many_threads_after_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(package: Any, case: str, threads: list[int], seed: int = 0) -> list[torch.Tensor]:
    params = make_params(LARGE, seed=seed)
    optimizer = construct(package, case, params)
    for step, count in enumerate(threads):
        torch.set_num_threads(count)
        give_grads(params, step)
        optimizer.step()
    return [param.detach() for param in params]


def check_thread_counts(case: str, ours: Any = fastopt) -> None:
    one = run(ours, case, [1, 1, 1, 1])
    for threads in ([2, 2, 2, 2], [1, 2, 1, 64], [3, 1, 2, 2]):
        other = run(ours, case, threads)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), threads
    assert_params_close(one, run(torch, case, [1, 1, 1, 1]))


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
def test_the_number_of_threads_changes_no_bit(case: str) -> None:
    check_thread_counts(case)


class MoreThreadsMoreSteps(fastopt.optim.AdamW):
    """Wrong: the result depends on the number of threads."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["eps"] = 1e-6 * torch.get_num_threads()
        return super().step(closure)


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError):
        check_thread_counts("AdamW", MoreThreadsMoreSteps)


def test_a_step_leaves_the_number_of_threads_as_it_was() -> None:
    import numba

    torch.set_num_threads(1)
    before = torch.get_num_threads(), numba.get_num_threads()
    run(fastopt, "AdamW", [1, 1])
    assert (torch.get_num_threads(), numba.get_num_threads()) == before


def test_optimizers_in_several_threads_do_not_disturb_each_other() -> None:
    """Kernels release the GIL, so these launches do run at once."""
    cases = ["AdamW", "SGD-momentum", "AdamW", "SGD-momentum"]
    count = torch.get_num_threads()
    expected = [run(fastopt, case, [count] * 6, seed) for seed, case in enumerate(cases)]
    results: dict[int, list[torch.Tensor]] = {}
    barrier = threading.Barrier(len(cases))

    def work(seed: int, case: str) -> None:
        params = make_params(LARGE, seed=seed)
        optimizer = construct(fastopt, case, params)
        for step in range(6):
            give_grads(params, step)
            barrier.wait(timeout=60)
            optimizer.step()
        results[seed] = [param.detach() for param in params]

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(cases)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for seed in range(len(cases)):
        assert all(torch.equal(a, b) for a, b in zip(results[seed], expected[seed], strict=True))


def test_first_steps_in_several_threads_compile_once_each() -> None:
    """A rule nobody has stepped yet, by four threads at once."""
    results: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(4)

    def work(k: int) -> None:
        params = make_params([(17,)], dtype=torch.float16)
        optimizer = construct(fastopt, "Adagrad", params)
        give_grads(params, 0)
        barrier.wait(timeout=60)
        optimizer.step()
        results[k] = params[0].detach()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert all(torch.equal(results[k], results[0]) for k in range(4))
    assert not torch.equal(results[0], make_params([(17,)], dtype=torch.float16)[0].detach())


def test_backward_and_step_in_another_thread_than_the_one_that_made_the_optimizer() -> None:
    sides = []
    for package in (torch, fastopt):
        params = make_params(LARGE)
        optimizer = construct(package, "AdamW", params)

        def work(params: Any = params, optimizer: Any = optimizer) -> None:
            for _ in range(3):
                optimizer.zero_grad()
                sum((param**2).sum() for param in params).backward()
                optimizer.step()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(timeout=60)
        sides.append(params)
    assert_params_close(sides[1], sides[0])


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
def test_threads_that_step_one_optimizer_take_turns(options: dict[str, Any]) -> None:
    def make() -> tuple[list[torch.nn.Parameter], Any]:
        params = make_params([(5,)] * 40)
        give_grads(params, 0)
        return params, fastopt.optim.AdamW(params, lr=0.01, **options)

    alone, together = make(), make()
    for _ in range(800):
        alone[1].step()

    def work() -> None:
        for _ in range(200):
            together[1].step()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        sys.setswitchinterval(interval)
    assert {state["step"].item() for state in together[1].state.values()} == {800.0}
    assert all(torch.equal(a, b) for a, b in zip(together[0], alone[0], strict=True))


def test_an_optimizer_is_copied_and_pickled_with_a_lock_of_its_own() -> None:
    params = make_params([(5,)])
    optimizer = fastopt.optim.AdamW(params)
    for made in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        give_grads(made.param_groups[0]["params"], 0)
        with optimizer._lock:
            thread = threading.Thread(target=made.step)
            thread.start()
            thread.join(timeout=60)
            assert not thread.is_alive()


# Of a process whose first launch on several threads this is, under settings of its own.
LAUNCHES = """
import json, sys, threading, warnings
import torch
torch.set_num_threads({count})
counts = {{"before": torch.get_num_threads()}}
other = threading.Thread(target=lambda: counts.update(other=torch.get_num_threads()))
import fastopt

def elsewhere():
    torch.set_num_threads(3)
    assert torch.get_num_threads() == 3
    ready.set()
    go.wait()
    counts["a thread with a count of its own"] = torch.get_num_threads()

ready, go = threading.Event(), threading.Event()
apart = threading.Thread(target=elsewhere, daemon=True)
apart.start()
ready.wait()
torch.set_num_threads({count})
param = torch.nn.Parameter(torch.ones(100_000))
param.grad = torch.ones(100_000)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    optimizer = fastopt.optim.SGD([param], lr=0.5)
    optimizer.step()
    counts["a step"] = torch.get_num_threads()
    y = fastopt.functional.softmax(torch.ones(64, 1000), -1)
    counts["a softmax"] = torch.get_num_threads()
    for count in (2, 1, 5, {count}):
        torch.set_num_threads(count)
        optimizer.step()
        assert torch.get_num_threads() == count, count
    go.set()
    apart.join()
    other.start()
    other.join()
import numba
counts["after"] = torch.get_num_threads()
right = bool((param == 1 - 5 * 0.5).all() and torch.allclose(y, torch.tensor(1e-3)))
print(json.dumps([counts, right, numba.threading_layer(), [str(w.message) for w in said]]))
"""


def launches(count: int = 8, **settings: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES.format(count=count)],
        env=environment(OMP_NUM_THREADS="", **settings),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_counts(counts: dict[str, int], count: int) -> None:
    own = counts.pop("a thread with a count of its own")
    assert own == 3
    assert set(counts.values()) == {count}, counts


@pytest.mark.parametrize(
    ("count", "settings"),
    [(8, {}), (2, {"NUMBA_NUM_THREADS": "1"}), (3, {"NUMBA_THREADING_LAYER": "workqueue"})],
    ids=["more than CPUs", "more than numba's", "workqueue"],
)
def test_launches_leave_the_number_of_threads_of_torch(
    count: int, settings: dict[str, str]
) -> None:
    """The first one, which starts Numba's threads, and later ones; in every thread."""
    counts, right, _, said = launches(count, **settings)
    check_counts(counts, count)
    assert right
    assert said == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("NUMBA_THREADING_LAYER", "tbb"),
        ("NUMBA_THREADING_LAYER", "none of them"),
        ("NUMBA_THREADING_LAYER_PRIORITY", "omp"),
    ],
)
def test_a_threading_layer_that_is_not_there_is_said_and_another_one_works(
    variable: str, value: str
) -> None:
    counts, right, layer, said = launches(2, **{variable: value})
    if layer == "tbb":
        pytest.skip("TBB is installed")
    check_counts(counts, 2)
    assert right
    assert layer in ("omp", "workqueue")
    (message,) = said
    assert f"{variable}=" in message
    assert value in message
    assert f"Unset {variable}" in message


def test_these_checks_see_a_count_that_changes() -> None:
    own = {"a thread with a count of its own": 3}
    check_counts({"before": 8, "after": 8, **own}, 8)
    for wrong in ({"before": 8, "after": 2, **own}, {"before": 8, **dict.fromkeys(own, 2)}):
        with pytest.raises(AssertionError):
            check_counts(wrong, 8)


DISABLED = """
import json
import torch, fastopt
errors = []
param = torch.nn.Parameter(torch.ones(5))
param.grad = torch.ones(5)
optimizer = fastopt.optim.SGD([param])
x = torch.ones(3, 4)
for call in (
    optimizer.step, optimizer.step, lambda: fastopt.functional.softmax(x, -1),
    lambda: fastopt.functional.layer_norm(x, (4,)),
    lambda: fastopt.functional.cross_entropy(x, torch.zeros(3, dtype=torch.int64)),
):
    try:
        call()
    except RuntimeError as error:
        errors.append(str(error))
print(json.dumps([errors, param.tolist()]))
"""


def test_without_a_compiler_the_first_kernel_says_which_variable_to_unset() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DISABLED],
        env=environment(NUMBA_DISABLE_JIT="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors, values = json.loads(done.stdout)
    assert len(errors) == 5
    assert all("NUMBA_DISABLE_JIT" in error and "Unset it" in error for error in errors)
    assert values == [1.0] * 5
