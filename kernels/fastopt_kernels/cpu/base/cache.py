"""Compiled kernels on disk, found again by what they were made from.

numba's own cache does not serve here: it does not see an edit in a rule the kernel closes over (a
stale kernel is a wrong answer), misses in every process for such a closure and adds a file each
time, and raises where the package folder is read-only. Here `cache_key` names a kernel by
everything its machine code depends on, and `cache_folder` keeps it where only the user writes.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

from numba.core import compiler, config, registry, serialize
from numba.core.runtime.nrt import rtsys

from fastopt_kernels.cpu.base import cache_folder, cache_key
from fastopt_kernels.cpu.base.cache_folder import folder
from fastopt_kernels.cpu.base.cache_key import key

__all__ = ["Obtained", "folder", "key", "load", "named", "obtain", "obtained", "save"]

# Symbols of the parallel bodies in this process. Numba names one by an address of the process that
# compiled it, so two kernels from disk may share a name, and the first would serve for both.
_bodies: set[str] = set()
_lock = threading.Lock()


def load(key: str) -> compiler.CompileResult | None:
    """The compiled kernel of that key, or None: a missing, torn or foreign file is no error."""
    if key in cache_key.unshared:
        return None
    content = cache_folder.read(f"{key}.kernel")
    if content is None:
        return None
    checksum, payload = content[:32], content[32:]
    if hashlib.sha256(payload).digest() != checksum:
        return None
    try:
        whose, bodies, reduced = pickle.loads(payload)
        # A file under the name of another one is a working kernel, but not this one.
        if whose != key or not _claim(bodies):
            return None
        target = registry.cpu_target.target_context
        rtsys.initialize(target)
        return compiler.CompileResult._rebuild(target, *pickle.loads(reduced))
    except Exception:  # whatever is in it, the kernel can be compiled
        return None


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
    """A kernel's origin: from disk or compiled, in how many seconds; and what makes it anew."""

    from_disk: bool
    seconds: float
    make: Callable[[str], compiler.CompileResult]


# Every kernel of this process, by its key.
obtained: dict[str, Obtained] = {}


def obtain(key: str, make: Callable[[str], compiler.CompileResult]) -> compiler.CompileResult:
    """The kernel of that key: from disk, or made by make(key) and kept for later processes.

    Raises RuntimeError where Numba is not to compile.
    """
    if config.DISABLE_JIT:
        raise RuntimeError(
            "NUMBA_DISABLE_JIT is set (in the environment, in .numba_config.yaml or as "
            "numba.config.DISABLE_JIT), and fastopt's CPU kernels are compiled by Numba. Unset it "
            "before Python starts, or use torch's own optimizers and functions while you debug."
        )
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
    if key not in cache_key.unshared and not compiled.library.has_dynamic_globals:
        payload = pickle.dumps((key, bodies, serialize.dumps(compiled._reduce())))
        cache_folder.write(f"{key}.kernel", hashlib.sha256(payload).digest() + payload)
    return True
