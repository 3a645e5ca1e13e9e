"""Checkpoints: logical tensors under the model's own names, as safetensors files and a hashed manifest, published by one rename.

Any plan loads any plan's checkpoint: each rank writes the shards that it owns, and reads the parts that it needs, so that no rank holds
the whole. What is restored: weights, buffers, optimizers' state and groups, a scheduler, seeds and generators, the data's position.
`save` and `load` are collective and either succeed or raise the same CheckpointError on every rank; a half-written or damaged checkpoint
is never taken for a whole one. When `save` returns the checkpoint is on disk; with wait=False a thread writes it while training goes on.

    folder/step-00000010/manifest.json  manifest.sha256  rank-00000.safetensors  rank-00001.safetensors …
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ...errors import CheckpointError
from ..trainable import Trainable
from . import folder as folders
from . import plain, state
from .background import Background
from .blocks import DTYPES, NAMES, Source, write
from .manifest import MANIFEST, MAX_STEP, SEAL, Manifest, file_name, seal
from .pieces import Logical, Piece, covers
from .reader import Checkpoint

__all__ = ["Checkpoint", "Restored", "finish", "inspect", "load", "newest", "prepare", "release", "save", "verify"]
log = logging.getLogger("autoshard")
T = TypeVar("T")
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Restored:
    """What `load` has found: the step, and what was given to `save` beside the model."""

    step: int
    path: Path
    data: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class Ranks(Protocol):
    """What is needed of `comm.Comm`."""

    rank: int
    size: int

    def share(self, text: str, source: int = 0) -> str: ...
    def together(self, work: Callable[[], T]) -> T: ...
    def aside(self) -> Ranks: ...


class Alone:
    """One process plays all ranks."""

    rank, size = 0, 1

    def share(self, text: str, source: int = 0) -> str:
        return text

    def together(self, work: Callable[[], T]) -> T:
        return work()

    def aside(self) -> Ranks:
        return self


def ranks_of(run: Trainable) -> Ranks:
    assert run.program is not None  # or it says that nothing is captured yet
    return getattr(run, "comm", None) or Alone()


# ---- saving ---------------------------------------------------------------------------------------------------------


def save(
    folder: PathLike,
    sharded: Trainable,
    *,
    step: int,
    scheduler: Any = None,
    data: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = None,
    wait: bool = True,
) -> Path:
    """Write folder/step-00000010 and give its path (a collective call: same arguments on all ranks; the first rank's `scheduler`,
    `data` and `extra` count). `keep`: how many checkpoints stay, this one among them. Raises CheckpointError on every rank.

    Without `wait`, what is saved is copied to host memory and written by a thread, while training goes on; it is there once `finish`
    returns. The next `save`, `load` or `finish` waits for it, and raises if it failed.
    """
    if type(step) is not int or not 0 <= step <= MAX_STEP or (keep is not None and (type(keep) is not int or keep < 1)):
        raise CheckpointError(f"step={step!r}, keep={keep!r}; expected whole numbers, keep at least 1")
    finish(sharded)
    ranks, root = ranks_of(sharded), Path(os.path.abspath(folder))
    first = ranks.rank == 0
    beside = {"scheduler": scheduler.state_dict() if scheduler is not None and first else None, "data": data, "extra": extra}
    with _stoppable() as pause:

        def start() -> str:
            pause()
            return str(folders.begin(root, step)) if first else ""

        temporary = Path(ranks.share(ranks.together(clean(start, root))))
        with _or_gone(temporary, first):
            made = ranks.together(clean(lambda: _collect(sharded, beside if first else {}, copied=not wait), root))
        if wait:
            return _publish(ranks, made, temporary, root, step, keep, pause)
    aside = ranks.aside()
    sharded.saving = Background(lambda: _publish(aside, made, temporary, root, step, keep, lambda: None))
    return root / folders.name(step)


def finish(sharded: Trainable) -> Path | None:
    """Wait for what `save` without `wait` began; its path, None where there was nothing (all ranks call it). Raises its CheckpointError."""
    saving, sharded.saving = getattr(sharded, "saving", None), None
    return None if saving is None else saving.result()


@contextmanager
def _or_gone(temporary: Path, first: bool) -> Iterator[None]:
    """A temporary folder goes when something fails."""
    try:
        yield
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


@dataclass
class _Made:
    """What this process is about to write: per rank its parts and values; and what the manifest says beside tensors."""

    ranks: list[tuple[int, list[state.Part], dict[str, Any]]]
    tied: dict[str, str]
    facts: dict[str, Any]


def _collect(run: Trainable, beside: Mapping[str, Any], copied: bool) -> _Made:
    """`copied`: in host memory, so that training may go on."""
    places, made = state.Places(run), list[tuple[int, list[state.Part], dict[str, Any]]]()
    for own in run.states:
        parts = list(state.parts(places, own, first=own.rank == 0))
        unknown = next((p for p in parts if 0 not in p.local and p.dtype not in NAMES), None)
        if unknown is not None:
            raise CheckpointError(f"{unknown.key} is {unknown.dtype}, which a safetensors file can't hold")
        made.append((own.rank, [_copied(p) for p in parts] if copied else parts, state.values(places, own)))
    facts = state.facts(run) | {"values": {}} | {key: plain.encode(value, key) for key, value in beside.items()}
    return _Made(made, state.tied(run), facts)


def _copied(part: state.Part) -> state.Part:
    if 0 in part.local:
        return part
    tensor = part.make().detach().to("cpu", copy=True)
    return replace(part, make=lambda: tensor)


def _publish(ranks: Ranks, made: _Made, temporary: Path, root: Path, step: int, keep: int | None, pause: Callable[[], None]) -> Path:
    """Write, seal, give it its name, and take older ones away."""
    first = ranks.rank == 0
    with _or_gone(temporary, first):
        mine = ranks.together(clean(lambda: _write(made, temporary, pause), root))
        written = [json.loads(ranks.share(mine, r)) for r in range(ranks.size)]

        def sealed() -> None:
            pause()
            if first:
                _seal(temporary, step, made, written)

        ranks.together(clean(sealed, root))
        path = ranks.share(ranks.together(clean(lambda: str(folders.publish(temporary, root, step)) if first else "", root)))
    if first and keep is not None:
        folders.prune(root, keep, Path(path))
    return Path(path)


def prepare(folder: PathLike, ranks: Ranks) -> None:
    """Make sure that checkpoints can be written here, before the first one is (a collective call). Raises CheckpointError on every rank."""
    root = Path(os.path.abspath(folder))
    temporary = Path(ranks.share(ranks.together(clean(lambda: str(folders.begin(root, 0)) if ranks.rank == 0 else "", root))))

    def seen() -> None:
        if not folders.is_folder(temporary):
            raise CheckpointError(f"rank {ranks.rank} doesn't see this folder", where=str(root), hint="all ranks must see the same one")

    try:
        ranks.together(seen)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def release(folder: PathLike) -> None:
    """Let other jobs write checkpoints here (a process keeps a folder that it has saved to for as long as it lives)."""
    folders.release(Path(folder))


def clean(work: Callable[[], T], where: Path) -> Callable[[], T]:
    """The same work, with what the system refuses as a CheckpointError."""

    def clean() -> T:
        try:
            return work()
        except OSError as error:
            raise folders.refusal(error, where) from error

    return clean


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """Between tensors, `pause()` raises CheckpointError if SIGTERM has come: a rank that dies at once would leave the others waiting.
    A handler of the user's own stays."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield lambda: None
        return
    came, told = threading.Event(), threading.Event()

    def pause() -> None:
        if came.is_set():
            told.set()
            raise CheckpointError("SIGTERM while the checkpoint was written; earlier ones are whole")

    signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield pause
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if came.is_set() and not told.is_set():
            os.kill(os.getpid(), signal.SIGTERM)


