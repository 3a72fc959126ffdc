"""The folder of compiled kernels: used only where no other user may write, and kept small.

One kernel is compiled, and then kept and found in many folders.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastopt_kernels.cpu.base import cache
from tests.test_cache import TIMEOUT, compiled_here, run, start

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
OTHER = 54321
KEY = f"sgd_{0:032x}"


Keep = Callable[..., tuple[bool, list[str]]]


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> Keep:
    """keep(folder): saves and finds the kernel there; whether it was found, and what was said."""
    monkeypatch.delenv("FASTOPT_CACHE_SIZE", raising=False)

    def keep(folder: Path | str | None = None, key: str = KEY) -> tuple[bool, list[str]]:
        if folder is not None:
            monkeypatch.setenv("FASTOPT_CACHE_DIR", str(folder))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                assert cache.save(key, compiled_here())
                found = cache.load(key) is not None
        return found, [str(warning.message) for warning in said]

    return keep


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Path]:
    """A folder of the user's alone, under one that others may only read."""
    top = tmp_path / "top"
    top.mkdir(mode=0o700)
    yield top
    top.chmod(0o700)


def open_folder(top: Path) -> tuple[Path, str]:
    (top / "open").mkdir()
    (top / "open").chmod(0o777)
    return top / "open", f"chmod go-w {top / 'open'}"


def open_to_the_group(top: Path) -> tuple[Path, str]:
    (top / "group").mkdir()
    (top / "group").chmod(0o770)
    return top / "group", f"chmod go-w {top / 'group'}"


def open_with_the_sticky_bit(top: Path) -> tuple[Path, str]:
    (top / "sticky").mkdir()
    (top / "sticky").chmod(0o1777)
    return top / "sticky", "Remedy: set FASTOPT_CACHE_DIR"


def below_an_open_one(top: Path) -> tuple[Path, str]:
    (top / "above" / "mine").mkdir(parents=True, mode=0o700)
    (top / "above").chmod(0o777)
    return top / "above" / "mine", f"chmod go-w {top / 'above'}"


def not_there_below_an_open_one(top: Path) -> tuple[Path, str]:
    (top / "a b").mkdir()
    (top / "a b").chmod(0o775)
    return top / "a b" / "new" / "newer", f"chmod go-w '{top / 'a b'}'"


def a_link_to_an_open_one(top: Path) -> tuple[Path, str]:
    (top / "real").mkdir()
    (top / "real").chmod(0o777)
    (top / "link").symlink_to("real")
    return top / "link", f"chmod go-w {top / 'real'}"


def a_link_that_others_can_turn(top: Path) -> tuple[Path, str]:
    (top / "mine").mkdir(mode=0o700)
    (top / "turned").mkdir()
    (top / "turned" / "link").symlink_to(top / "mine")
    (top / "turned").chmod(0o777)
    return top / "turned" / "link", f"chmod go-w {top / 'turned'}"


def of_another_user(top: Path) -> tuple[Path, str]:
    (top / "theirs").mkdir(mode=0o700)
    os.chown(top / "theirs", OTHER, OTHER)
    return top / "theirs", "set FASTOPT_CACHE_DIR"


def below_one_of_another_user(top: Path) -> tuple[Path, str]:
    path = top / "their home" / "cache"
    path.mkdir(parents=True, mode=0o700)
    os.chown(path.parent, OTHER, OTHER)
    return path, "set FASTOPT_CACHE_DIR"


UNSAFE = [
    open_folder, open_to_the_group, open_with_the_sticky_bit, below_an_open_one,
    not_there_below_an_open_one, a_link_to_an_open_one, a_link_that_others_can_turn,
]  # fmt: skip
IF_ROOT = [of_another_user, below_one_of_another_user]
Place = Callable[[Path], tuple[Path, str]]


def check_unsafe(top: Path, keep: Keep, place: Place) -> None:
    """Nothing is written to it or read from it, and one warning says what to do."""
    path, remedy = place(top)
    before = [*path.iterdir()] if path.exists() else None
    found, said = keep(path)
    assert not found
    (message,) = said
    assert str(path) in message
    assert remedy in message
    assert "FASTOPT_CACHE_DIR" in message
    assert before == ([*path.iterdir()] if path.exists() else None)


@pytest.mark.parametrize("place", UNSAFE)
def test_a_folder_where_others_can_write_is_not_used(top: Path, keep: Keep, place: Place) -> None:
    check_unsafe(top, keep, place)


@NEEDS_ROOT
@pytest.mark.parametrize("place", IF_ROOT)
def test_a_folder_of_another_user_is_not_used(top: Path, keep: Keep, place: Place) -> None:
    check_unsafe(top, keep, place)


def test_a_folder_that_others_can_only_read_is_used(top: Path, keep: Keep) -> None:
    """And one below a folder with the sticky bit, as /tmp is, or behind a link of the user's."""
    (top / "read").mkdir(mode=0o755)
    (top / "sticky" / "mine").mkdir(parents=True, mode=0o700)
    (top / "sticky").chmod(0o1777)
    (top / "link").symlink_to(top / "read")
    for path in (top / "read", top / "sticky" / "mine", top / "link", top / "not" / "there"):
        assert keep(path) == (True, []), path


def test_what_is_made_is_the_users_alone(top: Path, keep: Keep) -> None:
    """Folders on the way too, whatever the umask."""
    before = os.umask(0)
    try:
        assert keep(top / "a" / "b") == (True, [])
    finally:
        os.umask(before)
    made = [top / "a", top / "a" / "b", top / "a" / "b" / f"{KEY}.kernel"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o700, 0o700, 0o600]


