"""One order of a model's ops for all processes: independent iterations of a loop stand as what they compute says, not as Python ran them.

A forward that loops over a set (of layer types, say) runs its iterations in an order that every process draws anew. `Calls` records, for
each op, in which calls and loops of the user's code it was made. `canonical_order` takes the functional graph in program order and sorts,
within each run of a loop, its parts that no value connects: by the names of what they read, then by a hash of what they compute and of what
is computed with them. Everything else keeps its place, so the order is the program's where the program has one. Then ops and draws are
numbered anew; whatever is named after them, plans and opaque regions included, is the same in every process.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import itertools
import operator
import re
import sys
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from .captured import Draw
from .draws import draw_of, renumber
from .provenance import is_users, last_name

Scopes = tuple[str, ...]
"""From the outside in: a call as its number ("7"), a loop of it as number and bytecode offset ("7:120")."""


# ---- where an op is made


class Calls:
    """Numbers the calls of the user's functions that are running. A call that was left never runs again, a loop in it does."""

    def __init__(self, root: CodeType) -> None:
        self.root, self.numbers = root, itertools.count()
        self.running: list[tuple[FrameType, int]] = []

    def scopes_here(self) -> str:
        """The scopes of the code that is executing now, below the innermost frame of `root`; blanks between them."""
        frames = self._users()
        pairs = zip(self.running, frames, strict=False)
        kept = [old for old, _ in itertools.takewhile(lambda pair: pair[0][0] is pair[1], pairs)]
        self.running = kept + [(frame, next(self.numbers)) for frame in frames[len(kept) :]]
        return " ".join(scope for frame, n in self.running for scope in (str(n), *(f"{n}:{at}" for at in _loops_at(frame))))

    def _users(self) -> list[FrameType]:
        found: list[FrameType] = []
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code is not self.root:
            if is_users(frame.f_code.co_filename):
                found.append(frame)
            frame = frame.f_back
        return found[::-1]


def _loops_at(frame: FrameType) -> list[int]:
    return [start for start, end in loops_of(frame.f_code) if start <= frame.f_lasti <= end]


@functools.cache
def loops_of(code: CodeType) -> list[tuple[int, int]]:
    """(first, last) bytecode offset of each loop, outer ones first: every jump back spans one.

    >>> def f(rows):
    ...     for row in rows:
    ...         for x in row:
    ...             print(x)
    >>> [(a, b), (c, d)] = loops_of(f.__code__)
    >>> a < c < d <= b
    True
    """
    ends: dict[int, int] = {}
    for step in dis.get_instructions(code):
        if "JUMP" in step.opname and isinstance(step.argval, int) and step.argval <= step.offset:
            ends[step.argval] = max(step.offset, ends.get(step.argval, 0))
    return sorted(ends.items(), key=lambda loop: (loop[0], -loop[1]))


def _scopes_of(node: fx.Node) -> Scopes | None:
    text = last_name(node)
    return tuple(text.split()) if text is not None else None


# ---- the order


def canonical_order(program: torch.export.ExportedProgram, draws: list[Draw]) -> list[Draw]:
    """Order and name the nodes of the program's functional graph, in place. Returns the draws as numbered by it, in the program's order."""
    graph = program.graph
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    scopes: dict[fx.Node, Scopes] = {}
    last: Scopes = ()
    for node in nodes:  # what torch adds of its own belongs to what it stands beside
        scopes[node] = last = last if (found := _scopes_of(node)) is None else found
    content = functools.cache(lambda: Content(program))
    ordered = _arranged(nodes, scopes, 0, content)
    place = next(iter(graph.find_nodes(op="output")))
    for node in ordered:
        place.prepend(node)
    _rename(graph)
    graph.lint()
    program.graph_module.recompile()
    return renumber([n for n in ordered if draw_of(n) is not None], draws)


