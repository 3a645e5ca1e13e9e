"""Patterns: how the subgraphs that kernels compute are spelled in normal form.

In: a routine's steps, as `Steps`, and one of them, where a subgraph may end. Out: a `Match`, or None. A pattern looks at local steps,
after partition: whatever the placements are, what lies between two moves is a function of local tensors, and so is the kernel. A step that
knows its shard's place (a mean over a dim that is cut, say) has no op to look at, so that it never is part of a pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..trace.graph import Op, Ref, Tensor
from .routine import Step

ADD, MUL, POW = "aten.add.Tensor", "aten.mul.Tensor", "aten.pow.Tensor_Scalar"
CAST, MEAN, RSQRT = "aten._to_copy.default", "aten.mean.dim", "aten.rsqrt.default"


@dataclass(frozen=True)
class Match:
    """`args`: the kernel's, tensors as Refs to the routine's names. `inside`: names that nobody else may read. `unsplit`: a step of merged
    linears whose results are taken as one, under this name. `before`: what the kernel hands out first, before what the step at hand makes;
    nobody may read it earlier. `flat`: names of which the kernel takes dim 1, which is one, away."""

    args: tuple[Any, ...]
    inside: tuple[str, ...] = ()
    unsplit: tuple[Step, str] | None = None
    before: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()


@dataclass
class Steps:
    """Who makes what, with which shape and dtype."""

    steps: Sequence[Step]
    tensors: Mapping[str, Tensor]
    maker: dict[str, Step] = field(init=False)

    def __post_init__(self) -> None:
        self.maker = {name: step for step in self.steps for name in step.outs}

    def op(self, name: str, *targets: str) -> Op | None:
        """The op that makes a value, if it is one of these."""
        step = self.maker.get(name)
        return step.op if step is not None and step.op is not None and step.op.target in targets else None

    def pair(self, name: str, target: str) -> list[tuple[str, str]]:
        """The operands of a product or sum of two tensors, both ways round."""
        op = self.op(name, target)
        if op is None or not all(isinstance(a, Ref) for a in op.args[:2]) or len(op.args) != 2 or op.kwargs:
            return []
        a, b = (ref.name for ref in op.args)
        return [(a, b), (b, a)]

    def uncast(self, name: str, inside: list[str]) -> str:
        """What was cast, where something was."""
        op = self.op(name, CAST)
        if op is None:
            return name
        inside.append(name)
        return _name(op.args[0])


def _name(ref: Any) -> str:
    assert isinstance(ref, Ref), ref
    return ref.name


def rms_norm(steps: Steps, step: Step) -> Match | None:
    """x / sqrt(mean(x²) + eps), times w or 1 + w, which is cast before the product or after it, or nowhere."""
    y = step.outs[0]
    inside: list[str] = []
    product = steps.uncast(y, inside)
    for weight, hat in steps.pair(product, MUL):
        within, offset = [*inside, product], 0.0
        scale = steps.op(weight, ADD)
        if scale is not None and len(scale.args) == 2 and scale.args[1] == 1 and not scale.kwargs:
            within.append(weight)
            weight, offset = _name(scale.args[0]), 1.0
        cast_first = product == y
        if not cast_first:
            weight = steps.uncast(weight, within)
        found = _normalised(steps, steps.uncast(hat, within), within)
        if found is None:
            continue
        within.append(hat)
        (x, eps), dtype = found, steps.tensors[y].dtype
        if steps.tensors[weight].shape == steps.tensors[x].shape[-1:] and (cast_first or dtype == steps.tensors[x].dtype):
            return Match((Ref(x), Ref(weight), eps, offset, cast_first), _without(within, y))
    found = _normalised(steps, product, inside)
    if found is None or steps.tensors[y].dtype != steps.tensors[found[0]].dtype:
        return None
    return Match((Ref(found[0]), None, found[1]), _without([*inside, product], y))


def _without(names: Sequence[str], out: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name != out))


def _normalised(steps: Steps, name: str, inside: list[str]) -> tuple[str, float] | None:
    """(x, eps) of x · rsqrt(mean(x²) + eps); x as it was before a cast for this alone."""
    for wide, root in steps.pair(name, MUL):
        within = [root]
        rsqrt = steps.op(root, RSQRT)
        total = steps.op(_name(rsqrt.args[0]), ADD) if rsqrt else None
        if rsqrt is None or total is None or not isinstance(total.args[1], float) or total.kwargs:
            continue
        mean = steps.op(_name(total.args[0]), MEAN)
        last = len(steps.tensors[wide].shape) - 1
        if mean is None or tuple(mean.args[1:]) != ((last,), True) or mean.kwargs:
            continue
        square = _name(mean.args[0])
        power = steps.op(square, POW)
        if not (power is not None and power.args == (Ref(wide), 2)) and (wide, wide) not in steps.pair(square, MUL):
            continue
        within += [_name(rsqrt.args[0]), _name(total.args[0]), square]
        inside += [name, *within]
        return steps.uncast(wide, inside), float(total.args[1])
    return None


def layer_norm(steps: Steps, step: Step) -> Match | None:
    op = steps.op(step.outs[0], "aten.layer_norm.default")
    if op is None or len(op.args[1]) != 1:
        return None
    x, _, weight, bias, eps = op.args
    return Match((x, weight, bias, eps))


def gated_mlp(steps: Steps, step: Step) -> Match | None:
    """act(gate) · up."""
    found = _gated(steps, step)
    return None if found is None else Match((Ref(found[0]), Ref(found[1]), found[2]), (found[3],))


def gated_mlp_packed(steps: Steps, step: Step) -> Match | None:
    """The same of merged linears, whose result needn't be split."""
    found = _gated(steps, step)
    if found is None:
        return None
    gate, up, activation, active = found
    merged = steps.maker.get(gate)
    if merged is None or merged.rows is None or set(merged.outs) != {gate, up} or len(set(merged.rows)) != 1:
        return None
    packed = "+".join(merged.outs)
    return Match((Ref(packed), activation, merged.outs[0] == gate), (active, gate, up), (merged, packed))


