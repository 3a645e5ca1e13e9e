"""Lanes: where the calls run that move parameters and reduce gradients, beside the loop.

In: calls that a step issues in one order. Out: on CUDA they run on a stream of their own, so that communication stands behind the loop's
computation; elsewhere in place. The order in which they are issued is the executor's either way, and so the same on all ranks of a group.

Memory across streams needs no `record_stream`, by three rules that the executor keeps: a lane follows the loop before a step's first call
and before each reduction, so what was allocated here, handed to the loop and freed since is reused only after the loop's last use of it;
what a reduction reads is held until the loop has waited for that reduction; and nothing else that the loop frees is read here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class Lane:
    """In place: what is issued is done."""

    def follow(self) -> None:
        """What is issued here from now on starts after all that the loop was given so far."""

    def inside(self) -> AbstractContextManager[Any]:
        """Around what is issued here."""
        return nullcontext()

    def mark(self) -> Any:
        """A ticket for all that was issued here so far."""
        return None

    def wait(self, ticket: Any) -> None:
        """What the loop is given from now on starts after what the ticket stands for. Never holds up the host."""


class Stream(Lane):
    """A CUDA stream. Compiled graphs run on the current stream, and so do their waits for collectives: NCCL's own stream waits for this
    one when a collective starts, and this one, not the loop's, for its end."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def follow(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def inside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def mark(self) -> torch.cuda.Event:
        return self.stream.record_event()

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)
