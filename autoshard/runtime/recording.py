"""What a deferred constructor did to memory: its ops in order, and replay of the whole tensors they make, one after another.

In: `Recording.add`, called with every op that writes memory or makes some (views aren't ops: a tensor is a storage and a geometry).
Out: `replay(goals)` yields each wanted storage when its content is final, and frees what nothing needs any more.

A storage goes through *generations*: an op that overwrites all of it without reading (`normal_`, `zero_`, …) starts a new one, in
memory of its own. So a weight that is drawn when its layer is made and again when the model is initialised lives from the second
draw on alone; the first still consumes the generator, into memory that is freed at once. Draws run in the order of construction,
anything else as soon as a draw or a wanted tensor needs it, and what can follow a draw follows at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

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


@dataclass(frozen=True)
class Source:
    """A generator argument, by number (0: torch's default)."""

    number: int


@dataclass
class Op:
    """`func(args)`; or, without a func, a constant. `made`: output position → what it made. `needs`: ops whose content it reads.
    `follows`: ops that must have read before it writes. `state`: what its generator is set to first (a state, or an op to go on after)."""

    func: Any
    args: Any
    made: dict[int, Ref] = field(default_factory=dict)
    fresh: dict[Part, Ref] = field(default_factory=dict)
    touched: set[Part] = field(default_factory=set)
    needs: set[int] = field(default_factory=set)
    follows: set[int] = field(default_factory=set)
    dtype: torch.dtype = torch.float32
    random: bool = False
    source: int = 0
    state: Tensor | int | None = None
    constant: Tensor | None = None


@dataclass
class Storage:
    """How far one storage has come. `held` keeps torch from giving its address to another."""

    held: Any
    generation: int = 0
    writer: int = -1
    readers: list[int] = field(default_factory=list)


class Recording:
    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.storages: list[Storage] = []
        self.remembered: dict[int, Tensor | None] = {}
        """Draw after which the constructor took the generator's state, to come back to it → the real state, once replayed."""

    # ---- recording --------------------------------------------------------------------------------------------------

    def new_storage(self, held: Any) -> int:
        self.storages.append(Storage(held))
        return len(self.storages) - 1

    def constant(self, number: int, ref: Ref, tensor: Tensor) -> None:
        self.ops.append(Op(None, None, {0: ref}, touched={ref.part}, constant=tensor))
        self.storages[number].writer = len(self.ops) - 1

    def add(self, op: Op, reads: Sequence[int], writes: Sequence[int], overwrites: Sequence[int]) -> None:
        """Append an op whose arguments lie on these storages (an overwritten one's generation has been moved on by `overwrite`)."""
        index = len(self.ops)
        for number in reads:
            s = self.storages[number]
            op.needs.add(s.writer)
            s.readers.append(index)
        for number in writes:
            s = self.storages[number]
            op.needs.add(s.writer)
            op.follows |= set(s.readers)
            s.writer, s.readers = index, []
        for number in overwrites:
            self.storages[number].writer, self.storages[number].readers = index, []
        for ref in op.made.values():
            self.storages[ref.part[0]].writer = index
        op.needs -= {index, -1}
        op.follows -= {index}
        self.ops.append(op)

    # ---- what depends on what ---------------------------------------------------------------------------------------

    def ancestors(self, goals: Sequence[int], done: set[int] | None = None) -> set[int]:
        """The goals and every op whose content they need, those in `done` left out."""
        found: set[int] = set()
        stack = [g for g in goals if g >= 0 and (done is None or g not in done)]
        while stack:
            index = stack.pop()
            if index not in found:
                found.add(index)
                stack += [n for n in self.ops[index].needs if done is None or n not in done]
        return found

    def value(self, ref: Ref) -> Tensor | None:
        """The content of a tensor as of now; None if it depends on a draw."""
        wanted = self.ancestors([self.storages[ref.part[0]].writer])
        if any(self.ops[i].random for i in wanted):
            return None
        run = Replay(self, wanted, {ref.part[0]})
        with _disable_current_modes():  # a constructor may be running
            for index in sorted(wanted):
                run.execute(index)
            return ref.on(run.memory[ref.part]).clone()

    def replay(self, goals: Sequence[int]) -> Iterator[tuple[int, torch.UntypedStorage]]:
        """Each goal (a storage) with its final content, once; it is freed when the next is asked for, if nothing else needs it."""
        wanted = self.ancestors([self.storages[n].writer for n in goals])
        # a draw that reads (a tensor of means, what is there already) runs as it did, so that the generator moves as it did
        reading = [i for i, op in enumerate(self.ops) if op.random and i not in wanted and (op.needs or not (op.fresh or op.made))]
        run = Replay(self, wanted | self.ancestors(reading), set(goals))
        for index, op in enumerate(self.ops):
            if op.random:
                yield from run.reach(index)
        for number in goals:
            yield from run.reach(self.storages[number].writer)
            if self.storages[number].writer == -1:
                raise AssertionError(f"storage {number} was never written")


class Replay:
    """One replay. `wanted`: ops whose content matters; `goals`: storages to hand out."""

    def __init__(self, recording: Recording, wanted: set[int], goals: set[int]) -> None:
        self.r, self.wanted, self.goals = recording, wanted, goals
        self.done: set[int] = set()
        self.memory: dict[Part, torch.UntypedStorage] = {}
        self.uses = Counter(part for i in wanted for part in recording.ops[i].touched)
        self.users: dict[Part, list[int]] = {}
        for i in sorted(wanted):
            for part in recording.ops[i].touched:
                self.users.setdefault(part, []).append(i)
        self.final: dict[int, list[int]] = {}
        for number in goals:
            self.final.setdefault(recording.storages[number].writer, []).append(number)
        self.waiting: set[Part] = {(n, recording.storages[n].generation) for n in goals}
        self.generators: dict[int, torch.Generator] = {}

    def reach(self, index: int) -> Iterator[tuple[int, torch.UntypedStorage]]:
        """Run an op and what it needs, then whatever can follow without a draw."""
        if index in self.done:
            return
        if index not in self.wanted:
            self.execute(index)
            return
        queue = [index]
        while queue:
            target = queue.pop(0)
            for i in self.before(target):
                self.execute(i)
                yield from self.hand_out(i)
                queue += self.next_users(i)

    def before(self, target: int) -> list[int]:
        """An op and what is left to run before it, in order; nothing if that takes a draw."""
        if target in self.done:
            return []
        todo: set[int] = set()
        stack = [target]
        while stack:
            index = stack.pop()
            if index in todo or index in self.done:
                continue
            if self.r.ops[index].random and index != target:
                return []
            todo.add(index)
            stack += [n for n in (*self.r.ops[index].needs, *self.r.ops[index].follows) if n in self.wanted]
        return sorted(todo)

    def next_users(self, index: int) -> list[int]:
        """Ops that touch what this one wrote, and draw nothing."""
        op = self.r.ops[index]
        found: list[int] = []
        for part in sorted(op.touched):
            users = self.users[part]
            while users and users[0] in self.done:
                users.pop(0)
            found += [i for i in users[:64] if not self.r.ops[i].random and i not in self.done]
        return sorted(found)

    def execute(self, index: int) -> None:
        op = self.r.ops[index]
        self.done.add(index)
        if op.constant is not None:
            self.memory[op.made[0].part] = op.constant.clone().untyped_storage()
        else:
            self._call(index, op)
        if index not in self.wanted:  # a draw that nobody keeps
            for part in (*op.fresh, *(ref.part for ref in op.made.values())):
                self.memory.pop(part, None)
            return
        for part in op.touched:
            self.uses[part] -= 1
            self._free(part)

    def _call(self, index: int, op: Op) -> None:
        for part, ref in op.fresh.items():
            self.memory[part] = torch.empty_strided(ref.size, ref.stride, dtype=ref.dtype).untyped_storage()
        args, kwargs = pytree.tree_map_only((Ref, Source), self._argument, op.args)
        generator = self._generator(op) if op.random else None
        before = torch.get_default_dtype()
        torch.set_default_dtype(op.dtype)
        try:
            with torch.no_grad():
                outs = op.func(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)
        flat = pytree.tree_leaves(outs)
        for position, ref in op.made.items():
            out = flat[position]
            if out.stride() != ref.stride or out.storage_offset() != ref.offset:
                out = torch.empty_strided(ref.size, ref.stride, dtype=ref.dtype).copy_(out)
            self.memory[ref.part] = out.untyped_storage()
        if generator is not None and index in self.r.remembered:
            self.r.remembered[index] = generator.get_state()

    def _argument(self, leaf: Ref | Source) -> Any:
        if isinstance(leaf, Ref):
            return leaf.on(self.memory[leaf.part])
        return self._numbered(leaf.number)

    def _numbered(self, number: int) -> torch.Generator:
        return torch.default_generator if number == 0 else self.generators.setdefault(number, torch.Generator())

    def _generator(self, op: Op) -> torch.Generator:
        """The op's generator, where the constructor had it."""
        found = self._numbered(op.source)
        if op.state is not None:
            state = self.r.remembered[op.state] if isinstance(op.state, int) else op.state
            assert state is not None
            found.set_state(state)
        return found

    def hand_out(self, index: int) -> Iterator[tuple[int, torch.UntypedStorage]]:
        for number in self.final.get(index, ()):
            part = (number, self.r.storages[number].generation)
            yield number, self.memory[part]
            self.waiting.discard(part)
            self._free(part)

    def _free(self, part: Part) -> None:
        if not self.uses[part] and part not in self.waiting:
            self.memory.pop(part, None)
