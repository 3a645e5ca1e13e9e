"""The logical tensors of a run: weights, buffers, optimizers' state, masters, under the model's own names; collected and put back.

In: a Trainable. Out (`Part`s): what each rank of this process writes, each with the part of the whole that it is. And the way back:
`check` says what doesn't fit before anything is touched, `restore` fills this process's shards, under whatever plan it runs.

Kinds (a key is KIND/NAME): `weights`; `transient` (buffers that aren't part of the state dict); `optimizer.N.WHAT` (exp_avg, step, …);
`master.N` (float32 values of low precision parameters); `rng`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...lower.program import Slot
from ..executor import State
from ..inputs import torch_dtype
from ..optimizer import HOW, ShardedOptimizer
from ..trainable import Trainable
from . import plain
from .blocks import NAMES
from .pieces import Logical, Runs, runs_of
from .reader import Checkpoint

log = logging.getLogger("autoshard")
_STATE = re.compile(r"optimizer\.([0-9]{1,3})\.([^/]+)/(.+)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """What a rank writes of a tensor. Without elements it only says that the tensor exists."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    runs: tuple[Runs, ...]
    local: tuple[int, ...]
    make: Callable[[], Tensor]


# ---- collecting -----------------------------------------------------------------------------------------------------


@dataclass
class Places:
    """Where a Trainable's tensors are stored, looked up once."""

    run: Trainable
    persistent: set[str] = field(default_factory=set)
    known: dict[tuple[int, str, str], tuple[Runs, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.persistent = {self.run.owner.get(name, name) for name in self.run.names}

    def slot(self, kind: str, rank: int, path: str) -> Slot:
        return getattr(self.run.program.ranks[rank], kind)[path]  # type: ignore[no-any-return]

    def runs(self, kind: str, rank: int, path: str) -> tuple[Runs, ...]:
        key = (rank, kind, path)
        if key not in self.known:
            self.known[key] = tuple(runs_of(held) for held in self.slot(kind, rank, path).positions())
        return self.known[key]

    def key(self, path: str) -> str:
        return f"{'weights' if path in self.persistent else 'transient'}/{path}"

    def writer(self, path: str) -> int:
        """The rank that writes what is one for the whole parameter: the first that holds some of it."""
        holders = self.run.holders["params"][path]
        return next((r for r in holders if () not in self.runs("params", r, path)), holders[0])


def parts(places: Places, state: State, first: bool) -> Iterator[Part]:
    """What this rank writes; the first rank writes also what isn't in shards."""
    run = places.run
    for kind, shards in (("params", state.params), ("buffers", state.buffers)):
        for path, shard in shards.items():
            if state.rank in run.holders[kind][path]:
                yield _part(places, kind, state.rank, path, places.key(path), shard)
    for i, optimizer in enumerate(run.optimizers):
        yield from _optimizer_parts(places, state, optimizer, i)
    if first:
        for path, tensor in run.unused.items():
            yield _whole(places.key(path), tensor)
        for kind, now, _ in _generators(run):
            yield _whole(f"rng/{kind}", now())


def _part(places: Places, kind: str, rank: int, path: str, key: str, shard: Tensor) -> Part:
    shape = places.slot(kind, rank, path).tensor.shape
    return Part(key, shard.dtype, tuple(shape), places.runs(kind, rank, path), tuple(shard.shape), lambda: shard)


def _whole(key: str, tensor: Tensor) -> Part:
    shape = tuple(tensor.shape)
    return Part(key, tensor.dtype, shape, (None,) * len(shape), shape, lambda: tensor)


def stepped(optimizer: ShardedOptimizer, state: State) -> dict[str, tuple[str, nn.Parameter]]:
    """Path → (the optimizer's name for this rank's shard, what it steps: the shard or its master)."""
    names = {id(param): name for name, param in optimizer.named}
    found = {path: names[id(param)] for path, param in state.params.items() if id(param) in names}
    return {path: (name, optimizer.masters.get(name, state.params[path])) for path, name in found.items()}  # type: ignore[arg-type]


def _optimizer_parts(places: Places, state: State, optimizer: ShardedOptimizer, i: int) -> Iterator[Part]:
    for path, (name, param) in stepped(optimizer, state).items():
        if state.rank not in places.run.holders["params"][path]:
            continue
        if name in optimizer.masters:
            yield _part(places, "params", state.rank, path, f"master.{i}/{path}", param)
        for what, value in optimizer.inner.state.get(param, {}).items():
            key = f"optimizer.{i}.{what}/{path}"
            if not isinstance(value, Tensor):
                continue
            if value.shape == param.shape:
                yield _part(places, "params", state.rank, path, key, value)
            elif value.dim() == 0:
                if state.rank == places.writer(path):
                    yield _whole(key, value)
            else:
                raise CheckpointError(
                    f"{type(optimizer.inner).__name__} keeps {what} {list(value.shape)} for {path} {list(param.shape)}",
                    hint="state can be stored that is like its parameter, or one number",
                )


def values(places: Places, state: State) -> dict[str, Any]:
    """What optimizers keep for parameters that isn't a tensor: key → encoded value."""
    found = {}
    for i, optimizer in enumerate(places.run.optimizers):
        for path, (_, param) in stepped(optimizer, state).items():
            if state.rank == places.writer(path):
                for what, value in optimizer.inner.state.get(param, {}).items():
                    if not isinstance(value, Tensor):
                        key = f"optimizer.{i}.{what}/{path}"
                        found[key] = plain.encode(value, key)
    return found


def facts(run: Trainable) -> dict[str, Any]:
    """What is the same on every rank: seeds, and the optimizers' classes and groups."""
    optimizers = [
        {
            "class": type(o.inner).__name__,
            "groups": [plain.encode({k: v for k, v in g.items() if k != "params"}, f"optimizer {i}") for g in o.param_groups],
        }
        for i, o in enumerate(run.optimizers)
    ]
    return {"seed": plain.encode(run.seed), "steps_taken": plain.encode(run.steps_taken), "optimizers": optimizers}


def tied(run: Trainable) -> dict[str, str]:
    return {name: run.owner[name] for name in run.names if run.owner.get(name, name) != name}


# ---- fitting --------------------------------------------------------------------------------------------------------


def aliases(run: Trainable) -> dict[str, list[str]]:
    """Path → every name of it, its own first."""
    found: dict[str, list[str]] = {}
    for name, owner in run.owner.items():
        found.setdefault(owner, [owner])
        if name != owner:
            found[owner].append(name)
    return found


@dataclass
class Fit:
    """Which of a source's weights each of the model's is. `names`: the model's path → the source's name."""

    names: dict[str, str]
    transient: dict[str, str]


Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def fit(
    run: Trainable,
    stored: Specs,
    tied: Mapping[str, str],
    where: str,
    *,
    transient: Specs | None = None,
    foreign: bool = False,
) -> Fit:
    """Find every weight of the model. `foreign`: another library's, so other dtypes will do, tied weights may be stored under each name,
    and what the model doesn't know is only worth a warning. Raises CheckpointError, naming the first that are missing, unexpected or of
    another shape."""
    places, others = Places(run), aliases(run)
    named: dict[str, str] = {}
    missing, wrong, apart, used = list[str](), list[str](), list[str](), set[str]()
    expected = wanted(run)
    for path in places.persistent:
        found = {tied.get(name, name): None for name in others.get(path, [path]) if tied.get(name, name) in stored}
        used.update(found)
        if not found:
            missing.append(path)
            continue
        if len(found) > 1 and not foreign:
            apart.append(f"{' and '.join(found)}, which the model ties")
        named[path] = next(iter(found))
        dtype, shape = stored[named[path]]
        if shape != expected[path][1] or (dtype != expected[path][0] and not foreign):
            wrong.append(f"{path} is {_text(dtype, shape)}, expected {_text(*expected[path])}")
    unexpected = [name for name in stored if name not in used]
    order = {path: i for i, path in enumerate(expected)}
    missing.sort(key=lambda path: order[path])
    if foreign and unexpected and not missing and not wrong:
        log.warning("%s: %d tensors that the model doesn't have, %s first", where, len(unexpected), unexpected[0])
        unexpected = []
    if missing or unexpected or wrong or apart:
        lists = (("missing", missing), ("unexpected", unexpected), ("of another kind", wrong), ("separate", apart))
        text = "; ".join(f"{what}: {', '.join(found[:3])}{' …' if len(found) > 3 else ''}" for what, found in lists if found)
        raise CheckpointError(f"it holds another model's weights: {text}", where=where)
    passing = {path: path for path in expected if path not in places.persistent and (transient or {}).get(path) == expected[path]}
    return Fit(named, passing)


def wanted(run: Trainable) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for value in run.program.graph.sources("param", "buffer"):
        found[value.path] = (torch_dtype(value.tensor.dtype), tuple(value.tensor.shape))
    for path, tensor in run.unused.items():
        found[path] = (tensor.dtype, tuple(tensor.shape))
    return found


def _text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{NAMES.get(dtype, str(dtype))} {list(shape)}"


@torch.no_grad()
def assign(places: Places, names: Mapping[str, str], read: Callable[[str, tuple[Runs, ...]], Tensor]) -> None:
    """Fill this process's shards. `read(name, needed)`: the needed part of a source's tensor."""
    run = places.run
    for state in run.states:
        for kind, shards in (("params", state.params), ("buffers", state.buffers)):
            for path, shard in shards.items():
                if path in names:
                    shard.copy_(read(names[path], places.runs(kind, state.rank, path)))
    for path, tensor in run.unused.items():
        if path in names:
            tensor.copy_(read(names[path], (None,) * tensor.dim()))


# ---- putting back ---------------------------------------------------------------------------------------------------


@dataclass
class Match:
    """What `check` has found to be put back."""

    fit: Fit
    optimizers: list[dict[str, dict[str, str]]]
    """Per optimizer: the model's path → what → key of a tensor."""
    values: list[dict[str, dict[str, Any]]]
    masters: list[dict[str, str]]


def check(run: Trainable, source: Checkpoint) -> Match:
    """Whether this run can go on from there. Raises CheckpointError; nothing has been touched then."""
    manifest, where = source.manifest, str(source.path)
    for key in ("seed", "steps_taken"):
        _number(manifest.state, key, source)
    for kind, now, _ in _generators(run):
        generator = manifest.tensors.get(f"rng/{kind}")
        if generator is not None and (generator.dtype, generator.shape) != (torch.uint8, tuple(now().shape)):
            raise CheckpointError(f"rng/{kind} is no state of this torch's generator", where=where)
    weights, transient = ({n: (t.dtype, t.shape) for n, t in manifest.names(kind).items()} for kind in ("weights", "transient"))
    found = fit(run, weights, manifest.tied, where, transient=transient)
    saved = manifest.state.get("optimizers")
    if not isinstance(saved, list) or not all(isinstance(o, dict) and isinstance(o.get("groups"), list) for o in saved):
        raise CheckpointError("its manifest doesn't list optimizers", where=where)
    if saved and run.optimizers and len(saved) != len(run.optimizers):
        raise CheckpointError(f"it holds {len(saved)} optimizers, the run has {len(run.optimizers)}", where=where)
    if bool(saved) != bool(run.optimizers):
        why = "its optimizers aren't used: the run has none" if saved else "it holds no optimizers: they start anew"
        log.warning("%s: %s", where, why)
    for i, (old, optimizer) in enumerate(zip(saved, run.optimizers, strict=False)):
        _check_groups(old, optimizer, i, where)
    if not run.optimizers:
        return Match(found, [], [], [])
    shapes = {path: shape for path, (_, shape) in wanted(run).items()}
    single = manifest.state.get("values")
    if not isinstance(single, dict):
        raise CheckpointError("its manifest holds no values", where=where)
    tensors, values = _by_path(run, manifest.tensors, found), _by_path(run, single, found)
    for per_path in tensors:
        for path, state in per_path.items():
            for key in state.values():
                if manifest.tensors[key].shape not in ((), shapes[path]):
                    raise CheckpointError(f"{key} is {list(manifest.tensors[key].shape)}, {path} {list(shapes[path])}", where=where)
    masters = []
    for i in range(len(run.optimizers)):
        stored = manifest.names(f"master.{i}")
        masters.append({path: f"master.{i}/{name}" for path, name in found.names.items() if name in stored})
        for path, key in masters[-1].items():
            if manifest.tensors[key].shape != shapes[path] or not manifest.tensors[key].dtype.is_floating_point:
                raise CheckpointError(f"{key} is {list(manifest.tensors[key].shape)}, {path} {list(shapes[path])}", where=where)
    return Match(found, tensors, values, masters)


def _check_groups(old: Mapping[str, Any], optimizer: ShardedOptimizer, i: int, where: str) -> None:
    cls, groups = type(optimizer.inner).__name__, old["groups"]
    if old.get("class") != cls:
        raise CheckpointError(f"optimizer {i} is {str(old.get('class'))[:100]} there, {cls} here", where=where)
    if len(groups) != len(optimizer.param_groups) or not all(isinstance(g, dict) for g in groups):
        raise CheckpointError(f"optimizer {i} has {len(groups)} groups there, {len(optimizer.param_groups)} here", where=where)
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in plain.decode(saved).items():
            if key == "params" or not _kin(group.get(key), value):
                raise CheckpointError(
                    f"optimizer {i} has {key} = {str(value)[:50]!r} there, {str(group.get(key))[:50]!r} here", where=where
                )


def _kin(a: Any, b: Any) -> bool:
    """Whether one may stand for the other: numbers for numbers."""
    numbers = (int, float, Tensor)
    return a is None or b is None or (isinstance(a, numbers) and isinstance(b, numbers)) or type(a) is type(b)


def _by_path(run: Trainable, keyed: Mapping[str, Any], found: Fit) -> list[dict[str, dict[str, Any]]]:
    """Per optimizer, the model's path → what → its key (of a tensor) or value."""
    ours = {name: path for path, name in found.names.items()}
    made: list[dict[str, dict[str, Any]]] = [{} for _ in run.optimizers]
    for key, value in keyed.items():
        match = _STATE.fullmatch(key)
        if match and int(match[1]) < len(made) and match[3] in ours:
            made[int(match[1])].setdefault(ours[match[3]], {})[match[2]] = key if isinstance(value, Logical) else plain.decode(value)
    return made


@torch.no_grad()
def restore(places: Places, source: Checkpoint, match: Match) -> None:
    """Put everything of this process's ranks back. Raises CheckpointError."""
    run = places.run
    assign(places, match.fit.names, lambda name, needed: source.part(f"weights/{name}", needed))
    assign(places, match.fit.transient, lambda name, needed: source.part(f"transient/{name}", needed))
    facts = source.manifest.state
    for i, optimizer in enumerate(run.optimizers):
        if not facts["optimizers"]:
            optimizer.reload_masters()
            continue
        for state in run.states:
            _restore_optimizer(places, source, match, optimizer, i, state)
        for group, old in zip(optimizer.param_groups, facts["optimizers"][i]["groups"], strict=True):
            _restore_group(group, plain.decode(old))
    run.seed, run.steps_taken = _number(facts, "seed", source), _number(facts, "steps_taken", source)
    _restore_generators(run, source)


def _restore_optimizer(places: Places, source: Checkpoint, match: Match, optimizer: ShardedOptimizer, i: int, state: State) -> None:
    held = optimizer.inner.state
    for path, (name, param) in stepped(optimizer, state).items():
        runs = places.runs("params", state.rank, path)
        if name in optimizer.masters:
            param.copy_(source.part(match.masters[i][path], runs) if path in match.masters[i] else state.params[path])
        group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
        made: dict[str, Any] = dict(match.values[i].get(path, {}))
        for what, key in match.optimizers[i].get(path, {}).items():
            tensor = source.manifest.tensors[key]
            value = source.part(key, runs if len(tensor.shape) == len(runs) else ())
            # as torch does: steps are counted on the host unless the optimizer runs them on the device
            on_host = what == "step" and not (group.get("capturable") or group.get("fused"))
            made[what] = value if on_host else value.to(param.device)
        held.pop(param, None)
        if made:
            held[param] = made


def _restore_group(group: dict[str, Any], old: Any) -> None:
    for key in (old.keys() | group.keys()) - {"params"} - {how for how in HOW if how in group}:
        if key not in old or key not in group:
            if key != "initial_lr":  # a scheduler's, which may not have been made yet
                log.warning("the optimizer's option %s is only known %s", key, "here" if key in group else "in the checkpoint")
            group.setdefault(key, old.get(key))
        elif isinstance(group[key], Tensor):
            group[key].fill_(old[key])
        else:
            group[key] = old[key]


def _number(facts: Mapping[str, Any], key: str, source: Checkpoint) -> int:
    value = facts.get(key)
    if type(value) is not int or abs(value) >= 1 << 63:
        raise CheckpointError(f"its {key} is {str(value)[:50]!r}, expected a whole number", where=str(source.path))
    return value


def _generators(run: Trainable) -> list[tuple[str, Callable[[], Tensor], Callable[[Tensor], None]]]:
    """(kind, its state now, how to set it) of torch's generators."""
    found: list[tuple[str, Callable[[], Tensor], Callable[[Tensor], None]]] = [("cpu", torch.get_rng_state, torch.set_rng_state)]
    if run.device.type == "cuda":
        device = run.device
        found.append(("cuda", lambda: torch.cuda.get_rng_state(device), lambda value: torch.cuda.set_rng_state(value, device)))
    return found


def _restore_generators(run: Trainable, source: Checkpoint) -> None:
    for kind, _, put in _generators(run):
        if f"rng/{kind}" in source.manifest.tensors:
            try:
                put(source.part(f"rng/{kind}"))
            except RuntimeError as error:
                raise CheckpointError(f"rng/{kind} is no state of this torch's generator", where=str(source.path)) from error
