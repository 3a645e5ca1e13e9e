"""parallelize: the four rooms in order. Capture the model, search for a plan, lower it to a program, hand it to the runtime.

Every rank captures and lowers; rank 0 alone plans, and the others read its plan's text, so that ranks can't disagree. Whatever
fails on one rank is raised on all of them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .errors import BatchError, CaptureError, MeshError
from .lower import compile as lower
from .lower.program import Program
from .mesh import AXES, Mesh
from .plan.cluster import Cluster, catalogue
from .plan.merge import weights
from .plan.plan import Plan, fingerprint
from .plan.search import search
from .runtime.comm import Comm
from .runtime.module import NOTHING, Sharded
from .runtime.trainable import Wanted
from .trace.capture import capture
from .trace.captured import Captured
from .trace.graph import Graph

log = logging.getLogger("autoshard")
Where = DeviceMesh | Cluster | Mesh | Mapping[str, int] | str | os.PathLike[str]


def parallelize(
    model: nn.Module,
    mesh: Where,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    plan: Plan | str | Path | None = None,
    pins: Mapping[str, Any] | None = None,
    batch_dims: Mapping[str, int | None] | None = None,
    microbatches: int | None = None,
    compile: bool | None = None,
    device: torch.device | str | None = None,
    exact_random: bool = False,
) -> Sharded:
    """Make a distributed training program of a plain model. Call it on every rank, with the same arguments.

    `mesh`: named degrees (a DeviceMesh, {"dp": 2, "tp": 4} or "dp=2 tp=4") that the plan must have; or a Cluster, its file or its
    catalogue name ("h100x8"), and the planner chooses. `args`, `kwargs`: an example of the global batch (without it, the first
    step's). `loss`: makes a scalar of the model's output; without it the output itself, its `.loss` or `["loss"]`. `plan`: a plan
    or its file instead of a search. `pins`: decisions to hold fixed (see `plan.search`), `microbatches`: their
    count. `compile`: whether graphs go through
    torch.compile (default: on CUDA). `exact_random`: dropout replays torch's own CPU stream, as the plain model draws it (slow, for
    comparisons); otherwise every element's draw is keyed by seed and global index, the same under every plan.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")
    where = choose_device(mesh, device)
    comm = Comm(where)
    cluster, degrees = comm.together(lambda: _ranks(mesh, comm))
    rooms = Rooms(model, comm, cluster, degrees, loss, plan, dict(pins or {}), batch_dims, microbatches, exact_random)
    sharded = Sharded(None, model, comm=comm, compile=compile, source=rooms)
    if args or kwargs:
        sharded.begin(*rooms(tuple(args), dict(kwargs or {}), training=True, like=None))
    return sharded


