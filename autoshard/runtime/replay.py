"""Replay a recording: the storages that are wanted, with their final content, one after another.

In: a Recording and the storages that are wanted. Out: `replay` yields each as soon as its last draw's turn has come, `value` is what a
tensor holds while its constructor runs, if that depends on no draw.

Draws take their turns in the order of construction, each from the state in which the constructor had its generator. A storage is made
alone, by the ops that it needs: where other draws came between its own, these moved the generator in their turn and are drawn again
from the states kept then. So nothing waits in memory, and what exists at once is what one storage's own ops need. Ops that only
move, cast or compute element by element do so in the memory of an argument that nobody reads again: a draw, arithmetic on it and a
cast to fewer bytes take one tensor's memory.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .recording import Op, Part, Recording, Ref, Source

_MOVES = {torch.ops.aten.copy_.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
_PIECE = 1 << 16
Memory = dict[Part, torch.UntypedStorage]


def value(recording: Recording, ref: Ref) -> Tensor | None:
    """The content of a tensor as of now; None if it depends on a draw."""
    wanted = recording.making(ref.part[0])
    if any(recording.ops[i].random for i in wanted):
        return None
    with _disable_current_modes():  # a constructor may be running
        return ref.on(Replay(recording, ()).run(wanted, ref.part)).clone()


def replay(
    recording: Recording, goals: Sequence[int], to_the_end: bool = True
) -> Generator[tuple[int, torch.UntypedStorage], None, Tensor]:
    """Each goal (a storage) with its final content, once; drop it before the next is asked for. Returns torch's default generator's
    state after the last draw (the last that a goal needs, if not `to_the_end`); the generator itself stays as it is."""
    run = Replay(recording, goals)
    yield from run.turns(to_the_end)
    for number in run.ready:
        yield number, run.make(number)
    return run.at[0]


class Replay:
    """One replay. `at`: generator → the state it has come to; `before`: draw that is needed out of its turn → the state it starts from."""

    def __init__(self, recording: Recording, goals: Sequence[int]) -> None:
        self.r = recording
        if -1 in recording.remembered:
            recording.remembered[-1] = recording.start
        self.at: dict[int, Tensor] = {0: recording.start}
        self.before: dict[int, Tensor] = {}
        self.turn = -1
        self.other = torch.Generator()
        self.draws = [i for i, op in enumerate(recording.ops) if op.random] if goals else []
        self.ready: list[int] = []
        """Goals that need no draw."""
        self.completes: dict[int, list[int]] = {}
        """Draw → the goals whose last it is."""
        needed = {number: [i for i in recording.making(number) if recording.ops[i].random] for number in goals}
        for number, draws in needed.items():
            if recording.storages[number].writer == -1:
                raise AssertionError(f"storage {number} was never written")
            (self.completes.setdefault(draws[-1], []) if draws else self.ready).append(number)
        self.uses = Counter(i for draws in needed.values() for i in draws)
        # a draw that reads tensors needs them when it moves the generator too
        self.uses.update(i for d in self.draws if not recording.ops[d].blind for i in recording.ancestors([d]) if recording.ops[i].random)
        self.alone = self._alone(needed)

    def _alone(self, needed: dict[int, list[int]]) -> set[int]:
        """Draws that only one goal needs, with no others between them and its last: they are made in one go, in the last one's turn."""
        position = {index: i for i, index in enumerate(self.draws)}
        found: set[int] = set()
        for draws in needed.values():
            for i, index in enumerate(reversed(draws)):
                if self.uses[index] > 1 or position[index] != position[draws[-1]] - i:
                    break
                found.add(index)
        return found

    def turns(self, to_the_end: bool) -> Iterator[tuple[int, torch.UntypedStorage]]:
        last = max(self.completes, default=-1)
        for index in self.draws:
            if index > last and not to_the_end:
                return
            goals = self.completes.get(index, ())
            if index in self.alone and not goals:
                continue
            self.turn = index
            if self.uses[index] and index not in self.alone:
                self.before[index] = self._state(self.r.ops[index])
            for number in goals:
                yield number, self.make(number)
            if not goals:
                self._advance(index)

    def make(self, number: int) -> torch.UntypedStorage:
        return self.run(self.r.making(number), self.r.part(number))

    def run(self, wanted: Sequence[int], part: Part) -> torch.UntypedStorage:
        """Run ops; what the part holds in the end."""
        memory: Memory = {}
        last = {p: i for i in wanted for p in self.r.ops[i].touched}
        for index in wanted:
            op = self.r.ops[index]
            dying = {p for p in op.touched if last[p] == index and p != part}
            if op.random:
                self._draw(index, memory)
            else:
                _execute(op, memory, dying, self.other)
            for p in dying:
                memory.pop(p, None)
        return memory[part]

    # ---- draws ------------------------------------------------------------------------------------------------------

    def _advance(self, index: int) -> None:
        """Move the generator as a draw does."""
        op = self.r.ops[index]
        if not op.blind:
            self.run(self.r.ancestors([index]), next(iter(op.touched)))
            return
        refs = [leaf for leaf in pytree.tree_leaves(op.args) if isinstance(leaf, Ref)]
        self._draw(index, {ref.part: torch.UntypedStorage(_bytes(ref)) for ref in refs if ref.part not in op.fresh})

    def _draw(self, index: int, memory: Memory) -> None:
        """Draw from where the constructor's generator was, and leave the real one as it is."""
        op = self.r.ops[index]
        generator = self.other if op.source else torch.default_generator
        kept = generator.get_state()
        try:
            generator.set_state(self.before[index] if index in self.before else self._state(op))
            _execute(op, memory, set(), self.other)
            after = generator.get_state()
        finally:
            generator.set_state(kept)
        if index == self.turn or index not in self.before:
            self.at[op.source] = after
            if index in self.r.remembered:
                self.r.remembered[index] = after

    def _state(self, op: Op) -> Tensor:
        """Where the constructor had the op's generator."""
        state = self.r.remembered[op.state] if isinstance(op.state, int) else op.state if op.state is not None else self.at[op.source]
        assert state is not None
        return state


