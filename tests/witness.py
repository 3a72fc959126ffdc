"""Digests of what the library computes, to show that a change of structure changes no bit.

    python -m tests.witness record     write tests/witness.json
    python -m tests.witness check      compare with it; exits with 1 and the names where one differs

An entry is the sha256 of the bytes of some tensors: of parameters and states after 20 steps, for
every optimizer, storage format and option; of outputs and gradients of every row function and
module on fixed inputs, in each dtype. Compiled code differs between processors and versions of
Numba and torch, so the file names those it was recorded with, and a check on others is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

import fastopt
from fastopt import functional as F  # noqa: N812 -- the name torch's own documentation uses
from tests.optim import pairs
from tests.rows import every

RECORD = Path(__file__).with_suffix(".json")
STEPS = 20
FORMATS: tuple[Any, ...] = (None, torch.float32, torch.bfloat16, "8bit")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize": {"maximize": True},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "max_grad_norm inf": {"max_grad_norm": 0.5, "norm_type": float("inf")},
    "clip_value": {"clip_value": 0.25},
    "skip_nonfinite": {"skip_nonfinite": True},
    "ema_decay": {"ema_decay": 0.9, "ema_warmup": 5},
    "telemetry": {"telemetry": True},
    "stochastic": {"param_rounding": "stochastic", "rounding_seed": 3},
    "kahan": {"param_rounding": "kahan"},
    "master": {"param_rounding": "master"},
}
ROUNDED = ("stochastic", "kahan", "master")
SHAPES = ((40, 30), (7,), (), (3, 2, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def digest(tensors: Iterable[Tensor]) -> str:
    """Of dtypes, shapes and bytes, each tensor read in the order of its indices."""
    found = hashlib.sha256()
    for tensor in tensors:
        x = tensor.detach().contiguous()
        found.update(f"{x.dtype} {tuple(x.shape)} ".encode())
        found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def after_steps(case: str, state_dtype: Any, option: str) -> str:
    """Of the parameters and states of an optimizer after `STEPS` steps.

    Parameters are float32, bf16 where rounding is the option, and one gradient in five is missing.
    """
    dtype = torch.bfloat16 if option in ROUNDED else torch.float32
    params = pairs.make_params(SHAPES, dtype)
    options = dict(OPTIONS[option])
    if state_dtype is not None:
        options["state_dtype"] = state_dtype
    try:
        optimizer = pairs.construct(fastopt, case, params, **options)
    except ValueError:  # a state that 8 bits would lose
        return "refused"
    for step in range(STEPS):
        pairs.give_grads(params, step, [step % 4] if step % 5 == 4 else [])
        if option == "skip_nonfinite" and step == 7:
            params[0].grad[0, 0] = torch.inf  # type: ignore[index]
        optimizer.step()
    states = optimizer.state_dict()["state"]
    held = [value for key in sorted(states) for _, value in sorted(states[key].items())]
    return digest([*params, *(torch.as_tensor(value) for value in held)])


def optimizer_entries(case: str) -> Iterator[tuple[str, str]]:
    for state_dtype in FORMATS:
        for option in OPTIONS:
            name = str(state_dtype).removeprefix("torch.")
            yield f"{case} | {name} | {option}", after_steps(case, state_dtype, option)


def tensor(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def _targets(n: int, classes: int) -> Tensor:
    target = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(3))
    target[::7] = -100
    return target


Inputs = tuple[Tensor, ...]
X, WIDE, W, B = tensor(37, 67), tensor(3, 4099), tensor(67, seed=1), tensor(67, seed=2)
IMAGES, C, D = tensor(5, 8, 6, 7), tensor(8, seed=1), tensor(8, seed=2)
PIXELS = IMAGES.contiguous(memory_format=torch.channels_last)
SCORES, MASK = tensor(2, 3, 17, 33), tensor(2, 1, 17, 33, seed=4)
TARGET, WIDE_TARGET = _targets(37, 67), _targets(3, 4099)
TERMS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}
# name: (tensors that are cast and differentiated by, what is called with them)
FUNCTIONS: dict[str, tuple[Inputs, Callable[..., Any]]] = {
    "softmax": ((X,), lambda x: F.softmax(x, -1)),
    "softmax, wide": ((WIDE,), lambda x: F.softmax(x, -1)),
    "softmax of columns": ((X,), lambda x: F.softmax(x, 0)),
    "softmax of strides": ((X.t(),), lambda x: F.softmax(x, -1)),
    "log_softmax": ((X,), lambda x: F.log_softmax(x, -1)),
    "log_softmax of columns": ((X,), lambda x: F.log_softmax(x, 0)),
    "logsumexp": ((X,), lambda x: F.logsumexp(x, -1)),
    "logsumexp of columns": ((X,), lambda x: F.logsumexp(x, 0)),
    "logsumexp of dims": ((SCORES,), lambda x: F.logsumexp(x, (0, 2))),
    "masked_softmax": ((SCORES,), lambda x: F.scaled_masked_softmax(x, MASK > 0, 0.3)),
    "masked_softmax, causal": (
        (SCORES, MASK),
        lambda x, m: F.scaled_masked_softmax(x, m, 0.3, True),
    ),
    "cross_entropy": ((X,), lambda x: F.cross_entropy(x, TARGET)),
    "cross_entropy, wide": ((WIDE,), lambda x: F.cross_entropy(x, WIDE_TARGET, **TERMS)),
    "cross_entropy, terms": ((X,), lambda x: F.cross_entropy(x, TARGET, W.abs(), **TERMS)),
    "cross_entropy of each": ((X,), lambda x: F.cross_entropy(x, TARGET, reduction="none")),
    "cross_entropy of probabilities": (
        (X, X.softmax(1)),
        lambda x, p: F.cross_entropy(x, p, label_smoothing=0.1),
    ),
    "linear_cross_entropy": (
        (X, tensor(29, 67, seed=5), tensor(29, seed=6)),
        lambda x, w, b: F.linear_cross_entropy(x, w, TARGET % 29, linear_bias=b),
    ),
    "linear_cross_entropy of each": (
        (X, tensor(29, 67, seed=5)),
        lambda x, w: F.linear_cross_entropy(x, w, TARGET % 29, reduction="none", softcap=9.0),
    ),
    "layer_norm": ((X, W, B), lambda x, w, b: F.layer_norm(x, (67,), w, b)),
    "layer_norm, wide": ((WIDE,), lambda x: F.layer_norm(x, (4099,))),
    "layer_norm of strides": ((X.t(),), lambda x: F.layer_norm(x, (37,))),
    "rms_norm": ((X, W), lambda x, w: F.rms_norm(x, (67,), w)),
    "rms_norm, offset": ((X, W), lambda x, w: F.rms_norm(x, (67,), w, weight_offset=1.0)),
    "rms_norm of pixels": ((PIXELS,), lambda x: F.rms_norm(x, (6, 7))),
    "add_layer_norm": (
        (X, X.flip(0), W, B),
        lambda x, r, w, b: F.add_layer_norm(x, r, (67,), w, b, dropout_p=0.2, seed=5),
    ),
    "add_rms_norm": ((X, X.flip(0), W), lambda x, r, w: F.add_rms_norm(x, r, (67,), w)),
    **{
        f"batch_norm{name}": (
            (x, C, D),
            lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        )
        for name, x in (("", IMAGES), (" of pixels", PIXELS), (" of rows", tensor(33, 8)))
    },
    **{
        f"batch_norm by statistics{name}": (
            (x, C, D),
            lambda x, w, b: F.batch_norm(x, C.to(w.dtype), C.abs().to(w.dtype) + 1, w, b),
        )
        for name, x in (("", IMAGES), (" of pixels", PIXELS))
    },
    **{
        f"group_norm{name}": ((x, C, D), lambda x, w, b: F.group_norm(x, 4, w, b))
        for name, x in (("", IMAGES), (" of pixels", PIXELS))
    },
    **{
        f"instance_norm{name}": (
            (x, C, D),
            lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        )
        for name, x in (("", IMAGES), (" of pixels", PIXELS))
    },
}


def with_gradients(call: Callable[..., Any], inputs: Inputs) -> str:
    """Of what a call gives, and its gradients by every input, from fixed upstream ones."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = call(*leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    upstream = [tensor(*y.shape, seed=9 + k).to(y.dtype) for k, y in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return digest([*outputs, *(g for g in grads if g is not None)])