@dataclass
class Rooms:
    """batch → (program, captured), through trace, plan and lower (a `runtime.module.Source`)."""

    model: nn.Module
    comm: Comm
    cluster: Cluster | None
    degrees: Mesh | None
    loss: Callable[[Any], Tensor] | None
    plan: Plan | str | Path | None
    pins: dict[str, Any]
    batch_dims: Mapping[str, int | None] | None
    microbatches: int | None
    exact_random: bool = False
    programs: list[Program] = field(default_factory=list)
    left: weakref.ref[nn.Module] | None = None

    def __call__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool, like: Program | None, wanted: Wanted = NOTHING
    ) -> tuple[Program, Captured]:
        model = self.whole
        with contextlib.nullcontext() if training else _eval_mode(model):
            captured = self.comm.together(lambda: wanted.kept_by(self.captured(model, args, kwargs, wanted.loss or self.loss)))
        mine = fingerprint(captured.graph)
        first = self.comm.share(mine)
        self.comm.together(lambda: _same_graph(mine, first))
        for known in self.programs:
            # evaluation without dropout or batch statistics captures as training does
            if known.plan.graph == mine:
                return known, captured
        text = self.comm.together(lambda: self.planned(captured, like).to_yaml() if self.comm.rank == 0 else "")
        plan = Plan.from_yaml(self.comm.share(text))
        log.info("plan: %s, %d microbatches, %s", plan.mesh, plan.microbatches, plan.schedule)
        program = self.comm.together(lambda: lower(captured, plan, dropout="exact" if self.exact_random else "philox"))
        self.programs.append(program)
        return program, captured

    def captured(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None
    ) -> Captured:
        found = capture(model, args, kwargs, loss, self.batch_dims)
        paths = [v.path for v in found.graph.sources("input")]
        for path in self.batch_dims or ():
            if path not in paths and (found.spec is None or path not in found.spec.paths):
                raise BatchError(f"batch_dims names {path!r}, which is no argument", hint=f"the arguments are {', '.join(paths)}")
        return found

    @property
    def whole(self) -> nn.Module:
        """The user's model while it lives, then its skeleton."""
        return (self.left() if self.left else None) or self.model

    def release(self) -> None:
        """Keep a skeleton on meta instead of the model: who gave it and dropped it has its memory back. (Where something of the user's
        still refers to the model, a loss that reads its head say, it lives, and that one is captured.)"""
        model = self.model
        tensors = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values(), *_plain(m)) if t is not None]
        memo: dict[int, Any] = {id(t): t for m in model.modules() for t in _plain(m)}
        for t in tensors:
            if id(t) not in memo:
                memo[id(t)] = nn.Parameter(t.detach().to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.detach().to("meta")
        try:
            self.left, self.model = weakref.ref(model), copy.deepcopy(model, memo)
        except Exception as error:
            self.left = None
            log.info("the model can't be copied without its weights (%s); they stay in memory", error)

    def count(self, graph: Graph, later: bool) -> int | None:
        """The microbatches to plan for. A later batch (an epoch's last, say) that they don't divide is cut finer, so that no microbatch
        is larger than it would be; that the example isn't divided is a mistake. Raises BatchError."""
        wanted, sizes = self.microbatches, {v.tensor.shape[v.batch_dim] for v in graph.sources("input") if v.batch_dim is not None}
        rows = math.gcd(*sizes)
        if wanted is None or rows % wanted == 0:
            return wanted
        shown = ", ".join(map(str, sorted(sizes)))
        counts = [n for n in range(1, rows + 1) if rows % n == 0]
        if not later:
            raise BatchError(
                f"a batch of {shown} doesn't divide into {wanted} microbatches",
                hint=f"give one of {', '.join(map(str, counts[:12]))}, or none: the planner chooses then",
            )
        finer = next((n for n in counts if n >= wanted), rows)
        log.warning("a batch of %s doesn't divide into %d microbatches: it runs in %d", shown, wanted, finer)
        return finer

    def planned(self, captured: Captured, like: Program | None) -> Plan:
        count = self.count(captured.graph, later=like is not None) if like is not None or self.plan is None else None
        if like is not None:
            return _told(search(captured.graph, self.cluster, like.plan.mesh, count, {**self.pins, **_same_storage(like)}), count)
        if self.plan is None:
            return _told(search(captured.graph, self.cluster, self.degrees, count, self.pins), count)
        plan = self.plan if isinstance(self.plan, Plan) else Plan.load(self.plan)
        plan.check(captured.graph)
        if self.microbatches not in (None, plan.microbatches):
            raise BatchError(
                f"the plan has {plan.microbatches} microbatches, but {self.microbatches} are asked for", hint="give one of the two"
            )
        if self.degrees is not None and Mesh.of(dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True))) != self.degrees:
            raise MeshError(f"the plan is for the mesh {plan.mesh}, but {self.degrees} was given", hint="give the plan's mesh, or no plan")
        return plan


def _told(plan: Plan, count: int | None) -> Plan:
    """The plan. A count of microbatches that was asked for and couldn't be is told, with the op that forbids it."""
    if count is not None and plan.microbatches != count:
        log.warning("microbatches=%d isn't followed: %s", count, "; ".join(plan.notes))
    return plan


def _plain(module: nn.Module) -> list[Tensor]:
    """Tensors that are attributes without being parameters or buffers: constants of the graph."""
    return [value for value in vars(module).values() if isinstance(value, Tensor)]


def _same_graph(mine: str, first: str) -> None:
    """What all ranks run follows from the graph, so they must have the same."""
    if mine != first:
        raise CaptureError(
            f"this rank captures the model as graph {mine}, rank 0 as {first}",
            hint="give every rank the same model and arguments; look for what its code makes of the rank, the environment or chance",
        )


