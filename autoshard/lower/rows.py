"""Rows: products whose rows choose their matrix become grouped products of rows sorted by matrix, and what lies between stays sorted.

In: a routine's steps on local tensors. Out: the steps with each `autoshard.experts(x, w, index)` as

    order, position, ends = sort(index)          once for all products of an index
    ys = grouped_matmul(x[order], wᵀ, ends)
    y = ys[position]

A permutation of rows commutes with whatever works row by row (`trace/rows.py`): where x follows row by row from another product of the same
index, that way is taken in sorted order too, and `y` drops out unless somebody else reads it. Rows that are copies of others (each token k
times) are gathered from these; the gradient sums over the copies. No scatter anywhere: each of the two maps is the other's backward.
Gathers are plain ops, so that the compiler fuses them with what makes or reads the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..trace.graph import Op, Ref, Tensor, map_refs
from ..trace.rows import row_operands
from .routine import SAME, Fn, Step

EXPERTS = "autoshard.experts.default"
RESHAPE, EXPAND = "aten.reshape.default", "aten.expand.default"


def sort_rows(steps: list[Step], tensors: Mapping[str, Tensor], outputs: Collection[str]) -> tuple[list[Step], dict[str, Tensor]]:
    """The steps with grouped products in them, and every tensor that they know."""
    if not any(_is_product(step) for step in steps):
        return steps, dict(tensors)
    from ..kernels import grouped_matmul, moe  # noqa: F401  (they register the operators)

    sorter = _Sorter(dict(tensors), {name: step for step in steps for name in step.outs})
    for step in steps:
        if _is_product(step):
            sorter.product(step)
        else:
            sorter.steps.append(step)
    was_read = {name for step in steps for name in step.ins}
    return _without_dead(sorter.steps, was_read, set(tensors), outputs), sorter.tensors


def _is_product(step: Step) -> bool:
    return step.op is not None and step.op.target == EXPERTS


def _without_dead(steps: list[Step], read: Collection[str], old: Collection[str], outputs: Collection[str]) -> list[Step]:
    """Without steps that nobody reads any more, or that are new and nobody reads."""
    alive, kept = set(outputs), []
    for step in reversed(steps):
        idle = all(out in read or out not in old for out in step.outs)
        if alive.intersection(step.outs) or not idle:
            kept.append(step)
            alive.update(step.ins)
    return kept[::-1]


@dataclass(frozen=True)
class _Order:
    """The names of an index's sort. `key`: index and count of matrices."""

    key: tuple[str, int]
    rows: int

    @property
    def names(self) -> tuple[str, str, str]:
        index, count = self.key
        return f"{index}:order{count}", f"{index}:position{count}", f"{index}:ends{count}"


