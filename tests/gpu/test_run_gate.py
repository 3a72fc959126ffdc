"""The gate compiles every kernel there is, and what it reads is what the committed table has."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import triton
from triton.runtime import JITFunction

import fastopt_kernels.gpu
from fastopt_kernels.gpu import machine_code
from fastopt_kernels.gpu.machine_code import TARGETS, Launched, Read
from fastopt_kernels.gpu.rows import softmax
from tests.gpu import clip_gate, gate, gate_table, row_gate, run_gate
from tests.gpu.checked import Case, Checked
from tests.gpu.test_gate import TURNS
from tests.gpu.test_row_gate import SAMPLE

NOTHING_WRONG = Read(
    registers=40, spilled=0, loads=999, stores=999, float64=0, float32=0, instructions=100, shared=0
)
CASE = Case("sm_90", "softmax", "float32", "row")


def functions() -> list[Any]:
    """Everything of fastopt_kernels.gpu that Triton compiles, but what rules call."""
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(fastopt_kernels.gpu.__path__, "fastopt_kernels.gpu.")
        if info.name != "fastopt_kernels.gpu.base.xp"
    ]
    return [
        value.fn
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    ]


def kernels() -> set[str]:
    """Those that no other calls: they are launched."""
    found = functions()
    called = {name for function in found for name in function.__code__.co_names}
    return {function.__name__ for function in found} - called


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Cases are launched inside, and nothing is compiled; the kernels' names."""
    names: set[str] = set()

    def launch(recorder: Any, grid: Any) -> Any:
        def note(*args: Any, **constants: Any) -> None:
            names.add(recorder.name)
            recorder.launched.append(Launched(recorder.name, constants, SimpleNamespace(asm={})))

        return note

    def passed(launched: Launched) -> Checked:
        return Checked(launched.name, 1, NOTHING_WRONG, [])

    monkeypatch.setattr(machine_code._Recorder, "__getitem__", launch)
    for module in (gate, clip_gate, row_gate):
        monkeypatch.setattr(module, "checked", passed)
    return names


def test_every_kernel_is_in_the_gate(launching: set[str]) -> None:
    cases = [case for case, check in run_gate.all_checks(["sm_90"]) if check()]
    assert len(cases) == len(set(cases)) > 1000
    assert launching == kernels()


def test_a_kernel_that_nobody_checks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def beside(x_ptr: Any) -> None: ...

    beside.__module__ = softmax.__name__
    monkeypatch.setattr(softmax, "beside", triton.jit(beside), raising=False)
    assert "beside" in kernels()


def found(registers: int = 40, kernel: str = "softmax_kernel") -> Checked:
    read = Read(
        registers, spilled=0, loads=4, stores=4, float64=0, float32=9, instructions=520, shared=128
    )
    return Checked(kernel, 16, read, [])


def test_a_line_of_the_table_is_read_again_as_it_was_written() -> None:
    rows = gate_table.rows_of(CASE, [found(), found(48), found(), found(50, "other_kernel")])
    names = {key[3]: cell for key, cell in rows}
    assert names == {
        "softmax": "40/0/32.5/4/4/128",
        "softmax 2": "48/0/32.5/4/4/128",
        "other": "50/0/32.5/4/4/128",
    }
    table = {key: {"sm_90": cell, "gfx942": cell} for key, cell in rows}
    text = gate_table.text_of(table)
    assert gate_table.table_of(text) == table
    assert gate_table.made_with(text) == gate_table.compilers()


def test_what_is_not_as_the_table_has_it_is_said() -> None:
    table = {key: {"sm_90": cell} for key, cell in gate_table.rows_of(CASE, [found()])}
    assert gate_table.changes(table, "sm_90", gate_table.rows_of(CASE, [found()])) == []
    (said,) = gate_table.changes(table, "sm_90", gate_table.rows_of(CASE, [found(64)]))
    assert "40/0/" in said
    assert "64/0/" in said
    assert gate_table.changes(table, "sm_80", gate_table.rows_of(CASE, [found()])) != []


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "gate.part"
    entry = {"case": CASE, "rows": gate_table.rows_of(CASE, [found()]), "faults": []}
    run_gate.Run(path, fresh=False).add(entry)
    with path.open("a") as file:
        file.write('{"case": ["sm_90", "soft')
    run = run_gate.Run(path, fresh=False)
    assert list(run.found) == [CASE]
    assert run.table([CASE]) == {key: {"sm_90": cell} for key, cell in entry["rows"]}
    run.add(entry)
    assert list(run_gate.Run(path, fresh=False).found) == [CASE]
    assert run_gate.Run(path, fresh=True).found == {}


def test_a_run_of_other_sources_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "gate.part"
    path.write_text("another key\n" + json.dumps({"case": CASE, "rows": [], "faults": []}) + "\n")
    assert run_gate.Run(path, fresh=False).found == {}


def committed() -> gate_table.Table:
    if not gate_table.PATH.exists():
        pytest.skip(f"there is no {gate_table.PATH.name}: `make gate` writes it")
    return gate_table.table_of(gate_table.PATH.read_text())


def test_the_table_has_every_case_and_kernel() -> None:
    table = committed()
    for target in TARGETS:
        lines = {key for key, row in table.items() if target in row}
        assert {key[:3] for key in lines} == {case[1:] for case, _ in run_gate.all_checks([target])}
        assert {f"{key[3].split()[0]}_kernel" for key in lines} == kernels()


UPDATES = [(Case(t, name, "-".join(kinds), ""), (name, kinds, t)) for name, kinds, t in TURNS[::2]]
ROWS = [
    (Case(target, name, str(dtype)[6:], branch), (name, branch, dtype, target))
    for name, branch, dtype, target in SAMPLE[::2]
]


@pytest.mark.parametrize(("case", "what"), UPDATES + ROWS, ids=lambda x: " ".join(map(str, x)))
def test_a_kernel_is_what_the_table_has_of_it(case: Case, what: tuple[Any, ...]) -> None:
    table = committed()
    made_with = gate_table.made_with(gate_table.PATH.read_text())
    if made_with != gate_table.compilers():
        pytest.skip(f"the table was written with {made_with}; here is {gate_table.compilers()}")
    if case.subject in row_gate.FUNCTIONS:
        compiled = row_gate.check(*what)
    else:
        compiled = [gate.check_update(gate.updates()[what[0]], *what[1:])]
    changes = gate_table.changes(table, case.target, gate_table.rows_of(case, compiled))
    assert not changes, "\n".join([*changes, "`make gate` writes the table anew"])
