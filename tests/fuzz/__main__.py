"""python -m tests.fuzz [--count 1000] [--seed 0] [--jobs 2] [--full-every 20] [--bugs [NAME …]]

Compares random graphs on random meshes with one device and prints each mismatch as a script of a few lines; or, with --bugs, how soon
each planted bug is found.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import functools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .bugs import BUGS
from .hunt import FULL_EVERY, Find, Result, fuzz, hunt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="random graphs on random meshes, against one device")
    parser.add_argument("--count", type=int, default=1000, help="graphs to run, or to try for each bug")
    parser.add_argument("--seed", type=int, default=0, help="the first graph")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--full-every", type=int, default=FULL_EVERY, help="one graph in so many runs differentiated as well")
    parser.add_argument("--bugs", nargs="*", metavar="NAME", help="plant bugs (all of them) and say which graph finds each")
    options = parser.parse_args(argv)
    if options.bugs is not None:
        names = [n for n in BUGS if not options.bugs or any(part in n for part in options.bugs)]
        return find_bugs(names, options)
    return compare(options)


def spread(fn: Callable[[Any], Any], items: Sequence[Any], jobs: int) -> Iterator[Any]:
    if jobs == 1:
        yield from map(fn, items)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(fn, items)


def compare(options: argparse.Namespace) -> int:
    start, results = time.monotonic(), []
    run = functools.partial(fuzz, full_every=options.full_every)
    for result in spread(run, range(options.seed, options.seed + options.count), options.jobs):
        results.append(result)
        if result.failure:
            print(f"\n{result.failure}\n", flush=True)
        if len(results) % 100 == 0:
            wrong = sum(bool(r.failure) for r in results)
            print(f"{len(results):6d} graphs, {wrong} mismatches, {time.monotonic() - start:.0f} s", flush=True)
    print(summary(results, time.monotonic() - start))
    return 1 if any(r.failure for r in results) else 0


def summary(results: Sequence[Result], seconds: float) -> str:
    ran = [r for r in results if not r.skipped]
    ranks = Counter(_ranks(r.mesh) for r in ran)
    targets = Counter(t for r in ran for t in set(r.targets))
    lines = [
        f"{len(ran)} graphs of {min(r.ops for r in ran)} to {max(r.ops for r in ran)} ops, {len(targets)} kinds of them",
        f"{sum(r.full for r in ran)} of them differentiated too, {len(results) - len(ran)} without a plan (skipped), {seconds:.0f} s",
        "ranks   " + "  ".join(f"{n}: {k}" for n, k in sorted(ranks.items())),
        "rarest  " + "  ".join(f"{t.removeprefix('aten.')} {n}" for t, n in targets.most_common()[:-9:-1]),
        f"{sum(bool(r.failure) for r in ran)} mismatches",
    ]
    return "\n".join(lines)


def _ranks(mesh: str) -> int:
    n = 1
    for pair in mesh.split():
        n *= int(pair.partition("=")[2])
    return n


def find_bugs(names: Sequence[str], options: argparse.Namespace) -> int:
    missed = []
    print(f"{'bug':45} {'graph':>5} {'s':>5} {'lines':>5}  what differs")
    run = functools.partial(hunt, count=options.count, seed=options.seed, shrinking=20.0)
    finds: Iterator[Find] = spread(run, names, options.jobs)
    for find in finds:
        if find.seed is None or find.failure is None or find.small is None:
            missed.append(find.name)
            print(f"{find.name:45} {'-':>5} {find.seconds:5.0f} {'-':>5}  not found in {find.tried} graphs", flush=True)
        else:
            lines = find.small.script.count("\n") + 1
            what = str(find.failure).splitlines()[0][:90]
            print(f"{find.name:45} {find.seed:5d} {find.seconds:5.0f} {lines:5d}  {what}", flush=True)
    print(f"{len(names) - len(missed)} of {len(names)} bugs found within {options.count} graphs each")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
