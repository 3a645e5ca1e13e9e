"""Prices: what an op under a strategy, a move between layouts and a stored parameter cost, in seconds, forward and backward.

The planner's only way to the cost model (`costs/`); one instance serves one cluster, mesh and microbatch count, and remembers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..layout import Layout, Type, gradient, legal, local_shape, transition
from ..mesh import Mesh
from ..trace.blocks import is_heavy
from ..trace.graph import ITEMSIZE, Graph, Op, Tensor, Value
from ..trace.ops.rule import Rule, Strategy
from .cluster import Cluster
from .costs import collective
from .costs.compute import matmul_seconds, memory_seconds, op_seconds
from .merge import Placed
from .moves import local_bytes, numel, path, reachable
from .space import AXES, Pair

OPTIMIZER_BYTES = 28
"""Bytes moved per parameter element by an AdamW step (parameter, gradient and two moments, read and written, in float32)."""
FUSED = 0.35
"""The part of a pointwise op's bytes that reach memory once the compiler has fused its neighbours (2 of about 6 accesses)."""

DIVIDE = 1e4


def flops(op: Op, values: Mapping[str, Value]) -> float:
    """Floating-point operations of one op, whole. Zero for what only moves bytes."""
    name = op.target.split(".")[1]
    shapes = [values[n].tensor.shape for n in op.inputs]
    out = values[op.outs[0]].tensor
    if name in ("linear", "mm", "bmm", "matmul"):
        return 2.0 * out.numel * (shapes[0][-1] if shapes[0] else 1)
    if name == "einsum":
        left, _, right = op.args[0].replace(" ", "").partition("->")
        sizes = {letter: n for side, shape in zip(left.split(","), shapes, strict=False) for letter, n in zip(side, shape, strict=False)}
        return 2.0 * math.prod(sizes.get(letter, 1) for letter in set(left.replace(",", "") + right))
    if name == "experts":
        return 2.0 * out.numel * shapes[0][1]
    if name == "attention":
        b, h, s, e = shapes[0]
        return 2.0 * b * h * s * shapes[1][2] * (e + shapes[2][3]) * (0.5 if op.args[4] else 1.0)
    if name.startswith("conv"):
        return 2.0 * out.numel * math.prod(shapes[1][1:])
    return 0.0


