"""Host tables to the device in one copy a launch, which the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Pinned buffers held ready for captures; a step that is not captured makes one up to this many.
SPARES = 4

# A captured graph copies its tables from pinned memory at every replay, for as long as it lives,
# which nobody tells us: what it reads outside its own memory is never freed.
_captured: list[torch.Tensor] = []


class Tables:
    """The arrays that one launch sends to the device.

    lasting: an array that is sent again only where it was replaced, or on another stream
    """

    def __init__(self, device: torch.device, lasting: np.ndarray) -> None:
        self.device = device
        self._spares: list[torch.Tensor] = []
        self.replace(lasting)

    def replace(self, lasting: np.ndarray) -> None:
        """Another array in place of the lasting one."""
        self.lasting = lasting
        # The one on the device and the stream it was copied on; None until the next launch.
        self._sent: tuple[torch.Tensor, Any] | None = None

    def send(self, arrays: list[np.ndarray]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """These arrays, and the lasting one, on the device.

        The pinned buffer is a new one each time: torch's host allocator hands its memory out again
        only when the copy has ended. It may not be asked for one during capture; a spare serves.
        """
        stream = None if self.device.type == "cpu" else torch.cuda.current_stream()
        capturing = self._capturing()
        known = self._sent is not None and self._sent[1] == stream
        if not known:
            arrays = [*arrays, self.lasting]
        nbytes = sum(map(_padded, arrays))
        pinned = self._spares.pop() if capturing and self._spares else None
        if pinned is None or len(pinned) < nbytes:
            pinned = self._pinned(nbytes)
        target = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        tables, start = [], 0
        for array in arrays:
            source = torch.from_numpy(array)
            span = slice(start, start + array.nbytes)
            pinned[span].view(source.dtype).view(source.shape).copy_(source)
            tables.append(target[span].view(source.dtype).view(source.shape))
            start += _padded(array)
        target.copy_(pinned[:nbytes], non_blocking=True)
        if capturing:
            _captured.append(pinned)
            if known:
                _captured.append(self._sent[0])
        if known:
            return tables, self._sent[0]
        # A table that a captured copy fills holds nothing before the first replay.
        self._sent = None if capturing else (tables[-1], stream)
        return tables[:-1], tables[-1]

    def keep_spare(self, arrays: list[np.ndarray]) -> None:
        """Have a pinned buffer ready for a capture that sends as much as this."""
        if len(self._spares) < SPARES and not self._capturing():
            self._spares.append(self._pinned(sum(map(_padded, arrays))))

    def outlive(self, tensor: torch.Tensor) -> None:
        """Keep a tensor that a launch writes to and that somebody else may let go of: until this
        stream has done so, or, under capture, for good."""
        if self._capturing():
            _captured.append(tensor)
        elif self.device.type != "cpu":
            tensor.record_stream(torch.cuda.current_stream())

    def keep_if_captured(self, tensors: Sequence[torch.Tensor]) -> None:
        """Under capture, keep what a launch reads or writes and its plan alone holds: the graph
        may be replayed when that plan is gone."""
        if self._capturing():
            _captured.extend(tensors)

    def _capturing(self) -> bool:
        return self.device.type != "cpu" and torch.cuda.is_current_stream_capturing()

    def _pinned(self, nbytes: int) -> torch.Tensor:
        pin = self.device.type != "cpu"
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pin)


def _padded(array: np.ndarray) -> int:
    """Bytes of an array, up to the next boundary of 16."""
    return -(-array.nbytes // 16) * 16


def host_value(x: Any) -> float:
    """A hyper-parameter as far as the host knows it; one on a device is copied there."""
    if isinstance(x, torch.Tensor):
        return x.detach().item() if x.device.type == "cpu" else 0.0
    return float(x)


def here(x: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A tensor, if there is one, on a device, without waiting for it."""
    return None if x is None else x.to(device, non_blocking=True)


def copy_device_values(values: Sequence[Sequence[Any]], table: torch.Tensor) -> None:
    """Those that are on a device, to their places in a table there."""
    for row, of_row in enumerate(values):
        for column, value in enumerate(of_row):
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                table[row, column].copy_(value.reshape(()), non_blocking=True)
