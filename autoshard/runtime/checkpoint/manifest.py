"""The manifest: what a checkpoint holds and where, as JSON, with the hash of every part of every file and a hash of its own beside it.

`MANIFEST` is the JSON, `SEAL` its sha256 (`sha256sum -c` reads it). In the JSON, `cuts` lists the parts of dims that occur (runs, see
pieces.py), and a piece is [number of its file, [number of its cut or null, per dim]].

In: a folder. Out: a Manifest whose every claim was checked: names, shapes, pieces that make up the whole of each tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from .blocks import CHUNK, DTYPES, MAX_DIMS, MAX_ELEMENTS, NAMES, read_small, strict_json
from .pieces import Logical, Piece, Runs, covers, piece_shape, well_formed

MANIFEST, SEAL = "manifest.json", "manifest.sha256"
FORMAT, VERSION = "autoshard checkpoint", 1
MAX_MANIFEST = 128 << 20
MAX_STEP = 10**15
MAX_NAME = 1024
_FILE = re.compile(r"rank-[0-9]{5,7}\.safetensors")
_HASH = re.compile(r"[0-9a-f]{64}")


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


@dataclass
class Manifest:
    """`tensors` by key: KIND/NAME, the name being the model's own. `tied`: another name → the name it is stored under.
    `state`: whatever isn't a tensor, as plain.encode writes it."""

    step: int
    files: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    tensors: dict[str, Logical] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def names(self, kind: str) -> dict[str, Logical]:
        """The tensors of a kind by name."""
        return {key[len(kind) + 1 :]: tensor for key, tensor in self.tensors.items() if key.startswith(kind + "/")}

    def to_json(self) -> bytes:
        files = sorted(self.files)
        numbers, cuts = {name: i for i, name in enumerate(files)}, dict[Runs, int]()

        def piece(p: Piece) -> list[Any]:
            return [numbers[p.file], [None if r is None else cuts.setdefault(r, len(cuts)) for r in p.runs]]

        tensors = {
            key: {"dtype": NAMES[t.dtype], "shape": list(t.shape), "pieces": [piece(p) for p in t.pieces]}
            for key, t in sorted(self.tensors.items())
        }
        whole = {
            "format": FORMAT, "version": VERSION, "step": self.step, "chunk": CHUNK,
            "files": [{"name": name, "size": self.files[name][0], "sha256": self.files[name][1]} for name in files],
            "cuts": list(cuts), "tensors": tensors, "tied": self.tied, "state": self.state,
        }  # fmt: skip
        return json.dumps(whole, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_json(cls, raw: bytes, where: str | Path) -> Manifest:
        """Read and check what `to_json` wrote. Raises CheckpointError."""
        data = strict_json(raw, where, MAX_MANIFEST)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CheckpointError("not the manifest of a checkpoint", where=str(where))
        if data.get("version") != VERSION:
            raise CheckpointError(f"version {data.get('version')!r} of the format; this autoshard reads {VERSION}", where=str(where))
        try:
            return _Reader(data).manifest()
        except _Fault as fault:
            raise CheckpointError(str(fault), where=str(where)) from None


def seal(raw: bytes) -> bytes:
    return f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}\n".encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest in a checkpoint's folder. Raises CheckpointError, naming the file."""
    raw = read_small(path / MANIFEST, MAX_MANIFEST)
    if read_small(path / SEAL, 4096) != seal(raw):
        raise CheckpointError(f"damaged: {SEAL} doesn't hold the hash of {MANIFEST}", where=str(path / MANIFEST))
    return Manifest.from_json(raw, path / MANIFEST)


class _Fault(Exception):
    pass


def _need(good: bool, message: str) -> None:
    if not good:
        raise _Fault(message)


def _count(value: Any, most: int, what: str) -> int:
    _need(type(value) is int and 0 <= value <= most, f"{what} is {str(value)[:50]!r}, expected a number from 0 to {most}")
    return int(value)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    _need(isinstance(value, dict), f"{what} is not an object")
    for key in value:
        _need(0 < len(key) <= MAX_NAME and "\0" not in key, f"{key[:50]!r} is no name for {what}")
    return value  # type: ignore[no-any-return]