def _same_storage(program: Program) -> dict[str, Any]:
    """Pins that keep every parameter where a program has it, and merge what lies in one buffer there."""
    plan, paths = program.plan, {v.name: v.path for v in program.graph.sources("param")}
    storage = {paths[name]: str(layout[1]) for name, layout in plan.storage.items() if name in paths}
    zero = any(layout[0].kind == "S" for layout in plan.storage.values())
    merged = [list(group) for group in weights(plan.merge, program.graph)]
    return {"storage": storage, "zero": zero, "merge": merged, **({"cuts": plan.cuts} if plan.stages > 1 else {})}


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """eval() for a while; each submodule gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# ---- where to run ---------------------------------------------------------------------------------------------------


def choose_device(mesh: Where, device: torch.device | str | None) -> torch.device:
    """This process's device: as given, else the mesh's kind, else a GPU where there is one (unless the ranks talk through gloo). Raises
    MeshError where there is no such device."""
    if device is None and isinstance(mesh, DeviceMesh):
        device = mesh.device_type
    if device is None:
        gloo = dist.is_initialized() and dist.get_backend() == "gloo"
        device = "cuda" if torch.cuda.is_available() and not gloo else "cpu"
    found = torch.device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds none"
        hint = "give the device cpu, or none; autoshard doctor says more"
        raise MeshError(f"the device is {found}, but there is no GPU: {built}", hint=hint)
    if found.type == "cuda":
        if found.index is None:
            rank = dist.get_rank() if dist.is_initialized() else 0
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        torch.cuda.set_device(found)
    return found


def _ranks(mesh: Where, comm: Comm) -> tuple[Cluster | None, Mesh | None]:
    """(what to plan for, degrees if they are pinned). Raises MeshError unless it has as many ranks as run."""
    cluster, degrees = _cluster_or_degrees(mesh)
    count = degrees.ranks if degrees else cluster.ranks if cluster else 0
    if count != comm.size:
        raise MeshError(
            f"{degrees or cluster} has {count} ranks, but {comm.size} are running",
            hint=f"start {count} processes (torchrun --nproc-per-node), or give a mesh of {comm.size}",
        )
    return cluster or this_machine(comm), degrees


def _cluster_or_degrees(mesh: Where) -> tuple[Cluster | None, Mesh | None]:
    if isinstance(mesh, Cluster):
        return mesh, None
    if isinstance(mesh, DeviceMesh):
        return None, _degrees(mesh)
    if isinstance(mesh, str) and "=" in mesh:
        mesh = Mesh.parse(mesh)
    if isinstance(mesh, Mesh):
        mesh = dict(zip(mesh.names, mesh.sizes, strict=True))
    if isinstance(mesh, Mapping):
        return None, Mesh.of(mesh)
    if isinstance(mesh, (str, Path, os.PathLike)):
        return Cluster.load(mesh), None
    raise MeshError(f"a mesh is given as {type(mesh).__name__}", hint='expected a DeviceMesh, a Cluster, a path, {"dp": 2} or "dp=2 tp=2"')


def _degrees(mesh: DeviceMesh) -> Mesh:
    """A DeviceMesh's axes. Its ranks must lie as ours do: row-major, pp outermost, tp innermost."""
    names = mesh.mesh_dim_names
    if not names:
        raise MeshError("the DeviceMesh has no names for its axes", hint='init_device_mesh(…, mesh_dim_names=("dp", "tp"))')
    found = Mesh.of(dict(zip(names, mesh.mesh.shape, strict=True)))
    if [n for n in AXES if n in names] != list(names) or mesh.mesh.flatten().tolist() != list(range(found.ranks)):
        raise MeshError(
            f"the DeviceMesh has axes {', '.join(names)} over ranks {mesh.mesh.flatten().tolist()[:8]}",
            hint=f"name the axes in the order {', '.join(AXES)}, over all ranks from 0 on",
        )
    return found


def this_machine(comm: Comm) -> Cluster:
    """What the catalogue has of this machine's GPU, else its CPUs."""
    if comm.device.type == "cuda":
        name = torch.cuda.get_device_name(comm.device).lower()
        for known in sorted(catalogue(), key=len, reverse=True):
            if known.partition("-")[0].partition("_")[0] in name:
                return Cluster.load(f"{known}x{comm.size}")
        raise MeshError(f"the catalogue has no {name}", hint="describe it in a YAML file and give that as mesh=")
    return Cluster.local(comm.size)
