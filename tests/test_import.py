"""What an import brings along: a backend comes with the first step on its device, no sooner."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses

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

    def rows(functional):
        # What each gives, with the gradient it leaves; or the error, and what it left.
        import torch
        found = {}
        for name, rest in ROWS.items():
            x = torch.tensor([[0.0, 2.0], [1.0, 1.0]], requires_grad=True)
            rest = [torch.tensor(r) if isinstance(r, list) else r for r in rest]
            try:
                y = getattr(functional, name)(x, *rest)
                y.sum().backward()
                found[name] = [y.tolist(), x.grad.tolist()]
            except ImportError as error:
                found[name] = [str(error), x.tolist(), x.grad]
        return found

    ROWS = {
        "softmax": [1], "log_softmax": [0], "logsumexp": [1], "cross_entropy": [[1, 0]],
        "layer_norm": [(2,)], "rms_norm": [(2,)],
    }
"""
NAMES = ("softmax", "log_softmax", "logsumexp", "cross_entropy", "layer_norm", "rms_norm")


def run(body: str, *blocked: str) -> Any:
    """What the script prints last, from JSON."""
    code = f"BLOCKED = {blocked!r}\n{textwrap.dedent(BLOCK)}\n{textwrap.dedent(body)}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
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
        before = set(sys.modules)
        import fastopt, fastopt.functional, fastopt.nn, fastopt.optim
        found["fastopt"] = packages()
        found["torch's modules"] = sorted(m for m in set(sys.modules) - before if "torch" in m)
        model = fastopt.swap(torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Softmax(1)))
        found["swapped"] = packages()
        found["torch's step"] = step(torch)
        found["torch's packages"] = packages()
        asked.clear()
        found["our step"] = step(fastopt)
        found["our packages"] = packages()
        found["rows"] = rows(fastopt.functional)
        model(torch.ones(2, 2)).sum().backward()
        print(json.dumps({**found, "asked": asked}))
        """,
        "triton",
    )


def test_importing_fastopt_imports_torch_and_numpy_alone(without_triton: dict[str, Any]) -> None:
    added = set(without_triton["fastopt"]) - set(without_triton["torch"])
    assert added == {"fastopt", "fastopt_kernels"}
    assert not {"numba", "llvmlite", "triton"} & set(without_triton["fastopt"])
    assert without_triton["swapped"] == without_triton["fastopt"]


def test_importing_fastopt_does_not_wake_torchs_compiler(without_triton: dict[str, Any]) -> None:
    """Registering ops must not bring along Dynamo or Inductor, which take seconds."""
    assert without_triton["torch's modules"] == []


def test_a_step_on_the_cpu_neither_imports_nor_asks_for_triton(
    without_triton: dict[str, Any],
) -> None:
    """It runs where Triton is not installed. (Any optimizer's constructor has torch look for
    Triton: that was before.)"""
    assert without_triton["torch's step"] == without_triton["our step"] == [[0.5] * 3, None, 0]
    assert without_triton["asked"] == []
    added = set(without_triton["our packages"]) - set(without_triton["torch's packages"])
    assert {"numba", "llvmlite"} <= added


def test_functions_on_the_cpu_run_where_triton_is_not_installed(
    without_triton: dict[str, Any],
) -> None:
    functions = {name: getattr(F, name) for name in NAMES if name != "logsumexp"}
    functions["logsumexp"] = torch.logsumexp
    rest = {"cross_entropy": torch.tensor([1, 0]), "layer_norm": (2,), "rms_norm": (2,)}
    assert list(without_triton["rows"]) == list(NAMES)
    for name, (y, grad) in without_triton["rows"].items():
        x = torch.tensor([[0.0, 2.0], [1.0, 1.0]], requires_grad=True)
        expected = functions[name](x, rest.get(name, 0 if name == "log_softmax" else 1))
        expected.sum().backward()
        torch.testing.assert_close(torch.tensor(y), expected.detach())
        torch.testing.assert_close(torch.tensor(grad), x.grad)


@pytest.fixture(scope="module")
def without_numba() -> dict[str, Any]:
    """One process with the GPU kernels, which then tries the CPU."""
    return run(
        """
        import importlib, pkgutil
        import fastopt, fastopt_kernels.gpu
        walked = pkgutil.walk_packages(fastopt_kernels.gpu.__path__, "fastopt_kernels.gpu.")
        modules = [module.name.removeprefix("fastopt_kernels.gpu.") for module in walked]
        for name in modules:
            importlib.import_module(f"fastopt_kernels.gpu.{name}")
        found = {"modules": modules, "packages": packages(), "asked": list(asked)}
        found["step"], found["rows"] = step(fastopt), rows(fastopt.functional)
        print(json.dumps(found))
        """,
        "numba",
        "llvmlite",
    )


def test_the_gpu_kernels_import_where_numba_is_not_installed(without_numba: dict[str, Any]) -> None:
    assert {"step.launch", "rows.softmax", "rows.layer_norm"} <= set(without_numba["modules"])
    assert "triton" in without_numba["packages"]
    assert not [name for name in without_numba["asked"] if name.startswith(("numba", "llvmlite"))]


def test_a_missing_compiler_is_named_with_its_remedy_before_anything_is_written(
    without_numba: dict[str, Any],
) -> None:
    value, message, states = without_numba["step"]
    assert "pip install numba" in message
    assert "cpu" in message
    assert value == [1.0] * 3
    assert states == 0
    assert list(without_numba["rows"]) == list(NAMES)
    for message, x, grad in without_numba["rows"].values():
        assert "pip install numba" in message
        assert x == [[0.0, 2.0], [1.0, 1.0]]
        assert grad is None


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
