"""Many tensors in one launch: what an optimizer does to all parameters or gradients, without a launch for each.

A launch is given a table on the device: of each tensor its elements and the addresses of what belongs together (parameter, gradient,
moments, …), and of each program which chunk of which tensor is its own. Tensors of one kind share a launch: equal dtypes, and aligned (16
bytes wide loads) or not. The table is brought over anew, without waiting, when an address has changed.

    not_finite   1 where some element isn't finite, else 0                   reads once
    squares      Σ x², in a fixed order                                      reads once
    scale_       x ← c · x; nothing for c = 1                                reads and writes once, or nothing
    adam_        one step of Adam or AdamW, the formulas of `adamw`          reads and writes once

Triton only (`applies`): elsewhere torch's foreach does the same.
"""

# shapes: rows [tensors, 1 + columns, made even], where [programs, 2]; found, coefficient, skip, a rate on the device: one number each

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import backend

CHUNK = 16384  # elements of a program; a multiple of the blocks
BLOCK = 1024  # elements that a program steps at once: 16 bytes of bf16 for each thread of four warps
MASTER_BLOCK = 512  # with masters: 16 bytes of float32 for each, so that bf16 and float32 lie in threads alike, without shared memory
READ_BLOCK = 2048  # of one that only reads
WARPS = 4
DTYPES = (torch.float32, *backend.HALF)
ALIGNED = 16  # bytes of an address, and elements of a tensor
PARAM, GRAD, FIRST, SECOND, STEP, MASTER = range(6)
"""The columns of `adam_`."""

Row = tuple[Tensor | None, ...]


def applies(tensor: Tensor) -> bool:
    return backend.fused(tensor) and tensor.is_contiguous() and tensor.dtype in DTYPES


@dataclass(frozen=True)
class Launch:
    """Tensors of one kind. `kind`: what the caller tells them apart by."""

    kind: Hashable
    dtypes: tuple[torch.dtype | None, ...]
    aligned: bool
    rows: Tensor
    where: Tensor

    def settings(self, block: int) -> dict[str, Any]:
        return {"WIDTH": self.rows.shape[1], "ALIGNED": self.aligned, "CHUNK": CHUNK, "BLOCK": block, "num_warps": WARPS}


class Table:
    """Makes launches of rows of tensors; those of the last time where no address has changed. The first tensor of a row says how many
    elements its others have (or one; then programs read it as a number)."""

    def __init__(self) -> None:
        self.key: list[Any] = []
        self.launches: list[Launch] = []
        self.places: dict[tuple[int, ...], Tensor] = {}
        """Elements of a launch's tensors → which program does what; those of the last time."""

    def of(self, given: Sequence[tuple[Hashable, Row]]) -> list[Launch]:
        key: list[Any] = [CHUNK]
        for kind, row in given:
            key += (kind, None if row[0] is None else row[0].numel())
            for x in row:
                if x is None:
                    key.append(None)
                else:
                    key += (x.data_ptr(), x.dtype)
        if key != self.key:
            self.launches, self.key = self._make(given), key
        return self.launches

    def _make(self, given: Sequence[tuple[Hashable, Row]]) -> list[Launch]:
        sorts: dict[tuple[Hashable, tuple[torch.dtype | None, ...], bool], list[tuple[int, ...]]] = {}
        for kind, row in given:
            first = row[0]
            assert first is not None
            n = first.numel()
            odd = next((x for x in row if x is not None and not (x.numel() in (n, 1) and x.is_contiguous() and x.dtype in DTYPES)), None)
            if odd is not None:
                raise ValueError(
                    f"found a {odd.dtype} tensor of {list(odd.shape)}, strides {odd.stride()}; expected {list(first.shape)}, dense, of "
                    f"{', '.join(map(str, DTYPES))}"
                )
            if n:
                wide = [x for x in row if x is not None and x.numel() == n]
                aligned = n % ALIGNED == 0 and all(x.data_ptr() % ALIGNED == 0 for x in wide)
                # an even number, so that every launch's rows begin at 16 bytes: Triton compiles anew for others
                facts = (n, *(0 if x is None else x.data_ptr() for x in row), *(0,) * (1 - len(row) % 2))
                sorts.setdefault((kind, tuple(x if x is None else x.dtype for x in row), aligned), []).append(facts)
        if not sorts:
            return []
        device = next(x.device for _, row in given for x in row if x is not None)
        rows = _brought(np.array([row for group in sorts.values() for row in group], dtype=np.int64), device)
        before, self.places = self.places, {}  # by the chunks' size, too: it may be tuned
        launches, at = [], 0
        for (kind, dtypes, aligned), group in sorts.items():
            sizes = tuple(row[0] for row in group)
            where = before.get((CHUNK, *sizes))
            self.places[CHUNK, *sizes] = where = _brought(_where(sizes), device) if where is None else where
            launches.append(Launch(kind, dtypes, aligned, rows[at : at + len(group)], where))
            at += len(group)
        return launches


