"""A checkpoint to read from: any part of any tensor in it, checked, whatever plan wrote it.

In: a checkpoint's folder (untrusted). Out: its manifest, and tensors by the part that is needed; files are opened when first read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from ...errors import CheckpointError
from .blocks import BlockFile
from .manifest import MANIFEST, Manifest, expected, read_manifest
from .pieces import Logical, Piece, Runs, gather


class Checkpoint:
    """Reads. Raises CheckpointError, naming the file that is at fault."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError("no such checkpoint", where=str(path))
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        try:
            self.expected = expected(self.manifest)
        except CheckpointError as error:
            raise CheckpointError(str(error), where=str(path / MANIFEST)) from None
        self.files: dict[str, BlockFile] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def file(self, name: str) -> BlockFile:
        """An open file, whose header says what the manifest says. Raises CheckpointError."""
        if name not in self.files:
            size, hashes = self.manifest.files[name]
            file = BlockFile(self.path / name, hashes, size)
            found = {key: (entry.dtype, entry.shape) for key, entry in file.entries.items()}
            if found != self.expected[name]:
                file.close()
                odd = next(key for key in {**found, **self.expected[name]} if found.get(key) != self.expected[name].get(key))
                raise CheckpointError(
                    f"its header has {_text(found.get(odd))} for {odd[:200]!r}, the manifest {_text(self.expected[name].get(odd))}",
                    where=str(self.path / name),
                )
            self.files[name] = file
        return self.files[name]

    def part(self, key: str, needed: Sequence[Runs] | None = None) -> torch.Tensor:
        """A tensor, or the part of it that is needed."""
        tensor: Logical = self.manifest.tensors[key]

        def read(piece: Piece, first: int, last: int) -> torch.Tensor:
            return self.file(piece.file).read(key, first, last)

        return gather(tensor, tuple(needed) if needed is not None else (None,) * len(tensor.shape), read)

    def check(self, share: int = 0, of: int = 1) -> None:
        """Read every `of`-th file, from number `share` on, to the end. Raises CheckpointError, naming the file."""
        for name in sorted(self.manifest.files)[share::of]:
            self.file(name).check()


class Tensors(Protocol):
    """Whole tensors by name in some folder, of which any part can be read."""

    path: Path
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    tied: dict[str, str]

    def part(self, name: str, needed: Sequence[Runs] | None = None) -> torch.Tensor: ...
    def close(self) -> None: ...


class Weights:
    """A checkpoint's weights, as such."""

    def __init__(self, path: Path) -> None:
        self.checkpoint, self.path = Checkpoint(path), path
        self.specs = {name: (t.dtype, t.shape) for name, t in self.checkpoint.manifest.names("weights").items()}
        self.tied = self.checkpoint.manifest.tied

    def part(self, name: str, needed: Sequence[Runs] | None = None) -> torch.Tensor:
        return self.checkpoint.part(f"weights/{name}", needed)

    def close(self) -> None:
        self.checkpoint.close()


def _text(entry: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "nothing" if entry is None else f"{str(entry[0]).removeprefix('torch.')} {list(entry[1])}"
