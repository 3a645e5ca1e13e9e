"""Data: what a seed decides, exact resuming, and token files that are not to be trusted."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoshard.config import DataSource
from autoshard.errors import DataError
from autoshard.runtime.data import Array, Batches, Stream, open_sources, shuffled, split
from autoshard.runtime.indexed import Indexed

FIELDS = {"tokens": "tokens", "targets": "next"}


def streams(*sizes: int, weights: tuple[float, ...] = ()) -> list[Stream]:
    made = [Stream(f"s{i}", Array(np.arange(n) + 10_000 * i)) for i, n in enumerate(sizes)]
    for stream, weight in zip(made, weights, strict=False):
        stream.weight = weight
    return made


def batches(order: str = "random", **options: Any) -> Batches:
    given = {"seq": 8, "batch": 4, "order": order, "seed": 3, "fields": FIELDS} | options
    return Batches(given.pop("streams", streams(1000, 500, weights=(3, 1))), **given)


@pytest.mark.parametrize("order", ["random", "shuffled", "sequential"])
def test_resuming_is_exact(order: str) -> None:
    whole = batches(order)
    seen = [next(whole) for _ in range(40)]
    again = batches(order)
    for _ in range(13):
        next(again)
    resumed = batches(order)
    resumed.restore(json.loads(json.dumps(again.state())))
    for expected in seen[13:]:
        found = next(resumed)
        assert all(torch.equal(found[k], expected[k]) for k in FIELDS)


def test_targets_are_one_further() -> None:
    batch = next(batches())
    assert batch["tokens"].dtype == torch.int64 and batch["tokens"].shape == (4, 8)
    assert torch.equal(batch["tokens"] + 1, batch["targets"])


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_an_epoch_has_each_window_once(order: str) -> None:
    data = batches(order, streams=streams(81), batch=10)
    for _ in range(2):
        firsts = sorted(next(data)["tokens"][:, 0].tolist())
        assert firsts == list(range(0, 80, 8))


def test_the_blend_has_its_weights() -> None:
    data = batches(streams=streams(1000, 1000, 1000, weights=(5, 3, 2)), batch=100)
    next(data)
    assert data.taken == [50, 30, 20]


def test_shuffled_is_a_permutation() -> None:
    for count in (1, 2, 3, 17, 64, 100):
        assert sorted(shuffled(i, count, 1) for i in range(count)) == list(range(count))
    assert [shuffled(i, 100, 1) for i in range(100)] != [shuffled(i, 100, 2) for i in range(100)]


def test_another_seed_draws_other_windows() -> None:
    assert not torch.equal(next(batches())["tokens"], next(batches(seed=4))["tokens"])


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"seq": 7}, "seq"), ({"seed": 9}, "seed"), ({"order": "shuffled"}, "order"), ({"streams": streams(1000)}, "same sources")],
)
def test_a_state_of_other_data_is_refused(changed: dict[str, Any], says: str) -> None:
    state = batches().state()
    with pytest.raises(DataError, match=says):
        batches(**changed).restore(state)
    for bad in (None, {}, state | {"taken": [1]}, state | {"taken": [-1, 0]}, state | {"taken": ["a", 0]}):
        with pytest.raises(DataError):
            batches().restore(bad)


def test_tokens_that_the_model_does_not_know() -> None:
    with pytest.raises(DataError, match="the model knows 100 ids"):
        next(batches(streams=streams(1000), vocabulary=100, seed=1))
    with pytest.raises(DataError, match="has 8 tokens"):
        batches(streams=streams(8))


def test_the_tail_is_held_out() -> None:
    train, held = split(streams(1000, 20), 0.1, 9)
    assert [len(s.tokens) for s in train] == [900, 20] and [len(s.tokens) for s in held] == [100]
    assert held[0].tokens.take(0, 2).tolist() == [900, 901]


def test_text_and_token_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"world")
    (tmp_path / "a.txt").write_bytes(b"hello ")
    for path in (str(tmp_path), str(tmp_path / "*.txt")):
        (stream,) = open_sources([DataSource(path)])
        assert bytes(stream.tokens.take(0, len(stream.tokens)).astype(np.uint8)) == b"hello world"
    np.array([1, 2, 70000], np.uint32).tofile(tmp_path / "t.bin")
    (stream,) = open_sources([DataSource(str(tmp_path / "t.bin"), "tokens", "uint32")])
    assert stream.tokens.take(1, 2).tolist() == [2, 70000]
    (tmp_path / "odd.bin").write_bytes(b"123")
    for source in (
        DataSource(str(tmp_path / "odd.bin"), "tokens"),
        DataSource(str(tmp_path / "none.bin"), "tokens"),
        DataSource("no/*.txt"),
    ):
        with pytest.raises(DataError):
            open_sources([source])
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        open_sources([DataSource(str(tmp_path / "a.txt"))], str(tmp_path))


# ---- Megatron's files, byte by byte ---------------------------------------------------------------------------------


def index(lengths: list[int], pointers: list[int], documents: list[int], code: int = 8, version: int = 1) -> bytes:
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, len(lengths), len(documents))
    parts = (struct.pack(f"<{len(lengths)}i", *lengths), struct.pack(f"<{len(pointers)}q", *pointers))
    return head + b"".join(parts) + struct.pack(f"<{len(documents)}q", *documents)


def megatron(folder: Path, idx: bytes, data: bytes) -> str:
    (folder / "d.idx").write_bytes(idx)
    (folder / "d.bin").write_bytes(data)
    return str(folder / "d")


def test_sequences_of_an_index(tmp_path: Path) -> None:
    data = struct.pack("<6H", 1, 2, 3, 4, 5, 60000)
    found = Indexed(megatron(tmp_path, index([2, 3, 1], [0, 4, 10], [0, 1, 3]), data))
    assert len(found) == 6 and found.take(1, 4).tolist() == [2, 3, 4, 5] and found.take(5, 1).tolist() == [60000]
    assert list(found.documents) == [0, 1, 3]
    out_of_order = Indexed(megatron(tmp_path, index([3, 0, 2], [6, 0, 0], [0, 3]), data))
    assert out_of_order.take(0, 5).tolist() == [4, 5, 60000, 1, 2] and out_of_order.take(2, 2).tolist() == [60000, 1]
    wide = Indexed(megatron(tmp_path, index([2], [0], [0, 1], code=4), struct.pack("<2i", 7, 100000)))
    assert wide.take(0, 2).tolist() == [7, 100000]
    (stream,) = open_sources([DataSource(str(tmp_path / "d.bin"), "megatron")])
    assert len(stream.tokens) == 2


GOOD = index([2, 3, 1], [0, 4, 10], [0, 1, 3])


@pytest.mark.parametrize(
    "idx",
    [
        b"", b"MMIDIDX", b"NOTMAGIC!" + GOOD[9:], GOOD[:-1], GOOD[:40], GOOD + b"\0" * 8, index([2], [0], [0, 1], version=2),
        index([2], [0], [0, 1], code=99), index([2], [0], [0, 1], code=6), index([-1], [0], [0, 1]), index([2], [-4], [0, 1]),
        index([2], [1], [0, 1]), index([7], [0], [0, 1]), index([1], [12], [0, 1]), index([2], [2**62], [0, 1]),
        index([2**31 - 1], [0], [0, 1]), index([2], [0], [0, 9]), index([2], [0], [1, 0]), index([2], [0], [-1, 1]),
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2**63, 1), b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2**40, 2**60),
    ],
)  # fmt: skip
def test_hostile_indices_are_refused(tmp_path: Path, idx: bytes) -> None:
    with pytest.raises(DataError):
        Indexed(megatron(tmp_path, idx, struct.pack("<6H", *range(6))))


def test_flipped_bytes_never_read_outside(tmp_path: Path) -> None:
    """Each byte of the index, set to several others: refused, or read within the file."""
    for at in range(len(GOOD)):
        for value in (0, 1, 127, 255):
            idx = bytearray(GOOD)
            idx[at] = value
            try:
                found = Indexed(megatron(tmp_path, bytes(idx), struct.pack("<6H", *range(6))))
            except DataError:
                continue
            assert len(found.take(0, len(found))) == len(found)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.idx"):
        Indexed(tmp_path / "none")