@pytest.mark.parametrize("path", ["/dev/null", "/dev/null/kernels", "/proc/nowhere/kernels"])
def test_where_no_folder_can_be_there_is_no_cache_and_no_word(keep: Keep, path: str) -> None:
    assert keep(path) == (False, [])


@pytest.mark.parametrize(
    "settings",
    [
        {"FASTOPT_CACHE_DIR": "rel"},
        {"FASTOPT_CACHE_DIR": "~/kernels"},
        {"FASTOPT_CACHE_DIR": "", "XDG_CACHE_HOME": "rel-xdg"},
        {"FASTOPT_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "rel-home"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_a_path_that_is_not_absolute_is_no_folder(
    tmp_path: Path, keep: Keep, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found, (message,) = keep()
    assert not found
    assert [*tmp_path.iterdir()] == []
    assert "is not an absolute path" in message
    assert "set FASTOPT_CACHE_DIR" in message


def test_the_least_recently_used_kernels_go_beyond_the_limit(
    top: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {letter: top / f"sgd_{letter * 32}.kernel" for letter in "abcdef"}
    for age, letter in enumerate("abc"):
        keep(top, paths[letter].stem)
        then = paths[letter].stat().st_mtime - 3600 * (10 - age)
        os.utime(paths[letter], (then, then))
    (top / "another.kernel").write_bytes(bytes(2**20))
    size, written = paths["a"].stat().st_size, paths["a"].stat().st_mtime_ns
    monkeypatch.setenv("FASTOPT_CACHE_SIZE", str(3.5 * size / 2**20))
    assert cache.load(paths["a"].stem) is not None
    assert paths["a"].stat().st_mtime_ns == written
    keep(top, paths["d"].stem)
    assert {path.stem[4] for path in paths.values() if path.exists()} == {"a", "c", "d"}
    for letter in "ef":
        keep(top, paths[letter].stem)
    assert {path.stem[4] for path in paths.values() if path.exists()} == {"d", "e", "f"}
    assert (top / "another.kernel").exists()


def test_a_size_of_none_keeps_none(top: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(top)
    monkeypatch.setenv("FASTOPT_CACHE_SIZE", "0")
    assert cache.load(KEY) is None
    assert keep(top / "new") == (False, [])
    assert not (top / "new").exists()


@pytest.mark.parametrize("size", ["-1", "much", "nan", "inf"])
def test_a_size_that_is_none_is_said_and_the_limit_is_the_usual_one(
    top: Path, keep: Keep, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTOPT_CACHE_SIZE", size)
    found, (message,) = keep(top)
    assert found
    assert f"FASTOPT_CACHE_SIZE={size}" in message
    assert "512 MiB" in message


def test_a_failed_write_leaves_nothing(
    top: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    (top / f"{KEY}.kernel").mkdir()
    assert keep(top) == (False, [])
    assert [path.name for path in top.iterdir()] == [f"{KEY}.kernel"]

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert keep(top, f"sgd_{1:032x}") == (False, [])
    assert [path.name for path in top.iterdir()] == [f"{KEY}.kernel"]


KILLED = """
    os.replace = lambda *_: os._exit(0)
    sgd()
"""
AT_ONCE = """
    from fastopt_kernels.chunks import NO_OPTIONS
    kernel = engine._make_kernel(sgd_rule, ("fp32", "fp32"), 3, NO_OPTIONS, False, "at_once")
    letters, folder = "abcdef", os.environ["FASTOPT_CACHE_DIR"]
    engine.disk.save("sgd_" + "a" * 32, kernel)
    (name,) = os.listdir(folder)
    size = os.stat(os.path.join(folder, name)).st_size
    os.environ["FASTOPT_CACHE_SIZE"] = str(2.5 * size / 2**20)
    children = []
    for _ in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                for letter in letters * 5:
                    engine.disk.save("sgd_" + letter * 32, kernel)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    engine.disk.save("sgd_" + "0" * 32, kernel)
    say(statuses, os.listdir(folder))
"""


def test_what_a_killed_process_left_is_swept_and_nothing_else(top: Path, keep: Keep) -> None:
    start(top, KILLED).communicate(timeout=TIMEOUT)
    (temporary,) = top.iterdir()
    assert temporary.suffix != ".kernel"
    foreign = [top / name for name in ("notes.txt", "a.tmp", "tmpa1b2c3d4", "linux.kernel")]
    for path in foreign:
        path.write_text("keep")
    young = temporary.with_name(temporary.name.replace(".tmp", "x.tmp"))
    young.write_text("being written")
    for path in [*foreign, temporary]:
        os.utime(path, (1e9, 1e9))
    assert keep(top) == (True, [])
    assert not temporary.exists()
    assert young.exists()
    assert all(path.read_text() == "keep" for path in foreign)


def test_many_processes_remove_kernels_at_once(top: Path) -> None:
    statuses, names = run(top, AT_ONCE)[0]
    assert statuses == [0] * 6
    assert f"sgd_{'0' * 32}.kernel" in names
    assert len(names) <= 2
    assert all(name.endswith(".kernel") for name in names)


def test_these_checks_see_a_folder_that_is_used_unseen(
    top: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.cache_folder, "refusal", lambda path: None)
    with pytest.raises(AssertionError):
        check_unsafe(top, keep, open_folder)
