"""Number the random ops of a model in execution order, before dead ones are dropped, so that a run can replay torch's own stream.

In: the exported graph as the model executed it. Out: one `Draw` a random op, and its number in the node's metadata, which survives
functionalisation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.fx as fx

from .captured import Draw
from .primitives import Law
from .provenance import source_of

_TAG = "autoshard_draw"


def number_draws(graph: fx.Graph) -> list[Draw]:
    """Tag each random op with its ordinal and describe what it draws."""
    draws: list[Draw] = []
    for node in graph.nodes:
        if node.op == "call_function" and (draw := _describe(node, len(draws))) is not None:
            node.meta["custom"] = {**node.meta.get("custom", {}), _TAG: draw.index}
            draws.append(draw)
    return draws


def draw_of(node: fx.Node) -> int | None:
    return node.meta.get("custom", {}).get(_TAG)


def renumber(nodes: list[fx.Node], draws: list[Draw]) -> list[Draw]:
    """Number the draws that `nodes` make in the order of `nodes`; each stays where the program makes it."""
    old = [draw_of(n) for n in nodes]
    live = {n for n in old if n is not None}
    new = dict(zip(dict.fromkeys(old), sorted(live), strict=True))
    for node, index in zip(nodes, old, strict=True):
        node.meta["custom"] = {**node.meta["custom"], _TAG: new[index]}
    return [_numbered(draw, new.get(draw.index, draw.index)) for draw in draws]


def _numbered(draw: Draw, index: int) -> Draw:
    mask = draw.target == "autoshard.dropout_mask.default"
    args = (*draw.args[:3], index, *draw.args[4:]) if mask else draw.args
    return dataclasses.replace(draw, index=index, args=args)


def _describe(node: fx.Node, index: int) -> Draw | None:
    name = str(node.target).split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else ""
    if name in ("dropout", "dropout_", "native_dropout"):
        x, p, train = _arguments(node, "input", "self", "p", "train")  # in place it is self
        return _mask(index, x.meta["val"], p, node) if train and 0 < p < 1 else None
    if name == "scaled_dot_product_attention":
        q, k, p = _arguments(node, "query", "key", "dropout_p")
        q, k = q.meta["val"], k.meta["val"]
        return _mask(index, q.new_empty((*q.shape[:-1], k.shape[-2])), p, node) if 0 < p < 1 else None
    if (law := _law(node)) is not None:
        return _mask(index, node.meta["val"], law, node)
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _stand_in(n.meta["val"]))
    return Draw(index, str(node.target), tuple(args), {k: v for k, v in kwargs.items() if k != "device"}, source_of(node))


def _arguments(node: fx.Node, *names: str) -> list[Any]:
    """Arguments by schema name, with defaults."""
    found = []
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name in names:
            found.append(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value))
    return found


def _law(node: fx.Node) -> Law | None:
    """What a call of rand, randn, uniform_, … draws; None for any other op."""
    target = str(node.target)
    if target not in LAWS or not all(isinstance(n, int) for n in node.meta["val"].shape):
        return None
    name, arguments, defaults = LAWS[target]
    numbers = _arguments(node, *arguments) if arguments else list(defaults)
    if target in ("aten.randint.default", "aten.randint_like.default"):
        numbers = [0, *numbers]
    if not all(isinstance(n, (int, float)) for n in numbers):
        return None
    if name == "bernoulli":
        return 1 - numbers[0] if 0 < numbers[0] < 1 else None
    return name, *numbers


LAWS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    **{f"aten.{n}.default": ("uniform", (), (0.0, 1.0)) for n in ("rand", "rand_like")},
    **{f"aten.{n}.default": ("normal", (), (0.0, 1.0)) for n in ("randn", "randn_like")},
    "aten.uniform_.default": ("uniform", ("from", "to"), ()),
    "aten.normal_.default": ("normal", ("mean", "std"), ()),
    "aten.exponential_.default": ("exponential", ("lambd",), ()),
    **dict.fromkeys(["aten.bernoulli_.float", "aten.bernoulli.p"], ("bernoulli", ("p",), ())),
    **dict.fromkeys(["aten.randint.default", "aten.randint_like.default"], ("integers", ("high",), ())),
    **dict.fromkeys(["aten.randint.low", "aten.randint_like.low_dtype"], ("integers", ("low", "high"), ())),
}
"""Random op → the law's name, the arguments that hold its numbers, or the numbers."""

RANDOM = (
    *(target for target in LAWS if "_." not in target),
    *(f"aten.{name}" for name in ("uniform.default", "normal_functional.default", "exponential.default")),
)
"""The same ops once they are functional."""


def _mask(index: int, like: torch.Tensor, law: Law, node: fx.Node) -> Draw:
    """What is drawn for `like`: a tensor of its shape in its memory order."""
    strides = tuple(torch.empty_like(_stand_in(like)).stride())
    return Draw(index, "autoshard.dropout_mask.default", (tuple(like.shape), law, str(like.dtype), index, strides), {}, source_of(node))


def _stand_in(value: Any) -> Any:
    """A tensor argument of a draw: only its shape, strides and dtype matter to the generator."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
