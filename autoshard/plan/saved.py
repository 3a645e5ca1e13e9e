"""What a block keeps for its backward on one rank, much as `lower.recompute` decides: the fewest bytes from which cheap ops make the rest.

In: a block's ops, the layouts in which they run. Out: bytes kept for each microbatch in flight, and the bytes of the largest values that
live while the block runs. The lowering takes a minimum cut in the traced graph of every kernel; this takes it in the graph of the model's
ops, where what an op's backward reads is known by name. An op that isn't known is taken to need all that it takes and makes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..layout import I, Layout, R, local_shape, transition
from ..trace.blocks import HEAVY
from ..trace.graph import ITEMSIZE, Graph, Op
from ..trace.ops.rule import Strategy
from .moves import local_bytes, path
from .space import Pair, Space

MATMULS = frozenset("linear mm bmm matmul einsum conv1d conv2d conv3d convolution".split())
NOTHING = frozenset(
    """add sub neg rsub reshape permute expand slice split_with_sizes cat _to_copy sum mean detach cumsum constant_pad_nd full zeros ones
    select roll flip unfold slice_scatter time_slice time_mask alias clone arange dropout_mask eq ne lt le gt ge bitwise_not logical_not
    bitwise_and bitwise_or logical_and logical_or sign floor ceil round triu tril""".split()
)
"""Their backward reads no value."""
RESULT = frozenset("exp tanh sigmoid sqrt rsqrt relu reciprocal softmax log_softmax expm1 log_sigmoid".split())
"""Their backward reads what they made."""
ONE_ARGUMENT = frozenset("silu gelu pow log log2 log1p abs square sin cos erf leaky_relu elu softplus hardtanh clamp mish".split())
VIEWS = frozenset("reshape permute expand slice split_with_sizes select detach alias".split())
WHOLE = frozenset(
    """sum mean amax amin softmax log_softmax layer_norm group_norm batch_norm var std prod norm linalg_vector_norm embedding pick gather
    index index_select index_add scatter scatter_add topk sort cumsum cumprod argmax opaque logsumexp native_layer_norm max_pool2d
    avg_pool2d max_pool2d_with_indices""".split()
) | frozenset(HEAVY)
"""Not pointwise: never made again, and what their backward reads must lie in memory."""

Key = tuple[str, Layout]


@dataclass
class _Flow:
    """A flow network; `cut` is its least cut (augmenting paths, shortest first)."""

    edges: list[list[int]] = field(default_factory=list)
    head: list[int] = field(default_factory=list)
    room: list[float] = field(default_factory=list)

    def node(self) -> int:
        self.edges.append([])
        return len(self.edges) - 1

    def add(self, a: int, b: int, room: float) -> None:
        for u, v, r in ((a, b, room), (b, a, 0.0)):
            self.edges[u].append(len(self.head))
            self.head.append(v)
            self.room.append(r)

    def cut(self, source: int, sink: int) -> set[int]:
        """The nodes on the source's side."""
        while True:
            came = {source: -1}
            queue = [source]
            for node in queue:
                for edge in self.edges[node]:
                    there = self.head[edge]
                    if self.room[edge] > 0 and there not in came:
                        came[there] = edge
                        queue.append(there)
            if sink not in came:
                return set(came)
            way, at = [], sink
            while at != source:
                way.append(came[at])
                at = self.head[came[at] ^ 1]
            least = min(self.room[e] for e in way)
            for e in way:
                self.room[e] -= least
                self.room[e ^ 1] += least


def saved(
    ops: Sequence[Op],
    placed: Mapping[str, Pair],
    held: Mapping[str, Layout],
    graph: Graph,
    sizes: tuple[int, ...],
    fp8: Collection[str] = (),
) -> tuple[float, float]:
    """(bytes kept per microbatch, bytes of what lives only while the block runs). `fp8`: linears that keep a cast of their input, and
    casts of weights that stand all step long."""
    return _Block(graph, sizes, held, fp8).run(ops, placed)


def kept_values(ops: Sequence[Op], graph: Graph, space: Space) -> dict[str, tuple[str, ...]]:
    """The values that the block would keep on one device, each with the ops whose backward reads it."""
    whole = {v.name: (I, I) if v.grad else (R, R) for v in graph.values.values()}
    pairs = {
        op.name: tuple(Strategy(tuple(whole[n][0] for n in op.inputs), tuple(whole[n][0] for n in op.outs)) for _ in range(2)) for op in ops
    }
    block = _Block(graph, (1, 1), whole)
    block.run(ops, pairs)
    readers = {name: tuple(by) for name, by in block.readers.items()}
    return {key[0]: readers.get(key[0], ()) for key in block.kept if block.bytes[key]}


