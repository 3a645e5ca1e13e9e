"""Hugging Face folders: safetensors files, one or several with an index, read into shards and written from them.

In: a folder as `save_pretrained` writes it, and a model that is sharded; each rank reads the parts that it stores. Out: the same kind
of folder from a live model (a collective call; one whole tensor at a time) or from a checkpoint, under the model's own names, tied
weights once, which `from_pretrained` loads. Nothing here needs transformers, unless a plain model is asked for.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from . import checkpoint
from .checkpoint import folder as folders
from .checkpoint import state
from .checkpoint.blocks import BlockFile, Source, in_order, read_small, strict_json, write
from .checkpoint.pieces import Logical, Piece, Runs, gather
from .checkpoint.reader import Tensors, Weights
from .deferred import is_deferred, promise
from .trainable import Trainable

log = logging.getLogger("autoshard")
ONE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MAX_SHARD = 5 * 10**9
MAX_INDEX = 64 << 20
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")


def is_folder(path: Path) -> bool:
    return (path / ONE).exists() or (path / INDEX).exists()


class Folder:
    """Reads any part of any tensor. (Files may be links: a hub cache consists of them.) Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tied: dict[str, str] = {}
        self.files: dict[str, BlockFile] = {}
        self.place: dict[str, str] = {}
        try:
            if (path / INDEX).exists():
                self.place = _index(path / INDEX)
            names = sorted(set(self.place.values())) or [ONE]
            self.files = {name: BlockFile(path / name, follow=True) for name in names}
        except BaseException:
            self.close()
            raise
        self.place = self.place or dict.fromkeys(self.files[ONE].entries, ONE)
        missing = next((key for key, name in self.place.items() if key not in self.files[name].entries), None)
        if missing is not None:
            raise CheckpointError(f"has no {missing[:200]!r}, which the index puts there", where=str(path / self.place[missing]))
        entries = {key: self.files[name].entries[key] for key, name in self.place.items()}
        self.specs = {key: (entry.dtype, entry.shape) for key, entry in entries.items()}

    def part(self, name: str, needed: Sequence[Runs] | None = None) -> torch.Tensor:
        dtype, shape = self.specs[name]
        whole = (None,) * len(shape)
        pieces = (Piece(self.place[name], whole),)
        file = self.files[self.place[name]]
        return gather(Logical(dtype, shape, pieces), tuple(needed or whole), lambda piece, first, last: file.read(name, first, last))

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _index(path: Path) -> dict[str, str]:
    data = strict_json(read_small(path, MAX_INDEX, follow=True), path, MAX_INDEX)
    found = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(f, str) and _FILE.fullmatch(f) for f in found.values()):
        raise CheckpointError("an index needs a weight_map of file names in its own folder", where=str(path))
    return found


# ---- reading --------------------------------------------------------------------------------------------------------


def load_pretrained(folder: str | os.PathLike[str], model: Trainable | nn.Module | None = None) -> Any:
    """Read a folder's weights into a sharded model (a collective call) and return it. A deferred model is promised them: nothing is drawn
    that the folder holds, and `parallelize` reads each rank's parts. Without a model, a plain causal language model as transformers
    builds it (which every process then holds whole). Raises CheckpointError."""
    if model is None:
        return _plain(Path(folder))
    source = Folder(Path(folder))
    try:
        if isinstance(model, Trainable):
            assign(model, source)
        else:
            _promise(model, source)
    finally:
        source.close()
    return model


def _promise(model: nn.Module, source: Folder) -> None:
    if not is_deferred(model):
        raise CheckpointError(
            f"a {type(model).__name__} with weights of its own can't be promised others",
            where=str(source.path),
            hint="give what parallelize or autoshard.deferred returned",
        )
    own = list(model.state_dict())
    prefix = _prefix(own, source.specs)
    stored = {prefix + name for name in source.specs}
    promise(model, [name for name in own if name in stored], own, source.path)


def assign(sharded: Trainable, source: Tensors) -> None:
    """Give a sharded model another library's weights. Raises CheckpointError on every rank."""
    ranks = checkpoint.ranks_of(sharded)
    prefix = _prefix({*sharded.owner, *sharded.unused}, source.specs)
    stored = {prefix + name: spec for name, spec in source.specs.items()}
    found = ranks.together(lambda: state.fit(sharded, stored, source.tied, str(source.path), foreign=True))
    read: Callable[[str, tuple[Runs, ...]], torch.Tensor] = lambda name, needed: source.part(name.removeprefix(prefix), needed)
    ranks.together(lambda: state.assign(state.Places(sharded), found.names, read))
    for optimizer in sharded.optimizers:
        optimizer.reload_masters()


