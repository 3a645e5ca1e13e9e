"""Checkpoints with one thing broken: a bit, a length, two exchanged parts or files. Each has to be refused, with the file named."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from autoshard.errors import CheckpointError
from autoshard.runtime import checkpoint
from autoshard.runtime.in_process import InProcess
from tests.runtime.by_hand import Plain, batch, program


def trained() -> InProcess:
    run = InProcess(program(), Plain())
    optimizer = run.optimizer(torch.optim.AdamW, lr=0.05)
    run.train_step(**batch())
    optimizer.step()
    return run


def flip(file: Path, draw: random.Random) -> list[str]:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return [file.name]


def truncate(file: Path, draw: random.Random) -> list[str]:
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data))])
    return [file.name]


def append(file: Path, draw: random.Random) -> list[str]:
    with file.open("ab") as f:
        f.write(draw.randbytes(draw.randrange(1, 20)))
    return [file.name]


def swap_parts(file: Path, draw: random.Random) -> list[str]:
    data = before = file.read_bytes()
    while data == before:
        size = draw.randrange(1, max(2, len(data) // 3))
        a = draw.randrange(0, len(data) - 2 * size + 1)
        b = draw.randrange(a + size, len(data) - size + 1)
        data = before[:a] + before[b : b + size] + before[a + size : b] + before[a : a + size] + before[b + size :]
    file.write_bytes(data)
    return [file.name]


def swap_files(file: Path, draw: random.Random) -> list[str]:
    other = draw.choice([f for f in sorted(file.parent.iterdir()) if f != file])
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)
    return [file.name, other.name]


def delete(file: Path, draw: random.Random) -> list[str]:
    file.unlink()
    return [file.name]


WAYS: tuple[Callable[[Path, random.Random], list[str]], ...] = (flip, flip, flip, truncate, append, swap_parts, swap_files, delete)


def run(folder: Path, count: int, seed: int = 0) -> str:
    """Raises AssertionError at the first that isn't refused. The figures, as a line."""
    ours = trained()
    whole = ours.save(folder / "good", step=1)
    before = {k: t.clone() for k, t in ours.state_dict().items()}
    other = trained()
    seen: Counter[str] = Counter()
    for i in range(count):
        draw = random.Random(f"{seed} {i}")
        bad = folder / "bad" / whole.name
        shutil.rmtree(bad.parent, ignore_errors=True)
        shutil.copytree(whole, bad)
        way = draw.choice(WAYS)
        named = way(draw.choice(sorted(bad.iterdir())), draw)
        for ask in (lambda: checkpoint.verify(bad), lambda: other.load(bad), lambda: other.load(bad.parent)):
            try:
                ask()
            except CheckpointError as error:
                assert any(name in str(error) for name in named), f"{way.__name__} {i}: {named} are not named in {error}"
            else:
                raise AssertionError(f"{way.__name__} {i} of {named} was loaded")
        seen[way.__name__] += 1
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[key])
    shutil.rmtree(folder / "bad", ignore_errors=True)
    return f"{count} of {count} refused by verify and load, file named: {dict(seen)}"
