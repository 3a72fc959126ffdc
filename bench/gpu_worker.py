"""One process of the report: the rows of some sections, or of one shard of them.

python -m bench.gpu_worker SECTION[,SECTION...] [--shard I/N] [--quick] LOG DEADLINE
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.gpu_device import Cuda, Device, Interpreted
from bench.gpu_interpret import is_interpreted, route_cpu_to_triton
from bench.gpu_rows import Log, Row, run_rows

# The modules of each section: rows(device, quick), in this order.
SECTIONS = {
    "engine": ("gpu_check_engine",),
    "optim": ("gpu_check_optim", "gpu_check_passes", "gpu_check_formats"),
    "combinations": ("gpu_check_combinations",),
    "device": ("gpu_check_device", "gpu_check_variants"),
    "functions": ("gpu_check_functions",),
    "compiling": ("gpu_compiling",),
    "large": ("gpu_check_large",),
    "speed": ("gpu_speed",),
    "function_speed": ("gpu_speed_functions",),
    "tuning": ("gpu_tune",),
}


def rows_of(section: str, device: Device, quick: bool) -> Iterable[Row]:
    """quick: small sizes"""
    modules = (importlib.import_module(f"bench.{name}") for name in SECTIONS[section])
    return itertools.chain.from_iterable(module.rows(device, quick) for module in modules)


def _device() -> Device:
    if is_interpreted():
        route_cpu_to_triton()
        torch.set_num_threads(1)
        return Interpreted()
    return Cuda()


def _lost(device: Device) -> bool:
    """Whether an error of the device has been left behind that no later row would survive."""
    if device.broken:
        return True
    try:
        device.synchronize()
        if device.device.type != "cpu":
            torch.ones(1, device=device.device).item()
    except Exception:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("log", type=Path)
    parser.add_argument("deadline", type=float)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    shard, n_shards = map(int, options.shard.split("/"))
    device, log = _device(), Log(options.log)
    for section in options.sections.split(","):
        rows = itertools.islice(rows_of(section, device, options.quick), shard, None, n_shards)
        status = run_rows(section, rows, log, options.deadline, lambda: _lost(device))
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
