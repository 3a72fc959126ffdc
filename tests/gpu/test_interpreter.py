"""Runs the tests of this folder that need Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.conftest import INTERPRETED

HERE = Path(__file__).parent


def test_the_kernels_pass_their_tests_in_tritons_interpreter() -> None:
    modules = [str(HERE / module) for module in INTERPRETED]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *modules, "-p", "no:cacheprovider", "-x"],
        cwd=HERE.parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
