"""Files of tensors in the safetensors format: written as a stream, read in parts, every part checked against its hash.

In: names, dtypes, shapes, and a way to make each tensor when its turn comes, so that no more than one is in memory. Out: a file that
any safetensors library reads, its size, and a sha256 for each 4 MiB of it: whoever reads a part checks that part alone. (Standard
library only; the format is a length, a JSON header and the bytes.)

A file to read is untrusted: what its header says is checked before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ...errors import CheckpointError

CHUNK = 4 << 20
MAX_HEADER = 64 << 20
MAX_DIMS = 16
MAX_ELEMENTS = 1 << 50
KEPT_CHUNKS = 4

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Source:
    """A tensor to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, at these bytes of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def strict_json(raw: bytes, where: str | Path, most: int) -> Any:
    """JSON without duplicate keys, NaN or great depth. Raises CheckpointError."""
    if len(raw) > most:
        raise CheckpointError(f"{len(raw)} bytes of JSON, expected at most {most}", where=str(where))
    if raw.count(b"[") + raw.count(b"{") > max(1 << 16, len(raw) // 8):
        raise CheckpointError("JSON of nothing but brackets", where=str(where))

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) < len(found):
            raise ValueError("a key is there twice")
        return made

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    try:
        return json.loads(raw.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not readable as JSON: {str(error)[:200]}", where=str(where)) from error


# ---- writing --------------------------------------------------------------------------------------------------------


class Hashed:
    """Writes bytes to a new file and hashes each chunk of it."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "xb", buffering=0)
        self.hashes: list[str] = []
        self.size, self.current = 0, hashlib.sha256()

    def write(self, data: memoryview) -> None:
        while len(data):
            part = data[: CHUNK - self.size % CHUNK]
            written = self.file.write(part)
            assert written is not None
            self.current.update(part[:written])
            self.size += written
            if self.size % CHUNK == 0:
                self._end_chunk()
            data = data[written:]

    def _end_chunk(self) -> None:
        self.hashes.append(self.current.hexdigest())
        self.current = hashlib.sha256()

    def close(self) -> None:
        """Make sure that it is on disk."""
        if self.size % CHUNK:
            self._end_chunk()
        os.fsync(self.file.fileno())
        self.file.close()


def write(
    path: Path, sources: Iterable[Source], metadata: Mapping[str, str] | None = None, pause: Callable[[], None] = lambda: None
) -> tuple[int, list[str]]:
    """Write a new file. `pause` is called between tensors and may raise. Returns (size, hashes). Raises OSError."""
    ordered = in_order(sources)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for source in ordered:
        header[source.key] = {"dtype": NAMES[source.dtype], "shape": list(source.shape), "data_offsets": [at, at + source.bytes]}
        at += source.bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out = Hashed(path)
    try:
        out.write(memoryview(len(text).to_bytes(8, "little") + text))
        for source in ordered:
            pause()
            out.write(tensor_bytes(source.make(), source))
    except BaseException:
        out.file.close()
        raise
    out.close()
    return out.size, out.hashes


def in_order(sources: Iterable[Source]) -> list[Source]:
    """As they are written: so that every tensor is aligned."""
    return sorted(sources, key=lambda s: (-s.dtype.itemsize, s.key))


def tensor_bytes(tensor: torch.Tensor, source: Source) -> memoryview:
    assert tuple(tensor.shape) == source.shape and tensor.dtype == source.dtype, (source.key, tensor.shape, tensor.dtype)
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]


# ---- reading --------------------------------------------------------------------------------------------------------


class BlockFile:
    """A file to read from. With `hashes` (and then the `size`), nothing is handed out that wasn't checked."""

    def __init__(self, path: Path, hashes: Sequence[str] | None = None, size: int | None = None, follow: bool = False) -> None:
        self.path, self.hashes = path, hashes
        self.kept: OrderedDict[int, bytes] = OrderedDict()
        self.fd = open_regular(path, follow)
        try:
            self.size = os.fstat(self.fd).st_size
            if size is not None and self.size != size:
                raise self.error(f"{self.size} bytes, expected {size}")
            if hashes is not None and len(hashes) != -(-self.size // CHUNK):
                raise self.error(f"{len(hashes)} hashes for {self.size} bytes")
            self.entries = self._header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(message, where=str(self.path))

    def _header(self) -> dict[str, Entry]:
        if self.size < 8:
            raise self.error("too short for a safetensors file")
        length = int.from_bytes(self.span(0, 8), "little")
        if length > min(self.size - 8, MAX_HEADER):
            raise self.error(f"its header claims {length} bytes of a file of {self.size}")
        header = strict_json(bytes(self.span(8, 8 + length)), self.path, MAX_HEADER)
        if not isinstance(header, dict):
            raise self.error("its header is not a JSON object")
        header.pop("__metadata__", None)
        entries = {key: self._entry(key, value, 8 + length) for key, value in header.items()}
        at = 8 + length
        for key, entry in sorted(entries.items(), key=lambda e: (e[1].start, e[1].stop)):
            if entry.start != at:
                raise self.error(f"tensors overlap or leave a hole before {key[:100]!r}")
            at = entry.stop
        if at != self.size:
            raise self.error(f"its tensors end at byte {at} of {self.size}")
        return entries

    def _entry(self, key: str, value: Any, base: int) -> Entry:
        try:
            dtype, shape, (start, stop) = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
            good = all(type(i) is int and 0 <= i <= MAX_ELEMENTS for i in (*shape, start, stop)) and len(shape) <= MAX_DIMS
        except (KeyError, TypeError, ValueError):
            good = False
        if not good or stop - start != math.prod(shape) * dtype.itemsize:
            raise self.error(f"its header lies about {key[:100]!r}: {str(value)[:200]}")
        return Entry(dtype, tuple(shape), base + start, base + stop)

    def read(self, key: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """A tensor, or rows [first, last) of it."""
        entry = self.entries[key]
        shape = entry.shape
        start, stop = entry.start, entry.stop
        if shape and last is not None:
            row = (stop - start) // shape[0] if shape[0] else 0
            start, stop, shape = entry.start + first * row, entry.start + last * row, (last - first, *shape[1:])
        if not math.prod(shape):
            return torch.empty(shape, dtype=entry.dtype)
        return torch.frombuffer(self.span(start, stop), dtype=entry.dtype).reshape(shape)

    def span(self, start: int, stop: int) -> bytearray:
        """These bytes, checked."""
        out = bytearray(stop - start)
        if self.hashes is None:
            self._read_into(memoryview(out), start)
            return out
        for i in range(start // CHUNK, -(-stop // CHUNK)):
            a, b = max(start, i * CHUNK), min(stop, (i + 1) * CHUNK)
            out[a - start : b - start] = memoryview(self.chunk(i))[a - i * CHUNK : b - i * CHUNK]
        return out

    def chunk(self, i: int) -> bytes:
        if i in self.kept:
            return self.kept[i]
        assert self.hashes is not None
        data = bytearray(min(CHUNK, self.size - i * CHUNK))
        self._read_into(memoryview(data), i * CHUNK)
        if hashlib.sha256(data).hexdigest() != self.hashes[i]:
            raise self.error(f"damaged: bytes {i * CHUNK} to {i * CHUNK + len(data)} don't have the hash that the manifest gives")
        self.kept[i] = bytes(data)
        while len(self.kept) > KEPT_CHUNKS:
            self.kept.popitem(last=False)
        return self.kept[i]

    def _read_into(self, out: memoryview, at: int) -> None:
        try:
            while len(out):
                got = os.preadv(self.fd, [out], at)
                if not got:
                    raise self.error(f"ends at byte {at}")
                at, out = at + got, out[got:]
        except OSError as error:
            raise self.error(f"can't be read: {error.strerror}") from error

    def check(self) -> None:
        """Read all of it."""
        assert self.hashes is not None
        for i in range(len(self.hashes)):
            self.chunk(i)


def open_regular(path: Path, follow: bool = False) -> int:
    """A file descriptor of a regular file, which is no symbolic link unless `follow`. Raises CheckpointError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        why = "a symbolic link" if path.is_symlink() else error.strerror
        raise CheckpointError(f"can't be opened: {why}", where=str(path)) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError("not a regular file", where=str(path))
    return fd


def read_small(path: Path, most: int, follow: bool = False) -> bytes:
    """A file of at most so many bytes. Raises CheckpointError."""
    fd = open_regular(path, follow)
    with os.fdopen(fd, "rb") as file:
        if (size := os.fstat(fd).st_size) > most:
            raise CheckpointError(f"{size} bytes, expected at most {most}", where=str(path))
        return file.read(most)
