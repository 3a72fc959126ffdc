"""`fastopt doctor`: what it finds out is so, and each thing that is wrong is said with a remedy."""

from __future__ import annotations

import copy
import json
import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastopt
from fastopt.cli import doctor, main
from fastopt.cli.doctor import examine, findings
from fastopt.cli.shared import hardware, memory, plain
from tests.optim.workers import environment

ROOT = Path(__file__).resolve().parent.parent
GNU = ["/usr/lib/libgomp.so.1.0.0", "/site-packages/torch/lib/libgomp.so.1"]
COST = {"fresh_ms": 8.0, "reused_ms": 7.8, "page_faults": 0}
SLOW = {"fresh_ms": 56.4, "reused_ms": 7.6, "page_faults": 16385}
HEALTHY: dict[str, Any] = {
    "versions": {
        "fastopt": "0.1.0",
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "numba": "0.68.1",
        "llvmlite": "0.50.0",
        "triton": None,
        "numpy": "2.4.6",
    },
    "machine": {
        "cpu": "AMD EPYC",
        "cores": 2,
        "usable_cpus": 2.0,
        "caches": {"L2": "1024K"},
        "memory_gib": 23.5,
        "transparent_huge_pages": "madvise",
        "system": "Linux",
    },
    "backends": {
        "cpu": {
            "present": True,
            "device": "AMD EPYC",
            "compiler": "numba",
            "ready": True,
            "why": None,
            "first_call_s": 1.0,
        },
        "cuda": {
            "present": False,
            "device": None,
            "compiler": "triton",
            "ready": False,
            "why": "no GPU",
            "first_call_s": None,
        },
    },
    "threads": {
        "torch": 2,
        "numba": 2,
        "layer": "omp",
        "openmp": GNU,
        "openmp_error": None,
        "forked": False,
        "start_method": "fork",
        "wait_policy": None,
    },
    "memory": {
        "copy_gb_per_s": 30.0,
        "libc": "glibc 2.36",
        "setting": None,
        "output": COST,
        "output_kept": COST,
    },
    "cache": {"folder": "/home/me/.cache/fastopt", "kernels": 3, "bytes": 2**20, "error": None},
}


def facts(path: str = "", **changed: Any) -> dict[str, Any]:
    """HEALTHY with some facts changed, of the part that a dotted path leads to."""
    made = copy.deepcopy(HEALTHY)
    part = made
    for key in filter(None, path.split(".")):
        part = part[key]
    part.update(changed)
    return made


def test_a_healthy_machine_has_no_findings() -> None:
    assert findings.findings(HEALTHY) == []


