"""Bugs that a compiler like this has had or could have, each a patch of one function: the fuzzer must find every one of them.

A bug is a function from the original to the broken one, registered with the places that it replaces. `planted(name)` puts it
there for a while. What each does is its docstring.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from autoshard import layout
from autoshard.layout import I, R, transition
from autoshard.lower import bodies, collectives, partition, program
from autoshard.plan import microbatch
from autoshard.runtime import executor, trainable
from autoshard.runtime.requests import Send
from autoshard.trace.ops import rule, shapes, table


@dataclass(frozen=True)
class Bug:
    """`places`: (owner, name) of what is replaced; an owner is a module, a class or a dict."""

    name: str
    text: str
    breaks: Callable[[Any], Any]
    places: tuple[tuple[Any, str], ...]


BUGS: dict[str, Bug] = {}
SEEN: dict[str, int] = {
    "maximum reduced as sum": 26, "offset of an even split": 14, "foreign labels picked": 50,
    "dropout at local positions": 142, "slice taken from the end": 535, "split sizes of another rank": 303,
    "stored shards in the wrong order": 5, "causal mask at local positions": 43, "permutation inverted": 120,
    "gradients of tied parameters not summed": 47, "gradient of one consumer lost": 208,
    "merged rows shifted": 55, "merged weights upside down": 68,
}  # fmt: skip
"""Bug → a graph that shows it, where a test looks first (`python -m tests.fuzz --bugs` says)."""


def bug(*places: tuple[Any, str]) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def register(breaks: Callable[[Any], Any]) -> Callable[[Any], Any]:
        name = breaks.__name__.replace("_", " ")
        BUGS[name] = Bug(name, (breaks.__doc__ or "").strip(), breaks, places)
        return breaks

    return register


@contextmanager
def planted(name: str) -> Iterator[None]:
    """With the bug in place."""
    found = BUGS[name]
    kept = [_get(owner, attribute) for owner, attribute in found.places]
    try:
        for (owner, attribute), original in zip(found.places, kept, strict=True):
            _set(owner, attribute, found.breaks(original))
        yield
    finally:
        for (owner, attribute), original in zip(found.places, kept, strict=True):
            _set(owner, attribute, original)


def _get(owner: Any, name: str) -> Any:
    return owner[name] if isinstance(owner, dict) else getattr(owner, name)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


# ---- collectives ----------------------------------------------------------------------------------------------------


@bug((collectives, "all_reduce"))
def all_reduce_dropped(original):  # type: ignore[no-untyped-def]
    """A pending sum is taken for the sum."""
    return lambda x, reduce, spot: x.clone()


@bug((collectives, "all_reduce"))
def all_reduce_doubled(original):  # type: ignore[no-untyped-def]
    """What is summed is summed again."""
    return lambda x, reduce, spot: original(original(x, reduce, spot), reduce, spot)


@bug((collectives, "all_reduce"))
def maximum_reduced_as_sum(original):  # type: ignore[no-untyped-def]
    """The kind of reduction gets lost."""
    return lambda x, reduce, spot: original(x, "sum", spot)


def _pair(wrong: Callable[[Any, Any], Callable[[Any, Any], Any] | None]) -> Callable[[Any], Any]:
    """A `move` whose backward is `wrong(a, b)` where that is something."""

    def breaks(original):  # type: ignore[no-untyped-def]
        def move(x, a, b, spot, grad, *index):  # type: ignore[no-untyped-def]
            backward = wrong(a, b) if grad else None
            if backward is None:
                return original(x, a, b, spot, grad, *index)
            return collectives._Pair.apply(x, lambda t: original(t, a, b, spot, False, *index), lambda g: backward(g, spot))

        return move

    return breaks


@bug((partition, "move"))
def gradient_not_reduced(original):  # type: ignore[no-untyped-def]
    """I → R is nothing both ways: every rank keeps its own term of the gradient."""
    return _pair(lambda a, b: (lambda g, spot: g.clone()) if (a, b) == (I, R) else None)(original)


@bug((partition, "move"))
def all_reduce_its_own_backward(original):  # type: ignore[no-untyped-def]
    """P → I reduces the gradient once more, as torch's functional all_reduce does."""
    again = lambda g, spot: collectives.all_reduce(g, "sum", spot)
    return _pair(lambda a, b: again if a == layout.P and b == I else None)(original)


