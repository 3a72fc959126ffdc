"""The Triton engine in the interpreter, launch by launch, on memory laid out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bench.gpu_oracle import CASES, Case
from bench.gpu_streams import Streams
from fastopt_kernels import xp
from fastopt_kernels.chunks import chunk_table
from fastopt_kernels.gpu.step import engine, update
from fastopt_kernels.gpu.step import launch as step_launch
from fastopt_kernels.gpu.step.launch import Launch
from tests.gpu import gate

CPU = torch.device("cpu")
# Empty, one element and several chunks with a tail; the third begins off a 16-byte boundary.
SIZES, OFFSETS, STEPS = (5, 0, 1, engine.CHUNK + 700), (0, 0, 1, 0), (1, 3, 9, 1000)
# p, g, and what each state lies in. No bfloat16 beside a float64 parameter: the interpreter casts
# one to the other by way of an integer (the gate compiles that case).
KINDS = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "bf16", "bf16"),
    ("fp16", "fp16", "fp16"),
    ("fp64", "fp64", "fp64"),
    ("bf16", "fp16", "fp32"),
    ("fp32", "bf16", "bf16"),
    ("fp64", "bf16", "fp32"),
    ("fp16", "fp32", "fp16"),
)
ADAMW = next(case for case in CASES if case.name == "AdamW")
NADAM = next(case for case in CASES if case.name == "NAdam")
MOMENTUM = next(case for case in CASES if case.name == "SGD momentum")


def make(case: Case, kinds: tuple[str, str, str] = KINDS[0], **memory: Any) -> Streams:
    p, g, state = kinds
    streams = (p, g, *(state for _ in case.update.state_names))
    layout = {"sizes": SIZES, "offsets": OFFSETS, "steps": STEPS} | memory
    return Streams(step_launch, case, streams, device=CPU, **layout)


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counted]:
    counted = {
        name: Counted(getattr(step_launch, name)) for name in ("update_kernel", "scalars_kernel")
    }
    for name, kernel in counted.items():
        monkeypatch.setattr(step_launch, name, kernel)
    return counted


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the vector body and the masked body of the update kernel ran."""
    reached = {"vector": 0, "masked": 0}
    block = update._update_block

    def counting(pointers: Any, offsets: Any, mask: Any, *rest: Any) -> Any:
        reached["vector" if mask is None else "masked"] += 1
        return block(pointers, offsets, mask, *rest)

    monkeypatch.setattr(update, "_update_block", counting)
    return reached


def test_the_cases_are_every_rule_there_is() -> None:
    functions = set(gate.rule_functions().values())
    scalars = {f for f in functions if f.__name__.endswith("_scalars")}
    assert {case.update.rule for case in CASES} == functions - scalars
    assert {case.update.scalars for case in CASES} == scalars


@pytest.mark.parametrize(
    ("case", "kinds"),
    [(case, KINDS[0]) for case in CASES]
    + [(case, KINDS[1 + k % (len(KINDS) - 1)]) for k, case in enumerate(CASES)]
    + [(ADAMW, kinds) for kinds in KINDS],
    ids=lambda x: x.name if isinstance(x, Case) else "-".join(x),
)
def test_a_step_is_torchs_in_float64(case: Case, kinds: tuple[str, str, str]) -> None:
    streams = make(case, kinds)
    streams.run()
    assert streams.wrong(truncates=True) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scalars_computed_on_the_device_are_torchs(case: Case) -> None:
    streams = make(case, KINDS[3])
    streams.run_on_device()
    assert streams.wrong(truncates=True) == []
    assert streams.wrong_numbers() == []


def _no_op(p, g, m, v, a, b, c, d, e, f, h, i):
    return p, m, v


def _without_decay(p, g, m, v, wd, decay, step_size, mu, beta2, nu, eps, v_scale):
    m = xp.lerp(m, g, mu)
    v = beta2 * v + (nu * g) * g
    return p - step_size * m / (v_scale * xp.sqrt(v) + eps), m, v


def _coupled_decay(p, g, m, v, wd, decay, step_size, mu, beta2, nu, eps, v_scale):
    m = xp.lerp(m, g + (p - decay * p), mu)
    v = beta2 * v + (nu * g) * g
    return p - step_size * m / (v_scale * xp.sqrt(v) + eps), m, v


def _eps_inside(p, g, m, v, wd, decay, step_size, mu, beta2, nu, eps, v_scale):
    m = xp.lerp(m, g, mu)
    v = beta2 * v + (nu * g) * g
    return decay * p - step_size * m / (v_scale * xp.sqrt(v + eps)), m, v


