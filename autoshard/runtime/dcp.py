"""torch.distributed.checkpoint folders: tensors read from them and written to them.

In: a folder with `.metadata` (a pickle) and files of tensors. The pickle is read by an unpickler that knows a dozen names and makes
stand-ins of them, records without behaviour, so that nothing in it can run; tensors are read with `weights_only`. What isn't a tensor is
left out. Out: any part of any tensor; or a folder that torch's own DCP loads (written by it, from one process that holds all tensors).
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .checkpoint.blocks import MAX_DIMS, MAX_ELEMENTS, open_regular, read_small
from .checkpoint.pieces import Logical, Piece, Runs, covers, gather
from .checkpoint.reader import Tensors

log = logging.getLogger("autoshard")
METADATA = ".metadata"
MAX_METADATA = 256 << 20
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


class Record:
    """Stands for an object of the pickle: its class's name, and whatever state the pickle gives it."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        state = getattr(self, "state", None)
        return state.get(name) if isinstance(state, dict) else None


_RECORDS = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta",        "_MEM_FORMAT_ENCODING")),
    *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "Path", "WindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "PurePosixPath", "Path", "WindowsPath")),
    ("torch.serialization", "_get_layout"), ("torch._C", "_get_layout"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Finds nothing but stand-ins, made anew for each file."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.made: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in self.made:
            return self.made[key]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if key == ("torch", "Size"):
            self.made[key] = type("Size", (tuple,), {})
        elif key == ("collections", "OrderedDict"):
            self.made[key] = type("OrderedDict", (dict,), {})
        elif key in _RECORDS:
            self.made[key] = type(name, (Record,), {})
        else:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")
        return self.made[key]


def read_metadata(path: Path) -> Any:
    """The pickle as records. Raises CheckpointError."""
    raw = read_small(path, MAX_METADATA, follow=True)
    try:
        found = _Unpickler(io.BytesIO(raw)).load()
    except Exception as error:  # a broken pickle raises anything
        raise CheckpointError(f"not readable as DCP's metadata: {str(error)[:200]}", where=str(path)) from error
    if type(found).__name__ != "Metadata" or not isinstance(found, Record):
        raise CheckpointError("not DCP's metadata", where=str(path))
    return found


class Folder:
    """Reads any part of any tensor whose name begins with `prefix` (names are given without it). Raises CheckpointError."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        self.tied: dict[str, str] = {}
        metadata = read_metadata(path / METADATA)
        try:
            self.tensors, self.places = _tensors(metadata, prefix)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"its metadata is malformed: {str(error)[:200]}", where=str(path / METADATA)) from error
        for name, tensor in self.tensors.items():
            why = covers(tensor.shape, tensor.pieces)
            if why:
                raise CheckpointError(f"{name}: {why}", where=str(path / METADATA))
        self.specs = {name: (t.dtype, t.shape) for name, t in self.tensors.items()}

    def part(self, name: str, needed: Sequence[Runs] | None = None) -> torch.Tensor:
        tensor = self.tensors[name]

        def read(piece: Piece, first: int, last: int) -> torch.Tensor:
            found = self._chunk(name, piece)
            return found[first:last] if found.dim() else found

        return gather(tensor, tuple(needed or (None,) * len(tensor.shape)), read)

    def _chunk(self, name: str, piece: Piece) -> torch.Tensor:
        file, start, length = self.places[name, piece.runs]
        where = self.path / file
        fd = open_regular(where)
        try:
            if start + length > os.fstat(fd).st_size:
                raise CheckpointError(f"ends before byte {start + length}, where a part of {name} does", where=str(where))
            data = os.pread(fd, length, start)
        finally:
            os.close(fd)
        try:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # a broken or hostile file raises anything
            raise CheckpointError(f"a part of {name} can't be read: {str(error)[:200]}", where=str(where)) from error
        tensor = self.tensors[name]
        shape = tuple(n if r is None else r[1] - r[0] for r, n in zip(piece.runs, tensor.shape, strict=True))
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != shape or found.dtype != tensor.dtype:
            raise CheckpointError(f"a part of {name} is not what the metadata says", where=str(where))
        return found

    def close(self) -> None:
        pass


Place = tuple[str, int, int]


def _tensors(metadata: Record, prefix: str) -> tuple[dict[str, Logical], dict[tuple[str, tuple[Runs, ...]], Place]]:
    """(tensors by name, where each piece is: file, offset, length)."""
    entries: Mapping[str, Any] = metadata.get("state_dict_metadata")
    wanted = {key: e for key, e in entries.items() if key.startswith(prefix) and type(e).__name__ == "TensorStorageMetadata"}
    if left := [key for key in entries if key.startswith(prefix) and key not in wanted]:
        log.warning("%d entries aren't tensors and are left out, %s first", len(left), str(left[0])[:100])
    stored: dict[tuple[str, tuple[int, ...]], Place] = {}
    for index, info in metadata.get("storage_data").items():
        file, start, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if (
            not isinstance(file, str)
            or not _FILE.fullmatch(file)
            or not all(type(i) is int and 0 <= i <= MAX_ELEMENTS for i in (start, length))
        ):
            raise ValueError(f"a part is said to be at {str(file)[:100]!r}, {start}, {length}")
        if info.get("transform_descriptors"):
            raise ValueError("its parts are transformed (compressed), which isn't read here")
        stored[index.get("fqn"), tuple(index.get("offset") or ())] = (file, start, length)
    tensors: dict[str, Logical] = {}
    places: dict[tuple[str, tuple[Runs, ...]], Place] = {}
    for key, entry in wanted.items():
        name, shape, dtype = key[len(prefix) :], _sizes(entry.get("size")), entry.get("properties").state[0]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key} is of no dtype")
        pieces = []
        for chunk in entry.get("chunks") if all(shape) else ():
            offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
            if not all(sizes):
                continue
            if any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
                raise ValueError(f"a part of {key} lies outside of it")
            runs = tuple(None if s == n else (o, o + s) for o, s, n in zip(offsets, sizes, shape, strict=True))
            pieces.append(Piece(name, runs))
            places[name, runs] = stored[key, offsets]
        tensors[name] = Logical(dtype, shape, tuple(pieces))
    return tensors, places


def _sizes(found: Any) -> tuple[int, ...]:
    sizes = tuple(itertools.islice(found, MAX_DIMS + 1))
    if len(sizes) > MAX_DIMS or not all(type(i) is int and 0 <= i <= MAX_ELEMENTS for i in sizes):
        raise ValueError(f"{str(sizes)[:100]} are no sizes")
    return sizes


def write_folder(source: Tensors, folder: Path, prefix: str = "") -> Path:
    """Write what torch's DCP loads; all tensors are in memory meanwhile. Tied ones are there under each name."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError("there is something here already", where=str(folder), hint="give a new folder")
    tensors = {prefix + name: source.part(name) for name in source.specs}
    tensors |= {prefix + name: tensors[prefix + owner] for name, owner in source.tied.items() if prefix + owner in tensors}
    dcp_save(tensors, storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder
