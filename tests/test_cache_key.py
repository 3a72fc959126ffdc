"""The key of a kernel on disk: all that its machine code depends on, and nothing that differs
between processes which should share it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from numba import njit, types

import fastopt
import fastopt_kernels
from fastopt_kernels.cpu.base import cache, memory
from tests.optim.workers import environment

PACKAGES = {
    package.__name__: Path(package.__file__).parent for package in (fastopt, fastopt_kernels)
}
KERNELS = PACKAGES["fastopt_kernels"]
# Triton compiles the rest.
SOURCES = sorted(
    str(path.relative_to(KERNELS))
    for path in KERNELS.rglob("*.py")
    if path.relative_to(KERNELS).parts[0] != "gpu"
)
TIMEOUT = 300


def python(code: str, cwd: Path, **more: str) -> Any:
    """The JSON that a process prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment(**more),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of both packages, to be edited."""
    folder = tmp_path_factory.mktemp("copied")
    for name, path in PACKAGES.items():
        shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


# Of one process: keys of a step and of a function of each module, after an edit of each source.
EDITS = """
    import importlib, json, pathlib, re, sys
    sys.dont_write_bytecode = True
    root = pathlib.Path({root!r})
    from fastopt_kernels.chunks import NO_OPTIONS
    from fastopt_kernels.cpu.base import cache_key
    from fastopt_kernels.cpu.step import engine
    assert cache_key.__file__.startswith(str(root))

    def sgd(p, g, weight_decay, lr):
        return (p - lr * (g + weight_decay * p),)

    functions = {{}}
    for name in {modules!r}:
        module = importlib.import_module(name)
        own = [f for f in vars(module).values() if getattr(f, "__module__", None) == name]
        plain = [f for f in own if type(f) is type(sgd)]
        if plain:
            functions[name] = plain[0]

    def keys():
        cache_key._SOURCES = cache_key.read_sources(cache_key.PACKAGE)
        found = {{name: cache_key.key(function) for name, function in functions.items()}}
        step = engine.key_of.__wrapped__(sgd, ("fp32",) * 2, 3, NO_OPTIONS, False)
        return found | {{"step": step}}

    found = {{"": keys(), "again": keys()}}
    for name, file in {modules!r}.items():
        path = root / file
        source = path.read_text()
        path.write_text(source + "EDITED = 1\\n")
        found[name] = keys()
        path.write_text(source)
    path = root / "fastopt" / "__init__.py"
    path.write_text(re.sub("__version__ = .*", "__version__ = '99'", path.read_text()))
    del sys.modules["fastopt_kernels.cpu.base.cache_key"]
    cache_key = importlib.import_module("fastopt_kernels.cpu.base.cache_key")
    found["version"] = {{"step": cache_key.key(sgd), "before": found[""]["step"]}}
    print(json.dumps(found))