def _write(made: _Made, temporary: Path, pause: Callable[[], None]) -> str:
    """Write the files of this process's ranks. What the manifest has to say of them, as JSON."""
    files, tensors, values = dict[str, Any](), dict[str, list[Any]](), dict[str, Any]()
    for rank, parts, singles in made.ranks:
        name = file_name(rank)
        sources = [Source(p.key, p.dtype, p.local, p.make) for p in parts if 0 not in p.local]
        if sources:
            files[name] = write(temporary / name, sources, {"format": "pt"}, pause)
        for p in parts:
            entry = tensors.setdefault(p.key, [NAMES[p.dtype], p.shape, []])
            if 0 not in p.local:
                entry[2].append([name, p.runs])
        values.update(singles)
    return json.dumps([files, tensors, values])


def _seal(temporary: Path, step: int, made: _Made, written: list[Any]) -> None:
    """Write the manifest of what all ranks have written, and its hash."""
    manifest = Manifest(step, tied=made.tied, state=made.facts)
    found: dict[str, tuple[str, tuple[int, ...], list[Piece]]] = {}
    for files, tensors, values in written:
        manifest.files |= {name: (size, hashes) for name, (size, hashes) in files.items()}
        manifest.state["values"] |= values
        for key, (dtype, shape, pieces) in tensors.items():
            known = found.setdefault(key, (dtype, tuple(shape), []))
            assert known[:2] == (dtype, tuple(shape)), (key, known[:2], dtype, shape)
            known[2].extend(Piece(file, tuple(None if r is None else tuple(r) for r in runs)) for file, runs in pieces)
    for key, (dtype, shape, pieces_) in found.items():
        manifest.tensors[key] = Logical(DTYPES[dtype], shape, tuple(pieces_))
        assert not covers(shape, pieces_), f"{key}: {covers(shape, pieces_)}"
    seal_folder(temporary, manifest)