@bug((partition, "move"))
def count_not_reduced(original):  # type: ignore[no-untyped-def]
    """Sums of data (a count of labels) stay each rank's own."""

    def move(x, a, b, spot, grad, *index):  # type: ignore[no-untyped-def]
        return x if not grad and transition(a, b) == "all_reduce" else original(x, a, b, spot, grad, *index)

    return move


@bug((collectives, "gradient"))
def gradient_of_R_taken_for_I(original):  # type: ignore[no-untyped-def]
    """S → R slices the gradient in place of reduce-scattering it."""
    return lambda t: I if t == R else original(t)


@bug((collectives, "all_gather"))
def transpose_lost_after_all_gather(original):  # type: ignore[no-untyped-def]
    """What arrives stacked along dim 0 is read as if it were the dim gathered."""

    def all_gather(x, dim, local, spot):  # type: ignore[no-untyped-def]
        whole = original(x, dim, local, spot)
        if dim == 0 or len(set(collectives.lengths(local))) > 1:
            return whole
        return torch.cat(whole.chunk(spot.parts, dim), 0).reshape(whole.shape)

    return all_gather


@bug((collectives, "reduce_scatter"))
def reduce_scatter_gives_the_mirrored_part(original):  # type: ignore[no-untyped-def]
    """Parts are sent in the wrong order where they are as large."""

    def reduce_scatter(x, dim, local, spot):  # type: ignore[no-untyped-def]
        if len(set(collectives.lengths(local))) > 1:
            return original(x, dim, local, spot)
        return original(torch.cat(x.chunk(spot.parts, dim)[::-1], dim), dim, local, spot)

    return reduce_scatter


@bug((collectives, "merge"))
def segments_gathered_as_one(original):  # type: ignore[no-untyped-def]
    """Parts of a fused dim (q, k and v) are put one after the other, not woven."""
    return lambda pieces, dim, local: torch.cat(pieces, dim)


@bug((collectives, "split_sizes"))
def uneven_parts_last_in_one_place(original):  # type: ignore[no-untyped-def]
    """The larger parts come last when shards move, first everywhere else."""
    return lambda n, parts: original(n, parts)[::-1]


@bug((collectives, "lengths"))
def sizes_as_if_even(original):  # type: ignore[no-untyped-def]
    """Every rank is taken to hold as much as the first."""
    return lambda local: [original(local)[0]] * len(original(local))


# ---- where a shard lies ---------------------------------------------------------------------------------------------


def _rank_input(kind: str, wrong: Callable[..., torch.Tensor]) -> Callable[[Any], Any]:
    def breaks(original):  # type: ignore[no-untyped-def]
        return lambda self, sizes, coords: wrong(self, sizes, coords, original) if self.kind == kind else original(self, sizes, coords)

    return breaks


