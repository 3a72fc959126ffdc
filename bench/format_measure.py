"""AdamW at 33M by how parameters and states are stored, beside torch's fused step, its peers of
8 bits, and the fastest kernel that moves the same bytes.

Bytes an element: the gradient read; parameter, states and what a rounding keeps read and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fastopt
from bench import limit, timing
from bench.models import Gradients, make_parameters, n_elements
from bench.providers import NoStepError, import_peer
from bench.timing import Ratio, Subject, Timing

MODEL = "33m"
FUSED = "torch fused"
# At least so much of the limit.
SHARE = 0.85
Record = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """dtype: of parameters and gradients; options: of fastopt.optim.AdamW; goal: times as fast as
    torch's fused AdamW of `against`; streams: dtypes of what is written"""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]
    against: torch.dtype
    goal: float | None
    streams: tuple[torch.dtype, ...]

    @property
    def n_bytes(self) -> int:
        """Of one step; scales of 8-bit states, 4 bytes in 256, are left out."""
        each = self.dtype.itemsize + 2 * sum(dtype.itemsize for dtype in self.streams)
        return each * n_elements(MODEL)


_F32, _B16, _I16, _I8 = torch.float32, torch.bfloat16, torch.int16, torch.int8
EIGHT_BIT = Format("fp32, 8-bit states", _F32, {"state_dtype": "8bit"}, _F32, 1.5, (_F32, _I8, _I8))
FORMATS = (
    Format("fp32, telemetry", _F32, {"telemetry": True}, _F32, None, (_F32, _F32, _F32)),
    EIGHT_BIT,
    Format("all bf16, nearest", _B16, {}, _B16, 1.4, (_B16, _B16, _B16)),
    Format(
        "all bf16, stochastic",
        _B16,
        {"param_rounding": "stochastic"},
        _B16,
        1.1,
        (_B16, _B16, _B16),
    ),
    Format(
        "all bf16, kahan", _B16, {"param_rounding": "kahan"}, _B16, 1.1, (_B16, _B16, _B16, _B16)
    ),
    Format(
        "all bf16, master", _B16, {"param_rounding": "master"}, _B16, 1.1, (_B16, _B16, _B16, _I16)
    ),
    Format(
        "bf16, states bf16 and fp32",
        _B16,
        {"state_dtype": torch.bfloat16, "param_rounding": "stochastic"},
        _B16,
        None,
        (_B16, _B16, _F32),
    ),
    Format(
        "bf16 master, 8-bit states",
        _B16,
        {"state_dtype": "8bit", "param_rounding": "master"},
        _B16,
        None,
        (_B16, _I8, _I8, _I16),
    ),
)
# Telemetry: at most so much more time than the plain step.
WATCHED = 1.10
# 8-bit optimizers of others: how many times as fast as they.
PEERS = {"bitsandbytes": ("bitsandbytes.optim", 25.0), "torchao": ("torchao.optim", 25.0)}
PEER_SECONDS = 10.0


def _subject(make: Callable[[list[Any]], Callable[[], Any]], dtype: torch.dtype) -> Subject:
    params = make_parameters(MODEL, dtype)
    step = make(params)
    subject = Subject(step, Gradients(MODEL, dtype, "rebound").binder(params))
    subject.warm()
    return subject


def _ours(options: dict[str, Any]) -> Callable[[list[Any]], Callable[[], Any]]:
    return lambda params: fastopt.optim.AdamW(params, **options).step


def _fused(params: list[Any]) -> Callable[[], Any]:
    return torch.optim.AdamW(params, fused=True).step


def measure(seconds: float) -> Iterator[Record]:
    """Each format in rounds of its own, with torch's step, the plain one and the limit."""
    for format in FORMATS:
        subjects = {
            "fastopt": _subject(_ours(format.options), format.dtype),
            FUSED: _subject(_fused, format.against),
            "plain": _subject(_ours({}), format.dtype),
        }
        kernels = limit.mixed(n_elements(MODEL), (format.dtype, *format.streams))
        subjects |= {name: Subject(step) for name, step in kernels.items()}
        for name in kernels:
            subjects[name].warm()
        yield _record(format, timing.interleave(subjects, seconds), list(kernels))


def _record(format: Format, timings: dict[str, Timing], kernels: list[str]) -> Record:
    ours, fastest = timings["fastopt"], min((timings[k] for k in kernels), key=lambda t: t.median)
    ratio, share = Ratio.of(timings[FUSED], ours), Ratio.of(fastest, ours)
    record = {
        "case": f"AdamW {MODEL}, {format.name}",
        "bytes": format.n_bytes,
        "times": {
            "fastopt": ours.record(format.n_bytes),
            FUSED: timings[FUSED].record(format.n_bytes),
            "plain": timings["plain"].record(format.n_bytes),
            "limit": fastest.record(format.n_bytes),
        },
        "ratio": asdict(ratio),
        "goal": format.goal,
        "met": format.goal is None or ratio.median >= format.goal,
        "share": asdict(share),
        "share_goal": SHARE,
        "share_met": share.median >= SHARE,
    }
    if format.options.get("telemetry"):
        record["beyond"] = asdict(Ratio.of(ours, timings["plain"]))
        record["beyond_goal"] = WATCHED
        record["beyond_met"] = record["beyond"]["median"] <= WATCHED
    return record


def peers() -> Iterator[Record]:
    """8-bit AdamW against others' in float32; one that is not there says why."""
    for name, (module, goal) in PEERS.items():
        case = f"AdamW {MODEL}, fp32, 8-bit states, against {name}"
        try:
            cls = import_peer(module).AdamW8bit
            theirs = _subject(lambda params, cls=cls: cls(params, lr=1e-3).step, torch.float32)
        except (NoStepError, RuntimeError) as error:
            yield {"case": case, "error": str(error).splitlines()[0]}
            continue
        ours = _subject(_ours(EIGHT_BIT.options), torch.float32)
        timings = timing.interleave({"fastopt": ours, name: theirs}, PEER_SECONDS)
        n_bytes = EIGHT_BIT.n_bytes
        ratio = Ratio.of(timings[name], timings["fastopt"])
        yield {
            "case": case,
            "bytes": n_bytes,
            "times": {k: taken.record(n_bytes) for k, taken in timings.items()},
            "ratio": asdict(ratio),
            "goal": goal,
            "met": ratio.median >= goal,
        }