"""
Keys = dict[str, dict[str, str]]


def modules() -> dict[str, str]:
    """Every module that Numba's kernels may be built from, and its file."""
    found = {}
    for source in SOURCES:
        parts = ("fastopt_kernels", *Path(source).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = os.path.join("fastopt_kernels", source)
    return found


def imported(name: str, known: dict[str, str]) -> set[str]:
    """The modules that a module is built from: itself, and all that it imports, by their syntax."""
    found, waiting = set[str](), [name]
    while waiting:
        module = waiting.pop()
        if module not in known or module in found:
            continue
        found.add(module)
        source = (KERNELS.parent / known[module]).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                parts = node.module.split(".")
                waiting += [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
                waiting += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.fixture(scope="module")
def keys(copied: Path) -> Keys:
    """The keys of the kernels of each module after an edit of each source; "" before all."""
    code = textwrap.dedent(EDITS).format(root=str(copied), modules=modules())
    return python(code, copied, PYTHONPATH=str(copied))  # type: ignore[no-any-return]


def check_edits(keys: Keys) -> None:
    known, before = modules(), keys[""]
    assert keys["again"] == before
    for kernel, key in before.items():
        module = "fastopt_kernels.cpu.step.engine" if kernel == "step" else kernel
        changed = {edited for edited in known if keys[edited][kernel] != key}
        assert changed == imported(module, known), kernel


def test_a_key_covers_the_modules_that_a_kernel_is_built_from_and_no_others(keys: Keys) -> None:
    rows = {name for name in modules() if name.startswith("fastopt_kernels.cpu.rows.")}
    assert len(rows) > 15
    assert {"step", *rows} <= keys[""].keys()
    check_edits(keys)
    step = keys[""]["step"]
    assert keys["fastopt_kernels.cpu.rows.dropout"]["step"] == step
    assert keys["fastopt_kernels.chunks"]["step"] != step


def test_another_version_is_another_key(keys: Keys) -> None:
    assert keys["version"]["step"] != keys["version"]["before"]


def test_no_kernel_of_numba_is_made_of_a_source_for_triton() -> None:
    for name in SOURCES:
        source = (KERNELS / name).read_text()
        assert "fastopt_kernels.gpu" not in source, name
        assert "fastopt_kernels import gpu" not in source, name


def test_two_versions_share_a_folder_and_no_kernel(tmp_path: Path, copied: Path) -> None:
    """Blocks of another size: their scales have another one, which a stale kernel writes beyond."""
    new = tmp_path / "new"
    shutil.copytree(copied, new)
    chunks = new / "fastopt_kernels" / "chunks.py"
    source = chunks.read_text()
    assert "\nBLOCK_8BIT = 256\n" in source
    chunks.write_text(source.replace("\nBLOCK_8BIT = 256\n", "\nBLOCK_8BIT = 512\n"))
    code = """
        import json, torch, fastopt
        from fastopt_kernels import chunks
        p = torch.nn.Parameter(torch.ones(4096))
        optimizer = fastopt.optim.SGD([p], momentum=0.9, state_dtype="8bit")
        for _ in range(9):
            p.grad = torch.linspace(-1, 2, 4096)
            optimizer.step()
        print(json.dumps([chunks.BLOCK_8BIT, bool(p.isfinite().all())]))
    """
    folder = tmp_path / "kernels"
    more = {"FASTOPT_CACHE_DIR": str(folder), "MALLOC_CHECK_": "3"}
    assert python(code, tmp_path, **more) == [256, True]
    before = set(folder.iterdir())
    assert python(code, tmp_path, PYTHONPATH=str(new), **more) == [512, True]
    assert len(set(folder.iterdir()) - before) == len(before)


# Of one process: the key under each setting, and after it.
SETTINGS = """
    import json, os, pathlib, warnings
    warnings.simplefilter("ignore")  # where there is no YAML
    from numba.core import config
    from fastopt.optim.sgd import sgd
    from fastopt_kernels.cpu.base import cache, memory

    def key():
        return cache.key(sgd, ("fp32", "fp32"), 3)

    keys = {"": key()}
    environment = {
        "OPT": "1", "LOOP_VECTORIZE": "0", "SLP_VECTORIZE": "1", "BOUNDSCHECK": "1",
        "ENABLE_AVX": "0", "CPU_NAME": "generic", "CPU_FEATURES": "-avx2", "DEBUGINFO": "1",
        "NUM_THREADS": "1", "THREADING_LAYER": "workqueue", "COLOR_SCHEME": "dark_bg",
        "DISABLE_PERFORMANCE_WARNINGS": "1", "CACHE_DIR": "/nowhere",
        "THREADING_LAYER_PRIORITY": "omp tbb workqueue",
    }
    for name, value in environment.items():
        os.environ["NUMBA_" + name] = value
        keys[name] = key()
        del os.environ["NUMBA_" + name]
        assert key() == keys[""]
    for name, value in {"OPT": 0, "BOUNDSCHECK": 0, "LLVM_REFPRUNE_PASS": 0}.items():
        before = getattr(config, name)
        setattr(config, name, value)
        keys["config." + name] = key()
        setattr(config, name, before)
    file = pathlib.Path(".numba_config.yaml")
    file.write_text("opt: 1")
    keys["file"] = key()
    file.unlink()
    keys["after"] = key()
    print(json.dumps(keys))
"""
NO_CODE = (
    "NUM_THREADS", "THREADING_LAYER", "THREADING_LAYER_PRIORITY", "COLOR_SCHEME",
    "DISABLE_PERFORMANCE_WARNINGS", "CACHE_DIR",
)  # fmt: skip


def test_settings_of_numba_that_change_code_are_in_the_key(tmp_path: Path) -> None:
    """Of the environment, assigned in code, or in a file; and no others."""
    keys = python(SETTINGS, tmp_path)
    assert keys.pop("after") == keys[""]
    assert {name for name, key in keys.items() if name and key == keys[""]} == set(NO_CODE)
    changed = [key for name, key in keys.items() if name not in ("", *NO_CODE)]
    assert len(set(changed)) == len(changed)


def rule_of(source: str, **scope: Any) -> FunctionType:
    exec(source, scope)
    return scope["rule"]


def jitted(constant: float, **options: Any) -> Any:
    def scaled(x):  # type: ignore[no-untyped-def]
        return constant * x

    return njit(**options)(scaled)


def module_of(**contents: Any) -> Any:
    module = type(json)("constants")
    vars(module).update(contents)
    return module


GLOBAL = "def rule(p, g, lr):\n    return (p - SCALE * g,)"
HELPER = "def rule(p, g, lr):\n    return (p - scaled(g),)"
INNER = "def rule(p, g, lr):\n    return (p - (lambda x: SCALE * x)(g),)"
MODULE = "def rule(p, g, lr):\n    return (p - constants.SCALE * g,)"
DEFAULT = "def rule(p, g, lr=SCALE):\n    return (p - lr * g,)"
LARGE = np.arange(5000.0)
CHANGED = LARGE + (LARGE == 2500)
CONSTANT = "def rule(p, g, lr):\n    return (p - {} * g,)"
DIFFERENT: dict[str, tuple[Callable[[], FunctionType], Callable[[], FunctionType]]] = {
    "constant": tuple(lambda x=x: rule_of(CONSTANT.format(x)) for x in ("1.5", "2.5")),
    "type of a constant": tuple(lambda x=x: rule_of(CONSTANT.format(x)) for x in ("1", "True")),
    "global": tuple(lambda x=x: rule_of(GLOBAL, SCALE=x) for x in (1.5, 2.5)),
    "type of a global": tuple(
        lambda x=x: rule_of(GLOBAL, SCALE=x) for x in (np.float32(1), np.float64(1))
    ),
    "array": tuple(lambda x=x: rule_of(GLOBAL, SCALE=x) for x in (LARGE, CHANGED)),
    "tuple": tuple(lambda x=x: rule_of(GLOBAL, SCALE=x) for x in ((1.0, 2.0), (1.0, 3.0))),
    "global of an inner function": tuple(lambda x=x: rule_of(INNER, SCALE=x) for x in (1.5, 2.5)),
    "module": tuple(
        lambda x=x: rule_of(MODULE, constants=module_of(SCALE=x)) for x in (1.5, 2.5)
    ),
    "helper": tuple(lambda x=x: rule_of(HELPER, scaled=jitted(x)) for x in (1.5, 2.5)),
    "options of a helper": tuple(
        lambda x=x: rule_of(HELPER, scaled=jitted(1.5, fastmath=x)) for x in (False, True)
    ),
    "default": tuple(lambda x=x: rule_of(DEFAULT, SCALE=x) for x in (1.5, 2.5)),
}  # fmt: skip


def aliased(second: bool) -> FunctionType:
    """Calls two helpers of one name, one of them twice."""
    one, two = jitted(1.5), jitted(2.5)
    source = "def rule(p, g, lr):\n    return (a(p) - b(g) * c(lr),)"
    return rule_of(source, a=one, b=two, c=two if second else one)


def through_a_module(scale: float) -> FunctionType:
    """A helper takes what the rule does not from a module that both use."""
    constants = module_of(SCALE=scale, OTHER=1.0)
    scope = {"constants": constants, "njit": njit}
    exec("@njit\ndef scaled(x):\n    return constants.SCALE * x", scope)
    source = "def rule(p, g, lr):\n    return (p - constants.OTHER * zscaled(g),)"
    return rule_of(source, constants=constants, zscaled=scope["scaled"])


def made_by_the_package(n: int) -> FunctionType:
    """A helper that is of the package's code, and closes over what it was made with."""
    source = "def rule(p, g, lr):\n    return (p - row(g, lr)[0],)"
    return rule_of(source, row=memory.make_row(types.int64, n))


DIFFERENT["helper of the package"] = lambda: made_by_the_package(1), lambda: made_by_the_package(2)
DIFFERENT["which helper"] = lambda: aliased(False), lambda: aliased(True)
DIFFERENT["module of a helper"] = lambda: through_a_module(1.5), lambda: through_a_module(2.5)


def check_rules(key: Callable[[FunctionType], str]) -> None:
    for name, (first, second) in DIFFERENT.items():
        assert key(first()) != key(second()), name
        assert key(first()) == key(first()), name


def test_what_a_rule_refers_to_is_in_its_key() -> None:
    check_rules(cache.key)
    keys = {cache.key(rule()) for pair in DIFFERENT.values() for rule in pair}
    assert keys.isdisjoint(cache.cache_key.unshared)


def test_a_rule_that_refers_to_itself_has_a_key() -> None:
    source = "def rule(p, g, lr):\n    return rule(p, g, SCALE)"
    keys = [cache.key(rule_of(source, SCALE=scale)) for scale in (1.0, 1.0, 2.0)]
    assert keys[0] == keys[1] != keys[2]


def test_the_key_of_what_cannot_be_described_holds_in_one_process(tmp_path: Path) -> None:
    code = """
        import json
        from fastopt_kernels.cpu.base import cache, memory
        class Unknown:
            def __repr__(self):
                return "the same"
        scope = {"SCALE": Unknown()}
        exec("def rule(p, g, lr): return (p - SCALE * g,)", scope)
        print(json.dumps([cache.key(scope["rule"]) for _ in range(2)]))
    """
    first, second = (python(code, tmp_path) for _ in range(2))
    assert first[0] == first[1] != second[0]


def test_a_key_is_the_name_of_a_file_whatever_a_rule_is_called() -> None:
    rule = rule_of(CONSTANT.format(1.0))
    for name in ("<lambda>", "../../outside", "a" * 300):
        rule.__name__ = name
        assert os.path.basename(cache.key(rule)) == cache.key(rule)
        assert len(cache.key(rule)) < 200


def test_a_key_does_not_depend_on_the_seed_of_hashes(tmp_path: Path) -> None:
    code = """
        import json
        from fastopt_kernels.cpu.base import cache, memory
        scope = {"NAMES": frozenset(map(str, range(50)))}
        exec("def rule(p, g, lr): return (p if 'x' in {'a', 'b', 'c'} else NAMES,)", scope)
        print(json.dumps(cache.key(scope["rule"])))
    """
    assert len({python(code, tmp_path, PYTHONHASHSEED=seed) for seed in "12"}) == 1


def test_these_checks_see_a_key_that_covers_too_little(keys: Keys) -> None:
    with pytest.raises(AssertionError):
        check_rules(lambda rule: repr((rule.__code__.co_code, rule.__code__.co_consts)))
    with pytest.raises(AssertionError):
        check_edits({**keys, "fastopt_kernels.chunks": keys[""]})
