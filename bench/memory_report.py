"""Bytes a parameter that an AdamW holds, by how parameters and states are stored.

    python -m bench.memory_report --out bench/results

Counted after a step, over every storage that parameters, gradients and states hold; gradients that
are released are freed in backward, where the most that is there at once is the largest one. Saved:
the length of the file that torch.save writes of the optimizer's state_dict.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastopt
from bench import machine
from bench.render import conditions, markdown_table, yes
from bench.sections import publish

TENSORS, NUMEL = 64, 1 << 16
# 8-bit states, 16 low bits beside bf16, gradients released: at most.
GOAL = 6.1
Record = dict[str, Any]
_F32, _B16 = torch.float32, torch.bfloat16
# Name, dtype of the parameters, options, whether gradients are released.
FORMATS: tuple[tuple[str, torch.dtype, dict[str, Any], bool], ...] = (
    ("float32", _F32, {}, False),
    ("float32, 8-bit states", _F32, {"state_dtype": "8bit"}, False),
    ("float32, 8-bit states, released", _F32, {"state_dtype": "8bit"}, True),
    ("bf16, states bf16", _B16, {}, False),
    ("bf16 kahan, states bf16", _B16, {"param_rounding": "kahan"}, False),
    ("bf16 master, states float32", _B16, {"param_rounding": "master", "state_dtype": _F32}, False),
    (
        "bf16 stochastic, 8-bit states",
        _B16,
        {"param_rounding": "stochastic", "state_dtype": "8bit"},
        False,
    ),
    ("bf16 master, 8-bit states", _B16, {"param_rounding": "master", "state_dtype": "8bit"}, False),
    (
        "bf16 master, 8-bit states, released",
        _B16,
        {"param_rounding": "master", "state_dtype": "8bit"},
        True,
    ),
    (
        "bf16 stochastic, 8-bit states, released",
        _B16,
        {"param_rounding": "stochastic", "state_dtype": "8bit"},
        True,
    ),
)


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages behind these tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure(name: str, dtype: torch.dtype, options: dict[str, Any], released: bool) -> Record:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(NUMEL, dtype=dtype)) for _ in range(TENSORS)]
    optimizer = fastopt.optim.AdamW(params, **options)
    if released:
        optimizer.release_gradients()
    sum(p.square().sum() for p in params).backward()
    optimizer.step()
    n = TENSORS * NUMEL
    states = [t for state in optimizer.state.values() for t in state.values()]
    grads = [p.grad for p in params if p.grad is not None]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    bytes_each = held([*params, *grads, *states]) / n
    goal = GOAL if released and options.get("param_rounding") == "master" else None
    return {
        "format": name,
        "parameters": held(params) / n,
        "gradients": held(grads) / n,
        "states": held(states) / n,
        "bytes": bytes_each,
        "saved": len(file.getvalue()) / n,
        "goal": goal,
        "met": goal is None or bytes_each <= goal,
    }


def at_a_glance(report: Record) -> str:
    """The formats and the machine: for docs."""
    keys = ("parameters", "gradients", "states", "bytes", "saved")
    lines = [
        (
            record["format"],
            *(f"{record[key]:.2f}" for key in keys),
            f"at most {record['goal']}: {yes(record['met'])}" if record["goal"] else "",
        )
        for record in report["records"]
    ]
    head = ("AdamW", "parameters", "gradients", "states", "in all", "saved state_dict", "goal")
    return f"{markdown_table(head, lines)}\n\n{conditions(report)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    report = {
        "machine": machine.describe(),
        "quick": False,
        "copy_gb_per_s": None,
        "records": [measure(*format) for format in FORMATS],
    }
    text = f"# Bytes a parameter\n\n{at_a_glance(report)}"
    publish(options.out, "memory", report, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
