"""The rule table: what the compiler knows of each op, in one place, and its one reader, `rule_of`.

An entry is a line of notation, or a function where the factors follow from shapes or arguments. What isn't here runs whole
on every rank, which is always right; the plan says so. Users add an op of their own with `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..graph import Op, Ref, Value
from . import shapes
from .rule import Factor, Place, Rule, parse

RuleFunction = Callable[[Op, Mapping[str, Value]], Rule]


def _shapes(op: Op, values: Mapping[str, Value]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [values[n].tensor.shape for n in op.inputs], [values[n].tensor.shape for n in op.outs]


def notation(text: str, *linear: str) -> RuleFunction:
    """An entry in notation. `linear`: groups of operand numbers, "0" and "1" for each alone, "01" for both together."""
    groups = tuple(frozenset(map(int, group)) for group in linear)

    def rule(op: Op, values: Mapping[str, Value]) -> Rule:
        return Rule(parse(text, *_shapes(op, values)), groups)

    return rule


def pointwise(op: Op, values: Mapping[str, Value]) -> Rule:
    """Broadcasting elementwise op: each dim of the output is a factor."""
    ins, outs = _shapes(op, values)
    text = ", ".join("…" for _ in ins) + " -> " + ", ".join("…" for _ in outs)
    return Rule(parse(text, ins, outs))


def jointly_linear(op: Op, values: Mapping[str, Value]) -> Rule:
    """add, sub, where, and friends: linear in all floating operands together, if nothing else is added: no number, no integers."""
    tensors = [i for i, name in enumerate(op.inputs) if values[name].tensor.floating]
    conditions = [i for i, name in enumerate(op.inputs) if values[name].tensor.dtype == "bool" and op.target.startswith(_CONDITIONED)]
    others = len(tensors) + len(conditions) < len(op.inputs) or any(isinstance(a, (int, float)) and a != 0 for a in op.args)
    base = pointwise(op, values)
    return Rule(base.factors, () if others or not tensors else (frozenset(tensors),))


_CONDITIONED = ("aten.where.", "aten.masked_fill.")


def separately_linear(op: Op, values: Mapping[str, Value]) -> Rule:
    """mul: linear in each floating tensor operand by itself."""
    base = pointwise(op, values)
    return Rule(base.factors, tuple(frozenset({i}) for i, n in enumerate(op.inputs) if values[n].tensor.floating))


def linear_in_first(op: Op, values: Mapping[str, Value]) -> Rule:
    """div, neg: linear in the first argument, if that is a tensor."""
    base = pointwise(op, values)
    first = bool(op.args) and isinstance(op.args[0], Ref) and values[op.args[0].name].tensor.floating
    return Rule(base.factors, (frozenset({0}),) if first and values[op.outs[0]].tensor.floating else ())


def linear_in(*groups: str) -> RuleFunction:
    """Elementwise, and linear in these groups of operands: "0" for one alone, "01" for both together."""
    found = tuple(frozenset(map(int, group)) for group in groups)

    def rule(op: Op, values: Mapping[str, Value]) -> Rule:
        return Rule(pointwise(op, values).factors, found)

    return rule


def masked_fill(op: Op, values: Mapping[str, Value]) -> Rule:
    base = pointwise(op, values)
    return Rule(base.factors, (frozenset({0}),) if op.args[2] == 0 else ())


def prelu(op: Op, values: Mapping[str, Value]) -> Rule:
    """One weight a channel (dim 1), or one for all."""
    (shape, weight), _ = _shapes(op, values)
    own = Place(0) if weight and weight[0] > 1 else None
    return Rule(tuple(Factor(str(d), n, (Place(d), own if d == 1 else None), (Place(d),)) for d, n in enumerate(shape) if n > 1))


def reduction(result: str | None, body: str = "", linear: bool = False) -> RuleFunction:
    """A reduction over args[1] (`keepdim` = args[2]): kept dims are factors; reduced ones leave `result` pending."""

    def rule(op: Op, values: Mapping[str, Value]) -> Rule:
        (shape, *_), _ = _shapes(op, values)
        dims, keep = _dims(op, len(shape)), bool(op.args[2] if len(op.args) > 2 else op.kwargs.get("keepdim", False))
        kept = [d for d in range(len(shape)) if keep or d not in dims]
        factors = []
        for d, n in enumerate(shape):
            if n == 1:
                continue
            if d not in dims:
                factors.append(Factor(str(d), n, (Place(d),), (Place(kept.index(d)),) * len(op.outs)))
            elif result:
                factors.append(Factor(str(d), n, (Place(d),), (result,) * len(op.outs), body=body))
        return Rule(tuple(factors), (frozenset({0}),) if linear else ())

    return rule


def _dims(op: Op, rank: int) -> tuple[int, ...]:
    dims = op.args[1] if len(op.args) > 1 else None
    if dims is None or dims == ():
        return tuple(range(rank))
    return tuple(d % rank for d in ((dims,) if isinstance(dims, int) else dims))


def along(position: int = 1, default: int | None = -1, linear: bool = False) -> RuleFunction:
    """softmax, cumsum, topk, sort, flip: whole along the dim(s) in args[position], free along all others. `default`: the dim
    where the call names none, None for all of them."""

    def rule(op: Op, values: Mapping[str, Value]) -> Rule:
        ins, outs = _shapes(op, values)
        dims = op.args[position] if len(op.args) > position and op.args[position] != () else default
        rank = len(outs[0])
        blocked = {d % rank for d in (range(rank) if dims is None else (dims,) if isinstance(dims, int) else dims)} if rank else set()
        return Rule(
            tuple(
                Factor(str(d), n, tuple(Place(d) for _ in ins), tuple(Place(d) for _ in outs))
                for d, n in enumerate(outs[0])
                if d not in blocked and n > 1 and all(len(s) == rank and s[d] == n for s in ins)
            ),
            (frozenset({0}),) if linear and values[op.inputs[0]].tensor.floating else (),
        )

    return rule


def layer_norm(op: Op, values: Mapping[str, Value]) -> Rule:
    (shape, *rest), outs = _shapes(op, values)
    lead = len(shape) - len(op.args[1])
    return Rule(
        tuple(Factor(str(d), n, (Place(d), *(None for _ in rest)), (Place(d),) * len(outs)) for d, n in enumerate(shape[:lead]) if n > 1)
    )


def matmul(op: Op, values: Mapping[str, Value]) -> Rule:
    (a, b), outs = _shapes(op, values)
    left = "k" if len(a) == 1 else "… m k"
    right = "k" if len(b) == 1 else "… k n"
    out = " ".join(["…"] * (len(a) > 2 or len(b) > 2) + ["m"] * (len(a) > 1) + ["n"] * (len(b) > 1))
    return Rule(parse(f"{left}, {right} -> {out}", (a, b), outs), (frozenset({0}), frozenset({1})))


def einsum(op: Op, values: Mapping[str, Value]) -> Rule:
    ins, outs = _shapes(op, values)
    if "->" not in op.args[0]:
        return Rule(why="einsum without an output")
    left, _, right = op.args[0].replace(" ", "").replace("...", "…").partition("->")
    text = ", ".join(" ".join(side) for side in left.split(",")) + " -> " + " ".join(right)
    if any(len(set(side)) != len(side) for side in left.split(",")):
        return Rule(why="einsum that takes a diagonal")
    return Rule(parse(text, ins, outs), tuple(frozenset({i}) for i in range(len(ins))))


def embedding(op: Op, values: Mapping[str, Value]) -> Rule:
    ((v, h), ids), _ = _shapes(op, values)
    factors = [Factor(f"i{d}", n, (None, Place(d)), (Place(d),)) for d, n in enumerate(ids) if n > 1]
    factors += [Factor("v", v, (Place(0), None), ("sum",), body="embedding"), Factor("h", h, (Place(1), None), (Place(len(ids)),))]
    return Rule(tuple(factors), (frozenset({0}),))


def experts(op: Op, values: Mapping[str, Value]) -> Rule:
    """x t k, w e n k, index t -> t n. Cut along e, each rank knows the rows of its own matrices and gives zeros for the others."""
    ((t, k), (e, n, _), _), _ = _shapes(op, values)
    factors = (
        Factor("t", t, (Place(0), None, Place(0)), (Place(0),)),
        Factor("e", e, (None, Place(0), None), ("sum",), body="experts"),
        Factor("n", n, (None, Place(1), None), (Place(1),)),
        Factor("k", k, (Place(1), Place(2), None), ("sum",)),
    )
    return Rule(tuple(f for f in factors if f.size > 1), (frozenset({0}), frozenset({1})))


def pick(op: Op, values: Mapping[str, Value]) -> Rule:
    (z, _), _ = _shapes(op, values)
    factors = [Factor(str(d), n, (Place(d), Place(d)), (Place(d),)) for d, n in enumerate(z[:-1]) if n > 1]
    last = Factor("v", z[-1], (Place(len(z) - 1), None), ("sum",), body="pick")
    return Rule((*factors, last), (frozenset({0}),))


def attention(op: Op, values: Mapping[str, Value]) -> Rule:
    """q b h s e, k b g t e, v b g t f, mask (1|b)(1|h)(1|s) t, noise b h s t -> b h s f, with h = g · repeat. Cutting s needs all keys, and
    no causal flag, whose meaning would shift; cutting t needs a strategy of its own (ring, gather)."""
    shapes_, _ = _shapes(op, values)
    (b, h, s, _), g = shapes_[0], shapes_[1][1]

    def in_mask(dim: int, n: int, inner: int = 1) -> tuple[Place | None, ...]:
        return tuple(Place(dim, inner=inner) if shape[dim] == n and n > 1 else None for shape in shapes_[3:])

    factors = []
    if b > 1:
        factors.append(Factor("b", b, (Place(0),) * 3 + in_mask(0, b), (Place(0),)))
    if g > 1:
        factors.append(Factor("h", g, (Place(1, inner=h // g), Place(1), Place(1), *in_mask(1, h, h // g)), (Place(1, inner=h // g),)))
    elif h > 1:
        factors.append(Factor("h", h, (Place(1), None, None, *in_mask(1, h)), (Place(1),)))
    if s > 1 and not op.args[4]:
        factors.append(Factor("s", s, (Place(2), None, None, *in_mask(2, s)), (Place(2),)))
    return Rule(tuple(factors), (frozenset({2}),))


def dropout_mask(op: Op, values: Mapping[str, Value]) -> Rule:
    return Rule(tuple(Factor(str(d), n, (), (Place(d),), body="dropout_mask") for d, n in enumerate(op.args[0]) if n > 1))


def index(op: Op, values: Mapping[str, Value]) -> Rule:
    """x[i, j, …] with index tensors in consecutive dims (broadcast together), the other dims taken whole."""
    shape = values[op.inputs[0]].tensor.shape
    indices = op.args[1]
    used = [d for d, i in enumerate(indices) if i is not None]
    tensors = [values[i.name].tensor for i in indices if i is not None]
    if any(t.dtype == "bool" for t in tensors) or used != list(range(used[0], used[0] + len(used))):
        return Rule(why="boolean or scattered index tensors")
    rank = max(len(t.shape) for t in tensors)
    out = values[op.outs[0]].tensor.shape
    factors = []
    for d, n in enumerate(shape):
        if d not in used and n > 1:
            to = d if d < used[0] else d - len(used) + rank
            factors.append(Factor(f"x{d}", n, (Place(d), *(None for _ in tensors)), (Place(to),)))
    for d in range(rank):
        n = out[used[0] + d]
        if n > 1:
            places = [Place(k) if (k := d - rank + len(t.shape)) >= 0 and t.shape[k] == n else None for t in tensors]
            factors.append(Factor(f"i{d}", n, (None, *places), (Place(used[0] + d),)))
    return Rule(tuple(factors), (frozenset({0}),) if values[op.inputs[0]].tensor.floating else ())


def gather(op: Op, values: Mapping[str, Value]) -> Rule:
    (x, idx), _ = _shapes(op, values)
    dim = op.args[1] % max(1, len(x))
    factors = []
    for d, n in enumerate(idx):
        if n > 1 and d == dim:
            factors.append(Factor(str(d), n, (None, Place(d)), (Place(d),)))
        elif n > 1 and x[d] == n:
            factors.append(Factor(str(d), n, (Place(d), Place(d)), (Place(d),)))
    return Rule(tuple(factors), (frozenset({0}),))


def index_select(op: Op, values: Mapping[str, Value]) -> Rule:
    (x, (n, *_)), _ = _shapes(op, values)
    dim = op.args[1] % len(x)
    factors = [Factor(str(d), m, (Place(d), None), (Place(d),)) for d, m in enumerate(x) if d != dim and m > 1]
    if n > 1:
        factors.append(Factor("i", n, (None, Place(0)), (Place(dim),)))
    return Rule(tuple(factors), (frozenset({0}),))


def pad(op: Op, values: Mapping[str, Value]) -> Rule:
    (shape, *_), _ = _shapes(op, values)
    padded = {len(shape) - 1 - i // 2 for i, n in enumerate(op.args[1]) if n}
    mode, value = (*op.args[2:4], None)[:2] if op.target == "aten.pad.default" and len(op.args) > 2 else ("constant", (*op.args, 0)[2])
    zero = mode != "constant" or not value
    factors = tuple(Factor(str(d), n, (Place(d),), (Place(d),)) for d, n in enumerate(shape) if d not in padded and n > 1)
    return Rule(factors, (frozenset({0}),) if zero else ())


def convolution(op: Op, values: Mapping[str, Value]) -> Rule:
    """x b (g c) …, w (g o) c … -> b (g o) …: batch, groups, or in a single group output channels and input channels (summed, where
    there is no bias). A transposed one has w c o …."""
    ins, outs = _shapes(op, values)
    (x, w, *bias), general = ins, op.target == "aten.convolution.default"
    groups = (op.args[8] if general else op.args[6]) if len(op.args) > (8 if general else 6) else 1
    transposed = general and op.args[6]
    if len(x) != len(w):
        return Rule(why="a convolution of one example without a batch dim")
    if transposed and groups > 1:
        return Rule((Factor("b", x[0], (Place(0), None, *(None for _ in bias)), (Place(0),)),) if x[0] > 1 else ())
    out = outs[0][1]
    factors = [Factor("b", x[0], (Place(0), None, *(None for _ in bias)), (Place(0),))]
    if groups > 1:
        o = Place(0, inner=out // groups)
        factors.append(Factor("g", groups, (Place(1, inner=w[1]), o, *(o for _ in bias)), (Place(1, inner=out // groups),)))
    else:
        factors.append(Factor("o", out, (None, Place(int(transposed)), *(Place(0) for _ in bias)), (Place(1),)))
        if not bias:
            factors.append(Factor("c", x[1], (Place(1), Place(int(not transposed))), ("sum",)))
    with_bias = frozenset(range(2, len(ins)))
    return Rule(tuple(f for f in factors if f.size > 1), (frozenset({0}) | with_bias, frozenset({1}) | with_bias))


def windows(spatial: int, linear: bool = True) -> RuleFunction:
    """Pooling, interpolation, unfolding over the last `spatial` dims: free along all others, which every operand and output has."""

    def rule(op: Op, values: Mapping[str, Value]) -> Rule:
        ins, outs = _shapes(op, values)
        lead = len(ins[0]) - spatial
        factors = [Factor(str(d), n, (Place(d),), (Place(d),) * len(outs)) for d, n in enumerate(ins[0][:lead]) if n > 1]
        return Rule(tuple(factors), (frozenset({0}),) if linear else ())

    return rule


def unfold(op: Op, values: Mapping[str, Value]) -> Rule:
    """x.unfold(dim, size, step): windows of one dim as a new last dim."""
    (shape, *_), _ = _shapes(op, values)
    dim = op.args[1] % max(1, len(shape))
    return Rule(tuple(Factor(str(d), n, (Place(d),), (Place(d),)) for d, n in enumerate(shape) if d != dim and n > 1), (frozenset({0}),))


def columns(op: Op, values: Mapping[str, Value]) -> Rule:
    """im2col: b c h w -> b (c kernel) places, and col2im back: batch and channels."""
    (shape, *_), (out, *_) = _shapes(op, values)
    if len(shape) != (4 if op.target == "aten.im2col.default" else 3):
        return Rule(why="columns of one example without a batch dim")
    c = min(shape[1], out[1])
    factors = (
        Factor("b", shape[0], (Place(0),), (Place(0),)),
        Factor("c", c, (Place(1, inner=shape[1] // c),), (Place(1, inner=out[1] // c),)),
    )
    return Rule(tuple(f for f in factors if f.size > 1), (frozenset({0}),))


def write_slice(op: Op, values: Mapping[str, Value]) -> Rule:
    """slice_scatter: x with a slice along args[2] replaced."""
    (shape, *_), _ = _shapes(op, values)
    factors = tuple(Factor(str(d), n, (Place(d), Place(d)), (Place(d),)) for d, n in enumerate(shape) if d != op.args[2] and n > 1)
    return Rule(factors, (frozenset({0, 1}),))


def scatter(*linear: int) -> RuleFunction:
    """x, index (and source), written along args[1]: free along every other dim in which all of them agree."""

    def rule(op: Op, values: Mapping[str, Value]) -> Rule:
        ins, (out,) = _shapes(op, values)
        dim = op.args[1] % max(1, len(out))
        factors = tuple(
            Factor(str(d), n, tuple(Place(d) for _ in ins), (Place(d),))
            for d, n in enumerate(out)
            if d != dim and n > 1 and all(len(s) == len(out) and s[d] == n for s in ins)
        )
        return Rule(factors, (frozenset(linear),) if linear else ())

    return rule


def index_add(op: Op, values: Mapping[str, Value]) -> Rule:
    """x, index, source: rows of source are added to the rows of x (along args[1]) that index names."""
    (shape, *_), _ = _shapes(op, values)
    dim = op.args[1] % len(shape)
    factors = tuple(Factor(str(d), m, (Place(d), None, Place(d)), (Place(d),)) for d, m in enumerate(shape) if d != dim and m > 1)
    return Rule(factors, (frozenset({0, 2}),))


def vector_norm(op: Op, values: Mapping[str, Value]) -> Rule:
    """A norm over args[2], whole along it (a sum of roots is no root of a sum)."""
    (shape, *_), (out, *_) = _shapes(op, values)
    dims = op.args[2] if len(op.args) > 2 and op.args[2] is not None else range(len(shape))
    over = {d % len(shape) for d in ((dims,) if isinstance(dims, int) else dims)} if shape else set()
    kept = [d for d in range(len(shape)) if len(out) == len(shape) or d not in over]
    return Rule(tuple(Factor(str(d), n, (Place(d),), (Place(kept.index(d)),)) for d, n in enumerate(shape) if d not in over and n > 1))


def opaque(op: Op, values: Mapping[str, Value]) -> Rule:
    return Rule(why="an opaque function: nothing is known of it, so it runs whole")


_UNARY = """abs acos asin atan bitwise_not ceil cos cosh elu erf exp exp2 expm1 floor gelu hardsigmoid hardswish hardtanh isinf isnan
 leaky_relu log log10 log1p log2 log_sigmoid logical_not mish reciprocal relu relu6 round rsqrt selu sigmoid sign silu sin sinh softplus
 sqrt square tan tanh trunc isfinite sgn celu logit erfinv clamp_min clamp_max frac nan_to_num threshold softshrink
 hardshrink zeros_like ones_like full_like""".split()
_BINARY = {
    "default": "atan2 floor_divide fmax fmin hypot logical_and logical_or logical_xor maximum minimum",
    "Tensor": """__and__ __lshift__ __or__ __rshift__ __xor__ bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor
     eq fmod ge gt le lt ne remainder""",
    "Scalar": """__and__ __lshift__ __or__ __rshift__ __xor__ bitwise_and bitwise_or bitwise_xor eq floor_divide fmod ge gt le lt ne pow
     remainder""",
    "Tensor_Scalar": "pow bitwise_left_shift bitwise_right_shift",
    "Tensor_Tensor": "pow",
    "Scalar_Tensor": "bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor remainder",
    "Scalar_Self": "xlogy",
}
_WINDOWS = (
    "avg_pool1d.default adaptive_avg_pool1d.default upsample_linear1d.vec upsample_nearest1d.vec",
    """avg_pool2d.default _adaptive_avg_pool2d.default adaptive_avg_pool2d.default upsample_bilinear2d.vec upsample_bicubic2d.vec
     upsample_nearest2d.vec _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec""",
    "avg_pool3d.default _adaptive_avg_pool3d.default adaptive_avg_pool3d.default upsample_trilinear3d.vec upsample_nearest3d.vec",
)
_MAXIMA = (
    "",
    "max_pool2d_with_indices.default adaptive_max_pool2d.default",
    "max_pool3d_with_indices.default adaptive_max_pool3d.default",
)
_LOSSES = """mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy binary_cross_entropy_with_logits"""
"""Element by element: their reduction is an op of its own in the normal form."""


def _table() -> dict[str, RuleFunction]:
    table: dict[str, RuleFunction] = {}

    def add(rule: RuleFunction, *targets: str) -> None:
        for target in targets:
            if target in table:
                raise AssertionError(f"two rules for {target}")
            table[target] = rule

    add(pointwise, *(f"aten.{n}.default" for n in _UNARY))
    add(pointwise, *(f"aten.{n}.{overload}" for overload, names in _BINARY.items() for n in names.split()))
    add(pointwise, "aten.clamp.default", "aten.clamp.Tensor", "aten.clamp_min.Tensor", "aten.clamp_max.Tensor")
    add(linear_in("01", "02"), "aten.addcmul.default")
    add(linear_in("01"), "aten.addcdiv.default", "aten.lerp.Scalar", "aten.lerp.Tensor")
    add(jointly_linear, "aten.add.Tensor", "aten.sub.Tensor", "aten.add.Scalar", "aten.sub.Scalar", "aten.rsub.Scalar", "aten.rsub.Tensor")
    add(jointly_linear, "aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
    add(pointwise, "aten.where.Scalar")
    add(separately_linear, "aten.mul.Tensor", "aten.mul.Scalar")
    add(linear_in_first, "aten.xlogy.Tensor", "aten.xlogy.Scalar_Other")
    add(linear_in_first, "aten.div.Tensor", "aten.div.Scalar", "aten.neg.default", "aten._to_copy.default", "aten.detach.default")
    add(pointwise, "aten.div.Tensor_mode", "aten.div.Scalar_mode")
    add(masked_fill, "aten.masked_fill.Scalar")
    add(jointly_linear, "aten.masked_fill.Tensor")
    add(notation("… k, n k -> … n", "0", "1"), "aten.linear.default")
    add(notation("m k, k n -> m n", "0", "1"), "aten.mm.default")
    add(notation("b m k, b k n -> b m n", "0", "1"), "aten.bmm.default")
    add(matmul, "aten.matmul.default")
    add(einsum, "aten.einsum.default")
    add(linear_in("01"), "aten.complex.default")
    add(pointwise, "aten.polar.default")
    add(notation("… -> … pair!", "0"), "aten.view_as_real.default")
    add(notation("… pair! -> …", "0"), "aten.view_as_complex.default")
    add(notation("… m! n! -> … m! n!", "0"), "aten.tril.default", "aten.triu.default")
    add(shapes.reshape, "aten.reshape.default")
    add(shapes.permute, "aten.permute.default")
    add(shapes.expand, "aten.expand.default")
    add(shapes.slice_, "aten.slice.Tensor")
    add(shapes.cat, "aten.cat.default")
    add(shapes.split, "aten.split_with_sizes.default")
    add(reduction("sum", linear=True), "aten.sum.dim_IntList")
    add(reduction("sum", body="mean", linear=True), "aten.mean.dim")
    add(reduction("max"), "aten.amax.default")
    whole = """amin.default prod.dim_int argmax.default max.dim min.dim any.dim all.dim var.correction std.correction logsumexp.default
     mode.default"""
    add(reduction(None), *(f"aten.{name}" for name in whole.split()))
    add(along(1), "aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default", "aten.cumprod.default",
        "aten.logcumsumexp.default", "aten.sort.default", "aten.argsort.default")  # fmt: skip
    add(along(1, linear=True), "aten.cumsum.default", "aten.flip.default")
    add(along(1, linear=True), "aten._fft_c2c.default", "aten._fft_r2c.default")
    add(along(2), "aten.topk.default")
    add(along(2, default=None, linear=True), "aten.roll.default")
    add(prelu, "aten.prelu.default")
    add(layer_norm, "aten.layer_norm.default", "aten.rms_norm.default", "aten._fused_rms_norm.default")
    add(embedding, "aten.embedding.default")
    add(pick, "autoshard.pick.default")
    add(attention, "autoshard.attention.default")
    add(experts, "autoshard.experts.default")
    add(dropout_mask, "autoshard.dropout_mask.default")
    add(opaque, "autoshard.opaque.default")
    add(along(1), "autoshard.time_slice.default")
    add(linear_in_first, "autoshard.time_mask.default")
    add(index, "aten.index.Tensor")
    add(gather, "aten.gather.default")
    add(index_select, "aten.index_select.default")
    add(pad, "aten.constant_pad_nd.default", "aten.pad.default")
    add(convolution, "aten.convolution.default", "aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
    add(columns, "aten.im2col.default", "aten.col2im.default")
    add(unfold, "aten.unfold.default")
    for spatial, names in enumerate(_WINDOWS, 1):
        add(windows(spatial), *(f"aten.{name}" for name in names.split()))
    for spatial, names in enumerate(_MAXIMA, 1):
        add(windows(spatial, linear=False), *(f"aten.{name}" for name in names.split()))
    add(write_slice, "aten.slice_scatter.default")
    add(scatter(), "aten.scatter.value")
    add(scatter(0, 2), "aten.scatter.src", "aten.scatter_add.default")
    add(index_add, "aten.index_add.default")
    add(vector_norm, "aten.linalg_vector_norm.default")
    add(pointwise, *(f"aten.{name}.default" for name in _LOSSES.split()))
    return table


TABLE = _table()


def register(target: str, rule: str | RuleFunction, *linear: str) -> None:
    """Add a rule for an op of your own: `register("mylib.scale.default", "… h, h -> … h", "0", "1")`. Raises KeyError if there is one."""
    if target in TABLE:
        raise KeyError(f"{target} has a rule already")
    TABLE[target] = notation(rule, *linear) if isinstance(rule, str) else rule


def rule_of(op: Op, values: Mapping[str, Value]) -> Rule:
    """The rule of one op call; an op that the table lacks has none of its own and runs whole."""
    entry = TABLE.get(op.target)
    return entry(op, values) if entry else Rule(why=f"{op.target} has no rule")
