"""Runs a section of the report in processes that may crash or hang, and loses no more than a row.

An illegal access poisons the CUDA context of its process, a hang blocks it: the row that did it is
recorded as failed, the process is replaced, and the rows after it still run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu_rows import EXIT_DEVICE_LOST, FAIL, Log, Record, results, unfinished

# A row that crashes costs a process; so many crashes and the section is given up.
MAX_PROCESSES = 6
# After its deadline a process may finish the row it is in for so long.
GRACE_S = 10.0
# One that only names what was not begun: it imports torch, and little else.
NAMING_S = 30.0
OUTPUT_CHARS = 3000
# The row of a process that ended otherwise than by one of its rows.
PROCESS = "(process)"


def supervise(
    section: str,
    command: Sequence[str],
    folder: Path,
    deadline: float,
    env: dict[str, str] | None = None,
) -> list[Record]:
    """The rows of a section; `command` gets the log's path and the deadline appended.

    deadline: time.time() after which no row begins; the process ends GRACE_S later at the latest
    """
    log = Log(folder / f"{section}.jsonl")
    output = folder / f"{section}.out"
    for _ in range(MAX_PROCESSES):
        # Past the deadline a process begins no row, but names those that were not begun.
        late = time.time() >= deadline
        until = time.time() + NAMING_S if late else deadline + GRACE_S
        before = len(results(log))
        status = _run([*command, str(log.path), repr(deadline)], output, until, env)
        row = unfinished(log)
        if row is not None:
            why = "was still running when its time was up" if status is None else f"died: {status}"
            detail = f"the process {why}; its last output: {_tail(output)}"
            log.write(event="end", **row, status=FAIL, detail=detail)
            continue
        if status == 0:
            return results(log)
        if status != EXIT_DEVICE_LOST or len(results(log)) == before:
            detail = f"the process of this section ended with {status}: {_tail(output)}"
            break
    else:
        detail = f"given up after {MAX_PROCESSES} processes"
    log.write(event="end", section=section, row=PROCESS, status=FAIL, detail=detail)
    return results(log)


def supervise_all(
    sections: dict[str, Sequence[str]],
    folder: Path,
    deadline: float,
    env: dict[str, str] | None = None,
) -> list[Record]:
    """Several sections side by side."""
    with ThreadPoolExecutor(max(1, len(sections))) as pool:
        futures = [
            pool.submit(supervise, name, command, folder, deadline, env)
            for name, command in sections.items()
        ]
        return [record for future in futures for record in future.result()]


def _run(
    command: Sequence[str], output: Path, until: float, env: dict[str, str] | None
) -> int | None:
    """The exit status, or None for a process that had to be ended."""
    with output.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | (env or {}),
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(1.0, until - time.time()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all it started (compilers), and wait for it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(output: Path) -> str:
    text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    return text[-OUTPUT_CHARS:].strip()
