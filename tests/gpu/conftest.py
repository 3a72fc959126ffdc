"""Two kinds of test live here, in two kinds of process.

Triton's interpreter is chosen for a whole process, before triton is imported, and the gate needs
the compiler instead: what runs in the interpreter is collected only with TRITON_INTERPRET=1, and
`test_interpreter.py` runs it that way.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.gpu_interpret import is_interpreted, route_cpu_to_triton

INTERPRETED = [
    "test_averages.py",
    "test_documented.py",
    "test_engine.py",
    "test_formats.py",
    "test_optim.py",
    "test_passes.py",
    "test_rows_channel_norms.py",
    "test_rows_functional.py",
    "test_rows_loss_terms.py",
    "test_rows_losses.py",
    "test_rows_masked_softmax.py",
    "test_rows_norms.py",
    "test_rows_residual_norms.py",
    "test_rows_softmax.py",
    "test_rows_weight_norms.py",
    "test_telemetry.py",
]
COMPILED = [
    "test_cuda.py",
    "test_extents.py",
    "test_gate.py",
    "test_interpreter.py",
    "test_ranges.py",
    "test_report.py",
    "test_row_gate.py",
    "test_run_gate.py",
]

collect_ignore = COMPILED if is_interpreted() else INTERPRETED

if is_interpreted():
    route_cpu_to_triton()
    torch.set_num_threads(1)


@pytest.fixture
def kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels that are compiled are kept in a folder of this test's own.

    Triton's key of a kernel does not always see the part that a test has replaced. Kept where the
    others are, the wrong kernel would be launched for the right one by whoever comes later.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
