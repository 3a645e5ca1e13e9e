"""Random numbers that belong to elements: whoever holds an element of a tensor draws for it what everyone else would.

In: a seed, and where the elements lie in the whole tensor: their rows (numbers of the leading dims, taken as one) and columns (the last
dim). Out: `keep_bits`, a bit an element that is 1 with probability 1 - p, or `random_bits`, 32 random bits an element.

A block of numbers is Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) of the counter (n, low row, high
row, 0 or 1) under the seed's two halves. `random_bits`: the element of column c has word c % 4 of block c // 4, after 10 rounds, the
library's default. `keep_bits`: 32 columns share a word; bit j of random words 0, 1, … are the digits, lowest first, of a number of column
j, which is kept where that isn't less than p. So one operation on words compares a digit of 32 elements, and 16 digits of 32 elements
cost four blocks of 7 rounds, the fewest that pass BigCrush (ibid.; FlashAttention's dropout takes as many).

p is rounded to 16 digits where that changes neither p nor 1 - p by more than a thousandth part, else to 32; `scale` divides by the
probability that is really used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend

WORD, CALL = 32, 4
KEEP_ROUNDS, ROUNDS = 7, 10
LOW = 0xFFFFFFFF
FACTORS, STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def chance(p: float) -> tuple[int, int]:
    """(threshold, digits): dropped is what is less than threshold / 2^digits.

    >>> chance(0.5), chance(0.1), chance(1e-4), chance(1.0)
    ((32768, 16), (6554, 16), (429497, 32), (65536, 16))
    """
    coarse = round(p * 2**16)
    if abs(coarse / 2**16 - p) <= 1e-3 * min(p, 1 - p):
        return coarse, 16
    return min(max(round(p * 2**32), 1), 2**32 - 1), 32


def scale(p: float) -> float:
    """What the elements that are kept are multiplied by."""
    threshold, digits = chance(p)
    left = 2**digits - threshold
    return 2**digits / left if left else 0.0


def words(columns: int) -> int:
    return backend.blocks(columns, WORD)


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor], rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits per counter of four, all as int64."""
    a, b, c, d = counter
    for _ in range(rounds):
        # the product's 64 bits are right, whatever int64 takes its sign to be
        one, two = a * FACTORS[0], c * FACTORS[1]
        a, b, c, d = (two >> 32 & LOW) ^ b ^ key[0], two & LOW, (one >> 32 & LOW) ^ d ^ key[1], one & LOW
        key = (key[0] + STEPS[0]) & LOW, (key[1] + STEPS[1]) & LOW
    return a, b, c, d


def _blocks(seed: Tensor, rows: Tensor, numbers: Tensor, stream: int, rounds: int) -> Tensor:
    """The words of these blocks of each row, in order: int64 [rows, 4 · numbers]."""
    high, low = (rows >> 32 & LOW).unsqueeze(1), (rows & LOW).unsqueeze(1)
    found = philox((numbers, low, high, torch.full_like(low, stream)), (seed & LOW, seed >> 32 & LOW), rounds)
    return torch.stack(found, -1).flatten(1)


def _signed(word: Tensor) -> Tensor:
    """32 bits as int32."""
    return ((word ^ 0x80000000) - 0x80000000).to(torch.int32)


def keep_reference(seed: Tensor, rows: Tensor, columns: int, p: float) -> Tensor:
    threshold, digits = chance(p)
    count, calls = words(columns), digits // CALL
    if threshold >> digits:
        return rows.new_zeros((len(rows), count), dtype=torch.int32)
    keep = rows.new_full((len(rows), count), LOW)
    lowest = (threshold & -threshold).bit_length() - 1 if threshold else digits
    first = lowest // CALL  # below the lowest 1 of p's digits nothing is decided
    numbers = (torch.arange(count, device=rows.device).unsqueeze(1) * calls + torch.arange(first, calls, device=rows.device)).reshape(1, -1)
    drawn = _blocks(seed, rows, numbers, 0, KEEP_ROUNDS).reshape(len(rows), count, digits - CALL * first)
    for digit in range(max(lowest, CALL * first), digits):
        word = drawn[..., digit - CALL * first]
        keep = word & keep if threshold >> digit & 1 else word | keep
    return _signed(keep)


def random_reference(seed: Tensor, rows: Tensor, columns: int, stream: int) -> Tensor:
    numbers = torch.arange(backend.blocks(columns, CALL), device=rows.device).unsqueeze(0)
    return _signed(_blocks(seed, rows, numbers, stream, ROUNDS)[:, :columns])


