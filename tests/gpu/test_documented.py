"""docs/extending.md on the GPU kernels, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pages import ROOT, run_python


def test_what_extending_shows_holds_for_the_gpu_kernels_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_python((ROOT / "docs" / "extending.md").read_text(), tmp_path, {}, monkeypatch)
