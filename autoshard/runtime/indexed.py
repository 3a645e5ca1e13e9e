"""Megatron's indexed data sets: a `.bin` of token ids and an `.idx` that says where each sequence lies.

In: the path without `.bin`. Out: `Indexed`, one long stream of tokens in the order of the sequences. The index is untrusted: its magic,
version, counts, lengths and pointers are checked against the sizes of both files before anything is read through them.

Layout of the index: b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 sequences, uint64 document bounds, then int32 lengths,
int64 byte offsets into `.bin`, int64 document bounds.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
"""Megatron's codes. Floating types are no tokens, and are refused."""


class Indexed:
    """Tokens of `PATH.bin`, as `PATH.idx` orders them. Raises DataError where the two don't fit."""

    def __init__(self, path: str | Path) -> None:
        text = str(path).removesuffix(".bin").removesuffix(".idx")
        self.index, self.data = Path(f"{text}.idx"), Path(f"{text}.bin")
        sizes = {}
        for file in (self.index, self.data):
            try:
                sizes[file] = file.stat().st_size
            except OSError as error:
                raise DataError(f"can't read {file}: {error.strerror}", hint="a Megatron data set is a .bin and an .idx") from error
        with open(self.index, "rb") as opened:
            head = opened.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise DataError(f"{self.index} is not a Megatron index: it doesn't begin with {MAGIC!r}")
        _, version, code, sequences, documents = HEADER.unpack(head)
        if version != 1:
            raise DataError(f"{self.index} is an index of version {version}, expected 1")
        dtype = DTYPES.get(code)
        if dtype is None or np.issubdtype(dtype, np.floating):
            raise DataError(f"{self.index} says dtype {code}, which isn't one of token ids", hint="expected 1, 2, 3, 4, 5 or 8")
        expected = HEADER.size + sequences * 12 + documents * 8
        # newer writers add one byte of mode a sequence
        if sizes[self.index] not in (expected, expected + sequences):
            raise DataError(
                f"{self.index} has {sizes[self.index]} bytes, but {sequences} sequences and {documents} document bounds take {expected}"
            )
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._read(sequences, documents, sizes[self.data])

    def _read(self, sequences: int, documents: int, data_bytes: int) -> None:
        def column(dtype: str, count: int, offset: int) -> np.ndarray:
            if not count:
                return np.empty(0, dtype)
            return np.memmap(self.index, dtype=dtype, mode="r", offset=offset, shape=(count,))

        self.lengths = column("<i4", sequences, HEADER.size)
        self.pointers = column("<i8", sequences, HEADER.size + 4 * sequences)
        self.documents = column("<i8", documents, HEADER.size + 12 * sequences)
        item = self.dtype.itemsize
        lengths = self.lengths.astype(np.int64)
        if sequences:
            self._refuse(lengths < 0, "a negative length")
            self._refuse(self.pointers < 0, "a negative offset")
            self._refuse(self.pointers % item != 0, f"an offset that isn't a multiple of {item}")
            # compared in this order, so that nothing overflows
            self._refuse(self.pointers > data_bytes, "an offset past the end of the data")
            self._refuse(lengths * item > data_bytes - self.pointers, "an end past the end of the data")
        if documents:
            bounds = np.asarray(self.documents)
            if bounds[0] < 0 or bounds[-1] > sequences or (np.diff(bounds) < 0).any():
                raise DataError(f"{self.index}: document bounds must rise from 0 to {sequences}, found {bounds[:3].tolist()} …")
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        """Where each sequence begins in the stream."""
        self.tokens = np.memmap(self.data, dtype=self.dtype, mode="r", shape=(data_bytes // item,)) if data_bytes >= item else None
        self.contiguous = bool((self.pointers == self.starts[:-1] * item).all())

    def _refuse(self, bad: np.ndarray, what: str) -> None:
        if bad.any():
            raise DataError(f"{self.index}: sequence {int(np.argmax(bad))} has {what}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, start: int, count: int) -> np.ndarray:
        """`count` tokens of the stream from `start` on, int64."""
        assert 0 <= start and start + count <= len(self), (start, count)
        if self.tokens is None or not count:
            return np.empty(0, np.int64)
        if self.contiguous:
            return self.tokens[start : start + count].astype(np.int64)
        parts, sequence = [], int(np.searchsorted(self.starts, start, side="right")) - 1
        while count:
            inside = start - int(self.starts[sequence])
            here = min(count, int(self.lengths[sequence]) - inside)
            first = int(self.pointers[sequence]) // self.dtype.itemsize + inside
            parts.append(self.tokens[first : first + here])
            start, count, sequence = start + here, count - here, sequence + 1
        return np.concatenate(parts).astype(np.int64)
