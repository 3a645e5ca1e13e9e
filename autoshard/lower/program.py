"""The Program: for each rank, fx modules with local shapes and explicit collectives, bound to the Plan's instruction list.

`lower.compile` makes it, the runtime plays it. A rank's step runs its instruction list; the values that pass between
instructions live in an *environment* (name → tensor), one per microbatch, which extends the step's environment (parameters
as used, results of the data prologue, rank inputs).

Collectives inside the modules are `torch.ops._c10d_functional` calls whose group name is a mesh axis ("dp", "tp"); `bind`
replaces them by real process groups' names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from ..layout import Cut, Layout, Type, dim_positions
from ..mesh import Mesh
from ..plan.schedules import Action
from ..trace.graph import Graph, Tensor

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..trace.capture import Captured


@dataclass(frozen=True)
class RankInput:
    """A small tensor that depends on where (and when) a module runs, so that one module serves every rank and microbatch.

    kind "positions": int64 [n_local], the global positions of a dim of `n` that this rank holds at this microbatch under
    `cuts` (`chain_positions`; axis "mb" is time). kind "offset": int64 scalar, the first of those positions.
    kind "index": int64, where this coordinate of axis `cuts[0][0]` finds its part in a dim divided as `draw` (segments of
    outer, sizes per coordinate, inner). kind "first": float32 scalar, 1 where every axis in `cuts` is at coordinate 0, else 0.
    kind "seed": int64 scalar, the step's random seed and the op's ordinal `order`, mixed. kind "dropout" (exact mode only): the
    mask of one dropout op, drawn whole from torch's stream in the ops' `order`, then cut to this rank and microbatch; `draw` =
    (full shape, strides, p, dtype, per-dim chains of cuts).
    """

    kind: str
    n: int = 0
    cuts: tuple[tuple[str, Cut], ...] = ()
    order: int = 0
    draw: tuple[Any, ...] = ()

    def tensor(self, sizes: Mapping[str, int], coords: Mapping[str, int]) -> torch.Tensor:
        """The value at these coordinates ("mb" among them), for the kinds that depend on nothing else."""
        if self.kind == "first":
            return torch.tensor(float(all(coords[a] == 0 for a, _ in self.cuts)))
        if self.kind == "index":
            return torch.from_numpy(part_index(self.draw, coords[self.cuts[0][0]]))
        held = chain_positions(self.n, self.cuts, sizes, coords)
        return torch.tensor(int(held[0]) if len(held) else 0) if self.kind == "offset" else torch.from_numpy(held)

    @property
    def timed(self) -> bool:
        """Whether it differs between microbatches."""
        chains = self.draw[4] if self.kind == "dropout" else (self.cuts,)
        return any(axis == "mb" for chain in chains for axis, _ in chain)


def part_index(local: tuple[Any, ...], coord: int) -> np.ndarray:
    """Ascending positions of one coordinate's part in a dim divided as `local` (see lower.collectives.Local)."""
    found, at = [], 0
    for o, sizes, i in local:
        whole = at + np.arange(o * sum(sizes) * i).reshape(o, sum(sizes), i)
        start = sum(sizes[:coord])
        found.append(whole[:, start : start + sizes[coord]].reshape(-1))
        at += o * sum(sizes) * i
    return np.concatenate(found)


def chain_positions(n: int, cuts: tuple[tuple[str, Cut], ...], sizes: Mapping[str, int], coords: Mapping[str, int]) -> np.ndarray:
    """Global positions left of a dim of n after a chain of cuts: a cut speaks of the dim as the time axis ("mb", first if
    there) left it; the mesh axes after it combine by intersection."""
    from ..layout import local_positions

    held = np.arange(n)
    time = [(a, c) for a, c in cuts if a == "mb"]
    space = [(a, c) for a, c in cuts if a != "mb" and sizes[a] > 1]
    for axis, cut in time:
        held = held[local_positions(len(held), (cut,), (sizes[axis],), (coords[axis],))]
    if space:
        picked = local_positions(
            len(held), tuple(c for _, c in space), tuple(sizes[a] for a, _ in space), tuple(coords[a] for a, _ in space)
        )
        held = held[picked]
    return held


@dataclass
class Module:
    """One block kind at one local shape: traced once, shared by every layer and rank that is alike.

    forward(inputs…) -> (outputs…, saved…)
    backward_input(saved…, gradients of `grad_outputs`…) -> (gradients of `grad_inputs`…, kept for the weights…)
    backward_weight(kept…) -> gradients of `grad_params`…
    backward(saved…, gradients of `grad_outputs`…) -> (gradients of `grad_inputs`…, of `grad_params`…), where there are any of these
    accumulate(saved…, gradients of `grad_outputs`…, sums of `grad_params`…) -> gradients of `grad_inputs`…: `backward` for several
        microbatches; the sums change in place
    backward_in_place is the same where gradients may be overwritten that are all-reduced as they come (None: there are none)
    All indices count `Call.inputs` / `Call.outputs`. The backward graphs are None where nothing in the block has a gradient.
    """

    forward: fx.GraphModule
    backward_input: fx.GraphModule | None
    backward_weight: fx.GraphModule | None
    outputs: int
    grad_outputs: tuple[int, ...]
    grad_inputs: tuple[int, ...]
    grad_params: tuple[int, ...]
    key: str = ""
    backward: fx.GraphModule | None = None
    accumulate: fx.GraphModule | None = None
    backward_in_place: fx.GraphModule | None = None


