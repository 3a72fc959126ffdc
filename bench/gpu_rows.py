"""One row of the report at a time, in a process that may die of it.

A row that raises is a failed row; one that raises NotApplicableError says why it is none here.
Every start and end is a line in a log that outlives the process: what began and never ended is what
killed it, and the next process goes on after it.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]

PASS, FAIL, NOT_HERE, NO_TIME = "pass", "fail", "not here", "out of time"
# The device is lost to this process; a new one can go on.
EXIT_DEVICE_LOST = 75
DETAIL_CHARS = 4000


class NotApplicableError(Exception):
    """Why a row does not apply on this machine."""


@dataclass(frozen=True)
class Row:
    """name: unique in its section; run() returns what to record, or raises;
    seconds: what it may take, so that it is not begun too late"""

    name: str
    run: Callable[[], Record | None]
    seconds: float = 5.0


class Log:
    """JSON lines, each on the disk before the next row begins."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **record: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Record]:
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the process died while it wrote
        return records


def results(log: Log) -> list[Record]:
    """The rows that ended, in order."""
    return [record for record in log.read() if record.get("event") == "end"]


def unfinished(log: Log) -> Record | None:
    """The section and name of the row that began last and never ended."""
    began: Record | None = None
    for record in log.read():
        if record.get("event") == "start":
            began = {"section": record["section"], "row": record["row"]}
        elif record.get("event") == "end" and began and record["row"] == began["row"]:
            began = None
    return began


def run_rows(
    section: str,
    rows: Iterable[Row],
    log: Log,
    deadline: float,
    device_lost: Callable[[], bool],
) -> int:
    """Run what the log does not have yet; the exit status of the process.

    deadline: time.time() after which nothing begins
    """
    done = {(record["section"], record["row"]) for record in results(log)}
    for row in rows:
        if (section, row.name) in done:
            continue
        record: Record = {"event": "end", "section": section, "row": row.name}
        if time.time() + row.seconds > deadline:
            log.write(**record, status=NO_TIME, detail="not begun: the time budget was used up")
            continue
        log.write(event="start", section=section, row=row.name)
        start = time.time()
        try:
            data = row.run() or {}
            outcome: Record = {"status": PASS, "detail": "", "data": data}
        except NotApplicableError as reason:
            outcome = {"status": NOT_HERE, "detail": str(reason)}
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            outcome = {
                "status": FAIL,
                "detail": f"{type(error).__name__}: {error}"[:DETAIL_CHARS],
                "traceback": text[-DETAIL_CHARS:],
            }
        log.write(**record, **outcome, seconds=round(time.time() - start, 3))
        if outcome["status"] == FAIL and device_lost():
            return EXIT_DEVICE_LOST
    return 0
