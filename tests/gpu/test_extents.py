"""What 32 bits do not count is refused where it would be launched, and what they do is launched."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch

from fastopt_kernels.gpu.base import extents
from fastopt_kernels.gpu.machine_code import driving
from fastopt_kernels.gpu.rows import shared
from tests.gpu import row_gate
from tests.gpu.test_run_gate import functions, kernels

TOO_LONG = extents.LONGEST + 16


def launched(name: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels of a function, of tensors without memory."""
    found: list[Any] = []
    monkeypatch.setattr(shared, "launch", lambda kernel, *rest, **constants: found.append(kernel))
    with torch.device("meta"), driving("sm_90"):
        row_gate.FUNCTIONS[name][0](row_gate.Arguments(shape, torch.bfloat16))
    return found


@pytest.mark.parametrize("name", row_gate.FUNCTIONS)
def test_a_line_that_is_too_long_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"has {TOO_LONG} elements.*up to {extents.LONGEST}"):
        launched(name, (1, TOO_LONG, 1), monkeypatch)


@pytest.mark.parametrize("name", [n for n in row_gate.OVER_DIM if "norm" not in n and n != "unit"])
def test_a_column_that_is_too_long_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="a column has"):
        launched(name, (1, TOO_LONG, 8), monkeypatch)


def test_more_columns_than_32_bits_count_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched("softmax", (1, 2, 2**33), monkeypatch)


def test_each_limit_is_of_an_argument_that_some_kernel_has() -> None:
    launched = [function for function in functions() if function.__name__ in kernels()]
    names = {name for function in launched for name in signature(function).parameters}
    assert set(extents.limits({})) <= names


def test_extents_that_come_in_vectors_have_as_much_smaller_limits() -> None:
    assert extents.limits({"VECTOR": 8})["n_cols"] * 8 <= extents.LONGEST
    assert extents.limits({"VECTOR": 8, "COLUMNS": True})["n_cols"] == extents.LONGEST
    assert extents.limits({"VECTOR": 8, "PIXELS": True})["n_channels"] * 8 <= extents.LONGEST
