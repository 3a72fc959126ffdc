"""The benchmark of the row functions under test: it times the function it says, and says if it is
wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch

from bench import gpu_tables, row_cases, row_measure, row_render, sections
from bench.allocator import WARM
from bench.models import DTYPES
from bench.providers import FASTOPT
from bench.row_cases import BEHIND, BOTH, FLOOR, FORWARD, RATIO, SECTIONS, Case, Goal
from bench.row_ops import OPS, SHAPES, TINY, TOLERANCE, Workload, difference, torchs
from bench.row_providers import ATEN, PROVIDERS
from bench.row_report import geometric_mean, judged

SMALL = (7, 33)


def case_of(op: str, shape: str, dtype: str = "fp32", which: str = BOTH) -> Case:
    return Case(OPS[op], shape, dtype, which)


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Puts another function in fastopt's place."""

    def stand_in(make: Callable[[str], Any]) -> None:
        monkeypatch.setitem(PROVIDERS, FASTOPT, make)

    return stand_in


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_measured_in_every_shape_dtype_and_pass(op: str) -> None:
    matrix = {
        (case.shape, case.dtype, case.which)
        for here in SECTIONS.values()
        for case in here
        if case.op.name == op and not case.is_tiny
    }
    assert len(matrix) == len(SHAPES) * len(DTYPES) * 2
    assert all(prod(shape) < 16 * 1024 for shape in TINY.values())


def test_layer_norm_moves_8_and_20_bytes_an_element() -> None:
    n = 4096 * 4096
    assert case_of("layer_norm", "4096x4096", "fp32", FORWARD).n_bytes == 8 * n
    assert case_of("layer_norm", "4096x4096", "fp32", BOTH).n_bytes == 20 * n
    assert case_of("cross_entropy", "4096x4096", "bf16", FORWARD).n_bytes == 2 * n
    assert case_of("cross_entropy", "4096x4096", "bf16", BOTH).n_bytes == 6 * n


@pytest.mark.parametrize("op", OPS)
def test_the_traffic_of_a_pass_is_no_less_than_what_it_returns_and_takes(op: str) -> None:
    work = Workload(OPS[op], SMALL, torch.float32)
    results = work.results(torchs(OPS[op].function), backward=True)
    n_bytes = {name: tensor.nbytes for name, tensor in results.items()}
    wide = work.x.nbytes
    takes_and_returns = wide + n_bytes["y"] * (n_bytes["y"] == wide)
    assert OPS[op].traffic(torch.float32, False) * work.n_elements == takes_and_returns
    # A backward writes dx and reads, at that size, dy where there is one and one more tensor.
    backward = OPS[op].backward * wide
    assert backward == n_bytes["dx"] + wide + work.dy.nbytes * (work.dy.nbytes == wide)


