"""Kernels on disk: found again by what they were made from, and never in the way.

Each process here works on the kernel package alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastopt.optim.sgd import sgd
from fastopt_kernels.chunks import NO_OPTIONS
from fastopt_kernels.cpu.base import cache
from fastopt_kernels.cpu.step import engine
from tests.optim.workers import environment

ROOT = Path(__file__).resolve().parents[1]
# Of a process that hangs: several compile beside the tests of other workers.
TIMEOUT = 600
PRELUDE = """
    import json, os
    import numpy as np
    from fastopt.optim.adagrad import adagrad as adagrad_rule
    from fastopt.optim.sgd import sgd as sgd_rule, sgd_momentum
    from fastopt_kernels import xp
    from fastopt_kernels.cpu.step import engine
    from fastopt_kernels.cpu.step.launch import Launch

    compiled = []
    make_kernel = engine._make_kernel

    def counting(rule, *args):
        compiled.append(rule.__name__)
        return make_kernel(rule, *args)

    engine._make_kernel = counting

    def run(rule, *scalars, n=5, threads=1, states=0):
        '''Element 0 of a parameter of ones and its states, after one launch with gradients 1.'''
        arrays = [np.ones(n, np.float32) for _ in range(2 + states)]
        launch = Launch(rule, ("fp32",) * len(arrays), [n], 1 + len(scalars))
        launch.tensors[0] = [array.ctypes.data for array in arrays]
        launch.scalars[0] = (1.0, *scalars)
        launch.run(threads)
        assert all((array == array[0]).all() for array in arrays)
        return round(float(arrays[0][0]), 4)

    LARGE = dict(n=200_000, threads=2)

    def sgd(**large):  # 0.75
        return run(sgd_rule, 0.0, 0.25, **large)

    def momentum(**large):  # 0.625
        return run(sgd_momentum, 0.0, 0.25, 0.5, 1.0, states=1, **large)

    def adagrad(**large):  # 0.2929
        return run(adagrad_rule, 0.0, 1.0, 0.0, states=1, **large)

    def say(*results):
        print(json.dumps([list(results), sorted(compiled)]))
"""


def start(folder: Path | str, body: str, **more: str) -> subprocess.Popen[str]:
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(FASTOPT_CACHE_DIR=str(folder), **more),
    )


def finish(process: subprocess.Popen[str]) -> tuple[list[Any], list[str]]:
    """What it computed, and the rules it compiled."""
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    results, compiled = json.loads(out.splitlines()[-1])
    return results, compiled


def run(folder: Path | str, body: str, **more: str) -> tuple[list[Any], list[str]]:
    return finish(start(folder, body, **more))


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with kernels that several processes compiled, all at once, none knowing of the
    others' rules; two of them compile the same."""
    folder = tmp_path_factory.mktemp("kernels") / "made" / "by" / "the first"
    bodies = ["say(sgd())"] * 2 + [
        "say(momentum(), momentum(**LARGE))",
        "say(sgd(**LARGE), adagrad())",
    ]
    outcomes = [finish(process) for process in [start(folder, body) for body in bodies]]
    assert [results for results, _ in outcomes] == [[0.75]] * 2 + [[0.625, 0.625], [0.75, 0.2929]]
    return folder


def test_many_processes_at_once_leave_one_whole_file_a_kernel(kept: Path) -> None:
    names = sorted(name.rpartition("_")[0] for name in files(kept))
    assert names == ["adagrad", "sgd", "sgd", "sgd_momentum", "sgd_momentum"]
    assert all(name.endswith(".kernel") for name in files(kept))


ALL = ("sgd()", "momentum()", "adagrad()", "sgd(**LARGE)", "momentum(**LARGE)")
VALUES = [0.75, 0.625, 0.2929, 0.75, 0.625]


@pytest.mark.parametrize("backwards", [False, True])
def test_kernels_of_several_processes_serve_together_in_one(kept: Path, backwards: bool) -> None:
    """In either order: symbols of the same name, made in different processes, must not mix."""
    before = files(kept)
    order = slice(None, None, -1 if backwards else 1)
    results, compiled = run(kept, f"say({', '.join(ALL[order])})")
    assert results == VALUES[order]
    assert not [name for name in compiled if name == "adagrad"]
    assert set(files(kept)) == set(before)


