"""The code blocks of a page of documentation, and what it takes to run them.

python  executed in order, all of a page in one namespace; one that begins with the name of a
        file, as in "# fastopt/functional/mine.py", is that module of the package from there on
sh      a command a line: run, or handed to its parser where running it takes long
text    output, formulas, trees of files: nothing that could run
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastopt.functional import registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("python", "sh", "text")
_FILE = re.compile(r"# ((?:fastopt|kernels|tests)/\S+)\.py\n")


class Block(NamedTuple):
    """line: of the page, where the block's first line stands"""

    language: str
    line: int
    source: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page; ValueError for one that says no language, or none of ours."""
    found: list[Block] = []
    lines: list[str] | None = None
    language, before = "", ""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            if lines is None:
                language, lines = line[3:], []
                if language not in LANGUAGES:
                    raise ValueError(f"line {number}: ```{language} is none of {LANGUAGES}")
            else:
                found.append(Block(language, number - len(lines), "\n".join(lines) + "\n"))
                lines = None
        elif lines is not None:
            lines.append(line)
        elif line.lstrip().startswith("```") or (line.startswith("    ") and not before.strip()):
            raise ValueError(f"line {number}: a block that is indented says no language: fence it")
        before = line
    if lines is not None:
        raise ValueError(f"a block of {language} is not closed")
    return found


def run_python(
    text: str, folder: Path, given: dict[str, Any], patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Execute the python blocks of a page; gives their namespace.

    folder: an empty one, where what is executed is written, at its lines in the page
    given: names that the page takes for granted
    """
    # Ops that a page registers end with it.
    library = torch.library.Library("fastopt", "FRAGMENT")  # type: ignore[no-untyped-call]
    patch.setattr(registry, "_library", library)
    try:
        return _run_blocks(blocks(text), folder, {"__name__": "page"} | given, patch)
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _run_blocks(
    found: list[Block], folder: Path, namespace: dict[str, Any], patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    written: list[str] = []
    for block in found:
        if block.language != "python":
            continue
        if file := _FILE.match(block.source):
            _import_as(file[1], block, folder, patch)
            continue
        written += [""] * (block.line - 1 - len(written)) + block.source.splitlines()
        page = folder / "page.py"
        page.write_text("\n".join(written) + "\n")
        source = "\n" * (block.line - 1) + block.source
        exec(compile(source, page, "exec"), namespace)
    return namespace


def _import_as(file: str, block: Block, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make the block a module of its package, and import it."""
    name = file.removeprefix("kernels/").replace("/", ".")
    package = importlib.import_module(name.rpartition(".")[0])
    path = folder / f"{file}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n" * (block.line - 1) + block.source)
    patch.setattr(package, "__path__", [*package.__path__, str(path.parent)])
    patch.delitem(sys.modules, name, raising=False)
    importlib.import_module(name)


def commands(text: str) -> list[str]:
    """The commands of a page, once each."""
    lines = [line for block in blocks(text) if block.language == "sh" for line in _lines(block)]
    return list(dict.fromkeys(lines))


def _lines(block: Block) -> Iterator[str]:
    for line in block.source.splitlines():
        if words := shlex.split(line, comments=True):
            yield shlex.join(words)


def run_command(command: str) -> int:
    """The exit status of `fastopt ...` or `python -m ...`, run in this process."""
    program, *arguments = shlex.split(command)
    if program == "fastopt":
        return _main_of("fastopt.cli")(arguments)
    _, module, *arguments = arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        return _main_of(module)()


def check_command(command: str) -> None:
    """Hand a command to what would parse it; AssertionError, or the parser's SystemExit, where it
    would not be taken."""
    words, settings = shlex.split(command), {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    match words:
        case ["fastopt", *arguments]:
            _assert_taken("fastopt.cli", arguments)
        case ["pytest", *arguments] | ["python", "-m", "pytest", *arguments]:
            _assert_collects(arguments, settings)
        case ["python", "-m", module, *arguments]:
            _assert_taken(module, arguments)
        case ["make", *targets]:
            subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True)
        case ["pip", "install", *arguments]:
            _assert_extras(arguments)
        case _:
            raise AssertionError(f"no test knows how to check {command!r}")


def _main_of(module: str) -> Callable[..., int]:
    main: Callable[..., int] = importlib.import_module(module).main
    return main


class _TakenError(Exception):
    """The parser took the arguments."""


def _assert_taken(module: str, arguments: list[str]) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: Any) -> None:
        parse(self, *args)
        raise _TakenError

    main = _main_of(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(_TakenError):
            main()


def _assert_collects(arguments: list[str], settings: dict[str, str]) -> None:
    """pytest takes the arguments and finds something to run; in this process, where it may."""
    # pytest-benchmark warns that nothing was saved, and of workers.
    quiet = ("ignore:Not saving", "ignore:Benchmarks are automatically disabled")
    arguments = [*arguments, "--collect-only", "-q", "-p", "no:cacheprovider"]
    arguments += [part for warning in quiet for part in ("-W", warning)]
    if settings:
        command = [sys.executable, "-m", "pytest", *arguments]
        status = subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, check=False
        ).returncode
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            status = pytest.main(arguments)
    assert status == pytest.ExitCode.OK


def _assert_extras(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for argument in arguments:
        if extras := re.search(r"\[(.*)\]", argument):
            missing = set(extras[1].split(",")) - set(project["optional-dependencies"])
            assert not missing, f"{argument!r}: pyproject.toml has no extras {missing}"
