"""What a program and its weights can do, whoever plays it: steps, whole gradients and state dicts, clipping, optimizers.

In: a Program and the whole model's weights. `Trainable` keeps the `State` of the ranks that live in this process: one in
`module.Sharded` (a process per rank), all in `in_process.InProcess`; these say how graphs run and how ranks talk.
"""

from __future__ import annotations

import fnmatch
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..errors import BatchError, CaptureError, StateError
from ..lower.program import Program, RankProgram, Slot
from ..trace.captured import unknown
from .deferred import is_deferred, materialise, promised
from .executor import Executor, State, Step
from .fused import Gradients
from .inputs import StepInputs, draw_masks, torch_dtype
from .lane import Lane
from .limits import Limits
from .optimizer import ShardedOptimizer
from .requests import Request

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..trace.captured import Captured
    from .checkpoint import Restored
    from .checkpoint.background import Background

Weights = Mapping[str, Tensor]
Outputs = Sequence[str] | str | bool
"""Names, one name, or True for all."""


@dataclass
class Loaded:
    """A program ready to run: one executor for each rank that lives here."""

    program: Program
    captured: Captured | None
    executors: list[Executor]

    def __post_init__(self) -> None:
        self.limits = None if self.captured is None else Limits(self.captured)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The global batch by value name, checked. Raises BatchError."""
        batch = self.flatten(args, kwargs)
        if self.limits is not None:
            self.limits.check(batch)
        return batch

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The global batch by value name. Raises BatchError."""
        if self.captured is not None:
            return self.captured.flatten(args, kwargs)
        given = {f"args.{i}": a for i, a in enumerate(args)} | {f"kwargs.{k}": v for k, v in kwargs.items()}
        inputs = {v.path or f"kwargs.{v.name}": v.name for v in self.program.graph.sources("input")}
        if set(given) != set(inputs):
            raise BatchError(f"the arguments are {sorted(given)}, expected {sorted(inputs)}")
        return {inputs[path]: tensor for path, tensor in given.items()}


@dataclass(frozen=True)
class Wanted:
    """What a step hands out besides its loss: `outputs` of the model or `activations` inside it (the names of Captured's methods).
    `loss` stands in for the model's own where given."""

    kind: str = "outputs"
    names: Outputs = ()
    loss: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            object.__setattr__(self, "names", (self.names,))

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.kind, self.names if isinstance(self.names, bool) else tuple(self.names), self.loss)

    def kept_by(self, captured: Captured) -> Captured:
        """With a graph that hands them out. Raises BatchError."""
        found: dict[str, str] = getattr(captured, self.kind)(self.names) if self else {}
        return captured.keeping(found)

    def check(self, loaded: Loaded) -> Loaded:
        """A program as it stands has to hand them out. Raises BatchError."""
        known = list(loaded.program.kept)
        for name in () if isinstance(self.names, bool) else self.names:
            if name not in known:
                raise unknown("output that this program keeps", name, known)
        return loaded