def _gated(steps: Steps, step: Step) -> tuple[str, str, str, str] | None:
    """(gate, up, activation, act(gate))."""
    for active, up in steps.pair(step.outs[0], MUL):
        op = steps.op(active, *ACTIVATIONS, "aten.gelu.default")
        if op is None:
            continue
        gate = _name(op.args[0])
        kind = ACTIVATIONS.get(op.target) or ("gelu_tanh" if "tanh" in (*op.args[1:], *op.kwargs.values()) else "gelu")
        a, b = steps.tensors[gate], steps.tensors[up]
        if (a.shape, a.dtype) == (b.shape, b.dtype):
            return gate, up, kind, active
    return None


def rotary(steps: Steps, step: Step) -> Match | None:
    """q and k turned by the same tables: x · cos + (-x₂, x₁) · sin, x₁ and x₂ the halves of a head."""
    found = _turned(steps, step)
    if found is None:
        return None
    for other in steps.steps:
        if other is step:
            return None  # of the two, the kernel takes the place of the later
        first = _turned(steps, other)
        if first is None or first[1:3] != found[1:3]:
            continue
        (q, cos, sin, within), (k, *_, inside) = first, found
        a, b, table = (steps.tensors[name] for name in (q, k, cos))
        alike = a.dtype == b.dtype and (a.shape[0], *a.shape[2:]) == (b.shape[0], *b.shape[2:])
        if alike and table.shape[0] in (1, a.shape[0]) and table.shape[1:] == (1, *a.shape[2:]) and steps.tensors[sin].shape == table.shape:
            return Match((Ref(q), Ref(k), Ref(cos), Ref(sin)), (*within, *inside), before=other.outs, flat=(cos, sin))
    return None


def _turned(steps: Steps, step: Step) -> tuple[str, str, str, tuple[str, ...]] | None:
    """(x, cos, sin, names inside)."""
    for straight, across in steps.pair(step.outs[0], ADD):
        for x, cos in steps.pair(straight, MUL):
            for turned, sin in steps.pair(across, MUL):
                op = steps.op(turned, "aten.cat.default")
                shape = steps.tensors[x].shape
                if op is None or len(op.args[0]) != 2 or len(shape) != 4 or tuple(op.args[1:]) != (3,) or shape[3] % 2:
                    continue
                minus, one = map(_name, op.args[0])
                negated = steps.op(minus, "aten.neg.default")
                if negated is None or steps.tensors[minus].shape[3] != shape[3] // 2:
                    continue
                two = _name(negated.args[0])
                if _starts_at(steps, one, x) == 0 and _starts_at(steps, two, x) == shape[3] // 2:
                    return x, cos, sin, (straight, across, turned, minus, one, two)
    return None


def _starts_at(steps: Steps, name: str, x: str) -> int | None:
    """Where a slice of x's last dim begins, with every element up to where it ends."""
    op = steps.op(name, "aten.slice.Tensor")
    if op is None or op.args[0] != Ref(x) or op.args[1] != 3 or tuple(op.args[4:]) not in ((), (1,)):
        return None
    return int(op.args[2])


ACTIVATIONS = {"aten.silu.default": "silu", "aten.relu.default": "relu", "aten.sigmoid.default": "sigmoid"}

PATTERNS: dict[str, Callable[[Steps, Step], Match | None]] = {
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "rotary": rotary,
    "gated_mlp_packed": gated_mlp_packed,
    "gated_mlp": gated_mlp,
}
"""Kernel → what it replaces; of several that would do, the first."""
