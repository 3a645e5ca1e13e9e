"""Text for the examples: the source of Python's own standard library, as bytes.

`standard_library()` returns two byte tensors, to train on and to hold out (whole files: those whose name hashes to it).
`batches(text, …)` cuts random windows with a seed of its own, so that every process draws the same global batches.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 20
"""One file in this many is held out."""


def standard_library() -> tuple[Tensor, Tensor]:
    """Training and held-out text, uint8[bytes]."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
    train, held = bytearray(), bytearray()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skipped.intersection(name.parts):
            continue
        text = path.read_bytes()
        (held if zlib.crc32(name.as_posix().encode()) % HELD_OUT == 0 else train).extend(text)
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held, dtype=torch.uint8)


def batches(text: Tensor, *, batch: int, seq: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless random windows: {"tokens", "targets"}, each int64[batch, seq], targets one byte further."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(seq + 1)
    while True:
        starts = torch.randint(len(text) - seq, (batch, 1), generator=generator)
        drawn = text[starts + window].long()
        yield {"tokens": drawn[:, :-1], "targets": drawn[:, 1:].contiguous()}