@bug((program.RankInput, "tensor"))
def offset_of_an_even_split(original):  # type: ignore[no-untyped-def]
    """A shard of a table starts at coordinate × (n // ranks), which an uneven split doesn't."""

    def wrong(self, sizes, coords, right):  # type: ignore[no-untyped-def]
        (axis, _), *others = self.cuts or (("mb", ()),)
        return right(self, sizes, coords) if others else torch.tensor(coords[axis] * (self.n // sizes[axis]))

    return _rank_input("offset", wrong)(original)


@bug((bodies, "pick"))
def foreign_labels_picked(original):  # type: ignore[no-untyped-def]
    """A label of another rank's shard picks the nearest element here in place of 0."""
    return lambda x, labels, offset: original(x, (labels - offset).clamp(0, x.shape[-1] - 1), torch.zeros_like(offset))


@bug((program.RankInput, "tensor"))
def bias_added_on_every_rank(original):  # type: ignore[no-untyped-def]
    """A whole value that enters a pending sum isn't masked."""
    return _rank_input("first", lambda self, sizes, coords, right: right(self, sizes, {**coords, "dp": 0, "tp": 0}))(original)


@bug((program.RankInput, "tensor"))
def regularizer_counted_in_every_microbatch(original):  # type: ignore[no-untyped-def]
    """A term of the loss that doesn't depend on the batch isn't masked in time."""
    return _rank_input("first", lambda self, sizes, coords, right: right(self, sizes, {**coords, "mb": 0}))(original)


@bug((bodies, "mean"))
def mean_by_local_count(original):  # type: ignore[no-untyped-def]
    """A shard's term of a mean is its own mean."""
    return lambda x, dims, keep, count: x.mean(dims, keep)


@bug((bodies, "dropout_mask"))
def dropout_at_local_positions(original):  # type: ignore[no-untyped-def]
    """Every rank draws as if its shard were the first."""
    return lambda seed, at, full, p, dtype: original(seed, [i - i[:1] for i in at], full, p, dtype)


@bug((partition, "localize"))
def slice_taken_from_the_end(original):  # type: ignore[no-untyped-def]
    """A slice of a shard that doesn't start at 0 is taken to be its last part."""

    def localize(op, held, out_shape):  # type: ignore[no-untyped-def]
        args = original(op, held, out_shape)
        if op.target != "aten.slice.Tensor" or args[4] != 1 or args[1:4] == op.args[1:4] or args[2] == 0:
            return args
        here, n = len(held(args[0].name, args[1])), args[3] - args[2]
        return (args[0], args[1], here - n, here, 1)

    return localize


@bug((partition, "localize"))
def split_sizes_of_another_rank(original):  # type: ignore[no-untyped-def]
    """The first part of a split takes one more than this rank holds of it, the last one less."""

    def localize(op, held, out_shape):  # type: ignore[no-untyped-def]
        args = original(op, held, out_shape)
        if op.target != "aten.split_with_sizes.default" or args[1] == op.args[1]:
            return args
        return (args[0], tuple(n + (1 if i == 0 else -1 if i == len(args[1]) - 1 else 0) for i, n in enumerate(args[1])), args[2])

    return localize


@bug((trainable, "_shard"))
def stored_shards_in_the_wrong_order(original):  # type: ignore[no-untyped-def]
    """What dp stores in shards is dealt out back to front."""

    def shard(whole, slot, device):  # type: ignore[no-untyped-def]
        dp = slot.sizes[0] - 1 - slot.coords[0] if slot.layout[0].kind == "S" else slot.coords[0]
        return original(whole, dataclasses.replace(slot, coords=(dp, slot.coords[1])), device)

    return shard


# ---- rules ----------------------------------------------------------------------------------------------------------


@bug((table.TABLE, "autoshard.attention.default"))
def causal_mask_at_local_positions(original):  # type: ignore[no-untyped-def]
    """Queries may be cut although the causal flag counts from the first one here."""

    def attention(op, values):  # type: ignore[no-untyped-def]
        free = type(op)(op.name, op.target, (*op.args[:4], False, op.args[5]), op.kwargs, op.outs)
        return original(free, values)

    return attention


@bug((table.TABLE, "aten.softmax.int"), (table.TABLE, "aten.log_softmax.int"))
def softmax_over_a_shard(original):  # type: ignore[no-untyped-def]
    """The dim that softmax normalises may be cut."""
    return table.pointwise


@bug(*((table.TABLE, f"aten.{n}.default") for n in ("tanh", "sigmoid", "silu", "gelu", "exp", "rsqrt")))
def pending_sum_through_a_nonlinear_op(original):  # type: ignore[no-untyped-def]
    """f(a + b) is taken for f(a) + f(b)."""
    return table.linear_in_first


@bug((table.TABLE, "aten.add.Tensor"))
def number_added_to_a_pending_sum(original):  # type: ignore[no-untyped-def]
    """x + 1 is taken for linear: each rank adds 1."""
    return table.linear_in_first


@bug((rule, "_with_cut"))
def whole_operand_typed_I(original):  # type: ignore[no-untyped-def]
    """An operand that lacks the factor cut is I, so that its gradient, a sum over the shards, isn't reduced."""

    def with_cut(factor, cut, operands, outs, parts):  # type: ignore[no-untyped-def]
        found = original(factor, cut, operands, outs, parts)
        ins = found and tuple(I if t == R and v.grad else t for t, v in zip(found.ins, operands, strict=True))
        return found and rule.Strategy(ins, found.outs, found.body)

    return with_cut


@bug((table.TABLE, "aten.permute.default"))
def permutation_inverted(original):  # type: ignore[no-untyped-def]
    """Shards go where the inverse permutation would put them."""

    def permute(op, values):  # type: ignore[no-untyped-def]
        inverse = tuple(op.args[1].index(d) for d in range(len(op.args[1])))
        return original(type(op)(op.name, op.target, (op.args[0], inverse), op.kwargs, op.outs), values)

    return permute


@bug((shapes, "_common_factors"))
def reshape_minor_first(original):  # type: ignore[no-untyped-def]
    """A merged dim is cut as if its minor part came first."""

    def factors(a, b):  # type: ignore[no-untyped-def]
        flip = lambda p: rule.Place(p.dim, p.inner, p.outer)
        return [rule.Factor(f.name, f.size, tuple(map(flip, f.ins)), tuple(map(flip, f.outs)), f.seeds, f.body) for f in original(a, b)]

    return factors


@bug((rule, "canonical"), (layout, "canonical"))
def different_cuts_taken_as_equal(original):  # type: ignore[no-untyped-def]
    """A fused dim cut by its parts is taken for the same dim cut as a whole."""
    return lambda cut, n, parts: ()


# ---- microbatches, stages, modules ----------------------------------------------------------------------------------


@bug((microbatch._Splitter, "_scale"))
def mean_of_microbatches_not_scaled(original):  # type: ignore[no-untyped-def]
    """Each microbatch's mean counts in full."""
    return lambda self, op: None


@bug((executor.Step, "total"))
def gradients_of_microbatches_overwritten(original):  # type: ignore[no-untyped-def]
    """The last gradient of a parameter stands for the sum."""
    return lambda self, name, grad: self.totals.__setitem__(name, grad) if grad is not None else None


@bug((executor.Step, "tied"))
def gradients_of_tied_parameters_not_summed(original):  # type: ignore[no-untyped-def]
    """Each stage keeps its own term of a shared parameter's gradient."""

    def tied(self, path, grad):  # type: ignore[no-untyped-def]
        return grad
        yield

    return tied


@bug((executor.Step, "SF"))
def stale_microbatch_sent(original):  # type: ignore[no-untyped-def]
    """A stage sends what it sent for the first microbatch."""

    def send(self, action):  # type: ignore[no-untyped-def]
        sent = self.__dict__.setdefault("sent", {})
        for request in original(self, action):
            yield Send(request.peer, sent.setdefault(action.peer, request.tensors), request.where)

    return send


@bug((executor.Step, "RB"))
def gradient_of_one_consumer_lost(original):  # type: ignore[no-untyped-def]
    """A value that goes to two stages keeps the gradient of the one that answers last."""

    def receive(self, action):  # type: ignore[no-untyped-def]
        for name in self.x.edge(action):
            self.grads.setdefault(action.mb, {}).pop(name, None)
        yield from original(self, action)

    return receive


@bug((partition, "linears"))
def merged_rows_shifted(original):  # type: ignore[no-untyped-def]
    """The weights of merged linears are read a row too late."""
    return lambda x, weight, rows: original(x, weight.roll(-1, 0), rows)


@bug((executor.State, "join"))
def merged_weights_upside_down(original):  # type: ignore[no-untyped-def]
    """The buffer of merged weights holds their rows in another order than the linears take them."""

    def join(self, paths):  # type: ignore[no-untyped-def]
        original(self, paths)
        self.joined[paths].copy_(self.joined[paths].flip(0))

    return join


@bug((partition._Builder, "_move"))
def module_shared_by_unequal_ranks(original):  # type: ignore[no-untyped-def]
    """Two ranks count as alike although their parts of an uneven dim differ."""

    def move(self, *args):  # type: ignore[no-untyped-def]
        original(self, *args)
        step = self.routine.steps[-1]
        step.text = step.text.rstrip("0123456789")

    return move
