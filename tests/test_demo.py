"""`fastopt demo` end to end, and proof that its checks see what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn

import fastopt.nn
import fastopt.optim
from fastopt.cli import main
from fastopt.cli.demo import race, tasks
from fastopt.cli.demo.race import (
    FASTOPT,
    FASTOPT_SWAP,
    PROVIDERS,
    TORCH,
    TORCH_FUSED,
    WARMUP_STEPS,
    Provider,
    problems,
)

# Rounding alone; a missing weight decay is 1.7e-4 in as many steps.
MAX_GAP = 1e-5
# Before the first update, where nothing but a swapped model rounds differently: 2 units in the
# last place of a loss between 4 and 8.
MAX_FIRST_GAP = {"fastopt swap": 1e-6}


@dataclass(frozen=True)
class Demo:
    """One run of the command and what it left behind."""

    status: int
    stdout: str
    stderr: str
    folder: Path
    numbers: dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keeps the time the same on a busy machine, where two threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    out, json_file = folder / "demo.png", folder / "demo.json"
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main(
            ["demo", "--quick", "--seed", "3", "--out", str(out), "--json", str(json_file)]
        )
    numbers = json.loads(json_file.read_text())
    return Demo(status, stdout.getvalue(), stderr.getvalue(), folder, numbers)


@pytest.fixture(scope="module")
def short_task() -> tasks.Task:
    task = tasks.digits_task(seed=0, quick=True)
    return dataclasses.replace(task, batches=task.batches[:25])


@pytest.fixture(scope="module")
def text_task() -> tasks.Task:
    return tasks.text_task(seed=0, quick=True)


class NoOp(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        pass


class Uphill(torch.optim.AdamW):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, maximize=True)


class NoDecay(torch.optim.AdamW):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, weight_decay=0)


class CoupledDecay(torch.optim.Adam):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, weight_decay=1e-2)


class ToNaN(torch.optim.AdamW):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.fill_(math.nan)


def blunts_norms(module: nn.Module) -> nn.Module:
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = 1e-3
    return module


def shifts_norms(module: nn.Module) -> nn.Module:
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.register_forward_hook(lambda norm, args, out: (out[0] + 1e-3, out[1]))
    return module


def smooths_labels(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.CrossEntropyLoss):
        module.label_smoothing = 1e-4
    return module


def test_compares_optimizers_and_the_whole_swap_on_two_tasks(demo: Demo) -> None:
    assert demo.status == 0, demo.stderr
    assert {task["name"]: list(task["runs"]) for task in demo.numbers["tasks"]} == {
        "digits": ["torch default", "torch fused", "fastopt", "fastopt swap"],
        "text": ["torch default", "torch fused", "fastopt", "fastopt swap"],
    }


def test_every_run_learns(demo: Demo) -> None:
    # What guessing reaches: one digit of ten; always the most frequent character, a blank.
    guessing = {"digits": 0.1, "text": 0.23}
    for task in demo.numbers["tasks"]:
        for name, run in task["runs"].items():
            losses = run["losses"]
            assert len(losses) == task["steps"], name
            assert all(math.isfinite(loss) for loss in losses), name
            assert statistics.fmean(losses[-5:]) < 0.75 * losses[0], name
            assert run["held_out_accuracy"] > guessing[task["name"]] + 0.02, name


def test_loss_curves_agree(demo: Demo) -> None:
    for task in demo.numbers["tasks"]:
        reference = task["runs"]["torch default"]["losses"]
        for name, run in task["runs"].items():
            gaps = [abs(a - b) for a, b in zip(run["losses"], reference, strict=True)]
            first = MAX_FIRST_GAP.get(name, 0.0)
            assert gaps[0] <= first, f"{name} did not start from the same weights and batch"
            assert max(gaps) < MAX_GAP, name
            assert run["largest_gap"] == max(gaps), name


def test_times_are_medians_without_the_warmup(demo: Demo) -> None:
    for task in demo.numbers["tasks"]:
        for run in task["runs"].values():
            optimizer_ms, step_ms = run["optimizer_ms"], run["step_ms"]
            assert all(0 < a < b for a, b in zip(optimizer_ms, step_ms, strict=True))
            assert run["median_optimizer_ms"] == pytest.approx(
                statistics.median(optimizer_ms[WARMUP_STEPS:])
            )
            assert run["median_step_ms"] == pytest.approx(statistics.median(step_ms[WARMUP_STEPS:]))


def test_json_says_where_it_was_measured(demo: Demo) -> None:
    assert demo.numbers["torch"] == torch.__version__
    assert demo.numbers["fastopt"] == fastopt.__version__
    assert demo.numbers["threads"] == torch.get_num_threads()
    assert (demo.numbers["seed"], demo.numbers["quick"]) == (3, True)
    assert demo.numbers["cpu"]


def test_picture_is_a_png_with_something_on_it(demo: Demo) -> None:
    image = imread(demo.folder / "demo.png")
    height, width, _ = image.shape
    assert height > 600
    assert width > 1000
    assert 0.02 < float((image[..., :3].min(axis=-1) < 0.9).mean()) < 0.9


def test_leaves_only_the_files_asked_for(demo: Demo) -> None:
    assert sorted(path.name for path in demo.folder.iterdir()) == ["demo.json", "demo.png"]


def test_output_that_is_no_terminal_is_plain_text(demo: Demo) -> None:
    assert "\x1b" not in demo.stdout + demo.stderr
    assert len(demo.stderr.splitlines()) == 2
    rows = re.findall(r"^ ((?:torch|fastopt)[a-z ]*?) +(\d.*)$", demo.stdout, re.MULTILINE)
    runs = [
        (name, run, task["runs"]["torch default"])
        for task in demo.numbers["tasks"]
        for name, run in task["runs"].items()
    ]
    assert [name for name, _ in rows] == [name for name, _, _ in runs]
    for (_, cells), (_, run, default) in zip(rows, runs, strict=True):
        loss, accuracy, _, step, step_ratio, _, whole, whole_ratio, _ = cells.split()
        assert loss == f"{run['final_loss']:.4f}"
        assert accuracy == f"{run['held_out_accuracy']:.1%}"
        for cell, ratio, ms in (
            (step, step_ratio, "median_optimizer_ms"),
            (whole, whole_ratio, "median_step_ms"),
        ):
            assert float(cell) == pytest.approx(run[ms], rel=0.01)
            assert float(ratio.removesuffix("x")) == pytest.approx(default[ms] / run[ms], rel=0.01)


def test_output_fits_80_columns(demo: Demo) -> None:
    tables = demo.stdout.partition("Loss curves and step times:")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables


def test_torch_and_fastopt_have_no_problem(short_task: tasks.Task) -> None:
    assert problems(race.race(short_task, PROVIDERS)) == []


def test_the_whole_swap_is_for_models_with_modules_to_swap(
    short_task: tasks.Task, text_task: tasks.Task
) -> None:
    assert race.providers_for(text_task) == PROVIDERS
    assert race.providers_for(short_task) == PROVIDERS
    bare = dataclasses.replace(short_task, model=nn.Linear(2, 2))
    assert race.providers_for(bare) == (TORCH, TORCH_FUSED, FASTOPT)
    assert not fastopt.swap_report(text_task.model).replaced, "the task's own model was swapped"


def test_only_the_whole_swap_swaps_the_model_and_the_loss(
    text_task: tasks.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for name in ("AddLayerNorm", "CrossEntropyLoss"):
        ours, forward = getattr(fastopt.nn, name), getattr(fastopt.nn, name).forward

        def noted(self: Any, *args: Any, name: str = name, forward: Any = forward) -> Any:
            ran.append(name)
            return forward(self, *args)

        monkeypatch.setattr(ours, "forward", noted)
    task = dataclasses.replace(text_task, batches=text_task.batches[: WARMUP_STEPS + 1])
    race.race(task, (TORCH, TORCH_FUSED, FASTOPT))
    assert ran == []
    race.race(task, (FASTOPT_SWAP,))
    n_norms = sum(isinstance(module, nn.LayerNorm) for module in task.model.modules())
    n_calls = len(task.batches) + len(task.held_out)
    assert ran == ([*["AddLayerNorm"] * n_norms, "CrossEntropyLoss"]) * n_calls


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (NoOp, "did not learn"),
        (Uphill, "did not learn"),
        (NoDecay, "away from torch default's"),
        (CoupledDecay, "away from torch default's"),
        (ToNaN, "the loss of step 2 is nan"),
    ],
)
def test_a_wrong_optimizer_is_found(
    short_task: tasks.Task, wrong: Callable[..., torch.optim.Optimizer], complaint: str
) -> None:
    provider = Provider("wrong", lambda params, lr: wrong(params, lr=lr))
    found = problems(race.race(short_task, (TORCH, provider)))
    assert found, "not noticed"
    assert all(problem.startswith("digits, wrong: ") for problem in found)
    assert any(complaint in problem for problem in found)


@pytest.mark.parametrize("wrong", [blunts_norms, shifts_norms, smooths_labels])
def test_a_wrong_swap_is_found(
    text_task: tasks.Task, wrong: Callable[[nn.Module], nn.Module]
) -> None:
    provider = dataclasses.replace(TORCH, name="wrong", adopt=wrong)
    (found,) = problems(race.race(text_task, (TORCH, provider)))
    assert found.startswith("text, wrong: ")
    assert "away from torch default's" in found


def test_the_command_fails_when_the_swap_is_wrong(
    text_task: tasks.Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    swap = fastopt.swap
    _only(monkeypatch, text_task)
    monkeypatch.setattr(fastopt, "swap", lambda module: blunts_norms(swap(module)))
    assert main(["demo", "--out", str(tmp_path / "demo.png")]) == 1
    message = capsys.readouterr().err
    assert "text, fastopt swap: " in message
    assert "text, fastopt: " not in message


@pytest.mark.parametrize("wrong", [NoOp, ToNaN])
def test_the_command_fails_when_fastopt_is_wrong(
    wrong: type[torch.optim.Optimizer],
    short_task: tasks.Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _only(monkeypatch, short_task)
    monkeypatch.setattr(fastopt.optim, "AdamW", wrong)
    json_file = tmp_path / "demo.json"
    status = main(["demo", "--out", str(tmp_path / "demo.png"), "--json", str(json_file)])
    assert status == 1
    assert "digits, fastopt: " in capsys.readouterr().err
    assert json.loads(json_file.read_text(), parse_constant=pytest.fail)


def test_interrupt_leaves_no_file(
    short_task: tasks.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(params: Iterator[Tensor], lr: float) -> torch.optim.Optimizer:
        raise KeyboardInterrupt

    _only(monkeypatch, short_task)
    monkeypatch.setattr(fastopt.optim, "AdamW", interrupted)
    assert main(["demo", "--out", str(tmp_path / "demo.png")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_held_out_digits_are_never_trained_on() -> None:
    task = tasks.digits_task(seed=0, quick=False)
    trained = {bytes(image.numpy()) for images, _ in task.batches for image in images}
    held_out = {bytes(image.numpy()) for images, _ in task.held_out for image in images}
    assert len(held_out) == 1797 // 5
    assert len(trained) > 1400
    assert not trained & held_out


def test_text_targets_are_the_next_characters() -> None:
    task = tasks.text_task(seed=0, quick=True)
    for inputs, targets in task.batches + task.held_out:
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("make", [tasks.digits_task, tasks.text_task])
def test_seed_decides_weights_and_batches(make: Callable[[int, bool], tasks.Task]) -> None:
    first, other_state = make(0, True), torch.get_rng_state()
    torch.rand(1)
    same, other = make(0, True), make(1, True)
    for a, b in zip(first.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first.batches, same.batches, strict=True))
    assert not torch.equal(first.batches[0][0], other.batches[0][0])
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))
    torch.set_rng_state(other_state)


def test_a_race_needs_more_steps_than_its_warmup(short_task: tasks.Task) -> None:
    too_short = dataclasses.replace(short_task, batches=short_task.batches[:WARMUP_STEPS])
    with pytest.raises(ValueError, match="5 of them are warm-up"):
        race.race(too_short, (TORCH, FASTOPT))


def _only(monkeypatch: pytest.MonkeyPatch, task: tasks.Task) -> None:
    """Makes the demo train `task` twice instead of its own two."""
    for name in ("digits_task", "text_task"):
        monkeypatch.setattr(tasks, name, lambda seed, quick: task)
