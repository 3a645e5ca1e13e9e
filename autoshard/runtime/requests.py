"""What a rank asks of the others. The executor yields these, a player (in process or distributed) answers them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..trace.graph import Tensor


class Meet(NamedTuple):
    """A collective: every rank of the group gives a tensor and gets its part of the result.

    `kind` is the name of the `_c10d_functional` op and `detail` its arguments between tensor and group. `group` is a mesh axis,
    or the ranks themselves. A broadcast's detail is the source's index in the group.
    """

    kind: str
    group: str | tuple[int, ...]
    tensor: torch.Tensor
    detail: tuple[Any, ...]
    where: str


class Send(NamedTuple):
    """Hand tensors to a rank; never waits."""

    peer: int
    tensors: list[torch.Tensor]
    where: str


class Receive(NamedTuple):
    """Wait for what a rank sends next; gets the list of tensors."""

    peer: int
    expected: list[Tensor]
    where: str


Request = Meet | Send | Receive
