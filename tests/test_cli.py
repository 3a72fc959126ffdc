"""The `fastopt` command: its arguments, its messages and the files it writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from fastopt.cli import COMMANDS, main
from fastopt.cli.demo import tasks
from fastopt.cli.shared import files

ALL_COMMANDS = ", ".join(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dmeo"], f"unknown command 'dmeo', did you mean 'demo'? (commands: {ALL_COMMANDS})"),
        (["Docter"], "unknown command 'Docter', did you mean 'doctor'?"),
        (["xyzzy"], f"unknown command 'xyzzy' (commands: {ALL_COMMANDS})"),
        (["demo", "--seed", "-1"], "'-1' is not a whole number from 0"),
        (["demo", "--seed", "one"], "'one' is not a whole number from 0"),
        (["demo", "--threads", "0"], "'0' is not a whole number from 1"),
        (["demo", "--out", "demo.jpg"], "'demo.jpg' does not end in .png"),
        (["demo", "--json", "demo.png"], "'demo.png' does not end in .json"),
        (["demo", "--out", "no/such/folder/demo.png"], "does not exist"),
        (["demo", "--xyzzy"], "unrecognized arguments: --xyzzy\n"),
        (["demo", "--quik"], "unrecognized arguments: --quik, did you mean '--quick'?"),
        (["demo", "--trheads=2"], "unrecognized arguments: --trheads, did you mean '--threads'?"),
        (["bench", "--comprae", "a", "b"], "--comprae, did you mean '--compare'?"),
        (["doctor", "now"], "unrecognized arguments: now"),
    ],
)
def test_argument_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_out_may_not_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo.png"
    folder.mkdir()
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(folder)])
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"), [(["--help"], "demo"), (["demo", "--help"], "--quick")]
)
def test_help(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert expected in capsys.readouterr().out


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "demo" in capsys.readouterr().err


def test_missing_extras_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--out", str(tmp_path / "demo.png")]) == 1
    message = capsys.readouterr().err
    assert "needs rich, matplotlib, scikit-learn: pip install 'fastopt[demo]'" in message
    assert list(tmp_path.iterdir()) == []


def _half_written(self: Path, content: bytes) -> int:
    with self.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise KeyboardInterrupt


def _not_renamed(self: Path, target: Path) -> Path:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("method", "interrupted"), [("write_bytes", _half_written), ("replace", _not_renamed)]
)
def test_interrupt_while_writing_keeps_the_old_file(
    method: str, interrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "demo.png"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            files.write_whole(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("demo.png", b"old")]
    files.write_whole(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("demo.png", b"new")]


@pytest.mark.parametrize("command", ["demo", "bench", "doctor"])
def test_an_interrupted_command_ends_without_a_traceback(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS[command], "run", interrupted)
    required = {"bench": ["--compare", "a", "b"]}
    assert main([command, *required.get(command, [])]) == 130
    assert capsys.readouterr().err == "\nfastopt: interrupted\n"


def test_thread_count_is_used_and_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_data(seed: int, quick: bool) -> tasks.Task:
        raise FileNotFoundError(f"no data for {torch.get_num_threads()} threads")

    monkeypatch.setattr(tasks, "digits_task", no_data)
    before = torch.get_num_threads()
    assert main(["demo", "--threads", "2", "--out", str(tmp_path / "demo.png")]) == 1
    assert capsys.readouterr().err == "fastopt demo: no data for 2 threads\n"
    assert torch.get_num_threads() == before