def _list(value: Any, what: str) -> list[Any]:
    _need(isinstance(value, list), f"{what} is not a list")
    return value  # type: ignore[no-any-return]


class _Reader:
    """Takes nothing on trust."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        _need(data.get("chunk") == CHUNK, f"chunks of {str(data.get('chunk'))[:50]} bytes, expected {CHUNK}")
        self.files: list[str] = []
        self.cuts = [tuple(_count(i, MAX_ELEMENTS, "a cut") for i in _list(cut, "a cut")) for cut in _list(data.get("cuts"), "cuts")]

    def manifest(self) -> Manifest:
        files = dict(self.file(f) for f in _list(self.data.get("files"), "files"))
        _need(len(files) == len(self.files), "a file is listed twice")
        tensors = {key: self.tensor(key, t) for key, t in _mapping(self.data.get("tensors"), "tensors").items()}
        tied = _mapping(self.data.get("tied"), "tied")
        for name, owner in tied.items():
            _need(isinstance(owner, str), f"{name!r} is tied to no name")
        state = dict(_mapping(self.data.get("state"), "state"))
        return Manifest(_count(self.data.get("step"), MAX_STEP, "step"), files, tensors, dict(tied), state)

    def file(self, value: Any) -> tuple[str, tuple[int, list[str]]]:
        value = _mapping(value, "a file")
        name, hashes = value.get("name"), _list(value.get("sha256"), "sha256")
        _need(isinstance(name, str) and _FILE.fullmatch(name) is not None, f"{str(name)[:100]!r} is no name of a checkpoint's file")
        _need(all(isinstance(h, str) and _HASH.fullmatch(h) for h in hashes), f"{name} has a hash that is none")
        size = _count(value.get("size"), MAX_ELEMENTS, f"the size of {name}")
        _need(len(hashes) == -(-size // CHUNK), f"{name} has {len(hashes)} hashes for {size} bytes")
        self.files.append(name)
        return name, (size, hashes)

    def tensor(self, key: str, value: Any) -> Logical:
        value = _mapping(value, key)
        dtype = value.get("dtype")
        _need(isinstance(dtype, str) and dtype in DTYPES, f"{key} is of {str(dtype)[:50]!r}, which is no dtype")
        shape = tuple(_count(n, MAX_ELEMENTS, f"a size of {key}") for n in _list(value.get("shape"), f"the shape of {key}"))
        _need(len(shape) <= MAX_DIMS and math.prod(shape) <= MAX_ELEMENTS, f"{key} claims the shape {shape[:MAX_DIMS]}")
        pieces = tuple(self.piece(key, shape, p) for p in _list(value.get("pieces"), f"the pieces of {key}"))
        why = covers(shape, pieces)
        _need(not why, f"{key}: {why}")
        return Logical(DTYPES[dtype], shape, pieces)

    def piece(self, key: str, shape: tuple[int, ...], value: Any) -> Piece:
        value = _list(value, f"a piece of {key}")
        _need(len(value) == 2, f"a piece of {key} is not a file and its cuts")
        file = self.files[_count(value[0], len(self.files) - 1, f"a file of {key}")]
        numbers = _list(value[1], f"the cuts of {key}")
        _need(len(numbers) == len(shape), f"a piece of {key} has {len(numbers)} dims of {len(shape)}")
        runs = tuple(None if i is None else self.cuts[_count(i, len(self.cuts) - 1, f"a cut of {key}")] for i in numbers)
        _need(all(well_formed(r, n) for r, n in zip(runs, shape, strict=True)), f"a piece of {key} is none of the shape {shape}")
        return Piece(file, runs)


def expected(manifest: Manifest) -> dict[str, dict[str, tuple[Any, tuple[int, ...]]]]:
    """File → key → (dtype, shape) that its header must give."""
    found: dict[str, dict[str, tuple[Any, tuple[int, ...]]]] = {name: {} for name in manifest.files}
    for key, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            if key in found[piece.file]:
                raise CheckpointError(f"{piece.file} holds two pieces of {key}")
            found[piece.file][key] = (tensor.dtype, piece_shape(tensor.shape, piece.runs))
    return found
