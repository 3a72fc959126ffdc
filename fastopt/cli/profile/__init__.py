"""Show where the time of an optimizer step, a function or your own training step goes.

fastopt profile adamw --shape gpt2 --dtype bf16 --state 8bit
fastopt profile layer_norm --shape 8192x1024 --backward
fastopt profile adamw --target sm_90
fastopt profile --model mymodule:build

Time in Python, in launching and in kernels; bytes moved, against what this machine moves when it
does nothing else; which limit holds. The machine code of the kernels: vectors on a CPU, registers,
spills and occupancy on a GPU, for a named one without having it. build() returns (model,
optimizer, loss): loss(model) computes the loss of the next batch; what fastopt.swap saves is
measured on copies.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any

from fastopt.cli.shared.files import output_file, write_whole

if TYPE_CHECKING:
    import torch

    from fastopt.cli.profile.measure import Profile
    from fastopt.cli.profile.subjects import Subject

DTYPES, STATES = ("fp32", "bf16", "fp16", "fp64"), ("fp32", "bf16", "8bit")
# Elements, for bandwidth against size.
SIZES = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
TRACED_STEPS = 5
# What an argument may be wrong in; what torch or the compilers say of it is the message.
MISTAKES = (LookupError, ValueError, TypeError, RuntimeError, ImportError, OSError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", nargs="?", help="an optimizer of fastopt.optim or a function of fastopt.functional")
    add("--model", metavar="MODULE:BUILD", help="profile your own model and optimizer instead")
    add("--shape", help="of an optimizer: gpt2, 33m, 20x1m (N tensors of M); of a function: NxM")
    add("--dtype", choices=DTYPES, default="fp32", help="default: fp32")
    add("--state", choices=STATES, help="how an optimizer stores its states")
    add("--backward", action="store_true", help="a function's backward too")
    add(
        "--set", action="append", default=[], type=_setting, metavar="NAME=VALUE",
        help="an argument of the optimizer or function, such as amsgrad=True",
    )  # fmt: skip
    add("--device", help="default: cuda where there is one, else cpu")
    add("--target", help="read the kernels for this GPU without running them, such as sm_90")
    add("--threads", type=_count, metavar="N", help="CPU threads (default: torch's choice)")
    add("--seconds", type=_seconds, default=1.0, help="for each part that is timed (default: 1)")
    add("--html", type=output_file(".html"), metavar="FILE.html", help="a report with plots")
    add("--json", type=output_file(".json"), metavar="FILE.json", help="every number")
    add("--trace", type=output_file(".json"), metavar="FILE.json", help="a Chrome trace")


def run(options: argparse.Namespace) -> int:
    """Profiles, prints, writes the files; the status is 1 for what cannot be profiled."""
    wanted = ["rich"] + ["matplotlib"] * (options.html is not None)
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"needs {', '.join(missing)}: pip install 'fastopt[report]'")
    import torch

    before = torch.get_num_threads()
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return _profile(options)
    except MISTAKES as error:
        return _fail(error.args[0] if isinstance(error, KeyError) else str(error))
    finally:
        torch.set_num_threads(before)


def _profile(options: argparse.Namespace) -> int:
    from fastopt.cli.profile import subjects
    from fastopt.cli.shared.shapes import nearest

    if (options.name is None) == (options.model is None):
        names = ", ".join(subjects.names())
        return _fail(f"give one name, or --model MODULE:BUILD. Names: {names}")
    if options.model is not None:
        return _profile_model(options)
    name = options.name.lower()
    if name not in subjects.names():
        hint = nearest(name, subjects.names())
        return _fail(f"no {options.name!r}{hint}. Names: {', '.join(subjects.names())}")
    if options.target is not None:
        return _read_target(options, name)
    device = _device(options.device)
    return _measure(options, name, device)


def _measure(options: argparse.Namespace, name: str, device: torch.device) -> int:
    from fastopt.cli.profile import lines, trace
    from fastopt.cli.profile.measure import measure, size_of
    from fastopt.cli.shared.progress import parts

    sizes = _sizes(options, name, device) if options.html is not None else []
    with parts(3 + len(sizes) + (options.trace is not None)) as begin:
        begin(f"Making {name}")
        subject = _subject(options, name, device)
        begin(f"Timing {name} and the machine")
        profile = measure(subject, options.seconds)
        begin("Reading machine code")
        profile.kernels = _kernels(options, name, profile)
        for shape in sizes:
            begin(f"Timing {shape}")
            other = _subject(options, name, device, shape)
            profile.sizes.append(size_of(other, options.seconds / 4))
        if options.trace is not None:
            begin("Tracing")
            write_whole(options.trace, trace.chrome(subject.step, device, TRACED_STEPS))
    print("\n".join(lines.lines(profile)))
    _write(options, lines.conditions(device) | {"profile": profile.as_dict()})
    if options.html is not None:
        from fastopt.cli.profile import page

        write_whole(options.html, page.page(profile))
    return 0


def _subject(
    options: argparse.Namespace, name: str, device: torch.device, shape: str | None = None
) -> Subject:
    from fastopt.cli.profile import subjects

    chosen, state, settings = shape or options.shape, options.state, dict(options.set)
    return subjects.make(name, chosen, options.dtype, device, options.backward, state, settings)


def _sizes(options: argparse.Namespace, name: str, device: torch.device) -> list[str]:
    """Shapes of rising size: one tensor for an optimizer, more or fewer rows for a function."""
    from math import prod

    from fastopt.cli.profile import subjects
    from fastopt.cli.shared import shapes

    if name in subjects.optimizers():
        return [str(n) for n in SIZES]
    rows, *rest = shapes.tensor(options.shape or subjects.default_shape(name))
    found = sorted({max(1, n // max(1, prod(rest))) for n in SIZES})
    return ["x".join(map(str, (n, *rest))) for n in found if n <= 4 * rows]


def _kernels(options: argparse.Namespace, name: str, profile: Profile) -> dict[str, dict[str, Any]]:
    import torch

    from fastopt.cli.profile import machine_code

    device = profile.subject.device
    if device.type == "cpu":
        return machine_code.by_numba(profile.times.launches)
    target = machine_code.target_of(device)
    return machine_code.for_target(target, lambda: _subject(options, name, torch.device("cpu")))


def _read_target(options: argparse.Namespace, name: str) -> int:
    """The kernels a GPU that need not be here would run."""
    import torch

    from fastopt.cli.profile import lines, machine_code, subjects
    from fastopt.cli.shared.progress import parts
    from fastopt.cli.shared.shapes import nearest

    known = machine_code.targets()
    if not known:
        return _fail("--target compiles with triton: pip install triton")
    if options.target not in known:
        hint = nearest(options.target, known)
        return _fail(f"no target {options.target!r}{hint}: {', '.join(known)}")
    if options.html is not None or options.trace is not None:
        return _fail("--target runs nothing that --html or --trace could show; use --json")
    # A kernel does not depend on how much there is to step.
    shape = "mlp" if name in subjects.optimizers() and options.shape is None else None
    with parts(1) as begin:
        begin(f"Compiling {name} for {options.target}")
        found = machine_code.for_target(
            options.target, lambda: _subject(options, name, torch.device("cpu"), shape)
        )
    print("\n".join(lines.target_lines(name, options.target, found)))
    here = lines.conditions(torch.device("cpu"))
    _write(options, here | {"name": name, "target": options.target, "kernels": found})
    return 0


def _profile_model(options: argparse.Namespace) -> int:
    from fastopt.cli.profile import lines, trace
    from fastopt.cli.profile.training import Swaps, load
    from fastopt.cli.shared.progress import parts

    own = ("shape", "state", "target", "html")
    if given := [f"--{name}" for name in own if getattr(options, name) is not None]:
        return _fail(f"{', '.join(given)} does not go with --model: the model says what is run")
    with parts(3 + (options.trace is not None)) as begin:
        begin(f"Building {options.model}")
        swaps = Swaps(*load(options.model))
        begin("Timing the step as it is, and with what is swapped")
        swaps.time(options.seconds)
        begin("Asking torch.profiler")
        swaps.ask_profiler()
        if options.trace is not None:
            begin("Tracing")
            traced = trace.chrome(swaps.variants[-1].step, swaps.device, TRACED_STEPS)
            write_whole(options.trace, traced)
    print("\n".join(swaps.lines()))
    _write(options, lines.conditions(swaps.device) | {"model": swaps.as_dict()})
    return 0


def _device(text: str | None) -> torch.device:
    import torch

    from fastopt import backend

    device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in backend.supported_devices():
        supported = ", ".join(backend.supported_devices())
        raise ValueError(f"no kernels for device {text!r}: fastopt runs on {supported}")
    return device


def _write(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    if options.json is not None:
        write_whole(options.json, json.dumps(numbers, indent=1, allow_nan=False).encode())


def _fail(message: object) -> int:
    print(f"fastopt profile: {message}", file=sys.stderr)
    return 1


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1024")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 600")
    return seconds
