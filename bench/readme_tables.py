"""The short tables of the README: speed, bytes a parameter, optimizers by storage."""

from __future__ import annotations

from typing import Any

from bench.render import markdown_table, ms

Report = dict[str, Any]

# Case and allocator in cpu_optim.json, what it is, and the provider it is compared with.
STEPS = (
    ("AdamW gpt2", "warm", "AdamW, GPT-2's 148 tensors", "torch fused"),
    ("AdamW 1000x1000", "default", "AdamW, 1000 tensors of 1000", "torch fused"),
    ("SGD 33m", "warm", "SGD with momentum, 33M parameters", "torch fused"),
)
# Case in cpu_passes.json, what it is, and the provider it is compared with.
PASSES = (
    (
        "unscale + clip + AdamW + EMA, gpt2",
        "unscale, clip, AdamW and average, GPT-2's tensors",
        "torch",
    ),
    (
        "AdamW 33m, fp32, 8-bit states, against torchao",
        "AdamW with 8-bit states, 33M",
        "torchao",
    ),
    (
        "AdamW 33m, fp32, 8-bit states, against bitsandbytes",
        "AdamW with 8-bit states, 33M",
        "bitsandbytes",
    ),
)
# Case in cpu_rows.json, and what it is.
ROWS = (
    ("softmax 4096x4096 fp32", "softmax, 4096 x 4096"),
    ("softmax 256x1024 fp32", "softmax, 256 x 1024"),
    ("cross_entropy 4096x4096 fp32", "cross_entropy, 4096 x 4096"),
    ("layer_norm 4096x4096 fp32", "layer_norm, 4096 x 4096"),
)
# Formats in memory.json that the README shows.
FORMATS = (
    "float32",
    "float32, 8-bit states",
    "bf16, states bf16",
    "bf16 master, states float32",
    "bf16 stochastic, 8-bit states",
    "bf16 master, 8-bit states, released",
)


def speed(optim: Report, passes: Report, rows: Report) -> str:
    """fastopt's time beside what one would otherwise run, from three reports."""
    lines = []
    for case, allocator, title, provider in STEPS:
        record = _only(optim["cases"], case=case, allocator=allocator)
        lines.append(_line(title, record, provider, record["ratios"][provider]))
    for case, title, provider in PASSES:
        record = _only((*passes["records"], *passes["peers"]), case=case)
        lines.append(_line(title, record, provider, record["ratio"]))
    for case, title in ROWS:
        record = _only(rows["cases"], case=f"{case}, forward + backward", allocator="warm")
        lines.append(_line(f"{title}, with backward", record, "ATen", record["ratios"]["ATen"]))
    head = ("what", "fastopt ms", "against", "its ms", "times as fast")
    return markdown_table(head, lines) + "\n"


def _only(records: Any, **wanted: str) -> Report:
    (record,) = (r for r in records if all(r.get(key) == wanted[key] for key in wanted))
    return dict(record)


def _line(title: str, record: Report, provider: str, ratio: Report) -> tuple[str, ...]:
    ours, theirs = record["times"]["fastopt"]["ms"], record["times"][provider]["ms"]
    shown = "torch" if provider == "ATen" else provider
    return (title, ms(ours), shown, ms(theirs), f"{ratio['median']:.3g}")


def memory(report: Report) -> str:
    """Bytes a parameter of AdamW by storage format."""
    keys = ("parameters", "gradients", "states", "bytes", "saved")
    head = ("AdamW", "parameters", "gradients", "states", "in all", "checkpoint")
    records = (_only(report["records"], format=name) for name in FORMATS)
    lines = [(r["format"], *(f"{r[key]:.2f}" for key in keys)) for r in records]
    return markdown_table(head, lines) + "\n"


def storage(report: Report) -> str:
    """A row for each set of optimizers that take the same storage formats with every option."""
    taken: dict[str, dict[str, bool]] = {}
    for record in report["records"]:
        formats = taken.setdefault(record["optimizer"], {})
        works = all(outcome == "yes" for outcome in record["cells"].values())
        formats[record["format"]] = works and formats.get(record["format"], True)
    sets: dict[tuple[bool, ...], list[str]] = {}
    for optimizer, formats in taken.items():
        sets.setdefault(tuple(formats.values()), []).append(optimizer)
    names = next(iter(taken.values()))
    head = ("optimizers", *(f"states: {name}" for name in names))
    lines = [
        (", ".join(each), *("yes" if works else "refused" for works in key))
        for key, each in sets.items()
    ]
    return markdown_table(head, lines) + "\n"