def _arranged(nodes: list[fx.Node], scopes: Mapping[fx.Node, Scopes], depth: int, content: Callable[[], Content]) -> list[fx.Node]:
    """`nodes`, all of the same first `depth` scopes, with the parts of each loop's run sorted, the inner loops first."""
    found: list[fx.Node] = []
    for scope, group in itertools.groupby(nodes, key=lambda n: scopes[n][depth : depth + 1]):
        run = list(group)
        if scope:
            run = _arranged(run, scopes, depth + 1, content)
        if scope and ":" in scope[0] and len(parts := _parts(run)) > 1:
            run = [n for part in sorted(parts, key=content().key) for n in part]
        found += run
    return found


def _parts(run: list[fx.Node]) -> list[list[fx.Node]]:
    """The run's nodes by the parts of it that values connect, each in the run's order."""
    part_of: dict[fx.Node, list[fx.Node]] = {}
    position = {n: i for i, n in enumerate(run)}
    for node in run:
        part_of[node] = [node]
        for other in node.all_input_nodes:
            if other in part_of and part_of[other] is not part_of[node]:
                small, large = sorted((part_of[other], part_of[node]), key=len)
                large += small
                part_of.update(dict.fromkeys(small, large))
    return [sorted(part, key=position.__getitem__) for part in {id(p): p for p in part_of.values()}.values()]


class Content:
    """Hashes of what each node computes, from names of parameters, buffers and inputs and from contents of constants; `key` sorts parts."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.sources: dict[fx.Node, str] = {}
        self.up: dict[fx.Node, str] = {}
        specs = {s.arg.name: s for s in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.up[node] = self._source(node, specs[node.name], program)
            else:
                self.up[node] = _hash(str(node.target), node.args, {k: v for k, v in node.kwargs.items() if k != "device"}, self.up)
        self.down: dict[fx.Node, str] = {}
        for node in reversed(program.graph.nodes):
            uses = sorted(f"{self.up[u]}{self.down[u]}{[i for i, a in enumerate(u.all_input_nodes) if a is node]}" for u in node.users)
            self.down[node] = hashlib.sha256("".join(uses).encode()).hexdigest()

    def _source(self, node: fx.Node, spec: Any, program: torch.export.ExportedProgram) -> str:
        contents = program.constants.get(spec.target) if spec.kind is torch.export.graph_signature.InputKind.CONSTANT_TENSOR else None
        if not isinstance(contents, Tensor) or contents.device.type == "meta" or isinstance(contents, torch._subclasses.FakeTensor):
            self.sources[node] = str(spec.target or node.name)
            return f"{spec.kind} {self.sources[node]}"
        data = contents.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
        return f"{contents.dtype} {tuple(contents.shape)} {hashlib.sha256(data).hexdigest()}"

    def key(self, part: list[fx.Node]) -> tuple[Any, ...]:
        """What is read, numbers in names counted; then everything."""
        read = sorted({_natural(self.sources[i]) for n in part for i in n.all_input_nodes if i in self.sources})
        return read, sorted(self.up[n] for n in part), sorted(self.down[n] for n in part)


def _hash(target: str, args: Any, kwargs: Any, known: Mapping[fx.Node, str]) -> str:
    text = repr(fx.map_arg((args, kwargs), lambda n: _Hashed(known[n])))
    return hashlib.sha256(f"{target} {text}".encode()).hexdigest()


class _Hashed(str):
    __repr__ = str.__str__


def _natural(path: str) -> tuple[tuple[int, str], ...]:
    """
    >>> sorted(["layers.10.w", "layers.9.w"], key=_natural)
    ['layers.9.w', 'layers.10.w']
    """
    return tuple((int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", path))


def _rename(graph: fx.Graph) -> None:
    """Name every op after its target, numbered in order; sources keep their names, which the signature knows them by."""
    names = fx.graph._Namespace()
    for node in graph.nodes:
        if node.op == "placeholder":
            names.create_name(node.name, node)
    for node in graph.nodes:
        if node.op == "call_function":
            overload = isinstance(node.target, torch._ops.OpOverload)
            base = node.target._schema.name.split("::")[1] if overload else getattr(node.target, "__name__", "op")
            node.name = names.create_name("getitem" if node.target is operator.getitem else base, None)