def _where(sizes: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Of each program: the row, and the chunk in it.

    >>> _where((1, CHUNK + 1)).tolist()
    [[0, 0], [1, 0], [1, 1]]
    """
    counts = np.array([backend.blocks(n, CHUNK) for n in sizes])
    chunks = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.stack((np.repeat(np.arange(len(sizes)), counts), chunks), 1).astype(np.int32)


def _brought(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """On the device, without waiting for it: pinned memory isn't given to anyone else before the copy is done."""
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def not_finite(launches: Sequence[Launch], column: int, found: Tensor) -> None:
    """`found` (float32) becomes 1 where an element isn't finite, and stays what it was where all are."""
    from .device import many as device

    for x in launches:
        with torch.cuda.device_of(x.rows):
            device.many_not_finite[(x.where.shape[0],)](
                x.rows, x.where, found, COLUMN=column, DTYPE=_language(x.dtypes[column]), **x.settings(READ_BLOCK)
            )


def squares(launches: Sequence[Launch], column: int) -> list[Tensor]:
    """Per launch, the sum of squares. (float32)"""
    from .device import many as device

    sums = []
    for x in launches:
        with torch.cuda.device_of(x.rows):
            partials = torch.empty(x.where.shape[0], dtype=torch.float32, device=x.rows.device)
            device.many_squares[(x.where.shape[0],)](
                x.rows, x.where, partials, COLUMN=column, DTYPE=_language(x.dtypes[column]), **x.settings(READ_BLOCK)
            )
            sums.append(partials.sum())
    return sums


def scale_(launches: Sequence[Launch], column: int, coefficient: Tensor) -> None:
    from .device import many as device

    for x in launches:
        with torch.cuda.device_of(x.rows):
            device.many_scale[(x.where.shape[0],)](
                x.rows, x.where, coefficient, COLUMN=column, DTYPE=_language(x.dtypes[column]), **x.settings(READ_BLOCK)
            )


@dataclass(frozen=True)
class Rates:
    """The numbers of a step. `decoupled`: AdamW's decay, not a term of the gradient."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool


def adam_(x: Launch, rates: Rates, skip: Tensor) -> None:
    """One step of what a launch holds: columns as named above, the step counted already; nothing where `skip` isn't 0."""
    from .device import many as device

    log1, log2 = (math.log(beta) if beta > 0 else -1e30 for beta in (rates.beta1, rates.beta2))
    kinds = {name: _language(x.dtypes[i]) for name, i in (("PARAM", PARAM), ("GRAD", GRAD), ("FIRST", FIRST), ("SECOND", SECOND))}
    master = x.dtypes[MASTER]
    with torch.cuda.device_of(x.rows):
        device.many_adam[(x.where.shape[0],)](
            x.rows, x.where, skip, rates.lr, rates.beta1, rates.beta2, 1 - rates.beta1, 1 - rates.beta2, log1, log2, rates.eps,
            rates.weight_decay, **kinds, MASTER=_language(master), DECOUPLED=rates.decoupled, RATE_AT=isinstance(rates.lr, Tensor),
            **x.settings(BLOCK if master is None else MASTER_BLOCK),
        )  # fmt: skip


def _language(dtype: torch.dtype | None) -> Any:
    return None if dtype is None else backend.language(dtype)