class Trainable(ABC):
    """A program with its weights. The subclass says how graphs run and how ranks talk."""

    def __init__(
        self,
        program: Program,
        weights: nn.Module | Weights,
        captured: Captured | None = None,
        *,
        ranks: Iterable[int],
        device: torch.device,
        evaluation: Program | None = None,
    ) -> None:
        self.program, self.captured, self.device = program, captured or program.captured, device
        self.seed, self.steps_taken = 0, 0
        self.optimizers: list[ShardedOptimizer] = []
        self.grads = Gradients()
        self.saving: Background | None = None
        self.holders = {kind: _holders(program, kind) for kind in ("params", "buffers")}
        values, whole = program.graph.sources("param", "buffer"), _whole_weights(weights)
        self.owner = {v.path: v.path for v in values} | program.graph.tied
        """Every name of a parameter or buffer in the graph → the name that it is stored under."""
        persistent = set(weights.state_dict()) if isinstance(weights, nn.Module) else set(whole) | set(self.owner)
        self.names = [name for name in (*whole, *self.owner) if name in persistent]
        self.names = list(dict.fromkeys(self.names))
        self.unused: dict[str, Tensor] = {}
        """What the model holds and the graph never reads."""
        self.states = self._take([program.ranks[r] for r in ranks], weights, whole)
        self.training = self._load(program, captured)
        self.evaluation = None if evaluation is None else self._load(evaluation, captured)
        for folder in promised(weights):
            from .huggingface import load_pretrained

            load_pretrained(folder, self)

    def _take(self, ranks: Sequence[RankProgram], weights: nn.Module | Weights, whole: Weights) -> list[State]:
        """The ranks' shards, tensor by tensor: of a deferred model, no more than one whole tensor exists at a time. (Those that a folder
        was promised for are empty still.)"""
        wanted: dict[str, list[tuple[dict[str, Tensor], Slot]]] = {}
        found: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        for rank in ranks:
            found.append(({}, {}))
            for shards, slots in zip(found[-1], (rank.params, rank.buffers), strict=True):
                for path, slot in slots.items():
                    if path not in whole:
                        raise StateError(f"no weights for {path}", hint="give the model, or all of its tensors by name")
                    _check_fits(whole[path], slot)
                    wanted.setdefault(path, []).append((shards, slot))
        for name, tensor in materialise(weights) if isinstance(weights, nn.Module) and is_deferred(weights) else whole.items():
            for shards, slot in wanted.get(name, ()):
                shards[name] = _shard(tensor.detach(), slot, self.device)
            if name not in self.owner:
                self.unused[name] = tensor.detach().clone()
            del tensor  # before the next is made
        for name, tensor in whole.items():
            for shards, slot in wanted.get(name, ()):
                if name not in shards:
                    shards[name] = torch.empty(slot.local, dtype=tensor.dtype, device=self.device)
            if name not in self.owner and name not in self.unused:
                self.unused[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        states = []
        for rank, (params, buffers) in zip(ranks, found, strict=True):
            made = {path: nn.Parameter(params[path], requires_grad=slot.trainable) for path, slot in rank.params.items()}
            states.append(State(rank.rank, made, {path: buffers[path] for path in rank.buffers}))
        return states

    def _load(self, program: Program, captured: Captured | None) -> Loaded:
        """Make a program ready to run on these weights. Raises StateError if it stores them otherwise."""
        for mine, theirs in zip(self.program.ranks, program.ranks, strict=True):
            odd = [p for p in (*mine.params, *theirs.params) if not _same_place(mine.params.get(p), theirs.params.get(p))]
            if odd:
                raise StateError(
                    f"rank {mine.rank} stores {odd[0]} in another layout than the new program does",
                    hint="plan it with the same mesh, cuts and storage (pins=)",
                )
        for state in self.states:
            for paths in program.ranks[state.rank].joined.values():
                state.join(paths)
        constants = {name: t.to(self.device) for name, t in program.constants.items()}
        executors = [Executor(program, program.ranks[s.rank], self.device, self._run, constants, self._lane()) for s in self.states]
        return Loaded(program, captured or program.captured, executors)

    # ---- what a player provides -------------------------------------------------------------------------------------

    def _lane(self) -> Lane:
        """Where calls run beside the loop."""
        return Lane()

    @abstractmethod
    def _run(self, graph: fx.GraphModule, args: Sequence[Tensor]) -> Generator[Request, Any, tuple[Any, ...]]:
        """Run one graph."""

    @abstractmethod
    def _play(self, steps: list[Step]) -> list[Tensor]:
        """Run the steps of the ranks that live here; their losses."""

    @abstractmethod
    def _reduce(self, tensor: Tensor, op: str) -> Tensor:
        """Combine ("sum", "max") what each process has reduced over its own ranks."""

    @abstractmethod
    def _fetch(self, rank: int, shard: Tensor | None, slot: Slot) -> Tensor:
        """A rank's shard, in every process (given where the rank lives)."""

    # ---- steps ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise BatchError(
            "a sharded model isn't called",
            hint="train_step(…) gives the loss and leaves gradients; eval_step(…, outputs=True) gives outputs",
        )

    @property
    def plan(self) -> Plan:
        return self.program.plan

    def manual_seed(self, seed: int) -> None:
        """Start the stream of dropout seeds anew: the next step uses `seed`, the one after `seed + 1`."""
        self.seed, self.steps_taken = seed, 0

    def train_step(self, *args: Any, outputs: Outputs = (), **kwargs: Any) -> Any:
        """Forward and backward of a global batch. The loss, the same on all ranks; gradients are added to `.grad` of the shards.

        `outputs`: names of the model's further outputs (True: all); then (loss, {name: whole tensor}), as of the global batch.
        """
        loaded = self._for_training(args, kwargs, Wanted("outputs", outputs))
        batch = loaded.read(args, kwargs)
        masks = draw_masks(loaded.program.ranks, loaded.captured.draws if loaded.captured else ())
        inputs = StepInputs(batch, self.seed + self.steps_taken, masks)
        self.steps_taken += 1
        for optimizer in self.optimizers:
            optimizer.norm = None  # of gradients that are about to change
        return self._results([Step(x, s, inputs) for x, s in zip(loaded.executors, self.states, strict=True)], bool(outputs))

    def eval_step(self, *args: Any, outputs: Outputs = (), **kwargs: Any) -> Any:
        """The loss of a global batch in eval mode, without gradients and without buffer updates; with `outputs` as `train_step`."""
        return self._evaluate(args, kwargs, Wanted("outputs", outputs))

    def activations(self, names: str | Sequence[str], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Whole tensors inside the model on a global batch, in eval mode (a collective call). `names`: paths of modules, whose output
        is taken (the last value that they hand on), or names of the graph's values; patterns too ("layers.*.mlp")."""
        wanted = Wanted("activations", (names,) if isinstance(names, str) else tuple(names))
        return dict(self._evaluate(args, kwargs, wanted)[1])

    def _evaluate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Wanted) -> Any:
        loaded = self._for_evaluation(args, kwargs, wanted)
        inputs = StepInputs(loaded.read(args, kwargs))
        steps = [Step(x, s, inputs, train=False) for x, s in zip(loaded.executors, self.states, strict=True)]
        return self._results(steps, bool(wanted))

    def _for_training(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Wanted) -> Loaded:
        return wanted.check(self.training)

    def _for_evaluation(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Wanted) -> Loaded:
        if self.evaluation is None:
            self._check_evaluable()
        return wanted.check(self.evaluation or self.training)

    def _results(self, steps: list[Step], outputs: bool) -> Any:
        with torch.no_grad():
            loss = self._play(steps)[0]
        return (loss, dict(steps[0].kept)) if outputs else loss

    def _check_evaluable(self) -> None:
        """The training graph serves evaluation unless it says something that eval mode doesn't."""
        seeded = any(r.kind == "seed" for rank in self.program.ranks for r in rank.rank_inputs.values())
        if seeded or self.program.graph.updates:
            what = "dropout" if seeded else f"updates of {next(iter(self.program.graph.updates))}"
            raise CaptureError(
                f"the model was captured in training mode and holds {what}, so it can't be evaluated by the same program",
                hint="capture and lower the model a second time in eval mode, with the same plan, and pass the program as evaluation=",
            )

    # ---- whole tensors ----------------------------------------------------------------------------------------------

    def gradients(self, names: str | Sequence[str] = "*") -> dict[str, Tensor]:
        """Whole gradients by the model's names (a collective call), of those that match a pattern. Parameters that no rank has a
        gradient for are left out."""
        patterns = (names,) if isinstance(names, str) else tuple(names)
        paths = [v.path for v in self.program.graph.sources("param") if v.path in self.holders["params"]]
        for pattern in patterns:
            if pattern != "*" and not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                raise unknown("parameter", pattern, paths)
        paths = [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]
        has = torch.zeros(len(paths), dtype=torch.int32, device=self.device)
        for state in self.states:
            for i, path in enumerate(paths):
                if path in state.params and state.params[path].grad is not None:
                    has[i] = 1
        present = self._reduce(has, "max").tolist()

        def shard(state: State, path: str) -> Tensor:
            param = state.params[path]
            return torch.zeros_like(param) if param.grad is None else param.grad

        return {path: self._assemble("params", path, shard) for path, there in zip(paths, present, strict=True) if there}

    def state_dict(self) -> dict[str, Tensor]:
        """Whole parameters and buffers under the model's own names, tied ones under each (a collective call)."""
        whole: dict[str, Tensor] = {}
        for path in self.holders["params"]:
            whole[path] = self._assemble("params", path, lambda state, path: state.params[path].detach())
        for path in self.holders["buffers"]:
            whole[path] = self._assemble("buffers", path, lambda state, path: state.buffers[path])
        whole |= {name: whole[owner] for name, owner in self.owner.items() if owner in whole}
        return {name: whole[name] if name in whole else self.unused[name] for name in self.names if name in whole or name in self.unused}

    def load_state_dict(self, state: Weights) -> None:
        """Take whole tensors under the model's own names (one of several tied names is enough). Raises StateError."""
        given = {self.owner.get(name, name): t for name, t in state.items()}
        unknown = [name for name in given if name not in self.owner and name not in self.unused]
        missing = [name for name in self.names if self.owner.get(name, name) not in given]
        if unknown or missing:
            raise StateError(f"the state dict doesn't fit: missing {missing[:5]}, unexpected {unknown[:5]}")
        for mine in self.states:
            rank = self.program.ranks[mine.rank]
            for slots, shards in ((rank.params, mine.params), (rank.buffers, mine.buffers)):
                for path in slots.keys() & given.keys():
                    _load(slots[path], shards[path], given[path])
        for name in self.unused.keys() & given.keys():
            self.unused[name].copy_(given[name])
        for optimizer in self.optimizers:
            optimizer.reload_masters()

    def _assemble(self, kind: str, path: str, shard: Callable[[State, str], Tensor]) -> Tensor:
        local = {state.rank: state for state in self.states}
        whole: Tensor | None = None
        for rank in self.holders[kind][path]:
            slot: Slot = getattr(self.program.ranks[rank], kind)[path]
            part = self._fetch(rank, shard(local[rank], path) if rank in local else None, slot)
            if whole is None:
                whole = torch.empty(slot.tensor.shape, dtype=part.dtype, device=part.device)
            _put(whole, part, slot)
        assert whole is not None
        return whole

    def save(self, folder: str | os.PathLike[str], **options: Any) -> Path:
        """Write a checkpoint into a folder of them (see `checkpoint.save`: step=, scheduler=, data=, extra=, keep=, wait=; a collective
        call). With wait=False a thread writes it while training goes on, and `saved` waits for it."""
        from . import checkpoint

        return checkpoint.save(folder, self, **options)

    def saved(self) -> Path | None:
        """Wait for what `save(…, wait=False)` began: its path, None where there is nothing to wait for. Raises CheckpointError if it
        failed, on every rank. (The next `save` and `load` do so too.)"""
        from . import checkpoint

        return checkpoint.finish(self)

    def load(self, folder: str | os.PathLike[str], **options: Any) -> Restored:
        """Go on from the newest whole checkpoint (see `checkpoint.load`: scheduler=, step=; a collective call)."""
        from . import checkpoint

        return checkpoint.load(folder, self, **options)

    # ---- parameters -------------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The local shards (in one process: those of all ranks, with the rank before the name)."""
        for state in self.states:
            for path, param in state.params.items():
                yield (path if len(self.states) == 1 else f"{state.rank}:{path}"), param

    def parameters(self) -> Iterator[nn.Parameter]:
        return (param for _, param in self.named_parameters())

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self.parameters():
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()

    def optimizer(
        self,
        cls: type[torch.optim.Optimizer],
        groups: Sequence[tuple[str, dict[str, Any]]] = (),
        *,
        masters: bool = True,
        **options: Any,
    ) -> ShardedOptimizer:
        """An optimizer on the shards. `groups`: (name pattern, options), the first that matches a parameter's name decides. `masters`:
        step bfloat16 and float16 parameters in float32. Its `step` is a collective call: where a gradient isn't finite on some rank,
        parameters and states stay as they are on all of them, and it says so."""
        named = [(name, param) for name, param in self.named_parameters() if param.requires_grad]
        names = [p for p, o in self.owner.items() if p == o]
        made = ShardedOptimizer(cls, named, groups, names, masters, self._reduce, self.device, **options)
        made.tells = any(state.rank == 0 for state in self.states)
        self.optimizers.append(made)
        return made

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_ on the whole model (a collective call). The total norm before clipping. Where that isn't
        finite, the next step of every optimizer is left out on all ranks (it has no need to look at the gradients again)."""
        norm_type = float(norm_type)
        if norm_type <= 0:
            raise ValueError(f"norm_type is {norm_type}; expected a positive number, or inf")
        highest = norm_type == float("inf")
        holders = self.holders["params"]
        given = [(s.rank in holders[path], p.grad) for s in self.states for path, p in s.params.items() if p.grad is not None]
        launches = self.grads.launches(given) if norm_type == 2.0 else None
        total = self._powers(given, norm_type) if launches is None else self.grads.squares(launches)
        if any(v.tensor.dtype == "float64" for v in self.program.graph.sources("param")):
            total = total.double()
        if highest:  # a maximum over ranks may drop a NaN
            total = torch.nan_to_num(total, nan=float("inf"), posinf=float("inf"))
        total = self._reduce(total, "max" if highest else "sum")
        total = total if highest else total ** (1.0 / norm_type)
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        if launches is not None:
            self.grads.scale_(launches, scale)
        elif given:
            torch.ops.aten._foreach_mul_.Tensor([grad for _, grad in given], scale)
        for optimizer in self.optimizers:
            optimizer.norm = total
        return total

    def _powers(self, given: Sequence[tuple[bool, Tensor]], norm_type: float) -> Tensor:
        """The sum of the elements' powers, or the largest element, of gradients (and whether each counts)."""
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for counts, grad in given:
            if not grad.numel():
                continue
            norm = torch.linalg.vector_norm(grad, norm_type, dtype=None if grad.dtype == torch.float64 else torch.float32)
            if not counts:
                norm = norm * 0.0  # a replica counts once, but has to be finite everywhere
            total = torch.maximum(total, norm) if norm_type == float("inf") else total + norm**norm_type
        return total


