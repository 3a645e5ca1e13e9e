"""Shardings that execution finds valid and the table doesn't claim.

`valid(sample)` tries every way to cut, keep whole or leave pending each operand on an axis of two ranks, runs the op on each rank's
part, and reads off what the outputs are. `unclaimed(sample)` drops what a claimed strategy gives with free transitions (slicing a
whole value, masking it to a term) and what another one found gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from autoshard.layout import P, R, S, Type, divisible
from autoshard.trace.graph import Value, map_refs
from autoshard.trace.interpret import call
from autoshard.trace.ops.rule import Strategy

from .sample import Sample, assemble, noise, ranks, routine, same, take

SIZED = ("aten.reshape.default", "aten.expand.default")
"""Their arguments name the output's shape, so that each kind of output is a run of its own."""
ALONE = ("autoshard.dropout_mask.default", "autoshard.time_slice.default", "autoshard.time_mask.default")
"""They exist only as bodies."""


def kinds(v: Value) -> list[Type]:
    cuts = [S(d) for d, n in enumerate(v.tensor.shape) if divisible((), n, 2)]
    return [R, *cuts, P] if v.tensor.floating else [R, *cuts]


def valid(s: Sample) -> Iterator[Strategy]:
    """Every sharding over two ranks, of whole dims, that gives the whole's outputs on two draws of the data."""
    other = _redrawn(s)
    for ins in itertools.product(*(kinds(v) for v in s.operands())):
        if all(t == R for t in ins):
            continue
        for first in kinds(s.results()[0]) if s.op.target in SIZED else (R,):
            outs = _outputs(s, ins, first, s.tensors, s.outs)
            if outs is not None and outs == _outputs(s, ins, first, *other):
                yield Strategy(ins, outs)


def _redrawn(s: Sample) -> tuple[dict[str, Tensor], list[Tensor]]:
    tensors = {}
    for i, (name, t) in enumerate(s.tensors.items()):
        # what is special for its op's sake stays so: integers, infinities, positive numbers
        special = not t.is_floating_point() or bool((t == t.round()).all()) or not bool(t.isfinite().all())
        drawn = noise(t.shape, 900 + i).to(t.dtype)
        tensors[name] = t if special else drawn.sigmoid() if bool((t > 0).all()) else drawn
    args, kwargs = map_refs((s.op.args, s.op.kwargs), lambda ref: tensors[ref.name])
    made = call(s.op.target, args, kwargs, device="cpu")
    return tensors, list(made) if isinstance(made, tuple) else [made]


def _outputs(s: Sample, ins: Sequence[Type], first: Type, tensors: dict[str, Tensor], whole: Sequence[Tensor]) -> tuple[Type, ...] | None:
    """What the outputs are when every rank runs the op on its part of the inputs; None if they are nothing of the kind."""
    here = Strategy((R,) * len(ins), (R,) * len(whole))
    runs: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
    trial = Strategy(tuple(ins), (first,) * len(whole))
    try:
        for coords in ranks((1, 2)):
            parts = [take(tensors[n], (R, t), (1, 2), coords) for n, t in zip(s.op.inputs, ins, strict=True)]
            runs[coords] = routine(s, (here, trial), (1, 2), coords)(*parts)
    except (RuntimeError, IndexError, ValueError):
        return None
    found = []
    for i, v in enumerate(s.results()):
        parts_ = {c: outs[i] for c, outs in runs.items()}
        fitting = [t for t in kinds(v) if _fits(parts_, whole[i], t)]
        if not fitting:
            return None
        found.append(fitting[0])
    return tuple(found)


def _fits(parts: dict[tuple[int, ...], Tensor], whole: Tensor, t: Type) -> bool:
    made = assemble(parts, whole.shape, (R, t), (1, 2))
    return isinstance(made, Tensor) and same(made.to(whole.dtype), whole)


def gives(s: Strategy, wanted: Strategy) -> bool:
    """Whether running the op as `s` serves where `wanted` would, by free transitions at its inputs and outputs."""
    return all(_free(a, b) for a, b in zip(wanted.ins, s.ins, strict=True)) and all(
        _free(a, b) for a, b in zip(s.outs, wanted.outs, strict=True)
    )


def _free(a: Type, b: Type) -> bool:
    return a == b or (a.kind in "RI" and b.kind in "SPRI") or (a.kind == "S" and b == P)


def unclaimed(s: Sample, claims: Sequence[Strategy]) -> list[Strategy]:
    if s.op.target in ALONE:
        return []
    with torch.no_grad():
        found = [c for c in valid(s) if not any(gives(claim, c) for claim in claims)]
    return [c for c in found if not any(o != c and gives(o, c) and not (gives(c, o) and str(c) < str(o)) for o in found)]
