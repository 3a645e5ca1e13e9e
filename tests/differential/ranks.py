"""Real gloo ranks, forked from this process (what it has imported, captured and compiled, they have), against an expected outcome."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from tests.runtime.ranks import ranks

from .compare import Difference, compare
from .reference import Outcome, Settings, Trainer, follow


def on_ranks(count: int, make: Callable[[], Trainer], kwargs: dict[str, Any], settings: Settings, expected: Outcome) -> list[Difference]:
    """Each rank makes its trainer and trains; its worst difference from the expected outcome. Raises what a rank raised."""

    def work() -> Difference:
        return compare(expected, follow(make(), kwargs, settings), settings)[0]

    try:
        return [Difference(f"rank {i}: {d.what}", d.delta, d.allowed, d.note) for i, d in enumerate(ranks(count, work))]
    finally:
        for child in multiprocessing.active_children():  # there are some left if we ran out of time
            child.kill()
