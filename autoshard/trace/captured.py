"""What capture returns: the Graph with the tensors and callables that plain data can't hold, and its reference interpreter.

In: argument tensors of a batch (`flatten`), then parameters, buffers and inputs by value name (`run`). Out: every value of the graph.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..errors import BatchError
from .graph import Graph, Op, Ref, Value, map_refs
from .interpret import call


@dataclass(frozen=True)
class Draw:
    """One random op of the plain model: dropout as the mask that it draws, any other as it was called. `index`: its number in the graph.

    A tensor among the arguments is a meta tensor that stands for one of its shape.
    """

    index: int
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str = ""


@dataclass(frozen=True)
class InputSpec:
    """The structure of the call: leaves by path, in order; the value name of a tensor leaf, the expected object of any other."""

    tree: Any
    paths: tuple[str, ...]
    names: tuple[str | None, ...]
    plain: tuple[Any, ...]


@dataclass
class Captured:
    """`graph` in normal form; `constants` by value name; `opaque` callables by key; `spec` of the call; `draws` that the model makes, in
    the order in which it makes them."""

    graph: Graph
    constants: dict[str, Tensor] = field(default_factory=dict)
    opaque: dict[str, Callable[..., tuple[Tensor, ...]]] = field(default_factory=dict)
    spec: InputSpec | None = None
    draws: list[Draw] = field(default_factory=list)

    def __str__(self) -> str:
        return str(self.graph)

    def flatten(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """The tensors of a call by input value name. Raises BatchError where it differs from the captured call."""
        assert self.spec is not None
        found, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs or {})))
        by_path = {path_text(path): leaf for path, leaf in found}
        missing, extra = set(self.spec.paths) - set(by_path), set(by_path) - set(self.spec.paths)
        if missing or extra:
            raise BatchError(
                f"the arguments are {sorted(by_path)}, but {sorted(self.spec.paths)} were captured",
                hint="call with the arguments that were captured, or capture again",
            )
        tensors = {}
        for path, name, plain in zip(self.spec.paths, self.spec.names, self.spec.plain, strict=True):
            leaf = by_path[path]
            if name is None:
                _check_plain(path, leaf, plain)
            else:
                tensors[name] = self._check_tensor(path, name, leaf)
        return tensors

    def _check_tensor(self, path: str, name: str, leaf: Any) -> Tensor:
        want = self.graph.values[name].tensor
        if not isinstance(leaf, Tensor):
            raise BatchError(f"{path} is {type(leaf).__name__}, but a tensor {want} was captured")
        dtype = str(leaf.dtype).removeprefix("torch.")
        if tuple(leaf.shape) != want.shape or dtype != want.dtype:
            raise BatchError(
                f"{path} is {dtype}[{', '.join(map(str, leaf.shape))}], but {want} was captured", hint="capture again for a new shape"
            )
        return leaf

    def run(self, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Execute every op on one device, differentiably, given parameters, buffers and inputs by value name.

        Random ops draw from torch's default generator in the plain model's order, those whose results are dead included.
        """
        values: dict[str, Tensor] = {**{k: v.to(device) for k, v in self.constants.items()}, **tensors}
        drawn = self._drawn(device)
        for op in self.graph.ops:
            args, kwargs = map_refs((op.args, op.kwargs), lambda ref: values[ref.name])
            mask = drawn.get(op.args[3]) if op.target == "autoshard.dropout_mask.default" else None
            outs = call(op.target, args, kwargs, device, self.opaque) if mask is None else mask
            values.update(zip(op.outs, outs if isinstance(outs, tuple) else (outs,), strict=True))
        return values

    def draw(self, index: int) -> Draw:
        """The draw of that number."""
        return next(draw for draw in self.draws if draw.index == index)

    def _drawn(self, device: torch.device | str) -> dict[int, Tensor]:
        """By number what the plain model draws, drawn in its order."""
        drawn = {}
        for draw in self.draws:
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: torch.zeros_like(t, device=device), (draw.args, draw.kwargs))
            drawn[draw.index] = call(draw.target, args, kwargs, device)
        return drawn

    # ---- what a step hands out besides the loss ---------------------------------------------------------------------

    def keeping(self, wanted: Mapping[str, str]) -> Captured:
        """The same with a graph whose steps also hand out some values: label → value. They are taken behind a detach, so that
        training doesn't notice."""
        if not wanted:
            return self
        old, kept, after = self.graph, dict[str, str](), dict[str, list[Op]]()
        values, first = dict(old.values), list[Op]()
        producer = old.producer()
        for label, name in wanted.items():
            value = old.values[name]
            op = producer.get(name)
            new = _fresh(f"kept_{len(kept)}", values)
            values[new] = Value(new, value.tensor, strides=value.strides)
            where = after.setdefault(op.name, []) if op else first
            where.append(Op(new, "aten.detach.default", (Ref(name),), {}, (new,), op.source if op else "", op.module if op else ""))
            kept[label] = new
        ops = first + [each for op in old.ops for each in (op, *after.get(op.name, ()))]
        return dataclasses.replace(self, graph=dataclasses.replace(old, values=values, ops=ops, kept=kept))

    def outputs(self, names: Sequence[str] | bool) -> dict[str, str]:
        """Label → value of the model's outputs by name (True: all, the loss apart). Raises BatchError."""
        known = self.graph.outputs
        if isinstance(names, bool):
            return dict(known) if names else {}
        for name in names:
            if name not in known:
                raise unknown("output", name, list(known))
        return {name: known[name] for name in names}

    def logits(self, names: bool) -> dict[str, str]:
        """The output called logits, or the only one."""
        known = self.graph.outputs
        return {"logits": known.get("logits") or known["output"]} if names else {}

    def activations(self, patterns: Sequence[str]) -> dict[str, str]:
        """Label → value of what modules (by path or pattern; what a module hands on) and ops (by value name) compute. Raises BatchError."""
        modules, found = self._module_values(), dict[str, str]()
        made = {out: out for op in self.graph.ops for out in op.outs}
        for pattern in patterns:
            hits = [n for n in modules if fnmatch.fnmatchcase(n, pattern)] or [n for n in made if fnmatch.fnmatchcase(n, pattern)]
            if not hits:
                raise unknown("module or value", pattern, [*modules, *made])
            found |= {n: modules.get(n) or made[n] for n in hits}
        return found

    def _module_values(self) -> dict[str, str]:
        """Module path → the last value made inside it that is used outside of it."""
        inside: dict[str, set[str]] = {}
        for op in self.graph.ops:
            parts = op.module.split(".") if op.module else []
            for i in range(len(parts)):
                inside.setdefault(".".join(parts[: i + 1]), set()).add(op.name)
        users = self.graph.consumers()
        roots = {*self.graph.roots, *self.graph.outputs.values()}
        found = {}
        for path, names in inside.items():
            made = [out for op in self.graph.ops if op.name in names for out in op.outs]
            leaving = [o for o in made if o in roots or any(user.name not in names for user in users[o])]
            found[path] = (leaving or made)[-1]
        return found


def _fresh(base: str, taken: Mapping[str, Any]) -> str:
    return next(name for name in itertools.chain([base], (f"{base}_{i}" for i in itertools.count(1))) if name not in taken)


def unknown(what: str, name: str, known: Sequence[str]) -> BatchError:
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or list(known)[:5]
    return BatchError(f"the model has no {what} {name!r}", hint=f"near to it: {', '.join(near)}" if near else "it has none at all")


def path_text(path: tuple[Any, ...]) -> str:
    """`args.0`, `kwargs.labels`, `kwargs.cache.0.1`: an argument's place in the call."""
    keys = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
    return ".".join([("args", "kwargs")[int(keys[0])], *keys[1:]])


def _check_plain(path: str, leaf: Any, plain: Any) -> None:
    if type(leaf) is type(plain) and (leaf is plain or leaf == plain):
        return
    raise BatchError(f"{path} is {leaf!r}, but {plain!r} was captured", hint="an argument that isn't a tensor is fixed at capture")
