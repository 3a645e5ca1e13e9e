"""Kernels: where a routine holds what a kernel of the plan's computes, the kernel takes its place.

In: a routine's steps, the tensors that they make, names of kernels. Out: the steps with matches (`patterns`) replaced. A match stands
if nobody else reads what lies inside of it, and if the kernel applies to these shapes and dtypes. The kernel's operator brings its own
backward, so `differentiate` need not know of it; where its backend is missing it runs its reference.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import PlanFileError
from ..trace.graph import Ref, Tensor, map_refs
from .fuse import linear
from .patterns import PATTERNS, Match, Steps
from .routine import Step

if TYPE_CHECKING:
    from ..kernels.registry import Table


def check(names: Sequence[str]) -> None:
    """Raise PlanFileError unless each can be placed."""
    odd = next((name for name in names if name not in PATTERNS or names.count(name) > 1), None)
    if odd is not None:
        raise PlanFileError(f"kernels: {odd!r} can't be placed", hint=f"each of these once: {', '.join(PATTERNS)}")


def place(steps: list[Step], tensors: Mapping[str, Tensor], outputs: Collection[str], names: Collection[str]) -> list[Step]:
    """The steps with kernels in them."""
    gone: set[int] = set()
    new: dict[int, Step] = {}
    at = {id(step): i for i, step in enumerate(steps)}
    readers: dict[str, list[int]] = {}
    for i, step in enumerate(steps):
        for name in step.ins:
            readers.setdefault(name, []).append(i)
    view = Steps(steps, tensors)
    for i in reversed(range(len(steps))):  # the larger of two that end alike comes first
        for name, pattern in PATTERNS.items():
            if name not in names or i in gone or i in new:
                continue
            match = pattern(view, steps[i])
            if match is None:
                continue
            inside = {at[id(view.maker[n])] for n in match.inside} - ({at[id(match.unsplit[0])]} if match.unsplit else set())
            before = {at[id(view.maker[n])] for n in match.before}
            own = inside | before | {i}
            free = all(r in own for n in match.inside for r in readers.get(n, ())) and not set(match.inside) & set(outputs)
            free = free and all(r > i for n in match.before for r in readers.get(n, ()))
            inside |= before
            if not free or inside & (gone | set(new)) or not _applies(name, match, tensors, view):
                continue
            gone |= inside
            new[i] = _step(name, match, steps[i])
            if match.unsplit:
                new[at[id(match.unsplit[0])]] = _unsplit(*match.unsplit)
    return [new.get(i, step) for i, step in enumerate(steps) if i not in gone]


def _registry() -> Table:
    """The table; importing it registers operators, which a program without kernels doesn't need."""
    from ..kernels.registry import KERNELS

    return KERNELS


def _applies(name: str, match: Match, tensors: Mapping[str, Tensor], view: Steps) -> bool:
    def fake(ref: Ref) -> torch.Tensor:
        if match.unsplit and ref.name == match.unsplit[1]:
            parts = [tensors[n] for n in match.unsplit[0].outs]
            return torch.empty(*parts[0].shape[:-1], sum(p.shape[-1] for p in parts), dtype=getattr(torch, parts[0].dtype))
        spec = tensors[ref.name]
        made = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        return made.squeeze(1) if ref.name in match.flat else made

    with FakeTensorMode():
        return bool(_registry()[name].applies(*map_refs(match.args, fake)))


def _step(name: str, match: Match, last: Step) -> Step:
    kernel = _registry()[name]
    ins: list[str] = []
    map_refs(match.args, lambda ref: ins.append(ref.name))
    operator: Any = torch.ops
    for part in kernel.op.split("."):
        operator = getattr(operator, part)

    def fn(*tensors: torch.Tensor) -> Any:
        feed = iter([t.squeeze(1) if name in match.flat else t for name, t in zip(ins, tensors, strict=True)])
        return operator(*map_refs(match.args, lambda _: next(feed)))

    text = f"kernel {name} {map_refs(match.args, lambda _: Ref('_'))!r}"
    return Step(fn, tuple(ins), (*match.before, *last.outs), text, last.source, kernel=name)


def _unsplit(merged: Step, packed: str) -> Step:
    return Step(linear, merged.ins, (packed,), f"{merged.text} unsplit", merged.source)
