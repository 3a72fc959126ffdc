"""Check and time every GPU kernel on this machine, in one command of under eight minutes.

    python bench/gpu_report.py --out DIR               on a machine with CUDA (or HIP)
    python bench/gpu_report.py --out DIR --dry-run     tiny, on Triton's interpreter, without one

Needs torch, triton and numpy; no installation. Beside what numba, matplotlib and peers there are it
sets the CPU's kernels, draws plots and times them. Writes gpu_report.json, gpu_report.md and plots
to DIR, anew after each part, so what there is when it stops is whole. Each part has its share of
the time and runs in processes of its own: a row that crashes or hangs is a failed row, one that no
time was left for is named. The exit status is 0 if every row passed or does not apply here, 1 if
not, 2 if there is no device.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = str(Path(__file__).resolve().parent)
# Run as a script, Python puts bench/ itself first, where `cases` and the like are no packages.
sys.path[:] = [str(ROOT), str(ROOT / "kernels"), *(p for p in sys.path if p not in (HERE, ""))]

from bench import gpu_plots, gpu_tables  # noqa: E402
from bench.gpu_rows import FAIL, NO_TIME, Record  # noqa: E402
from bench.gpu_supervise import PROCESS, supervise_all  # noqa: E402

BUDGET_S = 450.0


@dataclass(frozen=True)
class Phase:
    """until: the part of the budget after which none of its rows begins

    shards: of each section so many processes, side by side
    """

    until: float
    shards: dict[str, int]


# Compiling is most of the checks: there they share the machine's cores. What is timed runs alone,
# and so does what takes most of the memory.
PHASES = {
    "checks": Phase(0.38, {"engine": 2, "optim": 2, "combinations": 3, "device": 1,
                           "functions": 6, "compiling": 2}),
    "large": Phase(0.46, {"large": 1}),
    "speed": Phase(0.66, {"speed": 1}),
    "function_speed": Phase(0.93, {"function_speed": 1}),
    "tuning": Phase(0.97, {"tuning": 1}),
}  # fmt: skip
# Timed beside fastopt where they are installed.
PEERS = ("liger-kernel", "quack-kernels", "flag_gems")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds (default: 450)")
    parser.add_argument("--dry-run", action="store_true", help="on Triton's interpreter, no GPU")
    parser.add_argument("--commit", default=None, help="where git cannot tell it")
    options = parser.parse_args(argv)
    if not options.dry_run and (why := _no_device()):
        print(f"gpu_report: {why}", file=sys.stderr)
        return 2
    return _report(options)


def _no_device() -> str | None:
    try:
        import torch

        if torch.cuda.is_available():
            return None
        built = torch.version.cuda or torch.version.hip or "neither CUDA nor HIP"
        why = f"torch {torch.__version__} (built for {built}) sees no device"
    except Exception as error:
        why = f"torch does not import: {type(error).__name__}: {error}"
    return f"it needs a CUDA or HIP device, and {why}. --dry-run runs the checks without one."


def _report(options: argparse.Namespace) -> int:
    start = time.time()
    report: dict[str, Any] = {
        "machine": _machine(options),
        "finished": False,
        "rows": [],
    }
    gpu_tables.write(options.out, report)
    with tempfile.TemporaryDirectory(prefix="gpu_report_") as scratch:
        for name, phase in _phases(options).items():
            deadline = start + phase.until * options.budget
            print(f"{name}: until {deadline - start:.0f} s", flush=True)
            try:
                report["rows"] += _run(phase, options, Path(scratch), deadline)
            except Exception as error:  # the report of the other phases matters more
                detail = f"{type(error).__name__}: {error}"
                report["rows"].append(
                    {"section": name, "row": "(phase)", "status": FAIL, "detail": detail}
                )
            report["machine"]["seconds"] = round(time.time() - start, 1)
            gpu_tables.write(options.out, report)
    report["finished"] = True
    try:
        report["machine"]["plots"] = gpu_plots.draw(options.out, report["rows"]) or "drawn"
    except Exception as error:  # what was measured matters more
        report["machine"]["plots"] = f"{type(error).__name__}: {error}"
    gpu_tables.write(options.out, report)
    print(gpu_tables.short(report), flush=True)
    # Tuning is for whoever changes the kernels: it takes what time is left.
    wanted = [row for row in report["rows"] if row["section"] != "tuning" or row["status"] == FAIL]
    bad = sum(row["status"] in (FAIL, NO_TIME) for row in wanted)
    return 1 if bad or not report["rows"] else 0


def _phases(options: argparse.Namespace) -> dict[str, Phase]:
    """A dry run has one process for everything: there is nothing it could disturb."""
    if not options.dry_run:
        return PHASES
    sections = ",".join(section for phase in PHASES.values() for section in phase.shards)
    return {"everything": Phase(1.0, {sections: 1})}


def _run(phase: Phase, options: argparse.Namespace, scratch: Path, deadline: float) -> list[Record]:
    commands = {
        f"{number}-{k}": _command(section, options, k, n)
        for number, (section, n) in enumerate(phase.shards.items())
        for k in range(n)
    }
    rows = supervise_all(commands, scratch, deadline, _env(options, len(commands)))
    names = list(gpu_tables.TITLES)
    for row in rows:
        if row["row"] == PROCESS:
            row["section"] = list(phase.shards)[int(row["section"].partition("-")[0])]
    return sorted(rows, key=lambda row: names.index(row["section"].partition(",")[0]))


def _command(section: str, options: argparse.Namespace, shard: int, n_shards: int) -> list[str]:
    quick = ["--quick"] * options.dry_run
    command = [sys.executable, "-m", "bench.gpu_worker", section, *quick]
    return [*command, "--shard", f"{shard}/{n_shards}"]


def _env(options: argparse.Namespace, n_processes: int) -> dict[str, str]:
    """The environment of a part; every process finds the packages, and leaves cores to others."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    threads = max(1, min(8, (os.cpu_count() or 1) // n_processes))
    env = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "TRITON_INTERPRET": "1" if options.dry_run else "0",
    }
    if not os.access(Path.home(), os.W_OK):
        env["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "triton_cache")
    return env


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": options.commit or _commit(),
        "kernel sources": _sources_hash(),
        "device": "Triton's interpreter, CPU" if options.dry_run else _device(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy", *PEERS)},
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "command": " ".join(["bench/gpu_report.py", *sys.argv[1:]]),
    }


def _device() -> str:
    try:
        import torch

        found = torch.cuda.get_device_properties(0)
        parts = [
            found.name,
            f"{found.total_memory / 2**30:.0f} GiB",
            f"{found.multi_processor_count} multiprocessors",
            f"capability {found.major}.{found.minor}",
            f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}",
        ]
        return ", ".join(parts)
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    try:
        head, changes = (
            subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
        return head + "+" * bool(changes)
    except Exception as error:
        return f"unknown ({type(error).__name__})"


def _sources_hash() -> str:
    """Of what was measured, where there is no commit to name it."""
    digest = hashlib.sha256()
    for folder in ("fastopt", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
