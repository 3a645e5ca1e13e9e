"""Finds races between a step's loop and its lane, without a GPU: a lane that runs in place and notes what would be in order on two streams.

Every op that torch dispatches is an access of its tensors' memory, in the lane or in the loop. An access is in order after those of its own
side, and after those of the other side that `follow` and `wait` let it know of. Reused memory counts too, as a caching allocator with a
pool for each stream reuses it: what one side allocated and freed may go back to that side while the other still reads it.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoshard.runtime.lane import Lane

LOOP, BESIDE = 0, 1


@dataclass
class Memory:
    """The last access of each side, and the last that wrote; `home` is the side that allocated it."""

    home: int
    reads: list[int] = field(default_factory=lambda: [0, 0])
    writes: list[int] = field(default_factory=lambda: [0, 0])


class Watched(Lane, TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.side, self.now, self.known = LOOP, [0, 0], [0, 0]
        self.memory: dict[int, Memory] = {}
        self.races: list[str] = []
        self.accesses = [0, 0]

    # ---- a lane

    def follow(self) -> None:
        self.known[BESIDE] = self.now[LOOP]

    @contextmanager
    def inside(self):  # type: ignore[no-untyped-def,override]
        assert self.side == LOOP
        self.side = BESIDE
        yield
        self.side = LOOP

    def mark(self) -> int:
        return self.now[BESIDE]

    def wait(self, ticket: int) -> None:
        self.known[LOOP] = max(self.known[LOOP], ticket)

    # ---- a mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.now[self.side] += 1
        self.accesses[self.side] += 1
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        changes = any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.arguments)
        known = set()
        for i, t in enumerate(given):
            known.add(key(t))
            self.access(func, t, writes=changes and i == 0)
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and key(t) not in known:
                self.allocated(func, t)
        return result

    def access(self, func, t: Tensor, writes: bool) -> None:  # type: ignore[no-untyped-def]
        memory = self.memory.setdefault(key(t), Memory(self.side))
        other = 1 - self.side
        late = max(memory.writes[other], memory.reads[other] if writes else 0)
        if late > self.known[self.side]:
            self.races.append(f"{func} {'beside' if self.side else 'in'} the loop, on {tuple(t.shape)}")
        (memory.writes if writes else memory.reads)[self.side] = self.now[self.side]

    def allocated(self, func, t: Tensor) -> None:  # type: ignore[no-untyped-def]
        old = self.memory.get(key(t))
        other = 1 - self.side
        if old is not None and old.home == self.side and max(old.writes[other], old.reads[other]) > self.known[self.side]:
            self.races.append(f"{func} {'beside' if self.side else 'in'} the loop reuses memory of {tuple(t.shape)}")
        self.memory[key(t)] = Memory(self.side)
        self.memory[key(t)].writes[self.side] = self.now[self.side]


def key(t: Tensor) -> int:
    return int(t.untyped_storage().data_ptr())
