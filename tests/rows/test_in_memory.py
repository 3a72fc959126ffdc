"""The check whether kernels may read tensors as they lie, in compiled code and in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastopt.functional import guards
from fastopt_kernels.cpu.base import in_memory
from tests.rows.cases import draw


def compiled(tensors: tuple[Any, ...]) -> bool:
    found = in_memory.compiled()
    assert found is not None
    check, table = found
    return check(id(tensors), len(tensors), table)


def in_python(tensors: tuple[Any, ...]) -> bool:
    return guards._in_memory(tensors)


CHECKS = {"compiled": compiled, "python": in_python, "both": guards.in_memory}


def shrunk(view: Callable[[Tensor], Tensor], nbytes: int) -> Tensor:
    base = draw(4, 6)
    x = view(base)
    base.untyped_storage().resize_(nbytes)
    return x


READ: dict[str, Callable[[], Tensor]] = {
    **{str(dtype): lambda dtype=dtype: draw(3, 4).to(dtype) for dtype in in_memory._DTYPES},
    "parameter": lambda: torch.nn.Parameter(draw(3)),
    "buffer": lambda: torch.nn.Buffer(draw(3)),
    "of a graph": lambda: draw(3).requires_grad_() * 2,
    "of inference": lambda: torch.inference_mode()(draw)(3),
    "scalar": lambda: torch.tensor(2.0),
    "empty": lambda: torch.empty(0, 3),
    "empty view": lambda: draw(4, 6)[4:],
    "transposed": lambda: draw(4, 6).t(),
    "rows": lambda: draw(4, 6)[2:],
    "columns": lambda: draw(4, 6)[:, 1::2],
    "expanded": lambda: draw(1, 6).expand(4, 6),
    "channels_last": lambda: draw(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "what is left": lambda: shrunk(lambda base: base[:2], 48),
}
NOT_READ: dict[str, Callable[[], Any]] = {
    "nothing left": lambda: shrunk(lambda base: base, 0),
    "a byte less": lambda: shrunk(lambda base: base, 95),
    "rows that are gone": lambda: shrunk(lambda base: base[2:], 48),
    "columns that are gone": lambda: shrunk(lambda base: base[:, :3], 48),
    "expanded from what is gone": lambda: shrunk(lambda base: base[3].expand(5, 6), 72),
    "negated": lambda: torch._neg_view(draw(3)),
    "zeros": lambda: torch._efficientzerotensor((3,)),
    "functional": lambda: torch._to_functional_tensor(draw(3)),
    "meta": lambda: draw(3).to("meta"),
    "sparse": lambda: draw(3, 3).to_sparse(),
    "mkldnn": lambda: draw(3, 3).to_mkldnn(),
    "wrapper": lambda: TwoTensor(draw(3), draw(3)),
    "subclass": lambda: draw(3).as_subclass(type("Named", (Tensor,), {})),
    "no tensor": lambda: [1.0, 2.0],
}


def check_answers(check: Callable[..., bool]) -> None:
    x = draw(3)
    for make in READ.values():
        assert check((make(),))
        assert check((x, None, make(), x))
    for make in NOT_READ.values():
        for tensors in ((make(), x), (x, None, make()), (x, make(), x, x)):
            assert not check(tuple(tensors))


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_read_what_is_in_memory(check: str) -> None:
    check_answers(CHECKS[check])


def test_without_what_it_asks_of_torch_there_is_no_compiled_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python asks then, and finds the same."""
    with monkeypatch.context() as patch:
        patch.setattr(in_memory, "_IS_NEG", "no_such_function")
        assert in_memory.compiled.__wrapped__() is None
        patch.setattr(guards, "_compiled", None)
        check_answers(guards.in_memory)


def test_nothing_that_listens_hears_of_it_or_spoils_it() -> None:
    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            pytest.fail(f"{func} was called")

    with torch.device("meta"), Listening():
        assert in_memory.compiled.__wrapped__() is not None


def test_a_compiled_check_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the function for zero tensors stands in for the one for a pending sign."""
    monkeypatch.setattr(in_memory, "_IS_NEG", "_ZN2at6native14_is_zerotensorERKNS_6TensorE")
    assert in_memory.compiled.__wrapped__() is None


def test_a_check_that_looks_only_at_the_address_would_be_noticed() -> None:
    def wrong(tensors: tuple[Any, ...]) -> bool:
        given = [x for x in tensors if x is not None]
        return all(isinstance(x, Tensor) and (x.data_ptr() or not x.numel()) for x in given)

    with pytest.raises((AssertionError, RuntimeError)):
        check_answers(wrong)
