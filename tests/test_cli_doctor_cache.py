"""The cache folder in `fastopt doctor`: why it is not used, and what --clear-cache removes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastopt.cli import main
from fastopt.cli.doctor import examine, findings
from tests.test_cli_doctor import HEALTHY


def test_a_cache_folder_that_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor says what the warning of a step says, and makes nothing there."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for folder, why, remedy in (
        (tmp_path / "open", "others can write to", f"chmod go-w {tmp_path / 'open'}"),
        (tmp_path / "open" / "new", "others can write to", f"chmod go-w {tmp_path / 'open'}"),
        (Path("rel"), "rel is not an absolute path", "set FASTOPT_CACHE_DIR"),
    ):
        monkeypatch.setenv("FASTOPT_CACHE_DIR", str(folder))
        (finding,) = findings.findings(HEALTHY | {"cache": examine._cache()})
        assert why in finding.what
        assert remedy in finding.remedy
        assert not Path("rel").exists()
        assert [*(tmp_path / "open").iterdir()] == []
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("FASTOPT_CACHE_SIZE", "0")
    assert examine._cache()["error"] == "FASTOPT_CACHE_SIZE is 0"
    assert not (tmp_path / "none").exists()


def test_the_cache_folder_that_doctor_makes_is_the_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path / "new" / "newer"))
    assert examine._cache()["error"] is None
    assert [
        oct(path.stat().st_mode & 0o777) for path in (tmp_path / "new", tmp_path / "new" / "newer")
    ] == ["0o700"] * 2


@pytest.mark.parametrize("as_json", [False, True])
def test_clear_cache_removes_what_is_ours_and_says_how_much(
    as_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a folder that others can write to, what they put there goes too."""
    monkeypatch.setattr(examine, "examine", lambda: pytest.fail("nothing is examined"))
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    name = f"sgd_{'0a' * 16}.kernel"
    ours = [name, f"adam_w_{'1' * 32}.kernel", f"{name}.k2_x9y.tmp"]
    theirs = ["notes.txt", "linux.kernel", f"sgd_{'0' * 31}.kernel", "x.tmp", f"{name}.old"]
    for path in [*ours, *theirs]:
        (tmp_path / path).write_bytes(bytes(1000))
    (tmp_path / f"sgd_{'2' * 32}.kernel").mkdir()
    tmp_path.chmod(0o777)
    for files in (3, 0):
        assert main(["doctor", "--clear-cache", *["--json"] * as_json]) == 0
        out = capsys.readouterr().out
        if as_json:
            cleared = {"folder": str(tmp_path), "files": files, "bytes": 1000 * files}
            assert json.loads(out) == cleared
        else:
            assert out == f"removed {files} files, {1000 * files} bytes, from {tmp_path}\n"
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {*theirs, f"sgd_{'2' * 32}.kernel"}


def test_clear_cache_without_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path / "none"))
    assert main(["doctor", "--clear-cache"]) == 0
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("FASTOPT_CACHE_DIR", "rel")
    assert main(["doctor", "--clear-cache"]) == 1
    assert "rel is not cleared: not an absolute path" in capsys.readouterr().err


def test_a_folder_of_the_users_alone_has_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    assert findings.findings(HEALTHY | {"cache": examine._cache()}) == []
    wrong = HEALTHY["cache"] | {"error": "no reason"}
    assert len(findings.findings(HEALTHY | {"cache": wrong})) == 1