def _bytes(ref: Ref) -> int:
    span = sum((n - 1) * s for n, s in zip(ref.size, ref.stride, strict=True)) + 1 if 0 not in ref.size else 0
    return (ref.offset + span) * ref.dtype.itemsize


# ---- one op ---------------------------------------------------------------------------------------------------------


def _execute(op: Op, memory: Memory, dying: set[Part], generator: torch.Generator) -> None:
    """Run an op on memory. What is in `dying` nobody needs afterwards."""
    if op.constant is not None:
        memory[op.made[0].part] = op.constant.clone().untyped_storage()
        return
    with torch.no_grad(), _default_dtype(op.dtype):
        if _move(op, memory, dying):
            return
        for part, ref in op.fresh.items():
            memory[part] = ref.empty().untyped_storage()
        args, kwargs = pytree.tree_map_only((Ref, Source), lambda x: x.on(memory[x.part]) if isinstance(x, Ref) else generator, op.args)
        donor = _donor(op, dying)
        if donor is not None:
            _writing(op.func)(*args, **kwargs, out=donor.on(memory[donor.part]))
            memory.update((ref.part, memory[donor.part]) for ref in op.made.values())
            return
        flat = pytree.tree_leaves(op.func(*args, **kwargs))
    for position, ref in op.made.items():
        out = flat[position]
        if out.stride() != ref.stride or out.storage_offset() != ref.offset:
            out = ref.empty().copy_(out)
        memory[ref.part] = out.untyped_storage()


class _default_dtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.before)


def _move(op: Op, memory: Memory, dying: set[Part]) -> bool:
    """A copy or cast of what nobody needs afterwards: its memory is handed on, or cast in place."""
    if op.func not in _MOVES:
        return False
    args = op.args[0]
    old = args[1] if op.func is torch.ops.aten.copy_.default else args[0]
    new = next(iter((op.fresh or op.made).values()), None)
    if not isinstance(old, Ref) or new is None or old.part not in dying or not _same_place(old, new) or not _dense(new):
        return False
    if new.dtype != old.dtype:
        if new.dtype.itemsize > old.dtype.itemsize:
            return False
        _cast(memory[old.part], old, new)
    memory[new.part] = memory[old.part]
    return True


def _cast(storage: torch.UntypedStorage, old: Ref, new: Ref) -> None:
    """Cast piece by piece into the same memory, from its start: what is written was read before."""
    count = functools.reduce(lambda a, b: a * b, new.size, 1)
    given, made = (torch.empty(0, dtype=ref.dtype).set_(storage, 0, (count,), (1,)) for ref in (old, new))  # type: ignore[call-overload]
    for start in range(0, count, _PIECE):
        made[start : start + _PIECE] = given[start : start + _PIECE].clone()


def _donor(op: Op, dying: set[Part]) -> Ref | None:
    """An argument whose memory an elementwise op's result can take."""
    if len(op.made) != 1 or op.fresh or not isinstance(op.func, torch._ops.OpOverload) or torch.Tag.pointwise not in op.func.tags:
        return None
    (made,) = op.made.values()
    if not _dense(made) or _writing(op.func) is None:
        return None
    refs = [leaf for leaf in pytree.tree_leaves(op.args) if isinstance(leaf, Ref)]
    for ref in refs:
        alike = ref.part in dying and ref.dtype == made.dtype and _same_place(ref, made)
        if alike and all(other == ref for other in refs if other.part == ref.part):
            return ref
    return None


@functools.cache
def _writing(func: Any) -> Any:
    """The overload of an op that writes into `out=`, if there is one."""
    mine = [(a.name, str(a.type)) for a in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        theirs = [(a.name, str(a.type)) for a in overload._schema.arguments]
        if theirs == [*mine, ("out", "Tensor")]:
            return overload
    return None


def _same_place(a: Ref, b: Ref) -> bool:
    return (a.size, a.stride, a.offset) == (b.size, b.stride, b.offset)


def _dense(ref: Ref) -> bool:
    """Whether a tensor fills its memory from the start, each element once."""
    step = 1
    for stride, size in sorted(zip(ref.stride, ref.size, strict=True)):
        if size != 1 and stride != step:
            return False
        step *= size
    return ref.offset == 0