@dataclass
class Call:
    """One block of a rank: a module, and the environment names bound to its inputs and outputs."""

    module: Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    label: str = ""


@dataclass(frozen=True)
class Slot:
    """What a rank stores of one parameter (or buffer): `tensor` is the whole, `layout` the storage layout on (dp, tp)."""

    path: str
    tensor: Tensor
    layout: Layout
    trainable: bool
    sizes: tuple[int, ...]
    coords: tuple[int, ...]

    def positions(self) -> list[np.ndarray | None]:
        """Per dim, the positions held; None where the dim is whole."""
        found: list[np.ndarray | None] = []
        for d, n in enumerate(self.tensor.shape):
            held = dim_positions(n, d, self.layout, self.sizes, self.coords)
            found.append(None if len(held) == n else held)
        return found

    @property
    def local(self) -> tuple[int, ...]:
        """The shard's shape."""
        return tuple(n if held is None else len(held) for n, held in zip(self.tensor.shape, self.positions(), strict=True))

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the whole tensor: a view where it is a range in each dim, else a copy, made at once."""
        cut = whole.detach()
        scattered: dict[int, torch.Tensor] = {}
        for d, held in enumerate(self.positions()):
            if held is not None and len(held) > 0 and int(held[-1]) - int(held[0]) == len(held) - 1:
                cut = cut.narrow(d, int(held[0]), len(held))
            elif held is not None:
                scattered[d] = torch.from_numpy(held).to(whole.device)
        if not scattered:
            return cut
        # neighbouring dims are indexed together, so that they stay in their places
        first, last = min(scattered), max(scattered)
        each = [scattered.get(d, torch.arange(cut.shape[d], device=cut.device)) for d in range(first, last + 1)]
        shard = torch.empty(self.local, dtype=cut.dtype, device=cut.device)
        torch.ops.aten.index.Tensor_out(cut, [None] * first + list(torch.meshgrid(*each, indexing="ij")), out=shard)
        return shard


@dataclass
class RankProgram:
    """Everything one rank runs.

    `params`, `buffers`: what it stores, by the model's names. Environment names: a stored parameter is `param:PATH`, a buffer
    `buffer:PATH`; graph inputs, constants and rank inputs are in `inputs`, `constants`, `rank_inputs`.
    `gathers` (P), one a bucket: stored parameters → parameters as used in the loop (and after them, a block's weights → their casts to
    fp8, without gradients); their backwards (G) take the gradients accumulated
    over microbatches to the gradients of the stored shards. `once` (D): the data prologue, over the whole batch.
    `data`: data-only values of a microbatch, run before the first block of F. `blocks`: the stage's blocks in order.
    `sends`/`receives`: (src, dst) → the values that travel forward on that edge; of these `grad_values` send gradients back.
    """

    rank: int
    coords: dict[str, int]
    stage: int
    params: dict[str, Slot]
    buffers: dict[str, Slot]
    instructions: list[Action]
    gathers: tuple[Call, ...]
    once: Call | None
    data: Call | None
    blocks: list[Call]
    inputs: dict[str, InputSlice]
    constants: tuple[str, ...]
    rank_inputs: dict[str, RankInput]
    edges: dict[tuple[int, int], tuple[str, ...]]
    grad_values: frozenset[str]
    values: dict[str, Tensor]
    """Local shape and dtype of every value that travels."""
    loss: str = ""
    updates: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    """What a step hands out besides the loss and this rank makes: its name → the environment's."""
    tied: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Parameter path → ranks (of other stages too) that store the same shard; their gradients are summed after G."""
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Environment name → the parameters that lie one below the other in one buffer, and are used as one tensor."""


@dataclass(frozen=True)
class InputSlice:
    """Which part of a graph input a rank reads: per dim a chain of cuts (`chain_positions`); `source` is the input's value name
    in the captured graph. Not `timed`: the same for every microbatch (it may be the whole batch)."""

    source: str
    tensor: Tensor
    cuts: tuple[tuple[tuple[str, Cut], ...], ...]
    timed: bool


@dataclass
class Program:
    """All ranks' programs, made on demand (ranks that are alike share modules)."""

    plan: Plan
    graph: Graph
    mesh: Mesh
    constants: dict[str, torch.Tensor]
    ranks: list[RankProgram]
    captured: Captured | None = None
    """What the program was made from: it knows how a call's arguments become graph inputs."""
    kept: dict[str, Type] = field(default_factory=dict)
    """How the microbatches' parts of what a step hands out become the whole: S to be put together, P a sum, R all the same."""

    @property
    def microbatches(self) -> int:
        return self.plan.microbatches

    def source(self, rank: int) -> str:
        """Readable Python of everything this rank runs."""
        from .emit import source

        return source(self, rank)


def bind(module: fx.GraphModule, groups: Mapping[str, str], device: torch.device, overlap: bool = False) -> fx.GraphModule:
    """A copy of a module with axis names replaced by process groups' names; its factory calls and constants on `device`. With `overlap`,
    matmuls run beside the reduction of their result (`beside`)."""
    bound = copy.deepcopy(module).to(device)
    for node in bound.graph.nodes:
        if node.op != "call_function":
            continue
        if str(node.target).startswith("_c10d_functional."):
            node.args = tuple(groups.get(a, a) if isinstance(a, str) else a for a in node.args)
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    if overlap:
        from .beside import beside

        beside(bound.graph)
    bound.recompile()
    return bound
