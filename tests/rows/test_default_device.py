"""Row functions under a default device that is not that of their inputs: scratch of a kernel that
lay there would be an address of another memory, so the check is in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECK = """
import sys
import torch
import fastopt
from fastopt import functional as F
from fastopt.parametrizations import weight_norm

torch.manual_seed(0)
def leaf(*sizes):
    return torch.randn(sizes, requires_grad=True)
x, r, v, b, w = leaf(8, 16), leaf(8, 16), leaf(16), leaf(16), leaf(16, 16)
images, target = leaf(3, 16, 5, 5), torch.randint(16, (8,))
pixels = images.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
normed = weight_norm(torch.nn.Linear(16, 16))
leaves = (x, r, v, b, w, images, pixels, *normed.parameters())
calls = {
    "softmax": lambda: F.softmax(x, -1),
    "log_softmax": lambda: F.log_softmax(x, 0),
    "logsumexp": lambda: F.logsumexp(x, -1),
    "scaled_masked_softmax": lambda: F.scaled_masked_softmax(x, is_causal=True),
    "layer_norm": lambda: F.layer_norm(x, (16,), v, b),
    "rms_norm": lambda: F.rms_norm(x, (16,), v),
    "add_layer_norm": lambda: F.add_layer_norm(x, r, (16,), v, b, dropout_p=0.5, seed=3)[0],
    "add_rms_norm": lambda: F.add_rms_norm(x, r, (16,), v)[0],
    "group_norm": lambda: F.group_norm(images, 4, v, b),
    "batch_norm": lambda: F.batch_norm(images, None, None, v, b, True),
    "batch_norm of pixels": lambda: F.batch_norm(pixels, None, None, v, b, True),
    "instance_norm of pixels": lambda: F.instance_norm(pixels, None, None, v, b),
    "cross_entropy": lambda: F.cross_entropy(x, target),
    "linear_cross_entropy": lambda: F.linear_cross_entropy(x, w, target),
    "weight_norm": lambda: normed(x),
}

def found(call):
    for each in leaves:
        each.grad = None
    y = call()
    (y * y).sum().backward()
    return [y.detach(), *(each.grad for each in leaves if each.grad is not None)]

before = {name: found(call) for name, call in calls.items()}
torch.set_default_device("meta")
for name, call in calls.items():
    after = found(call) if len(sys.argv) == 1 else [torch.empty(())]
    if len(after) != len(before[name]) or not all(map(torch.equal, before[name], after)):
        sys.exit(name)
print("the same")
"""


def run(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *arguments], env=environment, capture_output=True, text=True
    )
    return f"{done.returncode} {done.stdout.strip()}{done.stderr.strip()[-200:]}"


def test_row_functions_do_not_follow_the_default_device() -> None:
    assert run() == "0 the same"


def test_this_check_sees_a_result_on_the_default_device() -> None:
    assert run("wrong") == "1 softmax"
