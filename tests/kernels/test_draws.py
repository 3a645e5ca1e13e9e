"""Draws: the generator's known answers, both ways of making them, shards, and how they are distributed."""

from __future__ import annotations

import pytest
import torch

from autoshard.kernels import draws

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)


def words(counter: int, key: int) -> list[int]:
    """Philox-4x32-10 of one counter whose words are all alike."""
    one = torch.tensor([counter])
    return [int(w) for w in draws.philox((one, one, one, one), (torch.tensor(key), torch.tensor(key)), 10)]


def test_known_answers():
    """Random123's kat_vectors."""
    assert words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(0xFFFFFFFF, 0xFFFFFFFF) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("p", [0.0, 1e-4, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("columns", [1, 31, 100])
def test_bits_are_the_references(way, p, columns):
    rows = torch.tensor([0, 5, 1 << 33, 7])
    assert torch.equal(torch.ops.autoshard.keep_bits(SEED, rows, columns, p), draws.keep_reference(SEED, rows, columns, p))


test_bits_are_the_references = pytest.mark.silent(test_bits_are_the_references)  # nothing is drawn where p is 1


@pytest.mark.parametrize("columns", [1, 6, 70])
def test_numbers_are_the_references(way, columns):
    rows = torch.arange(5) * 11
    for stream in (0, 1):
        found = torch.ops.autoshard.random_bits(SEED, rows, columns, stream)
        assert torch.equal(found, draws.random_reference(SEED, rows, columns, stream))


def test_a_part_draws_what_the_whole_draws():
    full = (3, 4, 75)
    at = [torch.arange(n) for n in full]
    whole = draws.unpacked(draws.keep_reference(SEED, draws.rows_of(at, full), 75, 0.3), None, 75).reshape(full)
    part = [torch.tensor([2, 0]), torch.arange(1, 3), torch.arange(40, 71)]
    found = draws.unpacked(draws.keep_reference(SEED, draws.rows_of(part, full), 75, 0.3), part[2], 75).reshape(2, 2, 31)
    assert torch.equal(found, whole[part[0]][:, 1:3, 40:71])


@pytest.mark.parametrize("p", [0.1, 0.5, 1e-3])
def test_how_bits_are_distributed(p):
    rows, columns = 512, 512
    kept = draws.unpacked(draws.keep_reference(SEED, torch.arange(rows), columns, p), None, columns).double()
    other = draws.unpacked(draws.keep_reference(SEED + 1, torch.arange(rows), columns, p), None, columns).double()
    q, n = 1 / draws.scale(p), rows * columns
    assert abs(q - (1 - p)) <= 1e-3 * min(p, 1 - p)
    deviation = (q * (1 - q)) ** 0.5
    assert abs(float(kept.mean()) - q) < 4 * deviation / n**0.5
    x, y = (kept - q) / deviation, (other - q) / deviation
    for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x, y), (x[:, 32:], x[:, :-32])):  # neighbours, seeds, words
        assert abs(float((a * b).mean())) < 4 / n**0.5


def test_operators():
    rows = torch.arange(3)
    torch.library.opcheck(torch.ops.autoshard.keep_bits.default, (SEED, rows, 40, 0.1))
    torch.library.opcheck(torch.ops.autoshard.random_bits.default, (SEED, rows, 40, 1))