def test_a_second_process_compiles_nothing_and_adds_no_file(kept: Path) -> None:
    before = files(kept)
    assert run(kept, "say(sgd(), sgd(**LARGE), adagrad())") == ([0.75, 0.75, 0.2929], [])
    assert files(kept) == before


RULES = """
    def make(source):
        scope = {"xp": xp}
        exec(source, scope)
        return scope["rule"]
"""
PLAIN = "def rule(p, g, lr):\n    return (p {sign} lr * g,)"


def test_an_edited_rule_gets_another_file_and_its_old_one_is_found_again(tmp_path: Path) -> None:
    """Two rules of one name, in one process and in the next."""
    body = (
        RULES
        + f"""
    minus, plus = (make({PLAIN!r}.format(sign=sign)) for sign in "-+")
    say(run(minus, 0.5), run(plus, 0.5))
    """
    )
    assert run(tmp_path, body) == ([0.5, 1.5], ["rule", "rule"])
    before = files(tmp_path)
    assert len(before) == 2
    mirrored = body.replace("run(minus, 0.5), run(plus, 0.5)", "run(plus, 0.5), run(minus, 0.5)")
    assert run(tmp_path, mirrored) == ([1.5, 0.5], [])
    assert files(tmp_path) == before


def test_edited_kernel_sources_get_other_files(tmp_path: Path) -> None:
    """And a process that imported them before the edit keeps its kernels under the old name."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pyc*"))
    source = tmp_path / "kernels" / "fastopt_kernels" / "cpu" / "base" / "xp.py"
    folder = tmp_path / "kept"
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "kernels"), str(ROOT)])}
    edit = f"""
    from pathlib import Path
    assert engine.__file__.startswith({str(tmp_path)!r})
    Path({str(source)!r}).write_text(Path({str(source)!r}).read_text() + "# edited")
    say(sgd())
    """
    assert run(folder, edit, **path) == ([0.75], ["sgd"])
    assert run(folder, "say(sgd())", **path) == ([0.75], ["sgd"])
    assert len(files(folder)) == 2


# What follows makes one process forget the kernels it has, in place of starting another.


def test_a_torn_or_foreign_file_is_ignored_and_replaced(tmp_path: Path) -> None:
    body = f"""
    import hashlib, pathlib, pickle
    results = [sgd()]
    (file,) = pathlib.Path({str(tmp_path)!r}).iterdir()
    whole = file.read_bytes()
    assert engine.disk.load(file.stem) is not None
    foreign = pickle.dumps(["something", "else"])
    damaged = [b"", b"0123", bytes(range(256)) * 40, whole[: len(whole) // 2],
               whole[:-1] + bytes([whole[-1] ^ 1]), hashlib.sha256(foreign).digest() + foreign]
    for content in damaged:
        file.write_bytes(content)
        assert engine.disk.load(file.stem) is None
    engine.compiled.cache_clear()
    results.append(sgd())
    assert file.read_bytes() != content
    file.unlink()
    file.mkdir()
    engine.compiled.cache_clear()
    say(*results, sgd())
    """
    assert run(tmp_path, body) == ([0.75] * 3, ["sgd"] * 3)


def test_a_folder_that_cannot_be_written_means_no_cache_and_no_error(tmp_path: Path) -> None:
    """Root writes to read-only folders; nobody writes below a file, or in /proc."""
    blocker, read_only = tmp_path / "file", tmp_path / "read-only"
    blocker.write_text("not a folder")
    read_only.mkdir(mode=0o500)
    folders = [str(blocker / "kernels"), "/proc/nowhere/kernels", str(read_only)]
    body = f"""
    results = []
    for folder in {folders!r}:
        os.environ["FASTOPT_CACHE_DIR"] = folder
        engine.compiled.cache_clear()
        results.append(sgd())
    say(*results)
    """
    assert run("", body) == ([0.75] * 3, ["sgd"] * 3)
    assert os.access(read_only, os.W_OK) or not files(read_only)
    assert blocker.read_text() == "not a folder"


def test_the_folder_without_a_choice_is_in_the_users_cache(tmp_path: Path) -> None:
    body = """
    first = sgd()
    del os.environ["XDG_CACHE_HOME"]
    engine.compiled.cache_clear()
    say(first, sgd())
    """
    places = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path / "home")}
    assert run("", body, **places) == ([0.75, 0.75], ["sgd", "sgd"])
    (name,) = files(tmp_path / "xdg" / "fastopt")
    assert list(files(tmp_path / "home" / ".cache" / "fastopt")) == [name]


@functools.cache
def compiled_here() -> Any:
    """A kernel that was compiled in this process, so that it can be kept: one from disk cannot."""
    return engine._make_kernel(sgd, ("fp32", "fp32"), 3, NO_OPTIONS, False, "compiled_here")


def with_checksum(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest() + payload


KEY = f"sgd_{0:032x}"
Damage = Callable[[Path], None]


def content(make: Callable[[Path], Any]) -> Damage:
    """A right checksum around another payload."""
    return lambda file: with_payload(file, make(file))


def with_payload(file: Path, value: Any) -> None:
    file.write_bytes(with_checksum(value if isinstance(value, bytes) else pickle.dumps(value)))


def under_another_name(file: Path) -> None:
    """A kernel that works, but is not this one."""
    cache.save(f"sgd_{1:032x}", compiled_here())
    os.replace(file.with_name(f"sgd_{1:032x}.kernel"), file)


def in_place_of_it(make: Callable[[Path], Any]) -> Damage:
    def replace(file: Path) -> None:
        file.rename(file.with_name("moved"))
        make(file)

    return replace


DAMAGE: dict[str, Damage] = {
    "no pickle": content(lambda file: b"nonsense"),
    "nothing": content(lambda file: b""),
    "another type": content(lambda file: 7),
    "the parts of an older version": content(lambda file: ([], pickle.dumps(("a", "b")))),
    "parts that are none": content(lambda file: (KEY, [], pickle.dumps(("a", "b")))),
    "parts of other types": content(lambda file: (KEY, [], pickle.dumps(tuple("abcdefghi")))),
    "symbols that are none": content(lambda file: (KEY, 7, pickle.dumps(tuple("abcdefghi")))),
    "a class that is gone": content(lambda file: b"cnowhere\nnothing\n."),
    "half a payload": content(lambda file: file.read_bytes()[32:900]),
    "under another name": under_another_name,
    "empty": lambda file: file.write_bytes(b""),
    "torn": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a FIFO": in_place_of_it(os.mkfifo),
    "a link": in_place_of_it(lambda file: file.symlink_to("moved")),
    "a link to nothing": in_place_of_it(lambda file: file.symlink_to("nowhere")),
    "others can write": lambda file: file.chmod(0o620),
    "not readable": lambda file: file.chmod(0),
}
if os.geteuid() == 0:
    DAMAGE["of another user"] = lambda file: os.chown(file, 54321, 54321)
    del DAMAGE["not readable"]  # root reads it


@pytest.fixture
def in_time() -> Iterator[None]:
    """An error where a call waits for ever."""

    def late(*_: object) -> None:
        raise AssertionError("blocked")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_loaded_is_compiled_again_and_replaced(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    assert cache.save(KEY, compiled_here())
    assert cache.load(KEY) is not None
    file, made = tmp_path / f"{KEY}.kernel", []

    def make(key: str) -> Any:
        made.append(key)
        return compiled_here()

    DAMAGE[damage](file)
    for _ in range(2):
        assert callable(cache.obtain(KEY, make).entry_point)
    assert made == [KEY]
    assert file.is_file()
    assert not file.is_symlink()
    assert cache.load(KEY) is not None


def test_these_checks_see_a_stale_kernel(tmp_path: Path) -> None:
    """A cache that goes by the name of a rule alone."""
    body = (
        RULES
        + f"""
    engine.disk.key = lambda rule, *_: rule.__name__
    minus, plus = (make({PLAIN!r}.format(sign=sign)) for sign in "-+")
    say(run(minus, 0.5), run(plus, 0.5))
    """
    )
    assert run(tmp_path, body)[0] != [0.5, 1.5]
