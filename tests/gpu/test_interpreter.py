"""Runs the tests of this folder that need Triton's interpreter, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.conftest import INTERPRETED

HERE = Path(__file__).parent
# The interpreter takes one core: so many processes share the modules.
PROCESSES = 2


def test_the_kernels_pass_their_tests_in_tritons_interpreter(tmp_path: Path) -> None:
    running = []
    for k in range(PROCESSES):
        modules = [str(HERE / module) for module in INTERPRETED[k::PROCESSES]]
        log = tmp_path / f"{k}.log"
        with log.open("w") as output:
            command = [sys.executable, "-m", "pytest", *modules, "-p", "no:cacheprovider", "-x"]
            process = subprocess.Popen(
                command,
                cwd=HERE.parent.parent,
                env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        running.append((process, log))
    codes = [process.wait() for process, _ in running]
    for code, (_, log) in zip(codes, running, strict=True):
        said = log.read_text()
        assert code == 0, said[-6000:]
        assert " passed" in said
        assert "skipped" not in said
