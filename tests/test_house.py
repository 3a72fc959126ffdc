"""The house stays one that a stranger can walk through: no circles, short files, few on a step."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import fastopt

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"fastopt": ROOT / "fastopt", "fastopt_kernels": ROOT / "kernels" / "fastopt_kernels"}
FOLDERS = (*PACKAGES.values(), ROOT / "bench")
LINES, FUNCTION_LINES = 400, 60
# Functions that are longer, as long as they are: none may grow.
LONGER = {
    "_planes": 113,
    "_loss_backward": 82,
    "_make_gradients": 74,
    "_pixel_norms": 70,
    "_make_sums": 67,
    "update_kernel": 67,
    "cross_entropy_backward": 66,
    "scalars_kernel": 66,
    "_softmax_backward": 65,
    "run_on_device": 64,
}
# Files that one step of AdamW on a CPU passes through, at most.
FILES_OF_A_STEP = 13


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """Of each module those it imports, anywhere in it; under TYPE_CHECKING too."""
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    target = full if full in known else node.module
                    if target in known and target != name:
                        graph[name].add(target)
            elif isinstance(node, ast.Import):
                graph[name].update(a.name for a in node.names if a.name in known)
    return graph


def circles(graph: dict[str, set[str]]) -> Iterator[set[str]]:
    """Sets of modules that import each other: what can reach itself."""
    reach = {name: set(targets) for name, targets in graph.items()}
    changed = True
    while changed:
        changed = False
        for targets in reach.values():
            more = targets.union(*(reach[t] for t in targets))
            if more != targets:
                targets |= more
                changed = True
    done: set[str] = set()
    for name, targets in reach.items():
        if name in targets and name not in done:
            circle = {other for other in targets if name in reach[other]}
            done |= circle
            yield circle


def test_no_modules_import_each_other() -> None:
    assert list(circles(imports(modules()))) == []


def test_a_circle_would_be_noticed() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert list(circles(graph)) == [{"a", "b", "c"}]


def test_kernels_import_nothing_of_the_library() -> None:
    for name, targets in imports(modules()).items():
        if name.startswith("fastopt_kernels"):
            assert not [t for t in targets if t.partition(".")[0] == "fastopt"], name


def test_no_file_is_too_long() -> None:
    long = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources()}
    assert {path: n for path, n in long.items() if n > LINES} == {}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_function_is_too_long() -> None:
    found = {(str(p.relative_to(ROOT)), name): n for p in sources() for name, n in functions(p)}
    long = {where: n for where, n in found.items() if n > LONGER.get(where[1], FUNCTION_LINES)}
    assert long == {}


def files_of(call: Any) -> list[str]:
    """The files of the library that a call enters, in order, each time that one is entered."""
    entered: list[str] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            entered.append(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [name for name, _ in groupby(entered) if "site-packages" not in name]


def test_a_step_passes_few_files() -> None:
    param = torch.nn.Parameter(torch.randn(8))
    param.grad = torch.randn(8)
    optimizer = fastopt.optim.AdamW([param])
    for _ in range(3):
        optimizer.step()
    entered = files_of(optimizer.step)
    assert len(set(entered)) <= FILES_OF_A_STEP, sorted(set(entered))


SPOKEN = [PACKAGES["fastopt"] / "optim", PACKAGES["fastopt"] / "functional"]


@pytest.mark.parametrize(
    "folder", [*SPOKEN, PACKAGES["fastopt_kernels"]], ids=lambda folder: folder.name
)
def test_no_docstring_asks_a_question(folder: Path) -> None:
    questions = ("Whether ", "What ", "How ", "Where ")
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node) or ""
                if text.startswith(questions):
                    found.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert found == []
