"""What a deferred constructor did to memory: its ops in order, and which op needs the content that another made.

In: `Recording.add`, called with every op that writes memory or makes some (views aren't ops: a tensor is a storage and a geometry).
Out: `ancestors`, the ops that make a storage what it is in the end; `replay` runs them.

A storage goes through *generations*: an op that overwrites all of it without reading (`normal_`, `zero_`, …) starts a new one, in
memory of its own. So a weight that is drawn when its layer is made and again when the model is initialised needs the second draw
alone; the first only moves the generator on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Part = tuple[int, int]
"""(storage, generation)."""


@dataclass(frozen=True)
class Ref:
    """A tensor argument: a geometry on a storage."""

    part: Part
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)  # type: ignore[call-overload]

    def empty(self) -> Tensor:
        """A tensor of its size and strides, in memory of its own."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype)


@dataclass(frozen=True)
class Source:
    """A generator argument, by number (0: torch's default)."""

    number: int


@dataclass
class Op:
    """`func(args)`; or, without a func, a constant. `made`: output position → what it made. `fresh`: what it overwrites. `touched`:
    all that it reads or writes. `needs`: ops whose content it reads. `state`: what its generator is set to first (a state, or an op to
    go on after). `blind`: a draw that reads no tensor."""

    func: Any
    args: Any
    made: dict[int, Ref] = field(default_factory=dict)
    fresh: dict[Part, Ref] = field(default_factory=dict)
    touched: set[Part] = field(default_factory=set)
    needs: set[int] = field(default_factory=set)
    dtype: torch.dtype = torch.float32
    random: bool = False
    blind: bool = False
    source: int = 0
    state: Tensor | int | None = None
    constant: Tensor | None = None


@dataclass
class Storage:
    """How far one storage has come. `held` keeps torch from giving its address to another."""

    held: Any
    generation: int = 0
    writer: int = -1


class Recording:
    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.storages: list[Storage] = []
        self.start = torch.default_generator.get_state()
        self.remembered: dict[int, Tensor | None] = {}
        """Draw after which the constructor took the generator's state (-1: before the first), to come back to it → the real state, once
        replayed."""

    def new_storage(self, held: Any) -> int:
        self.storages.append(Storage(held))
        return len(self.storages) - 1

    def constant(self, number: int, ref: Ref, tensor: Tensor) -> None:
        self.ops.append(Op(None, None, {0: ref}, touched={ref.part}, constant=tensor))
        self.storages[number].writer = len(self.ops) - 1

    def add(self, op: Op, reads: Iterable[int], writes: Iterable[int], overwrites: Iterable[int]) -> None:
        """Append an op whose arguments lie on these storages (an overwritten one is in its new generation already)."""
        index = len(self.ops)
        writes = list(writes)
        op.needs |= {self.storages[number].writer for number in (*reads, *writes)} - {-1}
        for number in (*writes, *overwrites, *(ref.part[0] for ref in op.made.values())):
            self.storages[number].writer = index
        self.ops.append(op)

    def ancestors(self, goals: Sequence[int]) -> list[int]:
        """These ops and every op whose content they need, in the order in which they ran."""
        found: set[int] = set()
        stack = [g for g in goals if g >= 0]
        while stack:
            index = stack.pop()
            if index not in found:
                found.add(index)
                stack += self.ops[index].needs
        return sorted(found)

    def making(self, number: int) -> list[int]:
        """The ops that make a storage what it is now."""
        return self.ancestors([self.storages[number].writer])

    def fingerprint(self) -> str:
        """Of what was done, without the contents that `replace` changes."""
        found = hashlib.sha256()
        for op in self.ops:
            state = op.state if isinstance(op.state, int) else op.state is not None
            name = getattr(op.func, "__qualname__", "") or str(op.func)
            found.update(repr((name, op.args, sorted(op.made.items()), sorted(op.needs), op.dtype, op.source, state)).encode())
        return found.hexdigest()

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Give other contents to what the recording holds: generators' states and constants."""
        self.start = change(self.start)
        for op in self.ops:
            if isinstance(op.state, Tensor):
                op.state = change(op.state)
            if op.constant is not None and op.constant.numel():
                op.constant = change(op.constant)

    def part(self, number: int) -> Part:
        return number, self.storages[number].generation