@pytest.mark.parametrize(
    ("changed", "what", "remedy", "serious"),
    [
        (facts("versions", torch="2.10.1"), "torch 2.10.1: fastopt needs 2.11", ">=2.11", True),
        (facts("versions", torch="2.16.0a0+git1"), "newer than 2.15", "torch<=2.15.99", False),
        (facts("versions", numba="0.67.0"), "numba 0.67.0", "pip install 'numba>=0.68'", True),
        (facts("versions", triton="3.5.1"), "triton 3.5.1", "pip install 'triton>=3.6'", True),
        (facts("versions", python="3.10.2"), "python 3.10.2", "install python>=3.11", True),
        (
            facts("backends.cpu", ready=False, why="a kernel failed: OSError: no"),
            "no cpu kernels: a kernel failed: OSError: no",
            "pip install --force-reinstall numba",
            True,
        ),
        (
            facts("backends.cuda", present=True, why="triton is not installed"),
            "no cuda kernels: triton is not installed",
            "pip install triton",
            True,
        ),
        (facts("threads", forked=True), "this process was forked", "set_start_method", True),
        (
            facts("threads", layer="workqueue", openmp_error="libgomp.so.1: cannot open"),
            "workqueue: one kernel at a time in the whole process (no OpenMP: libgomp.so.1",
            "apt-get install libgomp1",
            True,
        ),
        (facts("threads", layer="workqueue"), "workqueue", "NUMBA_THREADING_LAYER=omp", True),
        (facts("threads", layer="tbb"), "numba runs on TBB", "NUMBA_THREADING_LAYER=omp", True),
        (
            facts("threads", openmp=[*GNU, "/opt/conda/lib/libiomp5.so"]),
            "GNU and Intel OpenMP in one process",
            "from one source",
            True,
        ),
        (facts("threads", wait_policy="ACTIVE"), "OMP_WAIT_POLICY=ACTIVE", "unset", True),
        (
            facts("machine", usable_cpus=1.5),
            "torch runs 2 threads where 1.5 CPUs may be used",
            "OMP_NUM_THREADS=1",
            True,
        ),
        (facts("threads", numba=1), "numba may use 1 threads", "NUMBA_NUM_THREADS=2", False),
        (
            facts("cache", error="Read-only file system"),
            "cannot be kept in /home/me/.cache/fastopt (Read-only file system)",
            "FASTOPT_CACHE_DIR=",
            True,
        ),
        (
            facts("cache", error="others can write to /x (mode 777)", remedy="chmod go-w /x"),
            "cannot be kept in /home/me/.cache/fastopt (others can write to /x (mode 777))",
            "chmod go-w /x",
            True,
        ),
        (
            facts("threads", missing="NUMBA_THREADING_LAYER=tbb"),
            "numba has no threading layer here for NUMBA_THREADING_LAYER=tbb: kernels run on omp",
            "unset NUMBA_THREADING_LAYER, or install",
            False,
        ),
        (
            facts("backends.cpu", ready=False, why="a kernel failed: NUMBA_DISABLE_JIT is set"),
            "no cpu kernels: a kernel failed: NUMBA_DISABLE_JIT is set",
            "unset NUMBA_DISABLE_JIT",
            True,
        ),
        (
            facts("memory", output=SLOW),
            "a new 64 MB output costs 56.4 ms, writing into one that exists 7.6 ms",
            f"export GLIBC_TUNABLES={memory.KEEP}",
            False,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said_with_its_remedy(
    changed: dict[str, Any], what: str, remedy: str, serious: bool
) -> None:
    (finding,) = findings.findings(changed)
    assert what in finding.what
    assert remedy in finding.remedy
    assert finding.serious == serious


def test_a_gpu_machine_can_do_without_numba() -> None:
    changed = facts("versions", numba=None)
    changed["backends"]["cpu"].update(ready=False, why="numba is not installed")
    (finding,) = findings.findings(changed)
    assert finding.serious
    changed["backends"]["cuda"].update(present=True, ready=True, why=None)
    (finding,) = findings.findings(changed)
    assert not finding.serious


@pytest.mark.parametrize("kept", [None, SLOW], ids=["unknown", "no better"])
def test_a_setting_that_does_not_help_is_not_advised(kept: dict[str, Any] | None) -> None:
    assert findings.findings(facts("memory", output=SLOW, output_kept=kept)) == []


def test_what_is_serious_comes_first() -> None:
    changed = facts("threads", numba=1)
    changed["cache"]["error"] = "no"
    assert [finding.serious for finding in findings.findings(changed)] == [True, False]


def test_the_oldest_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {"python": project["requires-python"].removeprefix(">=")}
    for dependency in project["dependencies"]:
        name, _, version = dependency.partition(";")[0].partition(">=")
        declared[name] = version
    assert {name: oldest for name, (oldest, _) in findings.SUPPORTED.items()} == declared


def test_json_has_every_fact_and_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"healthy", "findings", *HEALTHY}
    for part in HEALTHY:
        assert report[part].keys() == HEALTHY[part].keys(), part
    assert status == (0 if report["healthy"] else 1)
    assert report["healthy"] == (not any(one["serious"] for one in report["findings"]))
    assert report["backends"]["cpu"]["ready"], report["backends"]["cpu"]["why"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["threads"]["torch"] == torch.get_num_threads()
    if platform.system() == "Linux":
        assert any("libgomp" in path for path in report["threads"]["openmp"])
    measured = report["memory"]
    assert measured["copy_gb_per_s"] > 0
    if measured["libc"].startswith("glibc"):
        assert measured["output_kept"]["page_faults"] < 100


def test_plain_text_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(examine, "examine", lambda: HEALTHY)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line and not line.startswith(" ")] == [
        "versions", "machine", "backends", "threads", "memory", "kernels on disk", "healthy",
    ]  # fmt: skip
    assert "\x1b" not in out


@pytest.mark.parametrize("terminal", [False, True])
def test_a_problem_and_a_hint_make_status_1(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = facts("threads", layer="tbb", numba=1)
    monkeypatch.setattr(examine, "examine", lambda: changed)
    monkeypatch.setattr(plain, "is_terminal", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem: numba runs on TBB" in out
    assert "  remedy: NUMBA_THREADING_LAYER=omp\n" in out
    assert "hint: numba may use 1 threads" in out
    assert out.endswith("not healthy: 1 problem, 1 hint\n")


def test_a_terminal_without_rich_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert plain.is_terminal()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not plain.is_terminal()


def no_op(*arguments: Any, **options: Any) -> Any:
    class Nothing:
        step = staticmethod(lambda: None)

    return Nothing()


def softmax_of_the_negated(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.softmax(-x, dim)


@pytest.mark.parametrize(
    ("module", "name", "wrong", "why"),
    [
        (fastopt.functional, "softmax", softmax_of_the_negated, "softmax is not torch's"),
        (fastopt.optim, "AdamW", no_op, "a step of AdamW is not torch's"),
    ],
)
def test_a_backend_with_wrong_results_is_not_ready(
    module: Any, name: str, wrong: Callable[..., Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, wrong)
    backend = examine._backend("cpu")
    assert not backend["ready"]
    assert backend["why"] == why


def test_a_missing_and_a_broken_compiler_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("Numba needs NumPy 2.4 or less.\nMore text")

    monkeypatch.setitem(sys.modules, "numba", None)
    assert examine._backend("cpu")["why"] == "numba is not installed"
    monkeypatch.setattr("importlib.import_module", broken)
    why = examine._backend("cpu")["why"]
    assert why == "numba does not import: ImportError: Numba needs NumPy 2.4 or less."


def test_a_cache_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.kernel").write_bytes(bytes(1000))
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    whole = {"folder": str(tmp_path), "kernels": 1, "bytes": 1000, "error": None}
    assert examine._cache() == whole
    in_a_file = tmp_path / "one.kernel" / "folder"
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(in_a_file))
    assert examine._cache()["error"] == "Not a directory"


def test_openmp_libraries_are_told_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "torch/lib/libgomp-a34b3233.so.1", "lib/libiomp5.so", "lib/libomp.so.5", "lib/libompd.so",
        "lib/libc.so.6",
    )  # fmt: skip
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 fd:00 123                        /usr/{}\n"
    maps.write_text("".join(line.format(name) for name in names for _ in range(3)))
    monkeypatch.setattr(examine, "_MAPS", maps)
    found = examine._openmp()
    assert found == sorted(f"/usr/{name}" for name in names[:3])
    assert {findings._maker(path) for path in found} == {"GNU", "Intel", "LLVM"}


@pytest.mark.parametrize(("quota", "cpus"), [("50000 100000", 0.5), ("max 100000", None)])
def test_a_container_may_use_its_quota(
    quota: str, cpus: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlimited = hardware.usable_cpus()
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(hardware, "_QUOTA", tmp_path / "cpu.max")
    assert hardware.usable_cpus() == (unlimited if cpus is None else cpus)


FORKED = """
import os, sys
from fastopt.cli import main
from fastopt_kernels.cpu.base import threads
child = os.fork()
if child == 0:
    sys.exit(main(["doctor"]))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="forks")
def test_a_forked_child_runs_nothing_and_says_why() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "this is a forked one: nothing was run or measured" in done.stdout
    assert "problem: this process was forked from one that ran kernels" in done.stdout


def test_every_section_has_lines() -> None:
    for title, lines in doctor.sections(HEALTHY):
        assert lines, title
        assert all(value for _, value in lines), title
