"""Rows: what torch.compile makes of the functions it is timed for, made beside the checks.

Inductor compiles each for seconds, on the host. It keeps what it made on the disk, where the
process that times finds it: that one process then has the time to measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bench.gpu_device import Device
from bench.gpu_rows import NotApplicableError, Row
from bench.gpu_timed import TimedCase, cases, compiled


def rows(device: Device, quick: bool) -> Iterator[Row]:
    chosen = list(cases(quick))[:1] if quick else [case for case in cases(quick) if case.compiled]
    for case in chosen:
        yield Row(f"torch.compile: {case.name}", partial(_compile, device, case), 20)


def _compile(device: Device, case: TimedCase) -> None:
    """Both passes, as they are timed."""
    if device.device.type == "cpu":
        raise NotApplicableError("it is the GPU's code that is kept")
    function, work = compiled(case.eager), case.work(device)
    for backward in (False, True):
        work.step(function, backward)()
    device.synchronize()
