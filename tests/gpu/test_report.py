"""The GPU report without a GPU: its checks in the interpreter, and what it does with bad rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_aims, gpu_calls, gpu_plots, gpu_supervise, gpu_tables
from bench.gpu_rows import FAIL, NO_TIME, NOT_HERE, PASS, Log, NotApplicableError, Row, run_rows
from bench.gpu_supervise import supervise
from bench.gpu_variants import EVERY, ORDERED, VARIANTS
from bench.providers import FASTOPT, FUSED

ROOT = Path(__file__).parent.parent.parent
SCRIPT = str(ROOT / "bench" / "gpu_report.py")
FOREVER = 1e12


def report(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = report("--out", "results", cwd=tmp_path)
    assert done.returncode == 2
    assert "needs a CUDA or HIP device" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_passes_every_check_it_can(tmp_path: Path) -> None:
    done = report("--out", "results", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {gpu_tables.JSON_NAME, gpu_tables.MARKDOWN_NAME, *gpu_plots.NAMES.values()}
    found = json.loads((tmp_path / "results" / gpu_tables.JSON_NAME).read_text())
    assert found["finished"]
    assert {row["section"] for row in found["rows"]} == set(gpu_tables.TITLES)
    passed = [row for row in found["rows"] if row["status"] == PASS]
    assert len(passed) > 50
    assert {row["status"] for row in found["rows"]} == {PASS, NOT_HERE}
    for key in ("date", "commit", "device", "torch", "triton", "kernel sources"):
        assert found["machine"][key]
    text = (tmp_path / "results" / gpu_tables.MARKDOWN_NAME).read_text()
    assert "AdamW tiny fp32 clipped" in text
    assert done.stdout.strip().splitlines()[-1].startswith(f"{len(passed)} pass, 0 fail")


WITH_A_WRONG_RULE = """
import sys
from fastopt.optim import adam

def wrong(p, g, m, v, weight_decay, decay, step_size, mu, beta2, nu, eps, v_scale):
    return p, m, v

adam.adam.__code__ = wrong.__code__
from bench.gpu_worker import main
sys.exit(main())
"""


def test_a_wrong_rule_fails_its_rows_and_no_others(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(WITH_A_WRONG_RULE)
    env = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, str(script), "engine", "--quick", "--shard", "0/1"]
    rows = supervise("engine", command, tmp_path, FOREVER, env)
    failed = {row["row"] for row in rows if row["status"] == FAIL}
    assert {"step: AdamW", "skip: AdamW", "missing gradients"} <= failed
    assert {row["row"] for row in rows if row["status"] == PASS} >= {
        "step: NAdam",
        "step: SGD momentum",
        "skip: RMSprop centered momentum",
    }


def fails() -> None:
    raise ValueError("off by one")


def does_not_apply() -> None:
    raise NotApplicableError("one device")


def test_rows_that_fail_do_not_apply_or_come_too_late_stop_no_other(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    rows = [
        Row("good", lambda: {"x": 1}),
        Row("bad", fails),
        Row("elsewhere", does_not_apply),
        Row("long", lambda: None, seconds=10_000),
        Row("last", lambda: None),
    ]
    assert run_rows("s", rows, log, time.time() + 1000, lambda: False) == 0
    records = {record["row"]: record for record in log.read() if record["event"] == "end"}
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "good": PASS, "bad": FAIL, "elsewhere": NOT_HERE, "long": NO_TIME, "last": PASS
    }  # fmt: skip
    assert records["good"]["data"] == {"x": 1}
    assert records["bad"]["detail"] == "ValueError: off by one"
    assert run_rows("s", [Row("bad", fails)], log, FOREVER, lambda: True) == 0, "done already"


WORKER = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from bench.gpu_rows import Log, Row, run_rows

def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

rows = [
    Row("one", lambda: None, 0),
    Row("crash", lambda: os.abort(), 0),
    Row("two", lambda: None, 0),
    Row("lost", lost, 0),
    Row("three", lambda: None, 0),
    Row("hang", lambda: time.sleep({hang}), 0),
    Row("four", lambda: None, 0),
]
print("some output", flush=True)
log, deadline = Log(Path(sys.argv[1])), float(sys.argv[2])
sys.exit(run_rows("s", rows, log, deadline, lambda: True))
"""


def test_a_process_that_dies_costs_the_row_it_died_in(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), hang=0))
    rows = supervise("s", [sys.executable, str(script)], tmp_path, time.time() + 60)
    statuses = {row["row"]: row["status"] for row in rows}
    assert statuses == {
        "one": PASS, "crash": FAIL, "two": PASS, "lost": FAIL, "three": PASS, "hang": PASS,
        "four": PASS,
    }  # fmt: skip
    crash = next(row["detail"] for row in rows if row["row"] == "crash")
    assert "died: -6" in crash
    assert "some output" in crash