def row_entries() -> Iterator[tuple[str, str]]:
    for name, (inputs, call) in FUNCTIONS.items():
        for dtype in DTYPES:
            cast = tuple(x.to(dtype) for x in inputs)
            yield f"{name} | {str(dtype).removeprefix('torch.')}", with_gradients(call, cast)
    for name, small in every.EVERY.items():
        yield f"{name} | float64, small", with_gradients(small.run, small.tensors)


def entries(part: str) -> dict[str, str]:
    torch.set_num_threads(1)
    return dict(row_entries() if part == "rows" else optimizer_entries(part))


def environment() -> dict[str, str]:
    """What compiled code depends on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor()
    return {"numba": numba.__version__, "torch": torch.__version__, "processor": processor}


def measure(parts: Iterable[str], workers: int) -> dict[str, str]:
    """The entries of these parts, each in a process of its own: a hundred kernels are compiled in
    each, which their process keeps."""
    running: dict[str, Any] = {}
    found: dict[str, str] = {}
    waiting = list(parts)
    while waiting or running:
        while waiting and len(running) < workers:
            part = waiting.pop()
            command = [sys.executable, "-m", "tests.witness", "part", part]
            running[part] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        part = next(iter(running))
        output, _ = running[part].communicate()
        if running.pop(part).returncode:
            raise SystemExit(f"{part} failed")
        found.update(json.loads(output))
    return dict(sorted(found.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("record", "check", "part"))
    parser.add_argument("parts", nargs="*", help="'rows' and cases of tests.optim.pairs; all")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    if given.command == "part":
        print(json.dumps(entries(given.parts[0])))
        return 0
    parts = given.parts or ["rows", *pairs.CASES]
    if given.command == "record":
        record = {"environment": environment(), "digests": measure(parts, given.workers)}
        RECORD.write_text(json.dumps(record, indent=0) + "\n")
        return 0
    record = json.loads(RECORD.read_text())
    if record["environment"] != environment():
        raise SystemExit(f"recorded with {record['environment']}, but this is {environment()}")
    found = measure(parts, given.workers)
    wrong = [name for name, value in found.items() if record["digests"].get(name) != value]
    print("\n".join(wrong) or f"{len(found)} digests are unchanged")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