def _holders(program: Program, kind: str) -> dict[str, list[int]]:
    """Path → the ranks whose shards together are the whole, one of each set of replicas (tied and replicated ranks count once)."""
    found: dict[str, dict[tuple[Any, ...], int]] = {}
    for rank in program.ranks:
        slots: dict[str, Slot] = getattr(rank, kind)
        for path, slot in slots.items():
            cut = tuple(c for t, c in zip(slot.layout, slot.coords, strict=True) if t.kind == "S")
            found.setdefault(path, {}).setdefault(cut, rank.rank)
    return {path: list(parts.values()) for path, parts in found.items()}


def _check_fits(whole: Tensor, slot: Slot) -> None:
    if tuple(whole.shape) != slot.tensor.shape or whole.dtype != torch_dtype(slot.tensor.dtype):
        raise StateError(f"{slot.path} is {whole.dtype} {tuple(whole.shape)}, but the program stores {slot.tensor}")


def _shard(whole: Tensor, slot: Slot, device: torch.device) -> Tensor:
    """What `slot.take` takes, as a tensor of its own, made in one copy."""
    cut = slot.take(whole)
    own = cut.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    if own and cut.device == device and cut.is_contiguous():
        return cut
    return torch.empty(cut.shape, dtype=cut.dtype, device=device).copy_(cut)


