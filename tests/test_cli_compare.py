"""`fastopt bench --compare`: a regression is one against torch in the same run, beyond noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastopt.cli import main
from fastopt.cli.bench import comparison
from fastopt.cli.bench.comparison import ALIKE, FASTER, SLOWER, Change, NotARunError, Run, Time
from fastopt.cli.shared import plain

# Seconds by provider, of two cases.
BASE = {
    "AdamW mlp": {"fastopt": 1e-3, "torch fused": 2e-3, "torch loop": 9e-3},
    "softmax 4096x4096 fp32, forward": {"fastopt": 2e-2, "ATen": 3e-2},
}
QUIET, NOISY = 0.01, 0.3


def saved(
    times: dict[str, dict[str, float]], noise: float = QUIET, load: float = 2.0
) -> dict[str, Any]:
    """A file as pytest-benchmark writes it, of these medians; quartiles lie `noise` around them."""
    return {
        "datetime": "2026-11-21T17:24:48.000000+00:00",
        "commit_info": {"id": "351c85a5235ceea77cae419e916c87d2539ae1f6"},
        "benchmarks": [
            {
                "name": f"test[{case}-{provider}]",
                "extra_info": {
                    "case": case,
                    "provider": provider,
                    "cpu": "AMD EPYC",
                    "threads": 2,
                    "cores": 2,
                    "load": load,
                    "versions": {"torch": "2.13.0"},
                },
                "stats": {"median": s, "q1": s * (1 - noise), "q3": s * (1 + noise)},
            }
            for case, providers in times.items()
            for provider, s in providers.items()
        ],
    }


def scaled(provider: str | None, factor: float) -> dict[str, dict[str, float]]:
    """BASE with one provider's times multiplied, or everybody's."""
    return {
        case: {name: s * factor if provider in (None, name) else s for name, s in times.items()}
        for case, times in BASE.items()
    }


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pytest-benchmark's own in it, empty, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ".benchmarks" / "Linux-CPython-3.11-64bit"
    folder.mkdir(parents=True)
    return folder


def save(folder: Path, name: str, content: Any) -> str:
    path = folder / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("after", "noise", "verdict"),
    [
        (BASE, QUIET, ALIKE),
        # Another machine, or a busy one: what a comparison of times would take for a regression.
        (scaled(None, 3.0), QUIET, ALIKE),
        (scaled("fastopt", 1.2), QUIET, SLOWER),
        (scaled("fastopt", 1.2), NOISY, ALIKE),
        (scaled("fastopt", 1.03), QUIET, ALIKE),
        (scaled("fastopt", 0.8), QUIET, FASTER),
    ],
    ids=["same", "slower machine", "slower", "within the noise", "too little", "faster"],
)
def test_a_regression_is_against_torch_and_beyond_the_spread(
    after: dict[str, dict[str, float]],
    noise: float,
    verdict: str,
    runs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = save(runs, "0001_a", saved(BASE)), save(runs, "0002_b", saved(after, noise))
    status = main(["bench", "--compare", a, b])
    out = capsys.readouterr().out
    changes = comparison.compare(comparison.load(Path(a)), comparison.load(Path(b)))
    assert {change.verdict for change in changes} == {verdict}
    assert status == (1 if verdict == SLOWER else 0)
    assert sum(line.rstrip().endswith(verdict) for line in out.splitlines()) == 2
    assert "\x1b" not in out


def test_factor_and_spread_of_known_times() -> None:
    def run(ours: float, torchs: float) -> Run:
        times = {
            "fastopt": Time(ours, ours / 1.05, ours * 1.05),
            "torch": Time(torchs, torchs, torchs),
        }
        return Run({"case": times}, "")

    (change,) = comparison.compare(run(1.0, 3.0), run(2.0, 3.0))
    assert (change.before, change.after, change.factor) == pytest.approx((3.0, 1.5, 0.5))
    # Two spreads of a factor of 1.05 squared, added as squares.
    assert change.spread == pytest.approx(1.05 ** (2 * 2**0.5))


def test_the_worst_comes_first_and_the_mean_is_geometric() -> None:
    changes = [Change("a", "torch", 1.0, 4.0, 1.0), Change("b", "torch", 1.0, 0.25, 1.0)]
    assert comparison.mean_factor(changes) == pytest.approx(1.0)
    a = Run({n: {"fastopt": Time(1, 1, 1), "ATen": Time(1, 1, 1)} for n in "xy"}, "")
    b = Run(
        {
            "x": {"fastopt": Time(1, 1, 1), "ATen": Time(2, 2, 2)},
            "y": {"fastopt": Time(1, 1, 1), "ATen": Time(0.5, 0.5, 0.5)},
        },
        "",
    )
    assert [change.case for change in comparison.compare(a, b)] == ["y", "x"]


def test_the_reference_is_one_that_both_runs_timed(runs: Path) -> None:
    only_loop = {"AdamW mlp": {"fastopt": 1e-3, "torch loop": 9e-3}}
    a, b = (save(runs, name, saved(times)) for name, times in (("a", BASE), ("b", only_loop)))
    (change,) = comparison.compare(*(comparison.load(Path(path)) for path in (a, b)))
    assert (change.case, change.reference) == ("AdamW mlp", "torch loop")
    assert change.before == pytest.approx(9)


def test_cases_of_one_run_are_counted_not_compared(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = "AdamW mlp"
    a = save(runs, "a", saved({case: BASE[case]}))
    b = save(runs, "b", saved(BASE | {"no torch": {"fastopt": 1.0}}))
    assert main(["bench", "--compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "0 cases only in A, 2 only in B, 0 without" in out
    assert "0 of 1 cases slower" in out
    assert "2026-11-21T17:24, AMD EPYC, 2 threads, torch 2.13.0, commit 351c85a523" in out


def test_a_run_on_a_busy_machine_is_marked(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save(runs, "a", saved(BASE)), save(runs, "b", saved(BASE, load=7.4))
    main(["bench", "--compare", a, b])
    out = capsys.readouterr().out
    assert out.count("processes wanted each core") == 1
    assert "3.7 processes wanted each core" in out


@pytest.mark.parametrize("name", ["0001_base", "0001", "base", "0001_base.json"])
def test_a_saved_run_is_found_by_name(name: str, runs: Path) -> None:
    path = save(runs, "0001_base", saved(BASE))
    save(runs, "0002_other", saved(BASE))
    assert comparison.find(name, Path(".benchmarks")) == Path(path).relative_to(Path.cwd())
    assert comparison.find(path, Path(".benchmarks")) == Path(path)


def test_a_name_of_two_runs_asks_for_the_path(runs: Path) -> None:
    save(runs, "0001_base", saved(BASE))
    save(runs, "0002_base", saved(BASE))
    with pytest.raises(NotARunError, match=r"'base' may be any of .*0001_base.json, .*0002_base"):
        comparison.find("base", Path(".benchmarks"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no run that pytest-benchmark saved (JSONDecodeError"),
        ("[]", "is no run that pytest-benchmark saved (TypeError"),
        ({"benchmarks": [{}]}, "is no run that pytest-benchmark saved (KeyError: 'extra_info')"),
        (saved({"x": {"fastopt": 0.0}}), "(ValueError: quartiles 0.0 and 0.0)"),
        (saved({"x": {"torch": 1.0}}), "has no times of fastopt: make one with pytest bench"),
        ({"benchmarks": []}, "has no times of fastopt"),
        (saved({"x": {"fastopt": 1.0, "ATen": 1.0}}), "no case in common"),
    ],
    ids=["torn", "a list", "foreign", "no time", "no fastopt", "empty", "nothing in common"],
)
def test_what_cannot_be_compared_is_said(
    content: Any, message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = save(runs, "a", saved(BASE)), save(runs, "b", content)
    assert main(["bench", "--compare", a, b]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastopt bench: ")
    assert message in error


def test_a_typo_gets_the_nearest_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--compare", "0001_bsae", "x"]) == 2
    assert "no run '0001_bsae' (nothing is saved in .benchmarks)" in capsys.readouterr().err
    save(runs, "0001_base", saved(BASE))
    assert main(["bench", "--compare", "0001_bsae", "x"]) == 2
    expected = "no run '0001_bsae', did you mean '0001_base'? (saved here: 0001_base)"
    assert expected in capsys.readouterr().err


def test_a_terminal_gets_a_table(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = save(runs, "a", saved(BASE)), save(runs, "b", saved(scaled("fastopt", 2.0)))
    monkeypatch.setattr(plain, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["bench", "--compare", a, b]) == 1
    out = capsys.readouterr().out
    assert "AdamW mlp" in out
    assert "0.500" in out
    assert SLOWER in out
