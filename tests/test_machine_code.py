"""What `fastopt profile` reads of machine code: of kernels that ran, and for GPUs not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastopt.cli import main
from fastopt.cli.profile import clock, subjects
from fastopt_kernels.cpu import machine_code as cpu_inspect
from fastopt_kernels.gpu import machine_code as gpu_inspect

CPU = torch.device("cpu")
SCALAR = """
f:
.LBB0_1:
\taddq\t$1, %rax
\tvaddss\t(%rdi,%rax,4), %xmm0, %xmm0
\tcmpq\t%rax, %rsi
\tjne\t.LBB0_1
\tretq
"""
# A loop of vectors inside one that is not, and its tail.
NESTED = """
f:
.LBB0_1:
\txorl\t%eax, %eax
.LBB0_2:
\tvmovups\t(%rdi,%rax,4), %zmm0
\tvaddps\t(%rsi,%rax,4), %zmm0, %zmm0
\taddq\t$16, %rax
\tjne\t.LBB0_2
.LBB0_3:
\tvaddps\t(%rsi,%rax,4), %xmm0, %xmm0
\tjne\t.LBB0_3
\tdecq\t%rcx
\tjne\t.LBB0_1
\tjmp\t.LBB0_9
.LBB0_9:
\tretq
"""


def test_the_width_of_loops_is_read() -> None:
    assert cpu_inspect.loops_of(SCALAR) == cpu_inspect.Loops(0, 1, 0)
    assert cpu_inspect.loops_of(NESTED) == cpu_inspect.Loops(512, 2, 2)


def test_a_kernel_of_this_process_is_read() -> None:
    step = subjects.make("adamw", "mlp", "fp32", CPU).step
    with clock.watching(CPU) as seen:
        step()
    found = cpu_inspect.read(seen[0].kernel)
    assert found.loops.vectorized > 0
    assert found.loops.bits >= 128
    assert found.compile_s > 0 < found.load_s


def test_occupancy() -> None:
    """64 registers let 32 of 64 warps run on sm_90; 100 KiB of shared memory two programs."""
    assert gpu_inspect.occupancy("sm_90", 64, 0, 4) == 0.5
    assert gpu_inspect.occupancy("sm_90", 32, 0, 4) == 1.0
    assert gpu_inspect.occupancy("sm_90", 32, 100 << 10, 4) == 2 * 4 / 64
    assert gpu_inspect.occupancy("gfx942", 128, 0, 4) == 0.5


@pytest.mark.parametrize(("name", "target"), [("softmax", "sm_90"), ("adamw", "gfx942")])
def test_kernels_are_read_for_a_gpu_that_is_not_here(
    name: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    shape = ["--shape", "8x1024"] if name == "softmax" else []
    assert main(["profile", name, "--target", target, "--json", str(out), *shape]) == 0
    (kernel,) = json.loads(out.read_text())["kernels"].values()
    assert kernel["launches"] == 1
    assert kernel["spills"] == 0
    assert kernel["load_bits"] == kernel["store_bits"] == 128
    assert 0 < kernel["occupancy"] <= 1
    assert f"{name} on {target}" in capsys.readouterr().out
    # The CPU has its own kernels again.
    assert subjects.make("softmax", "2x3", "fp32", CPU).step() is None