def test_a_row_that_hangs_is_ended_with_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_supervise, "GRACE_S", 0.2)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), hang=600))
    start = time.time()
    rows = supervise("s", [sys.executable, str(script)], tmp_path, start + 4)
    assert time.time() - start < 60
    statuses = {row["row"]: row["status"] for row in rows}
    assert statuses["hang"] == FAIL
    assert statuses["four"] == NO_TIME


def test_a_process_that_does_not_start_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such module')"]
    (row,) = supervise("s", command, tmp_path, FOREVER)
    assert row["status"] == FAIL
    assert "no such module" in row["detail"]


def a_report(**more: Any) -> dict[str, Any]:
    times = {"ms": 0.5, "alone_ms": 0.6, "host_ms": 0.1, "gbps": 4000.0, "share": 0.9}
    providers = {
        gpu_tables.FASTOPT: times | {"kernels": 1, "copies": 1, "kernel_share": 0.95},
        gpu_tables.FUSED: times | {"ms": 1.0},
        gpu_tables.FOREACH: {"unavailable": "no | foreach"},
    }
    data: dict[str, Any] = {"providers": providers, "copy_gbps": 4300.0, "bytes": 10**9}
    data["times_as_fast_as"] = {"torch fused": 2.0}
    speed = {"section": "speed", "row": "AdamW 33m", "status": PASS, "detail": "", "data": data}
    bad = {"section": "engine", "row": "step: SGD", "status": FAIL, "detail": "p\noff by | one"}
    return {"machine": {"device": "none"}, "finished": True, "rows": [speed, bad]} | more


def test_the_tables_show_speeds_and_failures(tmp_path: Path) -> None:
    gpu_tables.write(tmp_path, a_report())
    text = (tmp_path / gpu_tables.MARKDOWN_NAME).read_text()
    assert "| AdamW 33m | 0.500 | 4000 | 90 % | 95 % | 0.600 | 0.100 | 1 + 1 | 1.000 |" in text
    assert "**engine: step: SGD**: p off by \\| one" in text
    assert "no \\| foreach" in text
    short = gpu_tables.short(a_report())
    assert short.splitlines()[-1] == "1 pass, 1 fail, 0 out of time, 0 not here"


def test_what_falls_short_is_named() -> None:
    data = {
        "bytes": 2**30,
        "providers": {FASTOPT: {"share": 0.91}, FUSED: {"share": 0.97}},
        "times_as_fast_as": {FUSED: 0.94, "torch foreach": 1.5},
    }
    rows = [{"section": "speed", "row": "AdamW 33m", "data": data}]
    assert gpu_aims.shortfalls(rows) == [
        "AdamW 33m: 91 % of a copy (92 %), 0.94 times as fast as torch fused"
    ]
    small = {**data, "bytes": 2**20, "times_as_fast_as": {FUSED: 1.0}}
    assert gpu_aims.shortfalls([{"row": "AdamW mlp", "data": small}]) == []


def test_every_public_function_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_calls.missing() == []
    fewer = [call for call in gpu_calls.CALLS if call.function != "group_norm"]
    monkeypatch.setattr(gpu_calls, "CALLS", fewer)
    assert gpu_calls.missing() == ["group_norm"]


@pytest.mark.parametrize("optimizer", ORDERED)
def test_every_optimizer_is_timed_in_every_way_it_serves(optimizer: str) -> None:
    served = {name for name in EVERY if VARIANTS[name].serves(optimizer)}
    assert served >= set(EVERY) - {"fp32 8-bit"}
    assert ("fp32 8-bit" in served) == (optimizer not in ("Adagrad", "Adadelta", "Adamax"))


def test_bytes_of_a_step() -> None:
    """g read, p and two moments read and written, in float32, bf16 or codes with their scales."""
    assert VARIANTS["fp32"].n_bytes("AdamW") == 28
    assert VARIANTS["fp32 clipped"].n_bytes("AdamW") == 32
    assert VARIANTS["fp32 8-bit"].n_bytes("AdamW") == 12 + 4 * (1 + 4 / 256)
    assert VARIANTS["bf16 stochastic"].n_bytes("SGD") == 10
    assert VARIANTS["bf16 master"].n_bytes("AdamW") == 14 + 4


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    gpu_tables.write(tmp_path, a_report())
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(KeyError):
        gpu_tables.write(tmp_path, a_report(rows=[{"row": "no section"}], finished=False))
    after = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after[gpu_tables.MARKDOWN_NAME] == before[gpu_tables.MARKDOWN_NAME]
