"""Batches of text to train on: sources of tokens, blended, in an order that a seed decides and a small dict remembers.

In: `config.DataSource`s. Out: `Batches`, endless global batches {argument: int64[batch, seq]}, the same in every process. Which tokens
a sample takes depends on (seed, source, how many samples of that source came before) alone: the state is those counts, resuming is exact.

>>> import numpy as np
>>> batches = Batches([Stream("a", Array(np.arange(100)))], seq=4, batch=1, order="sequential", fields={"x": "tokens", "y": "next"})
>>> next(batches)["y"], batches.state()["taken"]
(tensor([[1, 2, 3, 4]]), [1])
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ..errors import DataError
from .indexed import Indexed

if TYPE_CHECKING:
    from ..config import DataSource

MAX_TEXT = 1 << 34
"""Bytes of text that are tokenized in memory; more than this belongs in a token file."""


class Tokens(Protocol):
    def __len__(self) -> int: ...

    def take(self, start: int, count: int) -> np.ndarray: ...


class Array:
    """Tokens of one array, in memory or mapped."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def take(self, start: int, count: int) -> np.ndarray:
        return self.values[start : start + count].astype(np.int64)


@dataclass
class Part:
    """A range of other tokens."""

    whole: Tokens
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def take(self, start: int, count: int) -> np.ndarray:
        return self.whole.take(self.start + start, count)


@dataclass
class Stream:
    """One source: its name for messages, its tokens, its weight in the blend."""

    name: str
    tokens: Tokens
    weight: float = 1.0


# ---- reading sources ------------------------------------------------------------------------------------------------


def open_sources(sources: Sequence[DataSource], tokenizer: str = "bytes") -> list[Stream]:
    """Raises DataError."""
    return [Stream(source.path, _open(source, tokenizer), source.weight) for source in sources]


def split(streams: Sequence[Stream], held_out: float, window: int) -> tuple[list[Stream], list[Stream]]:
    """(what to train on, what is held out: the last part of each source). A source too small to give a window gives nothing."""
    train, held = [], []
    for stream in streams:
        count = int(len(stream.tokens) * held_out)
        count = count if count >= window else 0
        train.append(Stream(stream.name, Part(stream.tokens, 0, len(stream.tokens) - count), stream.weight))
        if count:
            held.append(Stream(stream.name, Part(stream.tokens, len(stream.tokens) - count, count), stream.weight))
    return train, held


def _open(source: DataSource, tokenizer: str) -> Tokens:
    if source.format == "megatron":
        return Indexed(source.path)
    if source.format == "tokens":
        path, dtype = Path(source.path), np.dtype(source.dtype)
        size = _size(path)
        if size % dtype.itemsize or not size:
            raise DataError(f"{path} has {size} bytes, which isn't a whole number of {source.dtype}", hint="is dtype right?")
        return Array(np.memmap(path, dtype=dtype, mode="r"))
    return Array(_text(source.path, tokenizer))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}") from error


def _text(pattern: str, tokenizer: str) -> np.ndarray:
    """Tokens of the files that a path or pattern means, sorted by name."""
    path = Path(pattern)
    found = (
        sorted(path.rglob("*"))
        if path.is_dir()
        else [path]
        if path.is_file()
        else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
    )
    files = [p for p in found if p.is_file()]
    if not files:
        raise DataError(f"no file matches {pattern}", hint="give a file, a folder, or a pattern such as corpus/**/*.txt")
    total = sum(map(_size, files))
    if total > MAX_TEXT:
        raise DataError(
            f"{pattern} holds {total} bytes of text; at most {MAX_TEXT} are tokenized in memory", hint="make a token file of it"
        )
    try:
        if tokenizer == "bytes":
            return np.frombuffer(b"".join(p.read_bytes() for p in files), np.uint8)
        encode = _tokenizer(tokenizer)
        parts = [encode(p.read_text("utf-8", errors="replace")) for p in files]
    except OSError as error:
        raise DataError(f"can't read {error.filename}: {error.strerror}") from error
    return np.concatenate(parts) if parts else np.empty(0, np.uint32)


def _tokenizer(folder: str) -> Any:
    """text → token ids, by a Hugging Face tokenizer's folder."""
    from ..errors import ConfigError

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{folder} holds no tokenizer.json", hint="data.tokenizer is bytes, or a Hugging Face tokenizer's folder")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            "a tokenizer's folder needs the package tokenizers, which isn't installed", hint="pip install tokenizers"
        ) from error
    try:
        made = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception for whatever is wrong with a file
        raise DataError(f"{file} is not a tokenizer: {error}") from error
    return lambda text: np.array(made.encode(text).ids, np.uint32)


