"""`fastopt profile`: what it counts and times, what it reads of kernels, the files it writes."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastopt
from fastopt import functional, optim
from fastopt.cli import main, profile
from fastopt.cli.profile import arithmetic, clock, measure, subjects, training
from fastopt.cli.profile.clock import Breakdown
from fastopt.cli.profile.subjects import Subject, Traffic
from fastopt.cli.shared import limits
from fastopt.optim.sgd import sgd_scalars
from fastopt.optim.update import Update
from fastopt_kernels import launches
from fastopt_kernels.cpu.base import bandwidth

CPU = torch.device("cpu")
SMALL = {"batch_norm": "4x8x5x3", "group_norm": "4x8x5x3", "instance_norm": "4x8x5x3"}
LINEAR = "16x8x32"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shape_of(name: str) -> str:
    return LINEAR if name == "linear_cross_entropy" else SMALL.get(name, "16x64")


# What can be profiled.


def test_every_optimizer_and_every_function_is_found() -> None:
    classes = {name.lower() for name in optim.__all__ if name not in ("FusedOptimizer", "xp")}
    assert set(subjects.names()) == classes | set(functional.__all__)


@pytest.mark.parametrize("name", sorted(functional.__all__))
def test_every_function_gets_its_arguments_and_is_counted(name: str) -> None:
    """Backward takes more arithmetic than forward, and no element takes none."""
    arguments = subjects.arguments_of(name, shape_of(name), "fp32", CPU, {})
    forward = arithmetic.of_function(subjects.functions()[name], arguments, False)
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_(not key.startswith("running_"))
    both = arithmetic.of_function(subjects.functions()[name], arguments, True)
    first = next(iter(arguments.values()))
    assert forward is not None
    assert both is not None
    assert forward / first.numel() >= 1
    assert forward < both


# Arithmetic.


def test_arithmetic_of_a_function_is_that_of_its_formula() -> None:
    x = torch.randn(16, 64)
    # max, subtract, exp, sum, divide
    found = arithmetic.of_function(functional.softmax, {"input": x, "dim": -1}, False)
    assert found == 5 * x.numel()


def test_arithmetic_of_products_is_counted() -> None:
    arguments = subjects.arguments_of("linear_cross_entropy", LINEAR, "fp32", CPU, {})
    found = arithmetic.of_function(functional.linear_cross_entropy, arguments, False)
    assert found is not None
    assert 2 * 16 * 8 * 32 < found < 4 * 16 * 8 * 32


def _one_product_less(p, g, weight_decay, lr):
    g = xp.add_scaled(g, weight_decay, p)  # noqa: F821
    return (p - g,)


def test_arithmetic_of_a_rule_is_counted_from_its_source() -> None:
    sgd = subjects.optimizers()["sgd"]([nn.Parameter(torch.ones(1))])
    update = sgd.update_of(sgd.param_groups[0])
    # scale g; add decay * p; lr * g; subtract
    assert arithmetic.of_update(update) == 5
    lesser = Update(_one_product_less, sgd_scalars)
    assert arithmetic.of_update(lesser) == 4


# Bytes.


@pytest.mark.parametrize(
    ("name", "dtype", "state", "an_element"),
    [
        ("sgd", "fp32", None, Traffic(4, 0, 4)),
        ("adamw", "fp32", None, Traffic(4, 0, 12)),
        ("adamw", "bf16", "fp32", Traffic(2, 0, 10)),
    ],
)
def test_bytes_of_a_step(name: str, dtype: str, state: str | None, an_element: Traffic) -> None:
    subject = subjects.make(name, "3x100", dtype, CPU, state=state)
    assert (subject.n_tensors, subject.n_elements) == (3, 300)
    assert subject.traffic == Traffic(*(300 * n for n in an_element))


def test_bytes_of_8_bit_states_include_their_scales() -> None:
    subject = subjects.make("adamw", "1000", "fp32", CPU, state="8bit")
    blocks = math.ceil(1000 / 256)
    assert subject.traffic == Traffic(4000, 0, 4000 + 2 * (1000 + 4 * blocks))


def test_bytes_of_a_function_are_its_tensors() -> None:
    forward = subjects.make("softmax", "7x33", "fp32", CPU)
    both = subjects.make("softmax", "7x33", "fp32", CPU, backward=True)
    n = 4 * 7 * 33
    assert forward.traffic == Traffic(n, n)
    # x; y and dy again; y and dx
    assert both.traffic == Traffic(3 * n, 2 * n)


# Launches by name.


def test_launches_are_seen_by_name() -> None:
    step = subjects.make("layer_norm", "5x64", "fp32", CPU, backward=True).step
    with clock.watching(CPU, idle=True) as seen:
        step()
    assert [launched.name for launched in seen] == ["layer_norm", "layer_norm_backward"]
    assert all(launched.call_s > 0 and launched.idle_s > 0 for launched in seen)


def test_torch_profiler_shows_kernels_by_name() -> None:
    subject = subjects.make("adamw", "mlp", "fp32", CPU)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        subject.step()
        subject.step()
    counts = {event.key: event.count for event in record.key_averages()}
    assert counts["fastopt::adamw"] == 2


def test_nothing_is_entered_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    step = subjects.make("adamw", "mlp", "fp32", CPU).step

    def refuse(*args: Any) -> None:
        raise AssertionError("a launch that nobody looks at was announced")

    monkeypatch.setattr(launches, "_profiled", refuse)
    step()
    with pytest.raises(AssertionError, match="announced"), clock.watching(CPU):
        step()


# Time.


def test_time_outside_kernels_is_pythons() -> None:
    step = subjects.make("adamw", "mlp", "fp32", CPU).step

    def slow() -> None:
        time.sleep(0.01)
        step()

    found = clock.breakdown(slow, CPU, 0.01)
    assert found.python_s > 0.009
    assert found.kernel_s < 0.005
    assert found.python_s + found.launch_s + found.kernel_s <= found.total_s * 1.001


def profile_of(total_s: float, kernel_s: float, n_bytes: int, operations: int) -> measure.Profile:
    """On a machine that moves 1 GB/s and computes 10 Gop/s."""
    subject = Subject(
        "x", "function", "1", "fp32", 1, 1, lambda: None, Traffic(n_bytes, 0), operations, CPU
    )
    launched = clock.Launched("x", "key", call_s=kernel_s)
    return measure.Profile(subject, Breakdown(total_s, [launched], total_s), 1e9, 1e10)


@pytest.mark.parametrize(
    ("kernel_s", "n_bytes", "operations", "bound"),
    [
        (0.99, 900_000_000, 10**9, measure.MEMORY),
        (0.99, 100_000_000, 9 * 10**9, measure.COMPUTE),
        (0.2, 100_000_000, 10**9, measure.OVERHEAD),
        (0.99, 100_000_000, 10**9, measure.NONE),
    ],
)
def test_the_bound_is_what_explains_most(
    kernel_s: float, n_bytes: int, operations: int, bound: str
) -> None:
    assert profile_of(1.0, kernel_s, n_bytes, operations).bound == bound


# Limits.


@pytest.mark.parametrize("n_pieces", [1, 7])
@pytest.mark.parametrize("n", [1, 40_003])
def test_streams_move_every_byte_once(n: int, n_pieces: int) -> None:
    modes = (bandwidth.READ, bandwidth.WRITE, bandwidth.COPY, bandwidth.UPDATE)
    moved = bandwidth.Streams([(mode, 4 * n) for mode in modes])
    for source, target in moved.memory:
        source[:], target[:] = np.arange(n) % 7, -3
    moved.run(n_pieces)
    values = np.arange(n, dtype=np.float32) % 7
    (_, read), (_, written), (_, copied), (_, updated) = moved.memory
    assert (read == -3).all()
    assert (written == 1).all()
    assert (copied == values).all()
    assert (updated == -2).all()
    assert moved.sums.sum() == pytest.approx(values.sum())


def test_the_limit_is_a_rate_of_bytes() -> None:
    mix = Traffic(1 << 16, 1 << 15, 1 << 14)
    rate = limits.bytes_per_s(mix, CPU, 0.01)
    assert 1e7 < rate < 1e12


# The command.


def test_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "SIZES", (1 << 10, 1 << 12))
    files = {"html": tmp_path / "a.html", "json": tmp_path / "b.json", "trace": tmp_path / "c.json"}
    options = [x for name, path in files.items() for x in (f"--{name}", str(path))]
    assert main(["profile", "adamw", "--shape", "mlp", "--seconds", "0.01", *options]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("time", "bytes", "bandwidth", "arithmetic", "bound"))
    assert "\x1b" not in text
    found = json.loads(files["json"].read_text())["profile"]
    assert found["elements"] == 64 * 256 + 256 + 256 * 10 + 10
    assert found["bytes_read"] == 16 * found["elements"]
    assert found["bytes_written"] == 12 * found["elements"]
    assert [size["n_elements"] for size in found["sizes"]] == [1 << 10, 1 << 12]
    assert found["kernels"]["adamw"]["vector_bits"] >= 128
    page = files["html"].read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    names = {event.get("name") for event in json.loads(files["trace"].read_text())["traceEvents"]}
    assert "fastopt::adamw" in names
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nadamm"], "no 'nadamm' (did you mean 'nadam'?)"),
        (["layernorm"], "(did you mean 'layer_norm'?)"),
        ([], "give one name, or --model MODULE:BUILD"),
        (["adamw", "--shape", "gtp2"], "no shape 'gtp2' (did you mean 'gpt2'?)"),
        (["softmax", "--shape", "gpt2"], "a function takes the extents of its input"),
        (["adamw", "--backward", "--shape", "mlp"], "--backward is for functions"),
        (["softmax", "--state", "8bit"], "--state is for optimizers"),
        (["softmax", "--set", "dimm=0"], "softmax has no parameter 'dimm' (did you mean 'dim'?)"),
        (["batch_norm", "--shape", "8"], "takes an input of more dimensions than 8"),
        (["adamw", "--target", "sm90"], "no target 'sm90' (did you mean 'sm_90'?)"),
        (["adamw", "--device", "meta"], "fastopt runs on cpu, cuda"),
        (["--model", "nowhere"], "--model takes MODULE:BUILD"),
        (["--model", "json:dumbs"], "json has no function 'dumbs' (did you mean 'dumps'?)"),
        (["--model", "json:dumps", "--shape", "mlp"], "--shape does not go with --model"),
    ],
)
def test_what_cannot_be_profiled_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_an_interrupt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", interrupted)
    out = str(tmp_path / "out.json")
    assert main(["profile", "adamw", "--shape", "mlp", "--json", out]) == 130
    assert list(tmp_path.iterdir()) == []


# A user's own model.


def build(optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW) -> Any:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    inputs = torch.randn(4, 8)
    loss = lambda model: model(inputs).square().mean()  # noqa: E731
    return model, optimizer(model.parameters(), lr=0.1), loss


def test_a_swap_is_measured_on_copies() -> None:
    model, optimizer, loss = build()
    before = [param.clone() for param in model.parameters()]
    swaps = training.Swaps(model, optimizer, loss)
    swaps.time(0.001)
    names = [variant.name for variant in swaps.variants]
    assert names == ["as it is", "optimizer swapped", "and its modules"]
    kinds = [type(variant.optimizer).__module__.split(".")[0] for variant in swaps.variants]
    assert kinds == ["torch", "fastopt", "fastopt"]
    assert isinstance(swaps.variants[2].model[1], fastopt.nn.LayerNorm)
    assert type(model[1]) is nn.LayerNorm
    assert type(optimizer) is torch.optim.AdamW
    assert all(map(torch.equal, before, model.parameters()))
    # Each copy has been stepped, as far as the others: the same steps of the same rule.
    ends = [list(variant.model.parameters()) for variant in swaps.variants]
    for own, ours, all_ours in zip(*ends, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(all_ours, own, rtol=1e-4, atol=1e-5)
    assert not all(map(torch.equal, before, ends[0]))
    swaps.ask_profiler()
    text = "\n".join(swaps.lines())
    assert "optimizer swapped" in text
    assert "modules swapped: LayerNorm" in text
    assert swaps.as_dict()["variants"][0]["total_ms"] > 0


def test_what_is_not_swapped_is_said() -> None:
    swaps = training.Swaps(*build(torch.optim.ASGD))
    assert [variant.name for variant in swaps.variants] == ["as it is", "modules swapped"]
    assert any("torch.optim.asgd.ASGD" in text for text in swaps.kept)


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (3, "must return (model, optimizer, loss), but returned int"),
        ((1, 2), "but returned 2 values"),
        ((1, 2, 3), "the model of given:build must be a torch.nn"),
        ((nn.Linear(1, 1), 2, 3), "the optimizer of given:build must be a torch.optim"),
        ((*build()[:2], 3), "must be loss(model)"),
    ],
)
def test_a_build_that_returns_something_else_is_refused(
    built: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SimpleNamespace(build=lambda: built)
    monkeypatch.setattr(training.importlib, "import_module", lambda name: given)
    with pytest.raises(TypeError, match=re.escape(message)):
        training.load("given:build")


def test_the_documented_build_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parent.parent / "docs" / "profile.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (tmp_path / "documented_model.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    swaps = training.Swaps(*training.load("documented_model:build"))
    assert len(swaps.variants) == 3


def test_missing_extras_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["profile", "adamw", "--html", "a.html"]) == 1
    assert "needs rich, matplotlib: pip install 'fastopt[report]'" in capsys.readouterr().err
