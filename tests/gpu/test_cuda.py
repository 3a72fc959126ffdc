"""Every check of the GPU report, on the device of this machine."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA or HIP device", allow_module_level=True)

from bench.gpu_device import Cuda
from bench.gpu_rows import NotApplicableError, Row
from bench.gpu_worker import rows_of

DEVICE = Cuda()
ROWS = [
    row
    for section in ("engine", "optim", "combinations", "device", "functions", "large")
    for row in rows_of(section, DEVICE, quick=False)
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_check_of_the_report_passes(row: Row) -> None:
    """The checks' own wrong candidates are rows too: "a wrong rule is found out"."""
    try:
        row.run()
    except NotApplicableError as reason:
        pytest.skip(str(reason))
