"""Shapes by name or as NxM: the parameters of a model, or one tensor for a function."""

from __future__ import annotations

import difflib
import re
from math import prod

Shape = tuple[int, ...]


def _gpt2() -> list[Shape]:
    """GPT-2 small (Radford et al. 2019), the output head tied to the token embedding."""
    width = 768
    block = [
        *[(width,), (width,)],
        *[(width, 3 * width), (3 * width,)],
        *[(width, width), (width,)],
        *[(width,), (width,)],
        *[(width, 4 * width), (4 * width,)],
        *[(4 * width, width), (width,)],
    ]
    return [(50257, width), (1024, width), *(12 * block), (width,), (width,)]


MODELS: dict[str, list[Shape]] = {
    "33m": [(33_000_000,)],
    "gpt2": _gpt2(),
    "20x1m": [(1_000_000,) for _ in range(20)],
    "1000x1000": [(1000,) for _ in range(1000)],
    "1000x64": [(64,) for _ in range(1000)],
    "mlp": [(64, 256), (256,), (256, 10), (10,)],
    "mlp-784": [(784, 128), (128,), (128, 10), (10,)],
}
_UNITS = {"": 1, "k": 1000, "m": 1_000_000}
_NUMBER = re.compile(r"([1-9]\d*)([km]?)")


def parameters(text: str) -> list[Shape]:
    """The parameters of a model by name, or of N tensors with M elements each: "gpt2", "20x1m".

    Raises ValueError for what is neither.
    """
    name = text.lower()
    if name in MODELS:
        return MODELS[name]
    numbers = _numbers(name)
    if numbers is None or len(numbers) > 2:
        raise ValueError(
            f"no shape {text!r}{nearest(name, MODELS)}. An optimizer takes {', '.join(MODELS)}, M "
            "or NxM: N tensors of M elements (k and m stand for a thousand and a million)"
        )
    return [(numbers[-1],)] * (numbers[0] if len(numbers) == 2 else 1)


def tensor(text: str) -> Shape:
    """The shape of one tensor: "8192x1024", "32x64x56x56". Raises ValueError for anything else."""
    numbers = _numbers(text.lower())
    if numbers is None:
        raise ValueError(
            f"no shape {text!r}: a function takes the extents of its input, such as 8192x1024"
        )
    return tuple(numbers)


def n_elements(shapes: list[Shape]) -> int:
    return sum(map(prod, shapes))


def nearest(text: str, names: object) -> str:
    """ ", did you mean 'gpt2'?" for "gtp2"; empty where nothing is near."""
    near = difflib.get_close_matches(text, list(names), n=1, cutoff=0.5)  # type: ignore[call-overload]
    return f" (did you mean {near[0]!r}?)" if near else ""


def _numbers(text: str) -> list[int] | None:
    matches = [_NUMBER.fullmatch(part) for part in text.split("x")]
    if not all(matches):
        return None
    return [int(m.group(1)) * _UNITS[m.group(2)] for m in matches if m]
