"""softmax, losses and norms with the signatures of torch.nn.functional, as fused kernels.

Plain tensors on a device with kernels run through them. What a kernel cannot see into goes to
torch's own function: tensor subclasses such as DTensor, functorch transforms (vmap, jvp, grad),
forward-mode AD, torch.jit.trace and torch.onnx.export; so their meaning is torch's. The result of a
collective, a view with a pending sign and zeros without memory are resolved first. Under
torch.compile, torch.export, fake tensors and dispatch modes the functions are the ops
torch.ops.fastopt.*; torch.fx.symbolic_trace records a call as one node.

RuntimeError for tensors on different devices, and for one whose storage is too short for it.

All of them: float32, bfloat16, float16 and float64 on CPU and CUDA; any strides. Sums and
statistics are kept in float32 (float64 for float64). A result is bitwise the same in every run and
for any number of threads, and a row's does not depend on the other rows. NaN and infinity give what
they give in torch. What torch refuses is refused with torch's exception.
"""

from __future__ import annotations

from fastopt.functional.add_layer_norm import add_layer_norm, add_rms_norm
from fastopt.functional.channel_norms import batch_norm, group_norm, instance_norm
from fastopt.functional.cross_entropy import cross_entropy
from fastopt.functional.layer_norm import layer_norm
from fastopt.functional.linear_cross_entropy import linear_cross_entropy
from fastopt.functional.masked_softmax import scaled_masked_softmax
from fastopt.functional.rms_norm import rms_norm
from fastopt.functional.softmax import log_softmax, logsumexp, softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "cross_entropy",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "logsumexp",
    "rms_norm",
    "scaled_masked_softmax",
    "softmax",
]
