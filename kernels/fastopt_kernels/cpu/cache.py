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
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

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


def _rule_facts(rule: FunctionType) -> tuple[object, ...] | None:
    """What a rule's machine code depends on; None where that cannot be told."""
    used = []
    for name in rule.__code__.co_names:
        value = rule.__globals__.get(name)
        if isinstance(value, (bool, int, float)):
            used.append((name, repr(value)))
        elif value is not None and not isinstance(value, ModuleType):
            return None
    return _code_facts(rule.__code__), tuple(used)


def key(rule: FunctionType, *specialization: object) -> str | None:
    """What a kernel is kept under, or None for one that cannot be kept."""
    facts = _rule_facts(rule)
    if facts is None:
        return None
    digest = hashlib.sha256(_ENVIRONMENT_HASH)
    digest.update(repr((facts, specialization)).encode())
    return f"{rule.__name__}_{digest.hexdigest()[:32]}"


# Symbols of the parallel bodies in this process. Numba names one by an address of the process that
# compiled it, so two kernels from disk may share a name, and the first would serve for both.
_bodies: set[str] = set()


def _path(key: str) -> Path:
    return folder() / f"{key}.kernel"


def load(key: str | None) -> compiler.CompileResult | None:
    """The compiled kernel of that key, or None: a missing, torn or foreign file is no error."""
    if key is None:
        return None
    try:
        content = _path(key).read_bytes()
    except OSError:
        return None
    checksum, payload = content[:32], content[32:]
    if hashlib.sha256(payload).digest() != checksum:
        return None
    bodies, reduced = pickle.loads(payload)
    if not _bodies.isdisjoint(bodies):
        return None
    _bodies.update(bodies)
    target = registry.cpu_target.target_context
    rtsys.initialize(target)
    return compiler.CompileResult._rebuild(target, *pickle.loads(reduced))


def save(key: str | None, compiled: compiler.CompileResult) -> None:
    """Keep a kernel for later processes; many may write it at once, each replaces it whole."""
    names = [function.name for function in compiled.library._final_module.functions]
    bodies = [name for name in names if "numba_parfor_gufunc" in name]
    _bodies.update(bodies)
    if key is None or compiled.library.has_dynamic_globals:
        return
    payload = pickle.dumps((bodies, serialize.dumps(compiled._reduce())))
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder(), delete=False) as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        os.replace(file.name, _path(key))
    except OSError:
        return
