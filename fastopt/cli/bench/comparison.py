"""Two saved runs side by side: how many times as fast as torch fastopt was in each.

change = (torch / fastopt in B) / (torch / fastopt in A). Torch was timed in the same run on the
same machine, so another machine, or the same on a busier day, cancels from the ratio.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FASTOPT = "fastopt"
# Whom fastopt is held against: the first of these that both runs have timed in a case.
REFERENCES = ("torch fused", "torch loop", "ATen", "torch")
# The least change that can be a finding, however quiet the rounds were. Five runs of seven row
# functions beside other programs: ratios of the same code moved by 7 % in the median, and the
# spread covered all but 6 of 70 changes.
LEAST_CHANGE = 1.05

# A benchmark alone keeps every core busy. Beside another program the threads of a loop wait for the
# one that was sent away, each time: torch's fused step of a small model took 36 ms, not 0.06.
BUSY = 1.5

FASTER, SLOWER, ALIKE = "faster", "slower", "alike"


@dataclass(frozen=True)
class Time:
    """Seconds: the median and the quartiles over the rounds."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """The distance of the quartiles, in logarithms.

        Half of it would be the noise of single rounds; the median of a run moves with the machine
        as a whole, too.
        """
        return math.log(self.high / self.low)


@dataclass(frozen=True)
class Run:
    """cases: times by case, then by provider; about: date, machine, versions, commit, one line

    busy: processes that wanted a core, for each core, at the busiest moment; 0 where not known
    """

    cases: Mapping[str, Mapping[str, Time]]
    about: str
    busy: float = 0.0


@dataclass(frozen=True)
class Change:
    """before, after: times as fast as the reference; spread: the factor that noise explains."""

    case: str
    reference: str
    before: float
    after: float
    spread: float

    @property
    def factor(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        beyond = max(self.spread, LEAST_CHANGE)
        if self.factor * beyond < 1:
            return SLOWER
        return FASTER if self.factor > beyond else ALIKE


class NotARunError(Exception):
    """Why a file cannot be compared."""


def load(path: Path) -> Run:
    """A file that `pytest bench --benchmark-save` or `--benchmark-json` wrote."""
    try:
        saved = json.loads(path.read_bytes())
        benchmarks = saved["benchmarks"]
        cases: dict[str, dict[str, Time]] = {}
        for benchmark in benchmarks:
            info = benchmark["extra_info"]
            if "provider" in info:
                cases.setdefault(info["case"], {})[info["provider"]] = _time(benchmark["stats"])
        about, busy = _about(saved), _busy(saved)
    except OSError as error:
        raise NotARunError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotARunError(
            f"{path} is no run that pytest-benchmark saved ({type(error).__name__}: {error}): "
            "make one with pytest bench --benchmark-save NAME"
        ) from error
    if not any(FASTOPT in providers for providers in cases.values()):
        raise NotARunError(
            f"{path} has no times of fastopt: make one with pytest bench --benchmark-save NAME"
        )
    return Run(cases, about, busy)


def _time(stats: Mapping[str, float]) -> Time:
    time = Time(stats["median"], stats["q1"], stats["q3"])
    if not 0 < time.low <= time.high < math.inf:
        raise ValueError(f"quartiles {time.low} and {time.high}")
    return time


def _about(saved: Mapping[str, Any]) -> str:
    infos: list[Mapping[str, Any]] = [one["extra_info"] for one in saved["benchmarks"]]
    info = next((info for info in infos if "versions" in info), {})
    versions = info.get("versions", {})
    facts = [
        str(saved.get("datetime", ""))[:16],
        info.get("cpu", ""),
        f"{info['threads']} threads" if "threads" in info else "",
        *(f"{name} {number}" for name, number in versions.items()),
        f"commit {(saved.get('commit_info') or {}).get('id', '?')[:10]}",
    ]
    return ", ".join(fact for fact in facts if fact)


def _busy(saved: Mapping[str, Any]) -> float:
    infos = [one["extra_info"] for one in saved["benchmarks"]]
    return max((info["load"] / info["cores"] for info in infos if "load" in info), default=0.0)


def compare(before: Run, after: Run) -> list[Change]:
    """Every case in which both runs timed fastopt and the same reference, the worst change first.

    The spread is that of the four times together, as if they were independent.
    """
    changes = []
    for case, old in before.cases.items():
        new = after.cases.get(case, {})
        both = old.keys() & new.keys()
        reference = next((name for name in REFERENCES if name in both), None)
        if FASTOPT not in both or reference is None:
            continue
        times = [run[name] for run in (old, new) for name in (reference, FASTOPT)]
        was, is_now = (run[reference].median / run[FASTOPT].median for run in (old, new))
        spread = math.exp(math.hypot(*(time.spread for time in times)))
        changes.append(Change(case, reference, was, is_now, spread))
    return sorted(changes, key=lambda change: change.factor)


def mean_factor(changes: Sequence[Change]) -> float:
    """Geometric mean of the changes."""
    return math.exp(sum(math.log(change.factor) for change in changes) / len(changes))


def saved_runs(folder: Path) -> dict[str, Path]:
    """Files of pytest-benchmark under a folder, by name: 0001_base is FOLDER/*/0001_base.json."""
    return {path.stem: path for path in sorted(folder.glob("*/*.json"))}


def find(name: str, folder: Path) -> Path | None:
    """The file of that path, or the saved run of that name: 0001_base, 0001, or base.

    Raises NotARunError where several runs have the name.
    """
    if Path(name).is_file():
        return Path(name)
    stem = name.removesuffix(".json")
    paths = sorted(folder.glob("*/*.json"))
    found = [path for path in paths if path.stem == stem] or [
        path for path in paths if stem in path.stem.split("_", 1)
    ]
    if len(found) > 1:
        raise NotARunError(f"{name!r} may be any of {', '.join(map(str, found))}: give the path")
    return found[0] if found else None