class Prices:
    """Costs of one mesh of a cluster. `per_step`: the weight of what happens once a step, against once a microbatch.

    `divide`: what an axis could divide and doesn't, matmuls and stored parameters, costs DIVIDE times over. A user who pins
    tp=4 wants the model in four parts, also where a model is so small that one device would be faster.
    """

    share = True

    def __init__(self, cluster: Cluster, mesh: Mesh, microbatches: int, divide: bool = False, overlap: bool = True) -> None:
        self.cluster, self.mesh, self.per_step, self.divide = cluster, mesh, 1.0 / microbatches, divide
        self.overlap = overlap and cluster.device.kind != "cpu"
        self.device = cluster.device
        self.movers: dict[tuple[Tensor, tuple[int, ...], bool], _Mover] = {}
        self.wires: dict[tuple[str, float, int], float] = {}
        self.merged: dict[object, float] = {}
        self.unary: dict[int, tuple[Sequence[Pair], dict[object, np.ndarray]]] = {}

    def op(self, op: Op, rule: Rule, graph: Graph, choices: Sequence[Pair], sizes: tuple[int, ...]) -> np.ndarray:
        values = graph.values
        operands, outs = [values[n] for n in op.inputs], [values[n] for n in op.outs]
        known = self.unary.setdefault(id(choices), (choices, {}))[1]  # ops that are alike share their choices, as an object
        key = (op.target, repr(op.args)[:400] if is_heavy(op) else "", tuple((v.tensor, v.grad) for v in (*operands, *outs)))
        if key not in known:
            work, heavy = flops(op, values), is_heavy(op)
            known[key] = np.array([self._one(op, work, heavy, operands, outs, pair, sizes) for pair in choices])
        return known[key]

    def one(self, op: Op, graph: Graph, pair: Pair, sizes: tuple[int, ...]) -> float:
        """Seconds of an op as it was chosen to run."""
        operands, outs = [graph.values[n] for n in op.inputs], [graph.values[n] for n in op.outs]
        return self._one(op, flops(op, graph.values), is_heavy(op), operands, outs, pair, sizes)

    def _one(
        self, op: Op, work: float, heavy: bool, operands: Sequence[Value], outs: Sequence[Value], pair: Pair, sizes: tuple[int, ...]
    ) -> float:
        held = 0.0
        for i, v in enumerate(operands):
            if not (i > 2 and op.target == "autoshard.attention.default" and v.name == op.inputs[-1] and len(op.args) > 6):
                held += local_bytes(v.tensor, tuple([s.ins[i] for s in pair]), sizes)
        for i, v in enumerate(outs):
            held += local_bytes(v.tensor, tuple([s.outs[i] for s in pair]), sizes)
        if op.target == "autoshard.dropout_mask.default":  # a bit an element; attention draws its own
            held /= 8 * ITEMSIZE[outs[0].tensor.dtype]
        grad = any(v.grad for v in outs)
        if heavy and work:
            share = 1.0
            for strategy, k in zip(pair, sizes, strict=True):
                if k > 1 and any(t.kind == "S" for t in (*strategy.ins, *strategy.outs)):
                    share *= _largest_share(strategy, operands, outs, k)
            kernel = "attention" if "attention" in op.target else ""
            once = op_seconds(self.device, work * share, held, outs[0].tensor.dtype, kernel)
            seconds = float(once * (1.0 + (sum(v.grad for v in operands[:3]) if grad else 0)))
            return seconds + (DIVIDE * seconds * share if self.divide and share > self._best_share(sizes) else 0.0)
        return held * FUSED / self.device.memory_bandwidth * (2.0 if grad else 1.0)

    def merging(self, x: Placed, weights: Sequence[Placed], copied: float, gathered: bool, sizes: tuple[int, ...]) -> float:
        """Seconds of a microbatch that linears of one input save as one matmul: tiles and waves that fill better, launches, and the sums of
        the input's gradients that each would make. `copied`: the part of the result whose gradient is a copy; `gathered`: the merged weight
        is one too, once a step."""
        key = (x, tuple(weights), copied, gathered, sizes)
        if key not in self.merged:
            self.merged[key] = self._merging(x, weights, copied, gathered, sizes)
        return self.merged[key]

    def _merging(self, x: Placed, weights: Sequence[Placed], copied: float, gathered: bool, sizes: tuple[int, ...]) -> float:
        (tensor, layout, wanted), (weight, _, trained) = x, weights[0]
        size, bandwidth = ITEMSIZE[tensor.dtype], self.device.memory_bandwidth
        k = local_shape(tensor.shape, layout, sizes, (0,) * len(sizes))[-1]
        m = numel(tensor, layout, sizes) // max(k, 1)
        rows = [numel(w, use, sizes) // max(k, 1) for w, use, _ in weights]

        def three(n: int) -> float:
            seconds = matmul_seconds(self.device, m, n, k, dtype=weight.dtype)
            seconds += matmul_seconds(self.device, m, k, n, dtype=weight.dtype) if wanted else 0.0
            return float(seconds + (matmul_seconds(self.device, n, k, m, dtype=weight.dtype) if trained else 0.0))

        saved = sum(map(three, rows)) - three(sum(rows)) + (2.0 * (len(rows) - 1) * m * k * size / bandwidth if wanted else 0.0)
        copies = 2.0 * copied * m * sum(rows) * size if wanted or trained else 0.0
        once = 2.0 * sum(rows) * k * ITEMSIZE[weight.dtype] * self.per_step if gathered else 0.0
        return saved - (copies + once) / bandwidth

    @property
    def multiplies_fp8(self) -> bool:
        return "float8_e4m3fn" in dict(self.device.peak)

    def halving(self, m: int, n: int, k: int, dtype: str, wanted: bool, trained: bool) -> float:
        """Seconds of a microbatch that a linear saves in fp8. Its casts: a reading and two bytes written an element (the largest
        magnitude is taken where a tensor is made); of the weight, two readings, once a step."""
        size, grads = ITEMSIZE[dtype], wanted or trained

        def three(kind: str) -> float:
            seconds = matmul_seconds(self.device, m, n, k, dtype=kind)
            seconds += matmul_seconds(self.device, m, k, n, dtype=kind) if wanted else 0.0
            return float(seconds + (matmul_seconds(self.device, n, k, m, dtype=kind) if trained else 0.0))

        each, once = (size + 2.0) * m * (k + (n if grads else 0)), (2.0 * size + 2.0) * n * k * self.per_step
        launches = self.device.launch * (2 + 2 * grads + 2 * self.per_step)
        return three(dtype) - three("float8_e4m3fn") - (each + once) / self.device.memory_bandwidth - launches

    def move(self, tensor: Tensor, a: Layout, b: Layout, sizes: tuple[int, ...], grad: bool) -> float:
        """A transition and its gradient's, axis by axis; infinite where there is no way."""
        mover = self.movers.get((tensor, sizes, grad))
        if mover is None:
            mover = self.movers[tensor, sizes, grad] = _Mover(self, tensor, sizes, grad)
        return mover.price(a, b)

    def hidden(self, op: Op, graph: Graph, pair: Pair, want: Layout, sizes: tuple[int, ...]) -> float:
        """Seconds of the all-reduce of a matmul's result that pass beside the matmul itself, in pieces (`lower.beside`)."""
        if not self.overlap or op.target not in ("aten.linear.default", "aten.mm.default") or len(op.inputs) != 2:
            return 0.0
        made, tensor = tuple(s.outs[0] for s in pair), graph.values[op.outs[0]].tensor
        steps = [(axis, a, b) for axis, (a, b) in enumerate(zip(made, want, strict=True)) if a != b and sizes[axis] > 1]
        if len(steps) != 1 or (steps[0][1].kind, steps[0][1].reduce, steps[0][2].kind) != ("P", "sum", "I"):
            return 0.0
        axis, a, b = steps[0]
        count = collective.pieces(numel(tensor, made, sizes) // max(tensor.shape[-1], 1))
        if count == 1:
            return 0.0
        rest = [i for i in range(len(sizes)) if i != axis]
        wire = self.wire("all_reduce", local_bytes(tensor, tuple([made[i] for i in rest]), tuple([sizes[i] for i in rest])), axis, a, b)
        matmul = self.one(op, graph, pair, sizes) / (1 + sum(graph.values[n].grad for n in op.inputs))
        lost = collective.contention(self.cluster, self.mesh.size(AXES[axis]), self.mesh.stride(AXES[axis]))
        # what is left is never less than a call takes to start: bounds rely on it
        return max(0.0, min(min(matmul, wire) * (1 - 1 / count) * (1 - lost), wire - self.least(made, want, False)))

    def least(self, a: Layout, b: Layout, grad: bool) -> float:
        """Seconds that the collectives of a move and its gradient's take, however little moves."""
        pairs = [(axis, x, y) for axis, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        pairs += [(axis, gradient(y), gradient(x)) for axis, x, y in pairs] if grad else []
        kinds = [(transition(x, y), axis) for axis, x, y in pairs]
        sizes = [(kind, self.mesh.size(AXES[axis]), self.mesh.stride(AXES[axis])) for kind, axis in kinds]
        return sum(float(collective.seconds(self.cluster, k, 1.0, n, stride)) for k, n, stride in sizes if k in collective.KINDS and n > 1)

    def wire(self, kind: str, full: float, axis: int, a: Type, b: Type) -> float:
        if kind == "nothing":
            return 0.0
        if kind in ("slice", "embed", "mask"):
            return self.device.launch + full / self.device.memory_bandwidth
        moved = (a.kind == "S" and (a.dim != 0 or a.cut != ())) or (b.kind == "S" and (b.dim != 0 or b.cut != ()))
        if kind == "all_to_all" and a.dim == b.dim:
            kind = "all_gather"
        key = (kind, full, axis)
        if key not in self.wires:
            size, stride = self.mesh.size(AXES[axis]), self.mesh.stride(AXES[axis])
            self.wires[key] = float(collective.seconds(self.cluster, kind, full, size, stride))
        return self.wires[key] + (self.device.launch + 2 * full / self.device.memory_bandwidth if moved else 0.0)

    def stored(self, tensor: Tensor, choices: Sequence[Layout], sizes: tuple[int, ...], trainable: bool) -> np.ndarray:
        """The optimizer's pass over what is stored."""
        each = OPTIMIZER_BYTES if trainable else 0
        held = np.array([numel(tensor, c, sizes) for c in choices], dtype=float)
        seconds = np.asarray(memory_seconds(self.cluster.device, held * each))
        if self.divide and sizes[-1] > 1:
            seconds = seconds + DIVIDE / self.per_step * np.asarray(memory_seconds(self.cluster.device, held * OPTIMIZER_BYTES))
        return seconds

    @staticmethod
    def _best_share(sizes: tuple[int, ...]) -> float:
        """A little above what one rank does if every axis divides an op evenly."""
        return 1.2 / math.prod(sizes)

    def send(self, bytes: float) -> float:
        """From one stage to the next."""
        return float(collective.seconds(self.cluster, "send", bytes, self.mesh.size("pp"), self.mesh.stride("pp")))


class _Mover:
    """Prices of all moves of one tensor. A way is made of steps along one axis, which many ways share."""

    def __init__(self, prices: Prices, tensor: Tensor, sizes: tuple[int, ...], grad: bool) -> None:
        self.prices, self.tensor, self.sizes, self.grad = prices, tensor, sizes, grad
        self.steps: dict[tuple[int, Layout, Type], float] = {}
        self.known: dict[tuple[Layout, Layout], float] = {}
        self.apart = [i for i, n in enumerate(sizes) if n > 1]

    def price(self, a: Layout, b: Layout) -> float:
        key = (a, b)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self._price(a, b)
        return found

    def _price(self, a: Layout, b: Layout) -> float:
        differ = [i for i in self.apart if a[i] != b[i]]
        order: Sequence[int]
        if len(differ) == 1 and legal(self.tensor.shape, b, self.sizes):
            order = differ
        else:
            way = path(self.tensor.shape, a, b, self.sizes)
            if way is None:
                return math.inf
            order = [axis for axis, _, _ in way]
        total, layout = 0.0, a
        for axis in order:
            step = (axis, layout, b[axis])
            if step not in self.steps:
                self.steps[step] = self._step(*step)
            total += self.steps[step]
            layout = (*layout[:axis], b[axis], *layout[axis + 1 :])
        return total

    def _step(self, axis: int, layout: Layout, want: Type) -> float:
        have = layout[axis]
        if self.grad and (want.reduce == "max" or have.reduce == "max"):
            return math.inf
        try:
            kind = transition(have, want)
        except KeyError:
            return math.inf
        others = [i for i in range(len(self.sizes)) if i != axis]
        full = local_bytes(self.tensor, tuple([layout[i] for i in others]), tuple([self.sizes[i] for i in others]))
        total = self.prices.wire(kind, full, axis, have, want)
        if self.grad:
            back, forth = gradient(want), gradient(have)
            total += self.prices.wire(transition(back, forth), full, axis, back, forth)
        return total


def _largest_share(strategy: Strategy, operands: Sequence[Value], outs: Sequence[Value], k: int) -> float:
    for v, t in [*zip(outs, strategy.outs, strict=True), *zip(operands, strategy.ins, strict=True)]:
        if t.kind == "S":
            n = v.tensor.shape[t.dim]
            return local_shape(v.tensor.shape, (t,), (k,), (0,))[t.dim] / n if n else 1.0
    return 1.0


class RandomPrices:
    """Random costs, finite wherever a plan is legal: the cheapest plan is then a random legal plan."""

    per_step = 1.0
    share = False
    multiplies_fp8 = False

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def op(self, op: Op, rule: Rule, graph: Graph, choices: Sequence[Pair], sizes: tuple[int, ...]) -> np.ndarray:
        return self.random.random(len(choices))

    def hidden(self, op: Op, graph: Graph, pair: Pair, want: Layout, sizes: tuple[int, ...]) -> float:
        return 0.0

    def move(self, tensor: Tensor, a: Layout, b: Layout, sizes: tuple[int, ...], grad: bool) -> float:
        drawn = float(self.random.random() * 0.3)
        return drawn if reachable(tensor, grad, a, b, sizes) else math.inf

    def stored(self, tensor: Tensor, choices: Sequence[Layout], sizes: tuple[int, ...], trainable: bool) -> np.ndarray:
        return self.random.random(len(choices))

    def halving(self, m: int, n: int, k: int, dtype: str, wanted: bool, trained: bool) -> float:
        return 0.0

    def merging(self, x: Placed, weights: Sequence[Placed], copied: float, gathered: bool, sizes: tuple[int, ...]) -> float:
        """Three groups of four are merged."""
        return float(self.random.random() - 0.25)
