"""Which elements of an input (images, channels, elements) are normalized together, and where."""

from __future__ import annotations

from typing import NamedTuple


class Channels(NamedTuple):
    """x as (images, channels, length), its strides in elements, and the sets it falls into.

    A set is what shares a mean: groups of neighbouring channels, of one image, or of all of them
    where `batch` is true (and a group is a channel). One of stride_channel and stride_element is 1.
    y, dy and dx are dense in the same order: planes (images, channels, length), or where `pixels`
    is true (images, length, channels).
    """

    images: int
    channels: int
    length: int
    stride_image: int
    stride_channel: int
    stride_element: int
    groups: int
    batch: bool
    pixels: bool

    @property
    def n_sets(self) -> int:
        return self.groups if self.batch else self.images * self.groups

    @property
    def per_set(self) -> int:
        """Elements of a set."""
        n = self.channels // self.groups * self.length
        return self.images * n if self.batch else n
