"""From which size on results should leave past the caches: what decides PAST of
`cpu/base/streaming_stores.py`.

    python -m bench.output_report --out bench/results

Five layers, each of which reads what the one before wrote and writes as much (x -> 1.1 x, float32),
by ordinary stores and by those that go past the caches, in turns; times as fast, median (quartiles)
over rounds. alone: one such layer again and again on the same memory, whose results nobody reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import torch
from numba import njit, prange, types
from torch import Tensor

from bench import machine, timing
from bench.measure import copy_gb_per_s
from bench.render import conditions, markdown_table, ms, spread
from bench.sections import publish
from bench.timing import Ratio, Subject
from fastopt_kernels.cpu.base import memory, streaming_stores

MEGABYTES = (1, 2, 4, 8, 16, 32, 64, 128)
LAYERS, ELEMENTS = 5, 16384
Record = dict[str, Any]

_load = memory.make_loader("fp32", types.float32, 0)
_store = memory.make_storer("fp32", types.float32, True, 1)
_place, _send = streaming_stores.make_streaming_stores(4)
_room, _settle, SPAN = streaming_stores.staging, streaming_stores.fence, streaming_stores.SPAN


@njit(nogil=True, fastmath={"contract"})
def _block(x, y, first, past):
    scratch = _room()
    for start in range(first, first + ELEMENTS, SPAN):
        to = _place(y, scratch, start, past)
        for i in range(start, start + SPAN):
            _store(to, i, _load(x, i) * types.float32(1.1))
        _send(y, scratch, start, start + SPAN, past)
    _settle(past)


@njit("void(int64, int64, int64, boolean)", nogil=True, parallel=True)
def _layer(x, y, blocks, past):
    for k in prange(blocks):
        _block(x, y, k * ELEMENTS, past)


def _chain(tensors: list[Tensor], past: bool) -> Callable[[], None]:
    blocks, places = tensors[0].numel() // ELEMENTS, [t.data_ptr() for t in tensors]

    def run() -> None:
        for x, y in pairwise(places):
            _layer(x, y, blocks, past)

    return run


def measure(seconds: float) -> Iterator[Record]:
    """One record a size."""
    for size in MEGABYTES:
        record: Record = {"megabytes": size}
        for name, layers in (("layers", LAYERS), ("alone", 1)):
            tensors = [torch.ones(size << 18) for _ in range(layers + 1)]
            subjects = {past: Subject(_chain(tensors, past == "past")) for past in ("kept", "past")}
            for subject in subjects.values():
                subject.warm()
            timings = timing.interleave(subjects, seconds)
            ratio = Ratio.of(timings["kept"], timings["past"])
            times = {key: t.record(2 * layers * tensors[0].nbytes) for key, t in timings.items()}
            record[name] = {"times": times, "ratio": asdict(ratio)}
        yield record


def at_a_glance(report: dict[str, Any]) -> str:
    """The table, and the machine it was measured on."""
    head = ["MB a result", "kept ms", "past ms", "times as fast", "alone"]
    lines = [
        (
            str(record["megabytes"]),
            ms(record["layers"]["times"]["kept"]["ms"]),
            ms(record["layers"]["times"]["past"]["ms"]),
            spread(record["layers"]["ratio"]),
            spread(record["alone"]["ratio"]),
        )
        for record in report["cases"]
    ]
    return f"{markdown_table(head, lines)}\n\n{conditions(report)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size")
    args = parser.parse_args()
    numba.set_num_threads(torch.get_num_threads())
    report = {
        "machine": machine.describe(),
        "quick": False,
        "copy_gb_per_s": copy_gb_per_s(),
        "cases": list(measure(args.seconds)),
    }
    text = f"# Results past the caches\n\n{at_a_glance(report)}"
    publish(args.out, "cpu_outputs", report, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