@pytest.mark.parametrize("kinds", KINDS[:4], ids="-".join)
@pytest.mark.parametrize("rule", [_no_op, _without_decay, _coupled_decay, _eps_inside])
def test_a_wrong_rule_does_not_pass(rule: Callable[..., Any], kinds: tuple[str, str, str]) -> None:
    """eps is 1e-2 here, or no low-precision store would show where it stands."""
    case = replace(ADAMW, options=ADAMW.options | {"eps": 1e-2})
    streams = make(case, kinds)
    streams.launch.rule = rule
    streams.run()
    assert streams.wrong(truncates=True) != []


def test_both_bodies_of_the_kernel_are_reached(bodies: dict[str, int]) -> None:
    """8 full blocks of float32 a chunk, one in its tail; the rest is masked."""
    streams = make(ADAMW)
    streams.run()
    assert bodies == {"vector": engine.CHUNK // 512 + 1, "masked": 1 + 1 + 1}
    assert streams.wrong(truncates=True) == []


def test_a_misaligned_tensor_keeps_vector_access_from_nobody_else(bodies: dict[str, int]) -> None:
    streams = make(ADAMW, sizes=(1024, 1024), offsets=(3, 0), steps=(2, 2))
    streams.run()
    assert bodies == {"vector": 2, "masked": 2}
    assert streams.wrong(truncates=True) == []


@pytest.mark.parametrize("stream", range(4), ids=["p", "g", "exp_avg", "exp_avg_sq"])
def test_one_misaligned_stream_is_enough_to_mask(stream: int, bodies: dict[str, int]) -> None:
    streams = make(ADAMW, sizes=(1024,), offsets=(0,), steps=(2,))
    raw = torch.full((1028,), -12345.0)
    moved = raw[1:1025]
    moved.copy_(streams.streams[stream][0])
    streams.streams[stream][0] = moved
    streams.launch.tensors[0, stream] = moved.data_ptr()
    streams.run()
    assert bodies == {"vector": 0, "masked": 2}
    assert streams.wrong(truncates=True) == []
    assert raw[0] == raw[1025] == -12345.0


@pytest.mark.parametrize("size", [engine.CHUNK - 1, engine.CHUNK, engine.CHUNK + 1, 511, 512, 513])
def test_sizes_around_a_chunk_and_a_block_are_whole(size: int) -> None:
    streams = make(ADAMW, sizes=(size, 3), offsets=(0, 0), steps=(2, 2))
    streams.run()
    assert streams.wrong(truncates=True) == []


def test_a_write_past_the_end_is_seen() -> None:
    streams = make(ADAMW, sizes=(100,), offsets=(0,), steps=(2,))
    launch = Launch(streams.update.rule, streams.kinds, [101], 9, CPU)
    launch.tensors[:] = streams.launch.tensors
    streams.launch = launch
    streams.run()
    assert any("out of bounds" in text for text in streams.wrong(truncates=True))


def test_groups_and_unequal_steps_share_one_launch(launches: dict[str, Counted]) -> None:
    streams = make(ADAMW)
    streams.run()
    assert launches["update_kernel"].grids == [(4,)]
    assert launches["scalars_kernel"].grids == []
    assert streams.wrong(truncates=True) == []


def test_counting_on_the_device_adds_one_launch(launches: dict[str, Counted]) -> None:
    streams = make(ADAMW)
    streams.run_on_device()
    assert launches["update_kernel"].grids == [(4,)]
    assert launches["scalars_kernel"].grids == [(1,)]


def test_groups_on_the_device_have_hyper_parameters_of_their_own() -> None:
    """Two groups, the second with the first's gradients negated and no learning rate."""
    streams = make(MOMENTUM, sizes=(7, 9), offsets=(0, 0), steps=(2, 2))
    row = [1.0, *streams.update.hypers(streams.group)]
    still = [-1.0, 0.0, *row[2:]]
    addresses = np.asarray([[x.data_ptr()] for x in streams.numbers])
    streams.launch.run_on_device(
        streams.update.scalars, addresses, np.asarray([0, 1]), [row, still], None, None
    )
    moved, kept = streams.streams[0]
    assert not (moved == streams.before[0][0]).any()
    assert torch.equal(kept, streams.before[0][1])
    # torch's buf = 0.9 buf + 0.7 (g + 0.1 p), here with -g
    p, g, buf = (stream[1].double() for stream in streams.before)
    right = 0.9 * buf + 0.7 * (0.1 * p - g)
    torch.testing.assert_close(streams.streams[2][1].double(), right, rtol=1e-6, atol=1e-6)


def test_hyper_parameters_may_be_tensors() -> None:
    ours, tensors = make(ADAMW), make(ADAMW)
    ours.run_on_device()
    group = tensors.group | {"lr": torch.tensor(0.1), "weight_decay": torch.tensor([0.1])}
    rows = [[tensors.sign, *tensors.update.hypers(group)]]
    addresses = np.asarray([[x.data_ptr()] for x in tensors.numbers])
    groups = np.zeros(len(STEPS), dtype=np.int64)
    tensors.launch.run_on_device(tensors.update.scalars, addresses, groups, rows, None, None)
    # 0.1 as a float32 tensor is not 0.1
    for a, b in zip(ours.streams[0], tensors.streams[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.equal(tensors.streams[0][3], tensors.before[0][3])


@pytest.mark.parametrize("case", [ADAMW, NADAM, MOMENTUM], ids=lambda case: case.name)
@pytest.mark.parametrize("kinds", [KINDS[0], KINDS[1]], ids="-".join)
def test_the_gradient_is_unscaled_inside_the_step(case: Case, kinds: tuple[str, str, str]) -> None:
    streams = make(case, kinds)
    streams.run_on_device(torch.tensor([8.0]), torch.tensor([0.0]))
    assert streams.wrong(truncates=True, g_scale=1 / 8) == []
    assert streams.wrong_numbers() == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_skipped_step_leaves_every_bit(case: Case) -> None:
    streams = make(case, sizes=(5, 600), offsets=(1, 0), steps=(1, 7))
    for stream in streams.streams[1]:
        stream[0] = torch.inf
    streams.before[1] = [x.clone() for x in streams.streams[1]]
    streams.run_on_device(torch.tensor([8.0]), torch.tensor([1.0]))
    assert streams.unchanged()
    streams.run_on_device(torch.tensor([8.0]), torch.tensor([0.0]))
    assert not streams.unchanged()


@pytest.mark.parametrize("case", [ADAMW, NADAM], ids=lambda case: case.name)
def test_what_has_no_gradient_is_not_stepped_on_the_device(case: Case) -> None:
    streams = make(case)
    active = (True, True, False, True)
    streams.launch.tensors[2, 1] = 0
    streams.run_on_device(active=active)
    assert streams.wrong(truncates=True, active=active) == []
    assert streams.wrong_numbers(active) == []


def test_what_has_no_gradient_is_not_stepped_by_the_host() -> None:
    streams = make(ADAMW)
    streams.launch.tensors[3, 1] = 0
    streams.launch.select(np.asarray([True, True, True, False]))
    streams.run()
    assert streams.wrong(truncates=True, active=(True, True, True, False)) == []


def test_a_launch_of_empty_tensors_counts_their_steps() -> None:
    streams = make(ADAMW, sizes=(0, 0), offsets=(0, 0), steps=(1, 4))
    streams.run()
    streams.run_on_device()
    assert streams.wrong_numbers() == []


def test_offsets_are_64_bit_throughout() -> None:
    """Addresses 2**33 elements below the tensors, chunks as far above: int32 would not meet."""
    far = 2**33
    streams = make(ADAMW, sizes=(1000,), offsets=(0,), steps=(2,))
    streams.launch.tensors -= far * 4
    chunks = chunk_table(np.asarray([1000]), engine.CHUNK)
    chunks[:, 1:] += far
    streams.launch._all_chunks = chunks
    streams.launch.select(None)
    streams.run()
    assert streams.wrong(truncates=True) == []


def test_a_tensor_of_many_chunks_has_each_element_once() -> None:
    sizes = np.asarray([2**33 + 5, 0, 1])
    chunks = chunk_table(sizes[1:], engine.CHUNK)
    assert chunks.tolist() == [[1, 0, 1]]
    chunks = chunk_table(sizes, 2**20)
    assert chunks.dtype == np.int64
    assert (chunks[:-1, 1:] == np.stack([np.arange(8193) * 2**20, chunks[:-1, 2]], axis=1)).all()
    assert chunks[8192].tolist() == [0, 2**33, 2**33 + 5]


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_default_device_does_not_move_the_tables(on_device: bool) -> None:
    streams = make(ADAMW)
    with torch.device("meta"):
        (streams.run_on_device if on_device else streams.run)()
    assert streams.wrong(truncates=True) == []