def _prefix(own: Iterable[str], stored: Iterable[str]) -> str:
    """What the folder's names lack: a base model's weights ("wte.weight") serve a model with a head ("transformer.wte.weight")."""
    own, names = dict.fromkeys(own), list(stored)
    if any(name in own for name in names):
        return ""
    firsts = dict.fromkeys(name.partition(".")[0] + "." for name in own)
    return next((first for first in firsts if any(first + name in own for name in names)), "")


def _plain(folder: Path) -> nn.Module:
    if not is_folder(folder):
        raise CheckpointError(f"no {ONE} or {INDEX} here", where=str(folder))
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True, trust_remote_code=False)
    return model


# ---- writing --------------------------------------------------------------------------------------------------------


def export(
    source: Trainable | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | Any = None,
    max_shard: int = MAX_SHARD,
) -> Path:
    """Write a folder that `from_pretrained` loads, from a sharded model (a collective call) or a checkpoint (or a folder of them: the
    newest). `config`: the model's, as a dict, a file or transformers' object. Raises CheckpointError where the folder isn't empty."""
    if isinstance(source, Trainable):
        ranks = checkpoint.ranks_of(source)
        return _export(list(_live(source)), Path(folder), config, max_shard, ranks)
    found = checkpoint.newest(source) or Path(source)
    weights = Weights(found if not folders.is_checkpoint(Path(source)) else Path(source))
    try:
        return write_folder(weights, Path(folder), config, max_shard)
    finally:
        weights.close()


def write_folder(source: Tensors, folder: Path, config: Any = None, max_shard: int = MAX_SHARD) -> Path:
    tensors = [Source(n, d, s, lambda n=n: source.part(n)) for n, (d, s) in source.specs.items()]  # type: ignore[misc]
    return _export(tensors, folder, config, max_shard, checkpoint.Alone())


def _live(run: Trainable) -> Iterable[Source]:
    """Every persistent weight once, each made whole by all ranks together when its turn comes."""
    persistent, wanted = state.Places(run).persistent, state.wanted(run)
    for path in (p for p in wanted if p in persistent):
        if path in run.unused:
            make: Callable[[], torch.Tensor] = lambda path=path: run.unused[path]  # type: ignore[misc]
        elif path in run.holders["params"]:
            make = lambda path=path: run._assemble("params", path, lambda s, path: s.params[path].detach())  # type: ignore[misc]
        else:
            make = lambda path=path: run._assemble("buffers", path, lambda s, path: s.buffers[path])  # type: ignore[misc]
        yield Source(path, *wanted[path], make)


def _shards(tensors: Iterable[Source], most: int) -> dict[str, list[Source]]:
    """File name → what goes there, in the model's order."""
    groups: list[list[Source]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.bytes > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    if len(groups) == 1:
        return {ONE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _export(tensors: list[Source], folder: Path, config: Any, most: int, ranks: checkpoint.Ranks) -> Path:
    folder = Path(os.path.abspath(folder))
    temporary = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(4)}")
    first = ranks.rank == 0

    def start() -> None:
        if first:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise CheckpointError("there is something here already", where=str(folder), hint="give a new folder")
            temporary.mkdir(parents=True)
            text = _config_text(config)
            if text is None:
                log.warning("%s: no config given, so from_pretrained can't tell what model these weights are", folder)
            else:
                folders.put(temporary / CONFIG, text)

    def finish() -> None:
        if first:
            if len(shards) > 1:
                places = {t.key: name for name, group in shards.items() for t in group}
                index = {"metadata": {"total_size": sum(t.bytes for t in tensors)}, "weight_map": places}
                folders.put(temporary / INDEX, json.dumps(index, indent=2, sort_keys=True).encode())
            folders.sync(temporary)
            os.rename(temporary, folder)  # onto an empty folder, or where there is none
            folders.sync(folder.parent)

    shards = _shards(tensors, most)
    try:
        ranks.together(checkpoint.clean(start, folder))
        for name, group in shards.items():
            ranks.together(checkpoint.clean(lambda name=name, group=group: _write(temporary / name, group, first), folder))  # type: ignore[misc]
        ranks.together(checkpoint.clean(finish, folder))
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _write(path: Path, group: list[Source], first: bool) -> None:
    """Write a file, on the first rank. Whatever fails there, all ranks make every tensor together."""
    waiting = in_order(group)

    def made(source: Source) -> torch.Tensor:
        waiting.pop(0)
        return source.make()

    try:
        if first:
            write(path, [Source(s.key, s.dtype, s.shape, lambda s=s: made(s)) for s in group], {"format": "pt"})  # type: ignore[misc]
    finally:
        while waiting:
            made(waiting[0])


def _config_text(config: Any) -> bytes | None:
    if config is None:
        return None
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        return read_small(path / CONFIG if path.is_dir() else path, 16 << 20, follow=True)
    if hasattr(config, "to_json_string"):
        return str(config.to_json_string(use_diff=False)).encode()
    return json.dumps(dict(config), indent=2).encode()