def seal_folder(temporary: Path, manifest: Manifest) -> None:
    raw = manifest.to_json()
    folders.put(temporary / MANIFEST, raw)
    folders.put(temporary / SEAL, seal(raw))


# ---- loading --------------------------------------------------------------------------------------------------------


def load(folder: PathLike, sharded: Trainable, *, scheduler: Any = None, step: int | None = None) -> Restored:
    """Go on from the newest whole checkpoint in a folder (a collective call). A damaged one is passed over with a warning, unless
    `step` asks for it or `folder` is the checkpoint itself. Raises CheckpointError on every rank: where there is none, or where it holds
    another model's weights."""
    finish(sharded)
    ranks = ranks_of(sharded)
    choices = json.loads(ranks.share(ranks.together(lambda: json.dumps(_choices(Path(folder), step)) if ranks.rank == 0 else "[]")))
    source = _first_whole(ranks, [Path(path) for path in choices])
    with source:

        def fits() -> tuple[state.Match, dict[str, Any]]:
            return state.check(sharded, source), _beside(source, scheduler)

        match, beside = ranks.together(fits)

        def restore() -> None:
            state.restore(state.Places(sharded), source, match)
            if scheduler is not None and beside["scheduler"]:
                scheduler.load_state_dict(beside["scheduler"])

        ranks.together(restore)
        return Restored(source.manifest.step, source.path, beside["data"], beside["extra"])


def _beside(source: Checkpoint, scheduler: Any) -> dict[str, Any]:
    """What was saved beside the model. Raises CheckpointError where it isn't what it should be."""
    found = {key: plain.decode(source.manifest.state.get(key)) for key in ("scheduler", "data", "extra")}
    for key, value in found.items():
        found[key] = {} if value is None else value
        if not isinstance(found[key], dict):
            raise CheckpointError(f"its {key} is {str(value)[:50]!r}, expected a dict", where=str(source.path))
    if scheduler is not None:
        if not found["scheduler"]:
            log.warning("%s holds no scheduler: it starts anew", source.path)
        unknown = [key for key in found["scheduler"] if key not in scheduler.state_dict()]
        if unknown:
            raise CheckpointError(
                f"its scheduler's state has {str(unknown[0])[:50]!r}, which {type(scheduler).__name__} doesn't know", where=str(source.path)
            )
    return found


