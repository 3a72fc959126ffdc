"""What an import brings along: a backend comes with the first step on its device, no sooner."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from tests.optim.workers import environment

# Packages that look as if they were not installed; who asked for them is remembered.
BLOCK = """
    import importlib.abc, json, sys
    asked = []

    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in BLOCKED:
                asked.append(name)
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Missing())

    def packages():
        names = {name.partition(".")[0] for name in sys.modules}
        return sorted(name for name in names if name not in sys.stdlib_module_names)

    def step(package):
        import torch
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = package.optim.SGD([p], lr=0.5)
        try:
            optimizer.step()
        except ImportError as error:
            return [p.tolist(), str(error), len(optimizer.state)]
        return [p.tolist(), None, len(optimizer.state)]
"""


def run(body: str, *blocked: str) -> Any:
    """What the script prints last, from JSON."""
    code = f"BLOCKED = {blocked!r}\n{textwrap.dedent(BLOCK)}\n{textwrap.dedent(body)}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without_triton() -> dict[str, Any]:
    """One process that imports torch and numpy, fastopt, and steps torch's and our optimizer."""
    return run(
        """
        import numpy, torch
        found = {"torch": packages()}
        import fastopt, fastopt.optim
        found["fastopt"] = packages()
        found["torch's step"] = step(torch)
        found["torch's packages"] = packages()
        asked.clear()
        found["our step"] = step(fastopt)
        found["our packages"] = packages()
        print(json.dumps({**found, "asked": asked}))
        """,
        "triton",
    )


def test_importing_fastopt_imports_torch_and_numpy_alone(without_triton: dict[str, Any]) -> None:
    added = set(without_triton["fastopt"]) - set(without_triton["torch"])
    assert added == {"fastopt", "fastopt_kernels"}
    assert not {"numba", "llvmlite", "triton"} & set(without_triton["fastopt"])


def test_a_step_on_the_cpu_neither_imports_nor_asks_for_triton(
    without_triton: dict[str, Any],
) -> None:
    """It runs where Triton is not installed. (Any optimizer's constructor has torch look for
    Triton: that was before.)"""
    assert without_triton["torch's step"] == without_triton["our step"] == [[0.5] * 3, None, 0]
    assert without_triton["asked"] == []
    added = set(without_triton["our packages"]) - set(without_triton["torch's packages"])
    assert {"numba", "llvmlite"} <= added


@pytest.fixture(scope="module")
def without_numba() -> dict[str, Any]:
    """One process with the GPU engine, which then tries a step on the CPU."""
    return run(
        """
        import fastopt
        import fastopt_kernels.gpu.engine
        found = {"engine": packages(), "asked": list(asked)}
        print(json.dumps({**found, "step": step(fastopt)}))
        """,
        "numba",
        "llvmlite",
    )


def test_the_gpu_engine_imports_where_numba_is_not_installed(without_numba: dict[str, Any]) -> None:
    assert "triton" in without_numba["engine"]
    assert not [name for name in without_numba["asked"] if name.startswith(("numba", "llvmlite"))]


def test_a_missing_compiler_is_named_with_its_remedy_before_anything_is_written(
    without_numba: dict[str, Any],
) -> None:
    value, message, states = without_numba["step"]
    assert "pip install numba" in message
    assert "cpu" in message
    assert value == [1.0] * 3
    assert states == 0


def test_these_checks_see_an_import_too_many() -> None:
    with pytest.raises(AssertionError, match="No module named 'numba'"):
        run("import numba", "numba")
    assert run(
        """
        try:
            import triton
        except ImportError:
            pass
        print(json.dumps(asked))
    """,
        "triton",
    ) == ["triton"]