def _same_place(a: Slot | None, b: Slot | None) -> bool:
    return a is not None and b is not None and (a.layout, a.sizes, a.coords) == (b.layout, b.sizes, b.coords)


def _whole_weights(weights: nn.Module | Weights) -> dict[str, Tensor]:
    """Whole tensors by every name, buffers that aren't saved included."""
    if not isinstance(weights, nn.Module):
        return dict(weights)
    named = (*weights.named_parameters(remove_duplicate=False), *weights.named_buffers(remove_duplicate=False))
    return {**{k: v for k, v in weights.state_dict().items() if isinstance(v, Tensor)}, **dict(named)}


def _load(slot: Slot, shard: Tensor, whole: Tensor) -> None:
    if tuple(whole.shape) != slot.tensor.shape:
        raise StateError(f"{slot.path} has the shape {tuple(whole.shape)}, expected {slot.tensor.shape}")
    with torch.no_grad():
        shard.copy_(slot.take(whole.detach()))


def _put(whole: Tensor, part: Tensor, slot: Slot) -> None:
    """Write a shard into the whole."""
    index = [
        torch.arange(n, device=whole.device) if held is None else torch.from_numpy(held).to(whole.device)
        for n, held in zip(slot.tensor.shape, slot.positions(), strict=True)
    ]
    if not index or all(held is None for held in slot.positions()):
        whole.copy_(part)
    else:
        whole[torch.meshgrid(*index, indexing="ij")] = part