def _choices(folder: Path, step: int | None) -> list[str]:
    """The checkpoints to try, best first."""
    if folders.is_checkpoint(folder):
        return [os.path.abspath(folder)]
    if not folders.is_folder(folder):
        raise CheckpointError("no such folder", where=str(folder))
    found = [(s, path) for s, path in folders.steps(folder) if step in (None, s)]
    if not found:
        there = ", ".join(path.name for _, path in folders.steps(folder)[:5])
        raise CheckpointError(
            "no checkpoint here" if step is None else f"no checkpoint of step {step} here; there are {there or 'none'}",
            where=str(folder),
            hint="a Hugging Face folder is read by runtime.huggingface.load_pretrained" if (folder / "config.json").exists() else "",
        )
    return [os.path.abspath(path) for s, path in found if step is None or (s, path) == found[0]]


def _first_whole(ranks: Ranks, choices: list[Path]) -> Checkpoint:
    """Each rank reads its share of the files, all agree. Raises the first refusal if none is whole."""
    refused: CheckpointError | None = None
    for i, path in enumerate(choices):
        opened: list[Checkpoint] = []

        def whole(path: Path = path, opened: list[Checkpoint] = opened) -> Checkpoint:
            opened.append(Checkpoint(path))
            opened[0].check(ranks.rank, ranks.size)
            return opened[0]

        try:
            source = ranks.together(whole)
        except CheckpointError as error:
            for one in opened:
                one.close()
            refused = refused or error
            if ranks.rank == 0 and len(choices) > 1:
                further = "trying the one before it" if i + 1 < len(choices) else "there is none before it"
                log.warning("checkpoint %s is refused, %s: %s", path, further, error)
            continue
        if refused is not None and ranks.rank == 0:
            log.warning("going on from the older checkpoint %s", path)
        return source
    assert refused is not None
    raise refused


# ---- looking --------------------------------------------------------------------------------------------------------


def newest(folder: PathLike) -> Path | None:
    """The newest checkpoint whose manifest is whole and whose files have the right sizes (`load` and `verify` read all of them)."""
    for _, path in folders.steps(Path(folder)):
        try:
            with Checkpoint(path) as source:
                for name in source.manifest.files:
                    source.file(name)
            return path
        except CheckpointError as error:
            log.warning("checkpoint %s is refused: %s", path, error)
    return None


def _one(path: PathLike) -> Path:
    """The checkpoint meant: itself, or the newest in a folder of them."""
    folder = Path(path)
    if folders.is_checkpoint(folder):
        return folder
    found = folders.steps(folder)
    if not found:
        raise CheckpointError("no checkpoint here", where=str(path))
    return found[0][1]


def verify(path: PathLike) -> None:
    """Read everything. Raises CheckpointError, naming the file that is damaged."""
    with Checkpoint(_one(path)) as source:
        source.check()


def inspect(path: PathLike) -> dict[str, Any]:
    """What a checkpoint holds, as plain values; tensors by key with dtype, shape, bytes and number of pieces."""
    with Checkpoint(_one(path)) as source:
        m = source.manifest
        optimizers = m.state.get("optimizers")
        optimizers = optimizers if isinstance(optimizers, list) else []
        tensors = {
            key: {"dtype": NAMES[t.dtype], "shape": list(t.shape), "bytes": t.bytes, "pieces": len(t.pieces)}
            for key, t in m.tensors.items()
        }
        return {
            "path": str(source.path),
            "step": m.step,
            "bytes": sum(size for size, _ in m.files.values()),
            "files": {name: size for name, (size, _) in m.files.items()},
            "weights": sum(t.bytes for t in m.names("weights").values()),
            "tensors": tensors,
            "tied": dict(m.tied),
            "optimizers": [o.get("class") if isinstance(o, dict) else None for o in optimizers],
            "seed": m.state.get("seed"),
            "steps_taken": m.state.get("steps_taken"),
            "data": plain.decode(m.state.get("data")),
            "extra": plain.decode(m.state.get("extra")),
        }
