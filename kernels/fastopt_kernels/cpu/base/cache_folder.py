"""The folder of compiled kernels: where it is, who may write there, what is removed from it.

A kernel read from disk is executed, so only this user may have written it: the folder is the
user's alone, no folder on the way to it lets others put another one in its place, and a file is
checked after it is opened. Where this does not hold there is no cache, a warning says why, and
kernels are compiled. A folder that cannot be written means no cache either, without a warning.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ENVIRONMENT = "FASTOPT_CACHE_DIR"
SIZE = "FASTOPT_CACHE_SIZE"
# Kernels have 20 to 200 KB, those of all optimizers, functions and dtypes some 100 MB.
DEFAULT_MIB = 512
# Nothing takes so long to write.
LEFT_BEHIND_S = 3600
# What this module has written: nothing else in the folder is ever removed.
_KERNEL = re.compile(r"\w+_[0-9a-f]{32}\.kernel")
_TEMPORARY = re.compile(r"\w+_[0-9a-f]{32}\.kernel\.\w+\.tmp")

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Who may own the folders on the way beside the user: root, which is shown as the second number
# where a container does not know it.
_SYSTEM = (0, 65534)
_MAX_LINKS = 40
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_OWN = f"set {ENVIRONMENT} to the absolute path of a folder of your own"
_warned: set[str] = set()
_swept: set[Path] = set()


class Refusal(NamedTuple):
    """Why kernels are not kept in a folder, and what to do about it."""

    why: str
    remedy: str


class Visited(NamedTuple):
    """A folder or a link on the way to a folder; last: the folder itself."""

    path: Path
    status: os.stat_result
    last: bool


def folder() -> Path:
    """The folder of kernels: $FASTOPT_CACHE_DIR, or `fastopt` in the user's cache folder."""
    if chosen := os.environ.get(ENVIRONMENT):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fastopt"


def limit() -> int:
    """Bytes that all kernels together may have: $FASTOPT_CACHE_SIZE in MiB; 0 keeps none."""
    given = os.environ.get(SIZE) or DEFAULT_MIB
    try:
        mib = float(given)
    except ValueError:
        mib = math.nan
    if not 0 <= mib < math.inf:
        _warn_once(
            f"{SIZE}={given} is not a size in MiB (0 keeps no kernels): the limit of the kernels "
            f"on disk is {DEFAULT_MIB} MiB"
        )
        mib = DEFAULT_MIB
    return int(mib * 2**20)


def refusal(path: Path) -> Refusal | None:
    """Reason to read no kernels from a folder and write none to it; None where it may be used."""
    if not path.is_absolute():
        return Refusal(f"{path} is not an absolute path", _OWN)
    if hasattr(os, "geteuid"):  # on Windows a user's cache folder is the user's alone
        with suppress(OSError):  # what cannot be examined cannot be used either
            for visited in _visited(path):
                if found := _refusal_of(visited):
                    return found
    return None


def _refusal_of(visited: Visited) -> Refusal | None:
    place, status, last = visited
    mode, kind = stat.S_IMODE(status.st_mode), stat.S_IFMT(status.st_mode)
    is_own, sticky = status.st_uid == os.geteuid(), mode & stat.S_ISVTX
    if kind not in (stat.S_IFDIR, stat.S_IFLNK):
        return None  # nothing lies in it
    if not is_own and (last or status.st_uid not in _SYSTEM):
        why = f"{place} belongs to another user (uid {status.st_uid})"
        return Refusal(f"{why}, and what is read from there is executed", _OWN)
    if kind == stat.S_IFLNK or not mode & _OTHERS_WRITE or (sticky and not last):
        return None
    remedy = _OWN
    if is_own and not sticky:  # the mode of /tmp stays as it is
        clear = " && fastopt doctor --clear-cache" if last else ""
        remedy = f"chmod go-w {shlex.quote(str(place))}{clear}; or {_OWN}"
    why = f"others can write to {place} (mode {mode:o})"
    return Refusal(f"{why}, and what is read from there is executed", remedy)


