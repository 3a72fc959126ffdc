"""Compiled kernels on disk, found again by what they were made from.

numba's own cache does not serve here: it does not see an edit in a rule the kernel closes over (a
stale kernel is a wrong answer), misses in every process for such a closure and adds a file each
time, and raises where the package folder is read-only. The key here is everything the machine code
depends on: the source of the kernels, the rule's code, the specialization, Numba, LLVM, Python and
the CPU. A folder that cannot be written means no cache, never an error.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from types import CodeType, FunctionType
from typing import NamedTuple

import llvmlite
import numba
from llvmlite import binding
from numba.core import compiler, registry, serialize
from numba.core.runtime.nrt import rtsys

ENVIRONMENT = "FASTOPT_CACHE_DIR"


def folder() -> Path:
    """Where kernels are kept: $FASTOPT_CACHE_DIR, or `fastopt` in the user's cache folder."""
    if chosen := os.environ.get(ENVIRONMENT):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fastopt"


def _hash_environment() -> bytes:
    """Hash of every kernel source and of the compilers and CPU they are compiled with."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent
    for source in sorted([*package.glob("*.py"), package.parent / "xp.py"]):
        digest.update(source.read_bytes())
    facts = (
        sys.version,
        numba.__version__,
        llvmlite.__version__,
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
        sorted((k, v) for k, v in os.environ.items() if k.startswith("NUMBA_")),
    )
    digest.update(repr(facts).encode())
    return digest.digest()


# Taken at import: sources replaced under a running process are not what it compiles.
_ENVIRONMENT_HASH = _hash_environment()


def _code_facts(code: CodeType) -> tuple[object, ...]:
    constants = tuple(
        _code_facts(c) if isinstance(c, CodeType) else (type(c).__name__, repr(c))
        for c in code.co_consts
    )
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_argcount


def key(function: FunctionType, *specialization: object) -> str:
    """What a kernel is kept under: a rule uses nothing but its arguments and `xp`, so its own code
    says all of it; whatever else a kernel uses is in the sources."""
    digest = hashlib.sha256(_ENVIRONMENT_HASH)
    digest.update(repr((_code_facts(function.__code__), specialization)).encode())
    return f"{function.__name__}_{digest.hexdigest()[:32]}"


# Symbols of the parallel bodies in this process. Numba names one by an address of the process that
# compiled it, so two kernels from disk may share a name, and the first would serve for both.
_bodies: set[str] = set()
_lock = threading.Lock()


def _path(key: str) -> Path:
    return folder() / f"{key}.kernel"


def load(key: str) -> compiler.CompileResult | None:
    """The compiled kernel of that key, or None: a missing, torn or foreign file is no error."""
    try:
        content = _path(key).read_bytes()
    except OSError:
        return None
    checksum, payload = content[:32], content[32:]
    if hashlib.sha256(payload).digest() != checksum:
        return None
    try:
        bodies, reduced = pickle.loads(payload)
        arguments = pickle.loads(reduced)
    except Exception:
        return None
    if not _claim(bodies):
        return None
    target = registry.cpu_target.target_context
    rtsys.initialize(target)
    return compiler.CompileResult._rebuild(target, *arguments)


def _claim(bodies: list[str]) -> bool:
    """Take symbols for a kernel; false where another kernel of this process has one of them."""
    if not _bodies.isdisjoint(bodies):
        return False
    _bodies.update(bodies)
    return True


def named(function, tag):
    """Mangled names are made of this one and a count of the process: kernels of two processes must
    not meet under one symbol in a third, where the first loaded would serve for both."""
    function.__name__ = function.__qualname__ = f"{function.__name__}_{tag}"
    return function


class Obtained(NamedTuple):
    """How a kernel came: from disk or compiled, in how many seconds; and what makes it anew."""

    from_disk: bool
    seconds: float
    make: Callable[[str], compiler.CompileResult]


# Every kernel of this process, by its key.
obtained: dict[str, Obtained] = {}


def obtain(key: str, make: Callable[[str], compiler.CompileResult]) -> compiler.CompileResult:
    """The kernel of that key: from disk, or made by make(key) and kept for later processes."""
    with _lock:
        start = perf_counter()
        compiled = load(key)
        from_disk = compiled is not None
        while compiled is None:
            compiled = make(key)
            if not save(key, compiled):
                compiled = None
        obtained[key] = Obtained(from_disk, perf_counter() - start, make)
    return compiled


def save(key: str, compiled: compiler.CompileResult) -> bool:
    """Keep a kernel for later processes; many may write it at once, each replaces it whole.

    False where this process has loaded another kernel with one of its symbols: compile it anew.
    """
    names = [function.name for function in compiled.library._final_module.functions]
    bodies = [name for name in names if "numba_parfor_gufunc" in name]
    if not _claim(bodies):
        return False
    if compiled.library.has_dynamic_globals:
        return True
    payload = pickle.dumps((bodies, serialize.dumps(compiled._reduce())))
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder(), delete=False) as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        os.replace(file.name, _path(key))
    except OSError:
        pass
    return True