@pytest.mark.parametrize(
    ("case", "goals"),
    [
        (case_of("softmax", "4096x4096", which=FORWARD), {RATIO: 1.05, FLOOR: 1.25}),
        (case_of("rms_norm", "256x1024"), {RATIO: 5.0}),
        (case_of("logsumexp", "256x1024", "bf16"), {RATIO: 4.0}),
        (case_of("softmax dim 0", "4096x4096", "bf16", FORWARD), {RATIO: 4.0}),
        (case_of("layer_norm", "65536x128"), {FLOOR: 1.25}),
        (case_of("layer_norm", "32x768"), {}),
        (case_of("cross_entropy", "8x16", "bf16", FORWARD), {BEHIND: 5.0}),
        (case_of("cross_entropy", "32x256"), {BEHIND: 8.0}),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_what_a_case_has_to_reach(case: Case, goals: dict[str, float]) -> None:
    assert {goal.what: goal.bound for goal in case.goals} == goals


def test_a_ratio_is_at_least_its_bound_and_a_time_at_most() -> None:
    assert Goal(RATIO, 2.0).met(2.1)
    assert not Goal(RATIO, 2.0).met(1.9)
    assert Goal(FLOOR, 1.25).met(1.2)
    assert not Goal(FLOOR, 1.25).met(1.3)
    assert not Goal(BEHIND, 5.0).met(6.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_steps_leave_their_inputs_and_results_are_named(op: str, dtype: str) -> None:
    work = Workload(OPS[op], SMALL, DTYPES[dtype])
    x, dy = work.x.clone(), work.dy.clone()
    function = torchs(OPS[op].function)
    assert not work.step(function, backward=False)().requires_grad
    first = work.step(function, backward=True)()
    second = work.step(function, backward=True)()
    assert all(map(torch.equal, first, second))
    assert len(first) == len(work.wanted)
    assert all(leaf.grad is None for leaf in work.wanted.values())
    assert torch.equal(work.x, x)
    assert torch.equal(work.dy, dy)
    assert work.results(function, True).keys() == work.oracle(torch.float32).keys()


def no_op(x: Any, *arguments: Any) -> Any:
    return torch.zeros_like(x) * x


def negated(x: Any, *arguments: Any) -> Any:
    return -torch.nn.functional.softmax(x, *arguments)


def wrong_gradient(x: Any, *arguments: Any) -> Any:
    y = torch.nn.functional.softmax(x, *arguments)
    return y.detach() + 0.5 * (y - y.detach())


def last_column_lost(x: Any, *arguments: Any) -> Any:
    y = torch.nn.functional.softmax(x, *arguments)
    return torch.cat([y[:, :-1], 0 * y[:, -1:]], 1)


def not_a_number(x: Any, *arguments: Any) -> Any:
    return torch.nn.functional.softmax(x, *arguments) * torch.nan


WRONG = [no_op, negated, wrong_gradient, not_a_number]


@pytest.mark.parametrize(
    ("function", "dtype"),
    # In bf16 rounding hides one column of 768.
    [*itertools.product(WRONG, DTYPES), (last_column_lost, "fp32")],
)
def test_a_function_that_is_not_the_function_has_no_time(
    standing_in: Any, function: Any, dtype: str
) -> None:
    standing_in(lambda name: function)
    with pytest.raises(RuntimeError, match="means nothing"):
        row_measure.measure(case_of("softmax", "32x768", dtype), (FASTOPT, ATEN), 0.05)


def test_one_lost_column_in_the_widest_rows_is_seen() -> None:
    widest = max(columns for _, columns in SHAPES.values())
    right = torch.ones(1, widest)
    wrong = right.clone()
    wrong[0, -1] = 0
    assert difference({"y": wrong}, {"y": right}) > TOLERANCE["fp32"]


def measured(case: Case) -> dict[str, Any]:
    return judged(row_measure.measure(case, (FASTOPT, ATEN), seconds=0.05), case)


def test_a_measured_case_becomes_a_row(standing_in: Any) -> None:
    standing_in(torchs)
    case = case_of("rms_norm", "256x1024")
    record = measured(case)
    assert set(record["ratios"]) == {ATEN}
    assert set(record["times_the_floor"]) == {FASTOPT, ATEN}
    assert record["floor"] in record["copies"]
    assert record["differences"][FASTOPT] <= TOLERANCE["fp32"]
    (goal,) = record["goals"]
    # ATen against itself.
    assert not goal["met"]
    assert goal["value"] == pytest.approx(1, rel=0.5)
    (row,) = row_render.rows([record])
    assert len(row.cells) == len(row_render.COLUMNS)
    assert not row.met
    (at_a_glance,) = row_render.glance([record])
    assert len(at_a_glance.cells) == len(row_render.GLANCE_COLUMNS)
    assert "missed" in at_a_glance.cells[2]


def test_a_tiny_case_is_judged_by_a_difference(standing_in: Any) -> None:
    standing_in(torchs)
    record = measured(case_of("softmax", "8x16", which=FORWARD))
    assert "times_the_floor" not in record
    (row,) = row_render.tiny_rows([record])
    assert len(row.cells) == len(row_render.TINY_COLUMNS)
    assert list(row_render.rows([record])) == []


def test_the_geometric_mean_is_over_every_case_but_the_tiny_ones() -> None:
    def record(which: str, ratio: float, tiny: bool = False) -> dict[str, Any]:
        return {"pass": which, "tiny": tiny, "ratios": {ATEN: {"median": ratio}}}

    records = [record(FORWARD, 2.0), record(BOTH, 8.0), record(BOTH, 1e6, tiny=True)]
    mean = geometric_mean([*records, {"error": "crashed"}])
    assert mean is not None
    assert mean["value"] == pytest.approx(4.0)
    assert (mean[FORWARD], mean[BOTH]) == pytest.approx((2.0, 8.0))
    assert (mean["cases"], mean["of"]) == (2, 7 * 6 * 2 * 2)
    assert mean["met"]


def test_a_process_that_dies_leaves_errors_and_no_gap() -> None:
    here = [case_of("softmax", "8x16"), case_of("layer_norm", "8x16")]
    records = list(sections.run("bench.no_such_module", "tiny", WARM, here, [], judged))
    assert [record["case"] for record in records] == [case.name for case in here]
    assert all("exited with status 1" in record["error"] for record in records)
    report = {"cases": records, "geometric_mean": geometric_mean(records)}
    assert report["geometric_mean"] is None
    assert row_render.summary(report) == []


def test_the_gpu_table_has_a_line_for_each_pass() -> None:
    times = {"ms": 0.5, "alone_ms": 0.6, "host_ms": 0.1, "gbps": 4000.0, "share": 0.9}
    providers = {FASTOPT: times | {"kernels": 2}, ATEN: times, "quack": {"unavailable": "no | 0"}}
    one = {"bytes": 8, "providers": providers, "times_as_fast_as": {ATEN: 2.0}}
    row = {
        "section": "function_speed",
        "row": "softmax 4096x4096 bf16",
        "status": "pass",
        "detail": "",
        "data": {"passes": {FORWARD: one, BOTH: one}},
    }
    text = gpu_tables.markdown({"machine": {}, "rows": [row]})
    line = "| 0.5000 | 4000 | 90 % |  | 0.600 | 0.100 | 2 | 90 % | 2.00 |"
    assert f"| softmax 4096x4096 bf16 | {FORWARD} {line}" in text
    assert f"| softmax 4096x4096 bf16 | {BOTH} {line}" in text
    assert "ATen of copy | x ATen" in text
    assert "- quack: no \\| 0" in text
    assert "2.00 x ATen" in gpu_tables.short({"rows": [row]})


def test_compiling_is_for_the_shape_it_is_worth() -> None:
    assert row_cases.providers("4096x4096", quick=False, peers=False) == tuple(PROVIDERS)
    assert row_cases.providers("4096x4096", quick=True, peers=False) == (FASTOPT, ATEN)
    assert row_cases.providers("32x768", quick=False, peers=False) == (FASTOPT, ATEN)
    assert row_cases.providers("32x768", quick=True, peers=True) == tuple(PROVIDERS)