# ---- batches --------------------------------------------------------------------------------------------------------


class Batches:
    """Endless global batches. `fields`: argument → "tokens" or "next". `vocabulary`: ids that the model knows. Raises DataError."""

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        seq: int,
        batch: int,
        order: str = "random",
        seed: int = 0,
        fields: Mapping[str, str],
        vocabulary: int | None = None,
    ) -> None:
        self.streams, self.seq, self.batch, self.order, self.seed = list(streams), seq, batch, order, seed
        self.fields, self.vocabulary = dict(fields), vocabulary
        self.taken = [0] * len(self.streams)
        for stream in self.streams:
            if len(stream.tokens) < seq + 1:
                raise DataError(f"{stream.name} has {len(stream.tokens)} tokens, but a sample takes {seq + 1}", hint="a shorter data.seq?")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        rows = np.stack([self._sample() for _ in range(self.batch)])
        cut = {"tokens": rows[:, :-1], "next": rows[:, 1:]}
        return {name: torch.from_numpy(np.ascontiguousarray(cut[what])) for name, what in self.fields.items()}

    def _sample(self) -> np.ndarray:
        which = self._which()
        stream, number = self.streams[which], self.taken[which]
        self.taken[which] += 1
        start = self._start(which, number, len(stream.tokens))
        tokens = stream.tokens.take(start, self.seq + 1)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
            known = f"{self.vocabulary} ids" if self.vocabulary else "ids from 0 on"
            raise DataError(
                f"{stream.name} holds token {low if low < 0 else high} near position {start}, but the model knows {known}",
                hint="is the tokenizer, or the dtype of the file, the model's?",
            )
        return tokens

    def _which(self) -> int:
        """The source that lags furthest behind its weight: exact proportions at any length, without drawing."""
        total = sum(s.weight for s in self.streams)
        count = sum(self.taken) + 1
        behind = [s.weight / total * count - taken for s, taken in zip(self.streams, self.taken, strict=True)]
        return max(range(len(behind)), key=behind.__getitem__)

    def _start(self, which: int, number: int, length: int) -> int:
        if self.order == "random":
            return _hash(length - self.seq, self.seed, which, number)
        windows = (length - 1) // self.seq
        epoch, place = divmod(number, windows)
        return self.seq * (place if self.order == "sequential" else shuffled(place, windows, self.seed, which, epoch))

    @property
    def tokens_seen(self) -> int:
        return sum(self.taken) * self.seq

    # ---- where it stands ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What `restore` takes: plain data."""
        sizes = [[s.name, len(s.tokens), s.weight] for s in self.streams]
        return {
            "taken": list(self.taken), "sources": sizes, "seq": self.seq, "order": self.order, "seed": self.seed, "batch": self.batch,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on where `state` was taken (the batch may be another: what comes next is the same). Raises DataError where the data is
        other than it was then."""
        if not isinstance(state, Mapping) or "taken" not in state:
            raise DataError("the checkpoint says nothing of where the data stood")
        now = self.state()
        for name, key in (("seq", "data.seq"), ("order", "data.order"), ("seed", "run.seed")):
            if state.get(name) != now[name]:
                raise DataError(
                    f"the checkpoint's data has {name} {state.get(name)}, but the config says {now[name]}",
                    hint=f"set {key} back, or start anew from its weights (autoshard checkpoint convert, model.pretrained)",
                )
        sizes = [list(s) for s in state.get("sources", [])]
        if [s[1:] for s in sizes] != [s[1:] for s in now["sources"]]:
            raise DataError(
                f"the checkpoint's data was {sizes}, but now it is {now['sources']}",
                hint="give the same sources, in the same order, with the same data.held_out",
            )
        taken = state["taken"]
        if len(taken) != len(self.taken) or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in taken):
            raise DataError(f"the checkpoint's data stood at {taken!r}, which can't be")
        self.taken = list(taken)


def _hash(below: int, *key: int) -> int:
    """A number under `below` that the key decides (uniform to within 2**-64 of its range)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little") % below


def shuffled(place: int, count: int, *key: int) -> int:
    """Where a permutation of range(count) sends a place: a keyed Feistel network, walked until it lands inside. No memory.

    >>> sorted(shuffled(i, 10, 3) for i in range(10)) == list(range(10))
    True
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            left, right = right, left ^ (_hash(1 << half, *key, turn, right))
        place = left << half | right
        if place < count:
            return place
