"""One process of the report: the rows of one section, or of one shard of it.

python -m bench.gpu_worker SECTION [--shard I/N] [--quick] LOG DEADLINE
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.gpu_device import Cuda, Device, Interpreted
from bench.gpu_interpret import is_interpreted, route_cpu_to_triton
from bench.gpu_rows import Log, Row, run_rows

SECTIONS = ("engine", "optim", "device", "functions", "speed", "function_speed", "tuning")


def rows_of(section: str, device: Device, quick: bool, compiled: bool) -> Iterable[Row]:
    """quick: small sizes; compiled: with torch.compile among those timed."""
    if section == "engine":
        from bench import gpu_check_engine
        from fastopt_kernels.gpu import engine

        return gpu_check_engine.rows(device, engine, quick)
    if section == "optim":
        from bench import gpu_check_formats, gpu_check_optim, gpu_check_passes

        checks = (gpu_check_optim, gpu_check_passes, gpu_check_formats)
        return itertools.chain.from_iterable(check.rows(device, quick) for check in checks)
    if section == "device":
        from bench import gpu_check_device

        return gpu_check_device.rows(device, quick)
    if section == "functions":
        from bench import gpu_check_functions

        return gpu_check_functions.rows(device, quick)
    if section == "function_speed":
        from bench import gpu_speed_functions

        return gpu_speed_functions.rows(device, quick, compiled)
    if section == "speed":
        from bench import gpu_speed

        return gpu_speed.rows(device, quick, compiled)
    from bench import gpu_tune
    from fastopt_kernels.gpu import engine

    return gpu_tune.rows(device, engine, quick)


def _device() -> Device:
    if is_interpreted():
        from fastopt_kernels.gpu import engine

        route_cpu_to_triton()
        torch.set_num_threads(1)
        return Interpreted(engine)
    return Cuda()


def _lost(device: Device) -> bool:
    """Whether an error of the device has been left behind that no later row would survive."""
    try:
        device.synchronize()
        if device.device.type != "cpu":
            torch.ones(1, device=device.device).item()
    except Exception:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("log", type=Path)
    parser.add_argument("deadline", type=float)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    shard, n_shards = map(int, options.shard.split("/"))
    device = _device()
    rows = rows_of(options.section, device, options.quick, options.compile)
    mine = itertools.islice(rows, shard, None, n_shards)
    log = Log(options.log)
    return run_rows(options.section, mine, log, options.deadline, lambda: _lost(device))


if __name__ == "__main__":
    sys.exit(main())