class _Block:
    def __init__(self, graph: Graph, sizes: tuple[int, ...], held: Mapping[str, Layout], fp8: Collection[str] = ()) -> None:
        self.graph, self.sizes, self.held, self.fp8 = graph, sizes, held, fp8
        self.cast: set[Key] = set()
        self.flow = _Flow()
        self.source, self.sink = self.flow.node(), self.flow.node()
        self.pair: dict[Key, tuple[int, int]] = {}
        self.bytes: dict[Key, float] = {}
        self.base: dict[Key, Key] = {}
        self.made: dict[str, Layout] = {}
        self.pinned: set[Key] = set()
        self.extra = 0.0
        self.readers: dict[str, list[str]] = {}
        self.kept: list[Key] = []
        self.drawn: set[str] = set()
        """What attention draws by itself, and never lies in memory."""

    def run(self, ops: Sequence[Op], placed: Mapping[str, Pair]) -> tuple[float, float]:
        read: dict[Key, None] = {}
        draws = {out for op in ops if op.target == "autoshard.dropout_mask.default" for out in op.outs}
        self.drawn = {op.inputs[-1] for op in ops if op.target == "autoshard.attention.default"} & draws
        for op in ops:
            pair = placed[op.name]
            ins = [self.operand(name, tuple(s.ins[i] for s in pair)) for i, name in enumerate(op.inputs)]
            outs = [(name, tuple(s.outs[i] for s in pair)) for i, name in enumerate(op.outs)]
            name = op.target.split(".")[1]
            for out in outs:
                self.made[out[0]] = out[1]
                self.value(out, keep=name in WHOLE, sources=ins)
                if name in VIEWS and len(ins) == 1:
                    self.base[out] = self.base.get(ins[0], ins[0])
            if any(self.graph.values[n].grad for n in op.outs):
                self.reads(op, name, ins, outs, read)
        for key in self.pinned:
            self.flow.add(self.source, self.pair[key][0], float("inf"))
        for key in read:
            self.flow.add(self.pair[key][1], self.sink, float("inf"))
        side = self.flow.cut(self.source, self.sink)
        self.kept = [k for k, (a, b) in self.pair.items() if a in side and b not in side]
        kept = sum(self.bytes[k] for k in self.kept)
        largest = sorted((b for k, b in self.bytes.items() if k not in self.base), reverse=True)[:3]
        return kept + self.extra, sum(largest)

    def reads(self, op: Op, name: str, ins: list[Key], outs: list[Key], read: dict[Key, None]) -> None:
        """Note what the op's backward reads; of what a kernel reads, that it can't be a fused product of others."""
        values = [self.graph.values[k[0]] for k in ins]
        grads = [v.grad for v in values]
        wanted: Iterable[Key]
        if name in NOTHING:
            return
        if op.name in self.fp8:
            if grads[1] and ins[0] not in self.cast:
                self.cast.add(ins[0])
                spec = self.graph.values[ins[0][0]].tensor
                self.extra += local_bytes(spec, ins[0][1], self.sizes) / ITEMSIZE[spec.dtype]
            return
        if name in MATMULS:
            wanted = [k for i, k in enumerate(ins[:2]) if any(g for j, g in enumerate(grads) if j != i)]
        elif name == "attention":
            wanted = [key for key in (*ins, *outs) if key[0] not in self.drawn]
            shape = local_shape(self.graph.values[outs[0][0]].tensor.shape, outs[0][1], self.sizes, (0,) * len(self.sizes))
            self.extra += 4.0 * shape[0] * shape[1] * shape[2]
        elif name == "experts":
            wanted = ins
        elif name == "mul":
            wanted = [k for i, k in enumerate(ins) if any(g for j, g in enumerate(grads) if j != i)]
        elif name == "div":
            wanted = ins[1:] + (ins[:1] if len(ins) > 1 and grads[1] else [])
        elif name in ("where", "masked_fill"):
            wanted = [k for k, v in zip(ins, values, strict=True) if v.tensor.dtype == "bool"]
        elif name in RESULT:
            wanted = outs
        elif name in ONE_ARGUMENT or name == "layer_norm":
            wanted = ins
        elif name in ("embedding", "pick", "gather", "index", "index_select", "topk", "sort"):
            wanted = [k for k in (*ins, *outs) if not self.graph.values[k[0]].tensor.floating]
        else:
            wanted = [*ins, *outs]
        for key in wanted:
            read[key] = None
            if key[0] not in op.outs:
                self.readers.setdefault(key[0], []).append(op.name)
            if name in WHOLE:
                self.pinned.add(self.base.get(key, key))

    def operand(self, name: str, want: Layout) -> Key:
        v = self.graph.values[name]
        free = v.role == "param" or not v.grad
        if name not in self.made:
            self.made[name] = want if free else self.held[name]
            self.value((name, self.made[name]), keep=True, sources=[], free=free)
        have = self.made[name]
        if (name, want) not in self.pair:
            steps = path(v.tensor.shape, have, want, self.sizes) or ()
            local = all(transition(a, b) in ("slice", "nothing", "mask") for _, a, b in steps)
            self.value((name, want), keep=not local, sources=[(name, have)], free=free)
            if local:
                self.base[name, want] = self.base.get((name, have), (name, have))
        return name, want

    def value(self, key: Key, keep: bool, sources: Sequence[Key], free: bool = False) -> None:
        if key in self.pair:
            return
        tensor = self.graph.values[key[0]].tensor
        size = 0.0 if free or key[0] in self.drawn else float(local_bytes(tensor, key[1], self.sizes))
        a, b = self.pair[key] = self.flow.node(), self.flow.node()
        self.bytes[key] = size
        self.flow.add(a, b, size + (0.0 if free else 1.0))
        if keep:
            self.flow.add(self.source, a, float("inf"))
        for source in sources:
            self.flow.add(self.pair[source][1], a, float("inf"))
