"""The walk of the norms over channels over their input on a GPU, and the sums of sets from tiles'.

A program takes one tile and keeps it in registers. Of planes a tile is LINES pieces of channels of
images; of pixels (channels_last) it is LINES pixels by COLS channels. Either way COLS lie beside
each other, and what is reduced of a tile is one number a channel of an image, a part. Parts are
added up, set by set, in an order that the shape alone decides: there are no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.channels import Channels
from fastopt_kernels.gpu.base.extents import counted
from fastopt_kernels.gpu.rows import shared

# Elements of a tile: 16 of 4 bytes a thread, of which 256 make a program.
TILE = {tl.float32: 4096, tl.float64: 2048}
# Bytes of neighbouring channels in a tile of pixels: whole lines of the L2 cache.
CHANNEL_BYTES = 256
# Tiles (sets, parts) of the sums over parts.
SUM_TILE, SUM_THREADS = (16, 32), 128
# What changes from call to call, and must not compile a kernel anew.
EXTENTS = [
    "images",
    "n_channels",
    "length",
    "n_pieces",
    "piece_size",
    "stride_image",
    "stride_channel",
    "stride_element",
    "set_image",
    "per_group",
]
SETS = [
    "n_sets",
    "groups",
    "base_outer",
    "base_inner",
    "n_parts",
    "inner",
    "step_outer",
    "step_inner",
    "length",
    "piece_size",
    "per_set",
    "per_group",
]


@triton.jit
def place(
    images, n_channels, length, n_pieces, piece_size, stride_image, stride_channel, stride_element,
    PIXELS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(image, channel, mask, offsets in x, offsets in a dense tensor, part, mask of parts); those
    of a channel have one line of a tile of pixels, one column of a tile of planes."""
    program = tl.program_id(0).to(tl.int64)
    stride_image = stride_image.to(tl.int64) * VECTOR
    if PIXELS:
        n_channels = n_channels * VECTOR
        blocks = tl.cdiv(n_channels, COLS)
        piece = program // blocks
        image = piece // n_pieces
        channel = ((program % blocks) * COLS + tl.arange(0, COLS))[None, :]
        element = ((piece % n_pieces) * piece_size + tl.arange(0, LINES))[:, None]
        here = channel < n_channels
        mask = (element < length) & here
        at = image * stride_image + element * (stride_element.to(tl.int64) * VECTOR) + channel
        dense = (image * length + element) * n_channels + channel
        part = piece * n_channels + channel
    else:
        length = length * VECTOR
        piece_size = piece_size * VECTOR
        part = (program * LINES + tl.arange(0, LINES))[:, None]
        row = part // n_pieces
        image = row // n_channels
        channel = row - image * n_channels
        cols = tl.arange(0, COLS)[None, :]
        first = (part - row * n_pieces) * piece_size
        here = image < images
        mask = here & (cols < piece_size) & (first + cols < length)
        start = image * stride_image + channel * (stride_channel.to(tl.int64) * VECTOR) + first
        at = start + cols
        dense = row * length + first + cols
    return image, channel, mask, at, dense, part, here


@triton.jit
def of_channel(x_ptr, index, here, COMPUTE: tl.constexpr):
    """One number a channel, of any dtype."""
    return shared.load(x_ptr, index, here, 0.0, COMPUTE)


