"""The problems of an installation, and what to do about them: facts in, findings out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath

from fastopt.cli.doctor.examine import Facts
from fastopt.cli.shared.memory import KEEP, VARIABLE

# The oldest that works, and the newest this version was written for.
SUPPORTED: dict[str, tuple[str, str | None]] = {
    "python": ("3.11", None),
    "torch": ("2.11", "2.15"),
    "numba": ("0.68", "0.68"),
    "numpy": ("2.0", None),
    "triton": ("3.6", "3.9"),
}
# Fresh pages cost 3 to 7 times the writing; kept memory 1.0 to 1.1, noise included.
FRESH_PAGES = 1.5
# By the file names of their libraries.
OPENMP_MAKERS = {"libgomp": "GNU", "libiomp": "Intel", "libomp": "LLVM"}


@dataclass(frozen=True)
class Finding:
    """serious: fastopt is wrong, slow or absent as it stands; the rest can be better."""

    what: str
    remedy: str
    serious: bool


def findings(facts: Facts) -> list[Finding]:
    """Everything there is to say, what is serious first."""
    found = [finding for check in CHECKS for finding in check(facts)]
    return sorted(found, key=lambda finding: not finding.serious)


def _versions(facts: Facts) -> Iterator[Finding]:
    for package, (oldest, newest) in SUPPORTED.items():
        found = facts["versions"][package]
        if found is None:
            continue
        if _release(found, oldest) < _release(oldest, oldest):
            yield Finding(
                f"{package} {found}: fastopt needs {oldest} or later",
                _install(package, f">={oldest}"),
                serious=True,
            )
        elif newest and _release(found, newest) > _release(newest, newest):
            yield Finding(
                f"{package} {found}: newer than {newest}, the newest this fastopt was made for",
                f"update fastopt; or, where something fails, {_install(package, f'<={newest}.99')}",
                serious=False,
            )


def _install(package: str, bound: str) -> str:
    return f"install python{bound}" if package == "python" else f"pip install '{package}{bound}'"


def _release(version: str, like: str) -> tuple[int, ...]:
    """The leading numbers of a version, as many as `like` has: 2.13.0+cpu like 2.11 is (2, 13)."""
    numbers = re.findall(r"\d+", re.split(r"[^\d.]", version)[0])
    return tuple(map(int, numbers[: like.count(".") + 1]))


def _backends(facts: Facts) -> Iterator[Finding]:
    backends = facts["backends"]
    any_ready = any(backend["ready"] for backend in backends.values())
    for device, backend in backends.items():
        if backend["ready"] or not backend["present"]:
            continue
        compiler, why = backend["compiler"], backend["why"]
        absent = facts["versions"][compiler] is None
        if absent:
            remedy = f"pip install {compiler}"
        elif "NUMBA_DISABLE_JIT" in why:
            remedy = "unset NUMBA_DISABLE_JIT"
        else:
            remedy = f"pip install --force-reinstall {compiler}; if that does not help, report it"
        yield Finding(
            f"no {device} kernels: {why}",
            remedy,
            # A machine that trains on its GPU can do without numba.
            serious=device == "cuda" or not absent or not any_ready,
        )


def _forked(facts: Facts) -> Iterator[Finding]:
    if facts["threads"]["forked"]:
        yield Finding(
            "this process was forked from one that ran kernels: GNU OpenMP does not survive that, "
            "so CPU kernels run on one thread here",
            "multiprocessing.set_start_method('spawn'), or a DataLoader's "
            "multiprocessing_context='spawn', where a child is to train",
            serious=True,
        )


def _layer(facts: Facts) -> Iterator[Finding]:
    threads = facts["threads"]
    if missing := threads.get("missing"):
        yield Finding(
            f"numba has no threading layer here for {missing}: kernels run on {threads['layer']}",
            f"unset {missing.partition('=')[0]}, or install that layer",
            serious=False,
        )
    if threads["layer"] == "workqueue":
        why = threads["openmp_error"]
        yield Finding(
            "numba runs on its workqueue: one kernel at a time in the whole process"
            + (f" (no OpenMP: {why})" if why else ""),
            "install the system's OpenMP library: apt-get install libgomp1, or dnf install libgomp"
            if why
            else "NUMBA_THREADING_LAYER=omp",
            serious=True,
        )
    if threads["layer"] == "tbb":
        yield Finding(
            "numba runs on TBB, torch on OpenMP: two pools of threads share the CPUs, and neither "
            "knows of the other",
            "NUMBA_THREADING_LAYER=omp",
            serious=True,
        )


def _openmp(facts: Facts) -> Iterator[Finding]:
    libraries = facts["threads"]["openmp"]
    makers = sorted({_maker(path) for path in libraries})
    if len(makers) > 1:
        yield Finding(
            f"{' and '.join(makers)} OpenMP in one process ({', '.join(libraries)}): their threads "
            "compete, and Intel's beside LLVM's may hang or abort",
            "install torch and numba from one source: both by pip, or both by conda",
            serious=True,
        )
    policy = facts["threads"]["wait_policy"]
    if len(libraries) > 1 and policy and policy.lower() == "active":
        yield Finding(
            f"OMP_WAIT_POLICY={policy} with {len(libraries)} OpenMP libraries in the process: the "
            "threads of one spin while the other works",
            "unset OMP_WAIT_POLICY",
            serious=True,
        )


def _maker(path: str) -> str:
    name = PurePath(path).name
    return next(maker for stem, maker in OPENMP_MAKERS.items() if name.startswith(stem))


def _counts(facts: Facts) -> Iterator[Finding]:
    threads, usable = facts["threads"], facts["machine"]["usable_cpus"]
    if threads["torch"] > max(1.0, usable):
        yield Finding(
            f"torch runs {threads['torch']} threads where {usable:g} CPUs may be used: they wait "
            "for one another",
            f"OMP_NUM_THREADS={max(1, int(usable))}",
            serious=True,
        )
    if threads["numba"] is not None and threads["numba"] < threads["torch"]:
        yield Finding(
            f"numba may use {threads['numba']} threads, torch {threads['torch']}: kernels take the "
            "smaller number",
            f"NUMBA_NUM_THREADS={threads['torch']}, or unset it",
            serious=False,
        )


def _cache(facts: Facts) -> Iterator[Finding]:
    cache = facts["cache"]
    if cache["error"]:
        yield Finding(
            f"compiled kernels cannot be kept in {cache['folder']} ({cache['error']}): every "
            "process compiles its own, for seconds",
            cache.get("remedy", "FASTOPT_CACHE_DIR=FOLDER, one that can be written"),
            serious=True,
        )


def _allocator(facts: Facts) -> Iterator[Finding]:
    output, kept = (facts["memory"].get(name) for name in ("output", "output_kept"))
    if output is None or output["fresh_ms"] < FRESH_PAGES * output["reused_ms"]:
        return
    if kept is None or kept["fresh_ms"] * FRESH_PAGES > output["fresh_ms"]:
        return
    yield Finding(
        f"a new 64 MB output costs {output['fresh_ms']:.1f} ms, writing into one that exists "
        f"{output['reused_ms']:.1f} ms: the difference is {output['page_faults']} page faults, "
        f"because glibc gave the memory back; with it kept, {kept['fresh_ms']:.1f} ms (measured)",
        f"export {VARIABLE}={KEEP} (processes then keep their peak of memory)",
        serious=False,
    )


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _forked, _backends, _versions, _layer, _openmp, _counts, _cache, _allocator,
)  # fmt: skip