def _visited(path: Path) -> Iterator[Visited]:
    """Every folder and link that leads to an absolute path, as far as there are any."""
    at, ahead, n_links = Path(path.anchor), list(reversed(path.parts[1:])), 0
    yield Visited(at, os.lstat(at), not ahead)
    while ahead:
        part = ahead.pop()
        at = at.parent if part == ".." else at / part
        status = os.lstat(at)
        if not stat.S_ISLNK(status.st_mode):
            yield Visited(at, status, not ahead)
            continue
        yield Visited(at, status, False)
        n_links += 1
        if n_links > _MAX_LINKS:
            raise OSError(f"{path} leads through more than {_MAX_LINKS} links")
        target = Path(os.readlink(at))
        ahead += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        at = Path(target.anchor) if target.is_absolute() else at.parent


def make(path: Path) -> None:
    """Make a folder that is the user's alone, and those it lies in that are not there."""
    if not path.is_dir():
        if path.parent != path:
            make(path.parent)
        with suppress(FileExistsError):  # another process has just made it
            path.mkdir(mode=0o700)


def read(name: str) -> bytes | None:
    """Content of a file of the folder; None where it is not a file that only this user wrote."""
    path = _usable()
    if path is None:
        return None
    try:
        with open(path / name, "rb", buffering=0, opener=_open) as file:
            status = os.fstat(file.fileno())
            if not _is_own(status):
                return None
            content = file.readall()
            _note_use(file.fileno(), status)
            return content
    except OSError:
        return None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | _FLAGS)


def _is_own(status: os.stat_result) -> bool:
    """A regular file that this user wrote and others cannot write."""
    if not stat.S_ISREG(status.st_mode):
        return False
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_WRITE


def _note_use(descriptor: int, status: os.stat_result) -> None:
    """The time of access says when a kernel was last used, on file systems without one too."""
    if os.utime in os.supports_fd:
        with suppress(OSError):
            os.utime(descriptor, ns=(time.time_ns(), status.st_mtime_ns))


def write(name: str, content: bytes) -> None:
    """Put a file into the folder, whole or not at all, and remove others beyond the limit."""
    path = _usable(make_it=True)
    if path is None:
        return
    try:
        descriptor, temporary = tempfile.mkstemp(".tmp", f"{name}.", path)
    except OSError:
        return
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path / name)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        return
    _shrink(path)


def _usable(make_it: bool = False) -> Path | None:
    """The folder, where kernels may be kept in it; made where it is not there and is to be."""
    path = folder()
    if limit() == 0:
        return None
    refused = refusal(path)
    if refused is None and make_it:
        try:
            make(path)
        except OSError:
            return None
        refused = refusal(path)  # another user may have made it in the meantime
    if refused is not None:
        _warn_once(
            f"fastopt keeps no compiled kernels in {path}, and every process compiles its own: "
            f"{refused.why}. Remedy: {refused.remedy}"
        )
        return None
    if path not in _swept:
        _swept.add(path)
        _sweep(path)
    return path


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _ours(path: Path, *patterns: re.Pattern[str]) -> list[os.DirEntry[str]]:
    """The files of a folder that this module gave their names."""
    with os.scandir(path) as entries:
        named = [e for e in entries if any(pattern.fullmatch(e.name) for pattern in patterns)]
    return [entry for entry in named if not entry.is_dir(follow_symlinks=False)]


def _sweep(path: Path) -> None:
    """Remove temporary files that processes left behind."""
    with suppress(OSError):
        for entry in _ours(path, _TEMPORARY):
            with suppress(OSError):  # another process has just removed it
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFT_BEHIND_S:
                    os.unlink(entry.path)


def _shrink(path: Path) -> None:
    """Remove the least recently used kernels beyond the limit."""
    kernels = []
    with suppress(OSError):
        for entry in _ours(path, _KERNEL):
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                used = max(status.st_atime_ns, status.st_mtime_ns)
                kernels.append((used, status.st_size, entry.path))
    excess = sum(size for _, size, _ in kernels) - limit()
    for _, size, kernel in sorted(kernels):
        if excess <= 0:
            return
        excess -= size
        with suppress(OSError):
            os.unlink(kernel)


def clear(path: Path) -> tuple[int, int]:
    """Remove all kernels and temporary files from a folder; how many these were, and their bytes.

    Raises OSError where one cannot be removed.
    """
    n_files = n_bytes = 0
    with suppress(FileNotFoundError):  # no folder: nothing to remove
        for entry in _ours(path, _KERNEL, _TEMPORARY):
            with suppress(FileNotFoundError):  # another process has just removed it
                size = entry.stat(follow_symlinks=False).st_size
                os.unlink(entry.path)
                n_files, n_bytes = n_files + 1, n_bytes + size
    return n_files, n_bytes
