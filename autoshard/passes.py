"""Run a list of passes over an artifact: verify, time and dump in one place, so that no pass does any of it.

In: an artifact (a captured graph, a program, …) and an ordered list of functions from that artifact to the same kind. Out: the last result.

>>> def double(text): return text * 2
>>> def shout(text): return text.upper()
>>> times = {}
>>> run_passes("ab", [double, shout], times=times)
'ABAB'
>>> list(times)
['double', 'shout']
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Pass = Callable[[T], T]


def run_passes(
    artifact: T,
    passes: Sequence[Pass[T]],
    *,
    verify: Callable[[T], None] | None = None,
    times: dict[str, float] | None = None,
    dump: str | Path | None = None,
) -> T:
    """Apply `passes` in order. `verify` runs after each; `times` receives seconds by pass name; `dump` a folder for each result's text.

    An AssertionError out of a pass or of `verify` is re-raised with the pass's name, since it can only mean a bug in that pass.
    """
    for i, step in enumerate(passes):
        started = time.perf_counter()
        try:
            artifact = step(artifact)
            if verify is not None:
                verify(artifact)
        except AssertionError as error:
            raise AssertionError(f"pass {step.__name__}: {error}") from error
        if times is not None:
            times[step.__name__] = times.get(step.__name__, 0.0) + time.perf_counter() - started
        if dump is not None:
            folder = Path(dump)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:02d}_{step.__name__}.txt").write_text(f"# after {step.__name__}\n{artifact}\n")
    return artifact
