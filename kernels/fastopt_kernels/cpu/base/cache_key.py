"""The name of a compiled kernel on disk: a hash of everything its machine code depends on.

That is the sources of the modules it is built from, with all that they import; fastopt's version,
the rule and what it refers to, the specialization, Python, NumPy, Numba and its settings, LLVM and
the CPU. An edit of another module leaves the name as it is.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import secrets
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import NamedTuple

import llvmlite
import numba
import numpy as np
from llvmlite import binding
from numba.core import config, registry, types
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic

PACKAGE = Path(__file__).resolve().parent.parent.parent
# Triton compiles what is here: no kernel of Numba is made of it.
_GPU = "gpu"

# Settings of Numba that change no machine code, and may differ between processes that share their
# kernels. All others count, those of later versions too.
_NO_CODE = re.compile(
    "NUMBA_NUM_THREADS|NUMBA_DEFAULT_NUM_THREADS|THREADING_LAYER|THREADING_LAYER_PRIORITY|"
    "CACHE_.*|CUDA_.*|FORCE_CUDA_CC|GDB_BINARY|DEVELOPER_MODE|FULL_TRACEBACKS|SHOW_HELP|"
    "COLOR_SCHEME|HIGHLIGHT_DUMPS|DISABLE_PERFORMANCE_WARNINGS|ALWAYS_WARN_UNINIT_VAR"
)
# Stands for what cannot be described: no other process has it.
_THIS_PROCESS = secrets.token_hex(16)
# Keys that hold in this process alone.
unshared: set[str] = set()
# What is defined here is known by its name: the versions, or the sources, are in the key.
_NAMED = ("builtins", "numpy", "numba", PACKAGE.name)
_FOLDERS = tuple(
    os.path.join(os.path.realpath(path), "") for path in (PACKAGE, *numba.__path__, *np.__path__)
)
_STDLIB = os.path.join(os.path.realpath(sysconfig.get_path("stdlib")), "")
_BUILT_IN = (BuiltinFunctionType, type(np.append))
# Imports of this package, wherever they are in a source.
_IMPORT = re.compile(
    rf"^[ \t]*(?:from|import)[ \t]+({PACKAGE.name}[\w.]*)(?:[ \t]+import[ \t]+(\([^)]*\)|[^\n]*))?",
    re.MULTILINE,
)
# By their order: the functions that are described already, and the modules that were met.
Seen = dict[object, int]


class _Module(NamedTuple):
    name: str


def _modules(seen: Seen) -> list[str]:
    return [key.name for key in seen if isinstance(key, _Module)]


class Source(NamedTuple):
    """A module that kernels may be built from: the hash of its source, and those it imports."""

    digest: str
    imports: frozenset[str]


def read_sources(package: Path) -> dict[str, Source]:
    """Every module of a package but those for Triton, by its dotted name; none where they cannot be
    read, as in a zip file."""
    names = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] != _GPU:
            names[".".join((package.name, *parts)).removesuffix(".__init__")] = path
    try:
        texts = {name: path.read_bytes() for name, path in names.items()}
    except OSError:
        return {}
    return {
        name: Source(hashlib.sha256(text).hexdigest(), _imports(text.decode(), names))
        for name, text in texts.items()
    }


def _imports(source: str, known: Collection[str]) -> frozenset[str]:
    """Those of the known modules that a source imports, and the packages they are in."""
    found = set()
    for module, names in _IMPORT.findall(source):
        found.add(module)
        found.update(f"{module}.{name}" for name in re.findall(r"\w+", names))
    for module in list(found):
        parts = module.split(".")
        found.update(".".join(parts[:n]) for n in range(1, len(parts)))
    return frozenset(found.intersection(known))


def built_from(modules: Iterable[str], sources: Mapping[str, Source]) -> dict[str, str]:
    """The hash of each of these modules and of all that they import, by name."""
    found: dict[str, str] = {}
    waiting = [name for name in modules if name in sources]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = sources[name].digest
            waiting += sources[name].imports
    return dict(sorted(found.items()))


def _version() -> bytes:
    """The line with fastopt's version. To import fastopt for it would import torch."""
    with suppress(ImportError, ValueError, OSError):
        spec = importlib.util.find_spec("fastopt")
        if spec is not None and spec.origin is not None:
            source = Path(spec.origin).read_bytes()
            line = re.search(rb"^__version__\b.*$", source, re.MULTILINE)
            return line[0] if line else source
    return b""


def _toolchain() -> tuple[object, ...]:
    """Versions, flags and CPU: all that compiles the sources, apart from Numba's settings."""
    return (
        sys.version,
        sys.flags.optimize,
        np.__version__,
        numba.__version__,
        llvmlite.__version__,
        sorted((k, v) for k, v in os.environ.items() if k.startswith("LLVMLITE_")),
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
    )


