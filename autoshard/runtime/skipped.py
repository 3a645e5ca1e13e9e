"""How many steps were left out, counted where that is decided: on the device, which nobody waits for.

The count is copied to the host beside the work that follows; what has arrived is looked at when the next step begins, and said.
Who asks for the number (`total`) waits for it.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger("autoshard")


class Skipped:
    """`tells`: whether this process says so."""

    def __init__(self) -> None:
        self.tells = True
        self.on_host, self.said = 0, 0
        self.on_device: Tensor | None = None
        self.coming: tuple[Tensor, torch.cuda.Event] | None = None

    def add(self, skip: bool | Tensor) -> None:
        """A step was left out (1) or taken (0)."""
        if isinstance(skip, bool):
            self.on_host += skip
            self._say(self.on_host)
            return
        if self.on_device is None:
            self.on_device = torch.zeros_like(skip)
        self.on_device.add_(skip)
        if skip.device.type != "cuda":
            self._say(self.on_host + int(self.on_device))
        elif self.coming is None and not torch.cuda.is_current_stream_capturing():
            with torch.cuda.device(skip.device):
                number = torch.empty(skip.shape, dtype=skip.dtype, pin_memory=True).copy_(self.on_device, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self.coming = number, event

    def look(self) -> None:
        """Say what has arrived."""
        if self.coming is not None and not torch.cuda.is_current_stream_capturing() and self.coming[1].query():
            number, self.coming = self.coming[0], None
            self._say(self.on_host + int(number))

    def total(self) -> int:
        """The number, waited for."""
        total = self.on_host + (0 if self.on_device is None else int(self.on_device))
        self._say(total)
        return total

    def _say(self, total: int) -> None:
        if total > self.said and self.tells:
            log.warning("a gradient isn't finite: the step is left out on every rank (%d so far)", total)
        self.said = max(self.said, total)
