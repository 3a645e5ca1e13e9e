"""Make a failing case small: fewer ranks, fewer ops, plainer numbers, as long as it still fails.

A reduction changes the graph, and with it what a plan's seed means, so each is tried with a few seeds of plans.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

from autoshard.trace.graph import Op, Ref, Tensor, map_refs

from .case import Case
from .generate import stages
from .run import Failure, Skipped, trial

PLANS = (1, 6, 30)
"""Further seeds of plans to try on each smaller case: few while it is large."""
Fails = Callable[[Case], Failure | None]


def shrink(case: Case, fails: Fails = trial, seconds: float = 60.0) -> tuple[Case, Failure]:
    """The smallest case found that fails, and how it does. `case` itself must fail."""
    failure = fails(case)
    assert failure is not None, "only a failing case can be shrunk"
    deadline = time.monotonic() + seconds
    for plans in PLANS:
        found = True
        while found and time.monotonic() < deadline:
            found = False
            for smaller in _smaller(case):
                if time.monotonic() > deadline:
                    break
                if hit := _still(smaller, fails, plans):
                    (case, failure), found = hit, True
                    break
    return case, failure


def _still(case: Case, fails: Fails, plans: int) -> tuple[Case, Failure] | None:
    """The case with a plan on which it fails, if there is one."""
    for plan in dict.fromkeys((case.plan, *range(plans))):
        tried = dataclasses.replace(case, plan=plan)
        try:
            failure = fails(tried)
        except Skipped:
            continue
        except (RuntimeError, AssertionError, IndexError, ValueError, TypeError):  # the smaller graph itself makes no sense
            return None
        if failure:
            return tried, failure
    return None


def _smaller(case: Case) -> Iterator[Case]:
    """Candidates, those that cut most first."""
    yield from _fewer_ranks(case)
    ops = case.graph.ops
    for op in reversed(ops):  # everything before a value gone: it is an input
        yield from _try(lambda op=op: _without(case, op, "input"))  # type: ignore[misc]
    for op in ops[: len(ops) * 3 // 4]:  # everything after a value gone: the loss is its sum
        for out in op.outs:
            if case.graph.values[out].grad and op.target != "aten.sum.dim_IntList":
                yield from _try(lambda out=out: _summed(case, out))  # type: ignore[misc]
    for op in reversed(ops):  # one op gone: a value from before it, of the same shape, stands for it
        for name in _alike(case, op):
            yield from _try(lambda op=op, name=name: _without(case, op, name))  # type: ignore[misc]
    for op in ops:
        if op.target == "aten.layer_norm.default" and op.args[2:4] != (None, None):
            plain = dataclasses.replace(op, args=(*op.args[:2], None, None, *op.args[4:]))
            yield from _try(lambda op=op, plain=plain: _rebuilt(case, [plain if o is op else o for o in ops]))  # type: ignore[misc]
    if case.graph.updates:
        yield from _try(lambda: _rebuilt(case, ops, updates=False))


def _fewer_ranks(case: Case) -> Iterator[Case]:
    sizes = dict(zip(case.shape.names, case.shape.sizes, strict=True))
    for axis, n in sizes.items():
        for smaller in [k for k in (1, 2, 3) if k < n]:
            axes = {**sizes, axis: smaller}
            yield dataclasses.replace(case, mesh=" ".join(f"{a}={k}" for a, k in axes.items()))
    for count in [k for k in (1, 2) if k < case.microbatches]:
        yield dataclasses.replace(case, microbatches=count)
    if case.blocks != "found":
        yield dataclasses.replace(case, blocks="found")


def _try(make: Callable[[], Case | None]) -> Iterator[Case]:
    try:
        made = make()
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError, AssertionError):  # an op that its new operands don't fit
        return
    if made is not None and made.graph.values[made.graph.loss].grad and made.shape.size("pp") <= stages(made):
        yield made


def _alike(case: Case, op: Op) -> list[str]:
    """Values of the shape of an op's output that are there before it: the earliest two, and its operands."""
    values, made = case.graph.values, {n for o in case.graph.ops[case.graph.ops.index(op) :] for n in o.outs}
    fits = [n for n, v in values.items() if n not in made and v.tensor == values[op.outs[0]].tensor and v.role in ("value", "input")]
    return list(dict.fromkeys((*fits[:2], *op.inputs)))


def _summed(case: Case, name: str) -> Case | None:
    dims = tuple(range(len(case.graph.values[name].tensor.shape)))
    end = Op("total", "aten.sum.dim_IntList", (Ref(name), dims, False), {}, ("total",))
    if len(case.graph.ops) < 3 or not dims:
        return None
    return _rebuilt(case, [*case.graph.ops, end], loss="total")


def _without(case: Case, op: Op, instead: str) -> Case | None:
    """The graph without an op; `instead`: an operand of the same shape, or "input" for a new source."""
    values = case.graph.values
    if any(out in case.graph.roots for out in op.outs):
        return None
    if instead != "input":
        if len(op.outs) != 1 or values[instead].tensor != values[op.outs[0]].tensor:
            return None
        return _rebuilt(case, case.graph.ops, {op.outs[0]: instead}, drop=op)
    fresh = {}
    batch = max((v.tensor.shape[v.batch_dim] for v in case.graph.sources("input") if v.batch_dim is not None), default=0)
    for out in op.outs:
        t = values[out].tensor
        if t.dtype == "int64":
            return None
        dim = 0 if t.shape and t.shape[0] == batch else None
        fresh[out] = ("input", t, "mask" if t.dtype == "bool" else "normal", dim)
    made = [n for o in case.graph.ops[: case.graph.ops.index(op)] for n in o.outs]
    if not made and not any(values[n].grad for n in op.inputs):
        return None
    return _rebuilt(case, case.graph.ops, {}, drop=op, fresh=fresh)


def _rebuilt(
    case: Case, ops: list[Op], instead: dict[str, str] | None = None, drop: Op | None = None,
    fresh: dict[str, tuple[str, Tensor, str, int | None]] | None = None, loss: str = "", updates: bool = True,
) -> Case:  # fmt: skip
    """The same case from its ops, shapes worked out anew, without what its roots don't need."""
    old, instead, fresh = case.graph, instead or {}, fresh or {}
    loss = loss or old.loss
    targets = dict(old.updates) if updates else {}
    needed, keep = {instead.get(loss, loss), *targets.values()}, []
    for op in reversed(ops):
        if op is not drop and needed.intersection(op.outs):
            needed.update(instead.get(n, n) for n in op.inputs)
            keep.append(op)
    new = dataclasses.replace(case, graph=type(old)(), fills={})
    for v in old.sources("param", "buffer", "constant", "input"):
        if v.name in needed:
            role = "frozen" if v.role == "param" and not v.grad else v.role
            new.source(v.name, role, v.tensor.shape, v.tensor.dtype, case.fills[v.name], v.batch_dim)
    for name, (role, t, fill, batch) in fresh.items():
        if name in needed:
            new.source(name, role, t.shape, t.dtype, fill, batch)
    for op in reversed(keep):
        args, kwargs = map_refs((op.args, op.kwargs), lambda r: Ref(instead.get(r.name, r.name)))
        new.op(op.target, args, kwargs, op.outs)
    new.graph.loss = instead.get(loss, loss)
    new.graph.updates = {path: value for path, value in targets.items() if path in new.graph.values}
    return new


def report(case: Case, failure: Failure) -> str:
    """What to print of a shrunk case."""
    return f"{failure}\n{case.script}"
