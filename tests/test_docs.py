"""What README.md, CONTRIBUTING.md and docs/ show runs, as it stands there."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import pages
from tests.pages import PAGES, ROOT

# What README takes for granted: a reader's own model.
GIVEN = {
    "model": lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)),
}
# Commands that end within seconds. All others are handed to their parsers.
RUN = {
    "fastopt profile softmax --target sm_90",
    "python -m bench.picture --check",
    "python -m bench.readme --check",
}
EACH = [
    pytest.param(command, id=f"{page.stem}: {command}")
    for page in PAGES
    for command in pages.commands(page.read_text())
]
NAMED = {"ids": lambda page: str(page.relative_to(ROOT))}


@pytest.mark.parametrize("page", PAGES, **NAMED)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # Inductor takes longer than all the rest, and is torch's: what is ours ends with the graph.
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.chdir(tmp_path)
    given = {name: make() for name, make in GIVEN.items()} if page.stem == "README" else {}
    pages.run_python(page.read_text(), tmp_path, given, monkeypatch)


@pytest.mark.parametrize("command", EACH)
def test_commands_are_taken(command: str) -> None:
    if command in RUN:
        assert pages.run_command(command) == 0
    else:
        pages.check_command(command)


def test_commands_that_are_run_are_in_the_pages() -> None:
    assert {param.values[0] for param in EACH} >= RUN


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_index_names_every_page_and_links_lead_somewhere() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    named = set(re.findall(r"\]\(([\w.]+\.md)\)", index))
    assert named == {page.name for page in PAGES if page.parent == ROOT / "docs"} - {"README.md"}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def fenced(language: str, *lines: str) -> str:
    return "\n".join(["# Title", "", f"```{language}", *lines, "```", ""])


def run_python(text: str, folder: Path, **given: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        return pages.run_python(text, folder, given, patch)


def test_a_page_whose_code_is_wrong_fails_at_its_line(tmp_path: Path) -> None:
    right = fenced("python", "import fastopt", "n = 2 * m")
    assert run_python(right, tmp_path, m=3)["n"] == 6
    wrong = right + fenced("text", "assert False") + fenced("python", "", "assert n == 7")
    with pytest.raises(AssertionError) as caught:
        run_python(wrong, tmp_path, m=3)
    assert caught.traceback[-1].lineno + 1 == wrong.splitlines().index("assert n == 7") + 1
    with pytest.raises(NameError):
        run_python(right, tmp_path)


def test_a_block_that_is_a_file_is_imported_as_that_module(tmp_path: Path) -> None:
    file = fenced("python", "# fastopt/functional/documented.py", "answer = 42")
    user = fenced("python", "from fastopt.functional.documented import answer")
    assert run_python(file + user, tmp_path)["answer"] == 42
    wrong = fenced("python", "# fastopt/functional/documented.py", "answer = 1 / 0")
    with pytest.raises(ZeroDivisionError):
        run_python(wrong, tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "fastopt profile adamw --shpae 20x1m",
        "fastopt porfile adamw",
        "python -m bench.readme --chekc",
        "python -m bench.no_such_report",
        "make no_such_target",
        "pytest bench --no-such-option",
        "pip install 'fastopt[no_such_extra]'",
        "some_other_program",
    ],
)
def test_a_command_that_would_fail_is_refused(command: str) -> None:
    failures = (
        AssertionError,
        SystemExit,
        ModuleNotFoundError,
        subprocess.CalledProcessError,
    )
    with pytest.raises(failures):
        pages.check_command(command)


@pytest.mark.parametrize(
    "text",
    [
        fenced("", "x = 1"),
        fenced("python3", "x = 1"),
        fenced("python no-test", "x = 1"),
        "```python\nx = 1\n",
        "Text:\n\n    fastopt doctor\n",
        "- an item:\n\n  ```python\n  x = 1\n  ```\n",
    ],
)
def test_a_block_that_no_test_would_run_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is none of|not closed|fence it"):
        pages.blocks(text)