# Taken at import: sources replaced under a running process are not what it compiles.
_SOURCES = read_sources(PACKAGE)
_ENVIRONMENT = (__name__ in _SOURCES or _THIS_PROCESS, _version(), _toolchain())


def _settings() -> tuple[object, ...]:
    """Numba's settings as they are now: of the environment, of a file, or assigned in code."""
    with suppress(RuntimeError):  # what it refuses to change stays as it is
        config.reload_config()  # as it does itself before it compiles
    file = Path(config._config_fname)
    with suppress(OSError):
        file = file.read_bytes()
    names = [name for name in dir(config) if name.isupper() and not _NO_CODE.fullmatch(name)]
    target = registry.cpu_target.target_context.codegen().magic_tuple()
    return file, [(name, repr(getattr(config, name))) for name in names], target


def key(function: FunctionType, *specialization: object) -> str:
    """Name for the kernel of a rule, or of the function that builds it, and a specialization.

    Where the rule is not of this package, the function that builds the kernel is in the
    specialization: the modules of functions are those whose sources count.
    """
    seen: Seen = {}
    facts = (_facts(function, seen), _facts(specialization, seen))
    sources = built_from(_modules(seen), _SOURCES)
    description = repr((_ENVIRONMENT, _settings(), sources, facts))
    name = re.sub(r"\W", "_", function.__name__)[:100]
    made = f"{name}_{hashlib.sha256(description.encode()).hexdigest()[:32]}"
    if _THIS_PROCESS in description:
        unshared.add(made)
    return made


def _facts(value: object, seen: Seen) -> object:
    """A description of a value that Numba may freeze into a kernel, the same in every process.

    seen: the functions that are described already, by their order
    """
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return type(value).__name__, repr(value)
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [_facts(item, seen) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted(repr(_facts(item, seen)) for item in value)
    if isinstance(value, dict):
        items = [(_facts(k, seen), _facts(v, seen)) for k, v in value.items()]
        return type(value).__name__, sorted(map(repr, items))
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        return "array", repr(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, CodeType):
        return _code_facts(value, seen)
    if isinstance(value, Dispatcher):
        return "jitted", _facts(value.py_func, seen), _facts(value.targetoptions, seen)
    if isinstance(value, _Intrinsic):
        return "intrinsic", _facts(value._defn, seen)
    if isinstance(value, functools._lru_cache_wrapper):
        return "cached", _facts(value.__wrapped__, seen)
    if isinstance(value, FunctionType):
        if id(value) in seen:
            return "seen", seen[id(value)]
        seen[id(value)] = len(seen)
        return _function_facts(value, seen)
    if isinstance(value, ModuleType):
        seen[_Module(value.__name__)] = len(seen)
        return "module", value.__name__
    if isinstance(value, _BUILT_IN) or (
        isinstance(value, type) and value.__module__.partition(".")[0] in _NAMED
    ):
        seen[_Module(value.__module__)] = len(seen)
        return "named", value.__module__, value.__qualname__
    if isinstance(value, (np.ufunc, types.Type)):
        return type(value).__name__, repr(value)
    return _THIS_PROCESS


def _code_facts(code: CodeType, seen: Seen) -> object:
    constants = [_facts(constant, seen) for constant in code.co_consts]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    return code.co_code, code.co_exceptiontable, constants, names, counts


def _function_facts(function: FunctionType, seen: Seen) -> object:
    """Facts of its code and of all that this refers to."""
    code, defaults = function.__code__, (function.__defaults__, function.__kwdefaults__)
    facts = [_code_facts(code, seen), _facts(defaults, seen)]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # empty as yet
            facts.append(_facts(cell.cell_contents, seen))
    if _is_known(code.co_filename):
        seen[_Module(function.__module__)] = len(seen)
        return facts
    names = set(_names(code))
    # Every compiler puts a module of its own in the place of `xp`.
    referred = {k: v for k, v in function.__globals__.items() if k in names and k != "xp"}
    return facts, list(_referred_facts(referred, names, seen))


def _is_known(file: str | None) -> bool:
    """True for a file whose contents the versions or the hash of the sources stand for."""
    path = os.path.realpath(file) if file else ""
    # The packages that are installed lie in the folder of the standard library too.
    in_stdlib = path.startswith(_STDLIB) and "-packages" not in path[len(_STDLIB) :]
    return in_stdlib or path.startswith(_FOLDERS)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _referred_facts(referred: dict[str, object], names: set[str], seen: Seen) -> Iterator[object]:
    """Facts of globals, and of what is taken from those that are modules."""
    for name, value in sorted(referred.items()):
        yield name, _facts(value, seen)
        if isinstance(value, ModuleType) and not _is_known(getattr(value, "__file__", None)):
            taken = {k: v for k, v in vars(value).items() if k in names}
            new = {k: v for k, v in taken.items() if (id(value), k) not in seen}
            seen.update({(id(value), k): len(seen) for k in new})
            yield from _referred_facts(new, names, seen)
