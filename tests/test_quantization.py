"""Swapped models under torch.ao.quantization and the other fusions of torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao import quantization

from fastopt import swap
from tests.rows.cases import draw

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor.*deprecated:UserWarning",
    "ignore:Please use quant_min and quant_max:UserWarning",
)


def convolution(dims: int, relu: bool, training: bool) -> nn.Sequential:
    torch.manual_seed(dims)
    conv, norm = getattr(nn, f"Conv{dims}d")(3, 4, 3), getattr(nn, f"BatchNorm{dims}d")(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return nn.Sequential(conv, norm, *[nn.ReLU()] * relu).train(training)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_and_its_norm_are_fused(dims: int, relu: bool, inplace: bool) -> None:
    x = draw(2, 3, *[5] * dims)
    for training in (False, True):
        how = quantization.fuse_modules_qat if training else quantization.fuse_modules
        torchs = convolution(dims, relu, training)
        swapped = swap(copy.deepcopy(torchs))
        names = [str(k) for k in range(len(torchs))]
        expected, found = how(torchs, names), how(swapped, names, inplace=inplace)
        assert [type(m) for m in found.modules()] == [type(m) for m in expected.modules()]
        torch.testing.assert_close(found(x), expected(x))
        assert inplace or type(swapped[1]).__module__ == "fastopt.nn"


@pytest.mark.parametrize(
    "modules",
    [
        lambda: (nn.Linear(5, 4), nn.BatchNorm1d(4)),
        lambda: (nn.ConvTranspose2d(4, 5, 3), nn.BatchNorm2d(5)),
        lambda: (nn.BatchNorm2d(4), nn.ReLU()),
    ],
)
def test_other_pairs_are_fused(modules: Any) -> None:
    torchs = nn.Sequential(*modules()).eval()
    x = draw(2, 5) if isinstance(torchs[0], nn.Linear) else draw(2, 4, 3, 3)
    expected = torchs(x)
    torch.testing.assert_close(quantization.fuse_modules(swap(torchs), ["0", "1"])(x), expected)


def test_fusions_of_one_module_at_a_time() -> None:
    conv, norm = convolution(2, False, training=False)
    x = draw(2, 3, 5, 5)
    expected = norm(conv(x))
    torch.testing.assert_close(nn.utils.fusion.fuse_conv_bn_eval(conv, swap(norm))(x), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(4),
        lambda: nn.LayerNorm([4, 3, 3]),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.InstanceNorm2d(4, affine=True),
    ],
)
def test_a_quantized_model_has_torchs_quantized_norms(make: Any) -> None:
    torch.manual_seed(0)
    torchs = nn.Sequential(
        quantization.QuantStub(), nn.Conv2d(3, 4, 3), make(), quantization.DeQuantStub()
    ).eval()
    x, results = draw(2, 3, 5, 5), []
    for each in (torchs, swap(copy.deepcopy(torchs))):
        each.qconfig = quantization.default_qconfig
        prepared = quantization.prepare(each)
        prepared(x)
        results.append(quantization.convert(prepared))
    assert type(results[1][2]) is type(results[0][2])
    torch.testing.assert_close(results[1](x), results[0](x))


def test_torchs_fusion_of_a_graph() -> None:
    from torch.fx.experimental.optimization import fuse

    torchs = convolution(2, relu=True, training=False)
    x = draw(2, 3, 5, 5)
    expected = torchs(x)
    torch.testing.assert_close(fuse(swap(torchs))(x), expected)
