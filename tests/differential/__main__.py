"""Run the matrix and print it as a table: `python -m tests.differential [--only FAMILY] [--mesh MESH] [--jobs N] [--sample K --seed S] …`.

Rows are families, columns meshes; a cell says how many trials passed of how many, and the worst distance in units of what is
allowed (at most 1 passes). Every trial that fails goes with its traceback to a file of JSON lines. Exit code 1 if any did.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests import zoo

from .matrix import MESHES, MICROBATCHES, PLANS, Row, Trial, run, sample, trials


def arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.differential", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="FAMILY", help="a family or a pattern (plain_*); may be repeated")
    parser.add_argument("--mesh", action="append", choices=list(MESHES), help="may be repeated; all by default")
    parser.add_argument("--microbatches", action="append", type=int, choices=MICROBATCHES)
    parser.add_argument("--plan", action="append", choices=PLANS)
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    parser.add_argument("--further", action="store_true", help="the families that are tried for breadth, not the listed ones")
    parser.add_argument("--sample", type=int, metavar="K", help="K trials a family instead of all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--ranks", action="store_true", help="each trial on real gloo ranks too, against the in-process player")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; 0 runs in this one, for a debugger")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a trial may take")
    parser.add_argument("--failures", type=Path, default=Path("out/differential.jsonl"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # trials as JSON lines on stdin, rows on stdout
    return parser.parse_args(args)


def chosen(args: argparse.Namespace) -> list[Trial]:
    known = zoo.LISTED + zoo.FURTHER
    families: Sequence[str] = zoo.FURTHER if args.further else zoo.LISTED
    if args.only:
        families = [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.only)]
    if not families:
        raise SystemExit(f"no family matches {', '.join(args.only)}; there are {', '.join(known)}")
    found = trials(families, args.mesh or tuple(MESHES), args.microbatches or MICROBATCHES, args.plan or PLANS, args.dtype)
    return sample(found, args.sample, args.seed) if args.sample else found


def to_json(row: Row) -> str:
    return json.dumps(dataclasses.asdict(row))


def from_json(line: str) -> Row:
    values = json.loads(line)
    return Row(**values | {"trial": Trial(**values["trial"])})


def worker(limit: float, ranks: bool) -> None:
    """Serve one family's trials. Rows go out on a file descriptor of their own, whatever a model prints."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        print(to_json(run(Trial(**json.loads(line)), limit, ranks)), file=out, flush=True)


def in_processes(groups: Iterable[list[Trial]], jobs: int, limit: float, ranks: bool) -> Iterator[Row]:
    """Each family in a process of its own, `jobs` at a time: one that dies costs its own trials only."""
    rows: Queue[Row] = Queue()

    def serve(group: list[Trial]) -> None:
        command = [sys.executable, "-m", "tests.differential", "--worker", "--limit", str(limit), *(["--ranks"] if ranks else [])]
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"} | os.environ
        served = 0
        with tempfile.TemporaryFile("w+") as errors:
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment)
            assert process.stdin and process.stdout
            process.stdin.write("".join(json.dumps(dataclasses.asdict(trial)) + "\n" for trial in group))
            process.stdin.close()
            for line in process.stdout:
                rows.put(from_json(line))
                served += 1
            status = process.wait()
            errors.seek(0)
            said = errors.read()[-4000:]
        for trial in group[served:]:
            rows.put(Row(trial, "error", math.inf, f"its process ended with {status}", trace=said))

    with ThreadPoolExecutor(jobs) as pool:
        groups = list(groups)
        for group in groups:
            pool.submit(serve, group)
        for _ in range(sum(map(len, groups))):
            yield rows.get()


def cell(rows: Sequence[Row]) -> str:
    """ "8/8 0.02", in red with what failed, with ¹ where a plan had to fall back to one microbatch."""
    tried = [row for row in rows if row.status != "n/a"]
    if not tried:
        return "[dim]n/a[/dim]" if rows else ""
    good = sum(row.status == "ok" for row in tried)
    worst = max(row.ratio for row in tried)
    text = f"{good}/{len(tried)} {worst:.2g}" + ("¹" if any(row.notes for row in tried) else "")
    return text if good == len(tried) else f"[bold red]{text}[/bold red]"


def table(rows: Sequence[Row]) -> Table:
    cells: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row.trial.family, row.trial.mesh].append(row)
    meshes = [mesh for mesh in MESHES if any(mesh == column for _, column in cells)]
    caption = "passed/tried, worst distance ÷ allowed; ¹ one microbatch where 4 were asked for"
    result = Table("family", *meshes, caption=caption, highlight=False)
    for family in dict.fromkeys(row.trial.family for row in sorted(rows, key=lambda r: (zoo.LISTED + zoo.FURTHER).index(r.trial.family))):
        result.add_row(family, *(cell(cells[family, mesh]) for mesh in meshes))
    return result


def watch(rows: Iterable[Row], total: int, console: Console, failures: Path) -> list[Row]:
    """Drain the rows behind a progress bar; failures are printed and written as they come."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    failures.parent.mkdir(parents=True, exist_ok=True)
    seen = []
    with failures.open("w") as file, Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("trials", total=total)
        for row in rows:
            seen.append(row)
            progress.update(task, advance=1, description=row.trial.family)
            if not row.passed:
                progress.console.print(f"[red]{row.status}[/red] {row.trial}: {escape(row.worst[:300])}", soft_wrap=True)
                print(to_json(row), file=file, flush=True)
    return seen


def main() -> int:
    args = arguments()
    if args.worker:
        worker(args.limit, args.ranks)
        return 0
    todo = chosen(args)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    groups = [list(group) for _, group in itertools.groupby(todo, key=lambda trial: trial.family)]
    rows = in_processes(groups, args.jobs, args.limit, args.ranks) if args.jobs else (run(t, args.limit, args.ranks) for t in todo)
    seen = watch(rows, len(todo), console, args.failures)
    console.print(table(seen))
    bad = sum(not row.passed for row in seen)
    console.print(f"{len(seen) - bad} of {len(seen)} trials passed" + (f"; the others are in {args.failures}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