@triton.jit
def parts_of(
    lines, first, n_sets, groups, base_outer, base_inner, n_parts, inner, step_outer, step_inner,
    length, piece_size, COLS: tl.constexpr,
):  # fmt: skip
    """(offsets, mask, elements of each, channel in its group) of COLS parts of some sets."""
    j = (first + tl.arange(0, COLS))[None, :]
    outer, piece = j // inner, j % inner
    base = (lines // groups) * base_outer + (lines % groups) * base_inner
    at = base + outer.to(tl.int64) * step_outer + piece.to(tl.int64) * step_inner
    count = tl.minimum(piece_size, length - piece * piece_size)
    return at, (lines < n_sets) & (j < n_parts), count, outer


@dataclass(frozen=True)
class Tiles:
    """Tiles of one geometry, and where the parts lie that each set, or each channel, is made of."""

    channels: Channels
    lines: int
    cols: int
    n_pieces: int
    piece_size: int
    vector: int
    compute: tl.dtype

    @classmethod
    def of(cls, x: Tensor, channels: Channels, tensors: tuple[Tensor | None, ...]) -> Tiles:
        """tensors: all that are read or written as tiles"""
        compute, itemsize, c = shared.COMPUTE[x.dtype], x.element_size(), channels
        size = TILE[compute]
        counted(c.channels, "the channels"), counted(c.length, "a channel of an image")
        if c.pixels:
            strides = c.channels, c.stride_image, c.stride_element
            vector = shared.vector_of(tensors, strides, itemsize)
            cols = min(shared.power_of_two(c.channels), CHANNEL_BYTES // itemsize)
            lines = min(shared.power_of_two(c.length), size // cols)
            return cls(c, lines, cols, triton.cdiv(c.length, lines), lines, vector, compute)
        strides = c.length, c.stride_image, c.stride_channel
        vector = shared.vector_of(tensors, strides, itemsize)
        n_pieces = triton.cdiv(c.length, size)
        piece_size = triton.cdiv(triton.cdiv(c.length, n_pieces), vector) * vector
        cols = shared.power_of_two(piece_size)
        lines = max(1, size // 2 // cols)
        return cls(c, lines, cols, triton.cdiv(c.length, piece_size), piece_size, vector, compute)

    @property
    def n_parts(self) -> int:
        return self.channels.images * self.n_pieces * self.channels.channels

    def room(self, x: Tensor, n: int) -> Tensor:
        """(n, parts) numbers of the compute type."""
        dtype = torch.float64 if self.compute == tl.float64 else torch.float32
        return torch.empty((n, self.n_parts), dtype=dtype, device=x.device)

    def _each(self) -> int:
        """Elements a thread: fewer of several planes, whose addresses take registers (sm_80)."""
        planes = self.lines > 1 and not self.channels.pixels
        return 8 if planes and self.compute == tl.float32 else 16

    def launch(self, kernel: Any, tensors: tuple[Any, ...], given: bool, **other: Any) -> None:
        """kernel[grid](*tensors, *EXTENTS), where a program is a tile; given: statistics are of
        channels."""
        c, v = self.channels, self.vector
        if c.pixels:
            grid = c.images * self.n_pieces * triton.cdiv(c.channels, self.cols)
            extents = (c.images, c.channels // v, c.length, self.n_pieces, self.piece_size)
            extents += (c.stride_image // v, 1, c.stride_element // v)
        else:
            grid = triton.cdiv(self.n_parts, self.lines)
            extents = (c.images, c.channels, c.length // v, self.n_pieces, self.piece_size // v)
            extents += (c.stride_image // v, c.stride_channel // v, 1)
        per_group = 1 if given else c.channels // c.groups
        extents += (0 if c.batch or given else c.groups, per_group)
        # Addresses of single elements take registers.
        each = self._each() if v > 1 else 4
        threads = min(512, max(32, self.lines * self.cols // each))
        shared.launch(
            kernel,
            (grid,),
            (*tensors, *extents),
            COMPUTE=self.compute,
            PIXELS=c.pixels,
            LINES=self.lines,
            COLS=self.cols,
            VECTOR=v,
            num_warps=shared.warps(threads),
            enable_fp_fusion=True,
            **other,
        )

    def launch_sums(
        self, kernel: Any, tensors: tuple[Any, ...], over_channels: bool, **other: Any
    ) -> None:
        """kernel[grid](*tensors, *SETS), where a line is a set, or else one channel of all
        images."""
        c, pieces = self.channels, self.n_pieces
        step = c.channels if c.pixels else 1
        batch = c.batch or over_channels
        groups = c.channels if over_channels else c.groups
        per_group, of_channel = c.channels // groups, 1 if c.pixels else pieces
        if batch:
            n_sets, outer, step_outer = groups, c.images, pieces * c.channels
        else:
            n_sets, outer, step_outer = c.images * groups, per_group, of_channel
        sets = (n_sets, groups, pieces * c.channels, per_group * of_channel)
        parts = (counted(outer * pieces, "a sum over parts"), pieces, step_outer, step)
        per_set = per_group * c.length * (c.images if batch else 1)
        lines, cols = SUM_TILE
        shared.launch(
            kernel,
            (triton.cdiv(n_sets, lines),),
            (*tensors, *sets, *parts, c.length, self.piece_size, per_set, per_group),
            COMPUTE=self.compute,
            LINES=lines,
            COLS=cols,
            num_warps=shared.warps(SUM_THREADS),
            enable_fp_fusion=True,
            **other,
        )