@torch.library.custom_op("autoshard::keep_bits", mutates_args=())
def keep_bits(seed: Tensor, rows: Tensor, columns: int, p: float) -> Tensor:
    """int32 [rows, words]: bit j % 32 of word j // 32 says whether column j is kept. `seed`: an int64; `rows`: int64, their numbers."""
    if not backend.fused(rows):
        return keep_reference(seed, rows, columns, p)
    found = rows.new_empty((len(rows), words(columns)), dtype=torch.int32)
    fill_keep(found, seed, rows, columns, p, len(rows), (0, found.shape[1], 1))
    return found


def fill_keep(
    found: Tensor, seed: Tensor, rows: Tensor, columns: int, p: float, group: int, strides: tuple[int, int, int], causal: bool = False
) -> None:
    """Write the words by Triton: of row r the word w lies at (r // group, r % group, w) under `strides`. `causal`: those of which row
    r % group would need no column up to its own number are left out."""
    from .device import draws as device

    threshold, digits = chance(p)
    count = words(columns)
    if threshold >> digits:
        found.zero_()
    elif found.numel():
        wide = min(32, backend.power(count))
        device.keep[(backend.blocks(len(rows), TILE // wide), backend.blocks(count, wide))](
            seed, rows, found, len(rows), count, group, *strides, THRESHOLD=threshold, DIGITS=digits, ROUNDS=KEEP_ROUNDS, CAUSAL=causal,
            ROWS=TILE // wide, WORDS=wide, num_warps=4,
        )  # fmt: skip


TILE = 512  # words a program


@torch.library.custom_op("autoshard::random_bits", mutates_args=())
def random_bits(seed: Tensor, rows: Tensor, columns: int, stream: int) -> Tensor:
    """int32 [rows, columns] of 32 random bits each. `stream`: 0, or 1 for as many again."""
    if not backend.fused(rows):
        return random_reference(seed, rows, columns, stream)
    from .device import draws as device

    found = rows.new_empty((len(rows), columns), dtype=torch.int32)
    if found.numel():
        wide = min(64, backend.power(backend.blocks(columns, CALL)))
        grid = backend.blocks(len(rows), TILE // wide), backend.blocks(columns, CALL * wide)
        device.random[grid](
            seed, rows, found, len(rows), columns, stream, ROUNDS=ROUNDS, ROWS=TILE // wide, CALLS=wide, num_warps=4
        )  # fmt: skip
    return found


@keep_bits.register_fake
def _(seed: Tensor, rows: Tensor, columns: int, p: float) -> Tensor:
    return rows.new_empty((rows.shape[0], words(columns)), dtype=torch.int32)


@random_bits.register_fake
def _(seed: Tensor, rows: Tensor, columns: int, stream: int) -> Tensor:
    return rows.new_empty((rows.shape[0], columns), dtype=torch.int32)


def applies(seed: Tensor, rows: Tensor, *_: Any, capability: backend.Capability = None) -> bool:
    return True


def keep_cost(*shapes: backend.Shape, itemsize: int = 4) -> tuple[float, float]:
    """Of a row of one word: how many there are isn't seen by the operands."""
    return 0.0, float(shapes[1][0] * (8 + itemsize))


def random_cost(*shapes: backend.Shape, itemsize: int = 4) -> tuple[float, float]:
    return keep_cost(*shapes, itemsize=itemsize)


def rows_of(at: Sequence[Tensor], full: Sequence[int]) -> Tensor:
    """Numbers of the rows at these positions of the leading dims of a whole tensor of shape `full`: int64 [product of their counts]."""
    found = torch.zeros((1,) * (len(full) - 1), dtype=torch.int64, device=at[0].device)
    stride = 1
    for d in reversed(range(len(full) - 1)):
        found = found + (at[d] * stride).reshape((-1,) + (1,) * (len(full) - 2 - d))
        stride *= full[d]
    return found.reshape(-1)


def unpacked(found: Tensor, column: Tensor | None, columns: int) -> Tensor:
    """Words as a bool an element: of these columns, or of all."""
    if column is not None:
        return (found.index_select(1, column >> 5) >> (column & 31).to(torch.int32) & 1).bool()
    bit = torch.arange(WORD, dtype=torch.int32, device=found.device)
    return (found.unsqueeze(-1) >> bit & 1).bool().reshape(found.shape[0], found.shape[1] * WORD)[:, :columns]
