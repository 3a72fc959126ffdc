"""A cache folder that others can write to: what they put there is not executed."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.optim.workers import environment

STEP = """
import torch, fastopt
param = torch.nn.Parameter(torch.zeros(4))
optimizer = fastopt.optim.SGD([param], lr=0.5)
for _ in range(2):
    param.grad = torch.ones(4)
    optimizer.step()
print(param.tolist())
"""
SAID = "[-1.0, -1.0, -1.0, -1.0]\n"


class Planted:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def step(folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", STEP],
        env=environment(FASTOPT_CACHE_DIR=str(folder)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == SAID
    return done


def plant(folder: Path, marker: Path) -> None:
    """Every kernel of a folder is another one's, with a right checksum, as a whole or inside."""
    for n, kernel in enumerate(sorted(folder.glob("*.kernel"))):
        planted = Planted(marker)
        payload = pickle.dumps((kernel.stem, [], pickle.dumps(planted)) if n % 2 else planted)
        kernel.write_bytes(hashlib.sha256(payload).digest() + payload)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a process has kept its kernels in."""
    folder = tmp_path_factory.mktemp("top") / "above" / "cache"
    assert "Warning" not in step(folder).stderr
    assert len([*folder.iterdir()]) >= 2
    return folder


def check_not_executed(
    kept: Path, open_it: Callable[[Path], Path], run: Callable[[Path], Any] = step
) -> None:
    """One warning names the folder and the chmod; afterwards the folder can be used again."""
    marker = kept.parent.parent / "ran"
    plant(kept, marker)
    opened = open_it(kept)
    try:
        done = run(kept)
        assert not marker.exists()
        assert done.stderr.count("RuntimeWarning") == 1
        assert f"chmod go-w {opened}" in done.stderr
        assert str(kept) in done.stderr
    finally:
        marker.unlink(missing_ok=True)
        opened.chmod(0o700)


def open_the_folder(folder: Path) -> Path:
    folder.chmod(0o777)
    return folder


def open_one_above(folder: Path) -> Path:
    folder.parent.chmod(0o775)
    return folder.parent


@pytest.mark.parametrize("open_it", [open_the_folder, open_one_above])
def test_what_was_planted_is_not_executed(kept: Path, open_it: Callable[[Path], Path]) -> None:
    check_not_executed(kept, open_it)


def test_a_file_that_others_could_write_is_not_executed(kept: Path) -> None:
    """In a folder of the user's alone: compiled again and replaced, without a word."""
    marker = kept.parent.parent / "ran"
    plant(kept, marker)
    planted = {path: path.read_bytes() for path in kept.glob("*.kernel")}
    for path in planted:
        path.chmod(0o666)
    assert step(kept).stderr == ""
    assert not marker.exists()
    assert all(path.read_bytes() != content for path, content in planted.items())


def test_these_checks_see_what_is_executed(kept: Path) -> None:
    def unpickle(folder: Path) -> Any:
        for kernel in folder.glob("*.kernel"):
            pickle.loads(kernel.read_bytes()[32:])

    with pytest.raises(AssertionError):
        check_not_executed(kept, open_the_folder, unpickle)