@dataclass
class _Sorter:
    tensors: dict[str, Tensor]
    maker: Mapping[str, Step]
    steps: list[Step] = field(default_factory=list)
    orders: dict[tuple[str, int], _Order] = field(default_factory=dict)
    sorted: dict[tuple[str, _Order], str] = field(default_factory=dict)
    """Value in rows as they came, and order → the name of its rows in that order."""
    follows: dict[tuple[str, _Order], bool] = field(default_factory=dict)
    """Whether it follows row by row from a product of that order."""

    def product(self, step: Step) -> None:
        """One product, in sorted order; and what it made, as its readers know it."""
        x, w, index = step.ins
        out, facts = step.outs[0], self.tensors[step.outs[0]]
        order = self.order(index, self.tensors[w].shape[0], step.source)
        xs = self.in_order(x, order)
        _, position, ends = order.names
        ys = self.new(out, order, facts)
        self.steps.append(Step(_grouped, (xs, w, ends), (ys,), "grouped matmul", step.source))
        self.steps.append(Step(_restore, (ys, position, order.names[0]), step.outs, "rows put back", step.source))
        self.follows[out, order] = True

    def order(self, index: str, count: int, source: str) -> _Order:
        key = (index, count)
        if key not in self.orders:
            order = self.orders[key] = _Order(key, self.tensors[index].shape[0])
            facts = [Tensor((order.rows,), "int32"), Tensor((order.rows,), "int32"), Tensor((count,), "int32")]
            self.tensors |= zip(order.names, facts, strict=True)
            self.steps.append(Step(_sorter(count), (index,), order.names, f"sort rows by {count}", source))
        return self.orders[key]

    def new(self, name: str, order: _Order, facts: Tensor) -> str:
        sorted_name = self.sorted[name, order] = f"{name}:by:{order.names[0]}"
        self.tensors[sorted_name] = facts
        return sorted_name

    def in_order(self, name: str, order: _Order) -> str:
        """A value's rows in the order; steps that make them are added where they aren't there yet."""
        stack = [name]
        while stack:  # without recursion: chains may be long
            top = stack[-1]
            if (top, order) in self.sorted:
                stack.pop()
                continue
            rows = self.rows(top, order) if self.follow(top, order) else ()
            waiting = [n for n in rows if (n, order) not in self.sorted]
            if waiting:
                stack += waiting
            elif rows:
                self.again(self.maker[top], rows, order)
            else:
                self.take(top, order)
        return self.sorted[name, order]

    def follow(self, name: str, order: _Order) -> bool:
        """Whether a value follows row by row from a product of the order."""
        stack = [name]
        while stack:
            top = stack[-1]
            if (top, order) in self.follows:
                stack.pop()
                continue
            rows = self.rows(top, order)
            waiting = [n for n in rows if (n, order) not in self.follows]
            if waiting:
                stack += waiting
            else:
                self.follows[top, order] = any(self.follows[n, order] for n in rows)
        return self.follows[name, order]

    def rows(self, name: str, order: _Order) -> tuple[str, ...]:
        """What a value follows from row by row, if it is known to have the order's rows and to follow from any."""
        step = self.maker.get(name)
        if step is None or self.tensors[name].shape[:1] != (order.rows,) or _is_product(step):
            return ()
        if step.op is None:
            return step.ins if step.text == SAME else ()
        shapes = {n: self.tensors[n].shape for n in (*step.op.inputs, *step.outs)}
        return row_operands(replace(step.op, outs=step.outs), shapes)

    def again(self, step: Step, rows: tuple[str, ...], order: _Order) -> None:
        """A step, on sorted rows."""
        name = {n: self.sorted[n, order] for n in rows}
        outs = tuple(self.new(out, order, self.tensors[out]) for out in step.outs)
        ins, op = tuple(name.get(n, n) for n in step.ins), step.op
        if op is not None:
            args, kwargs = map_refs((op.args, op.kwargs), lambda ref: Ref(name.get(ref.name, ref.name)))
            op = replace(op, args=args, kwargs=kwargs, outs=outs)
        self.steps.append(Step(step.fn, ins, outs, step.text, step.source, op, step.rows))

    def take(self, name: str, order: _Order) -> None:
        """A value's rows gathered into the order; of copies, their sources'."""
        source, copies = self.copied(name)
        facts = self.tensors[name]
        out = self.new(name, order, facts)
        fn = _taker(facts.shape, copies, facts.floating)
        self.steps.append(Step(fn, (source, *order.names[:2]), (out,), f"rows taken {facts} {copies}"))

    def copied(self, name: str) -> tuple[str, int]:
        """(value, k) where a value is the other's rows, each k times, one behind the other: reshape(expand([t 1 …], [t k …]), [t·k …])."""
        flat = self.made_by(name, RESHAPE)
        wide = self.made_by(flat.inputs[0], EXPAND) if flat else None
        if flat is None or wide is None:
            return name, 1
        before, after, shape = (self.tensors[n].shape for n in (wide.inputs[0], flat.inputs[0], name))
        fits = len(before) == len(after) >= 2 and before[1] == 1 and (before[0], *before[2:]) == (after[0], *after[2:])
        return (wide.inputs[0], after[1]) if fits and shape == (after[0] * after[1], *after[2:]) else (name, 1)

    def made_by(self, name: str, target: str) -> Op | None:
        step = self.maker.get(name)
        return step.op if step is not None and step.op is not None and step.op.target == target else None


def _sorter(count: int) -> Fn:
    return lambda index: torch.ops.autoshard.moe_order(index, count)


def _grouped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.autoshard.grouped_matmul(x, w.transpose(1, 2), ends)
    return found


def _taker(shape: tuple[int, ...], copies: int, grad: bool) -> Fn:
    def take(x: torch.Tensor, order: torch.Tensor, position: torch.Tensor) -> Any:
        flat = x.reshape(shape[0] // copies, *shape[1:])
        return _Take.apply(flat, order, position, copies) if grad else _taken(flat, order, copies)  # type: ignore[no-untyped-call]

    return take


def _taken(x: torch.Tensor, order: torch.Tensor, copies: int) -> torch.Tensor:
    return x.index_select(0, order if copies == 1 else order // copies)


class _Take(torch.autograd.Function):
    """x[order // copies]; the gradient of a row is the sum over the places of its copies."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, position: torch.Tensor, copies: int) -> torch.Tensor:
        ctx.save_for_backward(position)
        ctx.copies = copies
        return _taken(x, order, copies)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (position,) = ctx.saved_tensors
        back = grad.index_select(0, position)
        if ctx.copies > 1:
            back = back.reshape(-1, ctx.copies, *back.shape[1:]).sum(1)
        return back, None, None, None


class _Restore(torch.autograd.Function):
    """y[position], whose backward is grad[order]."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, position: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        return y.index_select(0, position)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None


def _restore(y: torch.Tensor, position: torch.Tensor, order: torch.Tensor) -> Any:
    return _Restore.apply(y, position, order)  # type: ignore[no-untyped-call]
