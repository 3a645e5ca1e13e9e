"""All comparisons, one after another: each in processes of its own, with a limit of time, whatever becomes of the others.

    python -m benchmarks.suite --list
    python -m benchmarks.suite --only 'llama-8b-layers*,moe*' --limit 570 --out runs/first
    python -m benchmarks.suite --only '*tp2,*dp2,*pp2' --limit 570 --out runs/first                 # goes on in the same folder
    python -m benchmarks.suite --only profile-1 --out runs/first -- --steps 5                       # what follows -- goes to each job

A job takes at most `--each` seconds, all of them `--limit`: what doesn't finish is ended and reported, with what it had recorded until
then; what no time is left for isn't started. In the folder: a log and a folder of records for each job, `summary.md` and `summary.json`,
written anew after every job, of this and earlier calls.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import plans, profile, summary
from .tables import Table, text
from .works import WORKS

LEAST = 20.0
"""Seconds that are left for a job, at least, or it isn't started."""


@dataclass(frozen=True)
class Job:
    """`module` of benchmarks with its arguments, on so many devices."""

    name: str
    module: str
    argv: tuple[str, ...]
    ranks: int = 1


def jobs() -> dict[str, Job]:
    """In the order in which they run."""
    found = []
    for work in WORKS.values():
        for model in work.models:
            name = work.name if model == work.models[0] else f"{work.name}-{model}"
            found.append(Job(name, "step", ("--work", work.name, "--model", model), work.ranks))
    one, two = ("--work", "llama-8b-layers"), ("--work", "llama-8b-layers-12-tp2")
    on_two, on_four = (*two, "--batch", "8", "--ranks", "2"), (*two, "--batch", "16", "--ranks", "4")
    found += [
        Job("profile-1", "profile", one),
        Job("profile-tp2", "profile", two, 2),
        Job("plans-1", "plans", (*one, "--batch", "4", *_plans("dp=1 x 1", "dp=1 x 2", "dp=1 x 4"))),
        Job("plans-2", "plans", (*on_two, *_plans("dp=2", "dp=2 x 2", "tp=2", "tp=2 x 2", "pp=2 x 4", "pp=2 x 8")), 2),
        Job("plans-2-top", "plans", (*on_two, "--top", "6"), 2),
        Job("plans-4", "plans", (*on_four, *_plans("dp=4", "tp=4", "dp=2 tp=2", "dp=2 pp=2 x 4", "tp=2 pp=2 x 4")), 4),
        Job("plans-4-top", "plans", (*on_four, "--top", "8"), 4),
    ]
    return {job.name: job for job in found}


def _plans(*each: str) -> list[str]:
    return [word for plan in each for word in ("--plan", plan)]


# ---- running them ---------------------------------------------------------------------------------------------------


def run(job: Job, limit: float, out: Path, extra: Sequence[str]) -> dict[str, Any]:
    """Run one job to its end or its limit. What became of it, with its newest record."""
    folder = out / job.name
    folder.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", f"benchmarks.{job.module}", *job.argv, "--results", str(folder), *extra]
    start, since = time.monotonic(), time.time()
    with (folder / "log.txt").open("w") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        environment = {**os.environ, MARK: mark, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            code = process.wait(limit)
            status = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"ended after {limit:.0f} s"
        finally:
            end(process, mark)
    record, path = newest(folder, since)
    return {"job": job.name, "module": job.module, "status": status, "seconds": time.monotonic() - start, "path": path, "record": record}


MARK = "AUTOSHARD_BENCHMARK_JOB"
"""Environment variable by which a job's processes know their job, and it them: torchrun gives ranks sessions of their own."""


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End what is left of a job: politely, then at once."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    for _ in range(20):
        left = marked(mark)
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.25)
    process.wait()


def marked(mark: str) -> list[int]:
    """Processes that a job has left (where there is /proc)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def newest(folder: Path, since: float) -> tuple[dict[str, Any] | None, str]:
    """The record that a job wrote last, itself and its path."""
    for path in sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        if path.stat().st_mtime < since - 1:
            continue
        with contextlib.suppress(ValueError):
            return json.loads(path.read_text()), str(path)
    return None, ""


# ---- what is said of them -------------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    where: dict[str, Any] = next((r["record"]["machine"] for r in results.values() if r["record"]), {})
    parts = ["# Benchmarks", ", ".join(f"{key} {value}" for key, value in where.items()), steps(results).markdown()]
    notes = [f"- {name}: {problem}" for name, r in results.items() if r["record"] for problem in r["record"].get("problems", ())]
    parts += ["## Wrong", "\n".join(notes)] if notes else []
    for name, r in results.items():
        if r["record"] and r["module"] in ("plans", "profile"):
            record = r["record"]
            if r["module"] == "plans":
                shown = plans.table("", record["rows"], record)
            else:
                shown = profile.table(record)
            parts += [f"## {name}", shown.markdown(), "\n".join(f"- {note}" for note in shown.notes)]
    jobs_table = Table("", ["job", "what became of it", "s", "record"])
    jobs_table.rows += [[name, r["status"], f"{r['seconds']:.0f}", r["path"]] for name, r in results.items()]
    return "\n\n".join(filter(None, [*parts, "## Jobs", jobs_table.markdown()])) + "\n"


def steps(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """All works and implementations in one table."""
    found = Table("", ["work", "implementation", "ms", "TFLOP/s a device", "× floor", "peak GiB", "ours takes", "note"])
    for name, r in results.items():
        if r["module"] != "step":
            continue
        record = r["record"]
        if not record:
            found.rows.append([name, "", *[None] * 5, r["status"]])
            continue
        ours = next((n for n in summary.measured(record["runs"]) if n.startswith("ours")), None)
        for each, row in record["runs"].items():
            if "problem" in row:
                found.rows.append([name, each, *[None] * 5, text(row["problem"])[:120]])
                continue
            ratio = record["ratios"].get(f"{ours} / {each}")
            apart = record["ratios"].get(f"{ours} / {each}, bubble apart")
            takes = " ".join(filter(None, [f"{ratio:.3f} ×" if ratio else "", f"({apart:.3f} × bubble apart)" if apart else ""]))
            numbers = [row["ms"], row["tflops_per_device"], row.get("times_floor"), row["peak_gib"]]
            found.rows.append([name, each, *numbers, takes, "" if record["finished"] else f"unfinished: {r['status']}"])
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    a, known = arguments(given[:at]), jobs()
    if a.list:
        for job in known.values():
            print(f"{job.name:32}{job.ranks} × {job.module} {' '.join(job.argv)}")
        return {}
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "summary.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    chosen = pick(known, a.only)
    started = time.monotonic()
    for job in chosen:
        left = a.limit - (time.monotonic() - started)
        if job.ranks > a.devices or left < min(LEAST, a.limit):
            why = f"needs {job.ranks} devices, {a.devices} are here" if job.ranks > a.devices else "not started: no time is left"
            found = {"job": job.name, "module": job.module, "status": why, "seconds": 0.0, "path": "", "record": None}
            results.setdefault(job.name, found)
        else:
            found = results[job.name] = run(job, min(a.each, left), out, [*a.options, *given[at + 1 :]])
        print(f"{job.name}: {found['status']}, {found['seconds']:.0f} s", flush=True)
        kept.write_text(json.dumps(results, indent=1) + "\n")
        (out / "summary.md").write_text(markdown(results))
    print(f"\n{(out / 'summary.md').read_text()}\nwritten to {out / 'summary.md'} and {kept}")
    return results


def pick(known: Mapping[str, Job], only: str) -> list[Job]:
    """The jobs that patterns name, pattern by pattern. Raises SystemExit if one names none.

    >>> [job.name for job in pick(jobs(), "plans-2,moe*")]
    ['plans-2', 'moe-8x2', 'moe-8x2-plain']
    """
    chosen: dict[str, Job] = {}
    for pattern in only.split(","):
        found = {name: job for name, job in known.items() if fnmatch.fnmatchcase(name, pattern.strip())}
        if not found:
            raise SystemExit(f"--only {pattern}: no such job; --list shows them")
        chosen |= {name: job for name, job in found.items() if name not in chosen}
    return list(chosen.values())


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--list", action="store_true", help="show the jobs")
    p.add_argument("--only", default="*", help="jobs by name, patterns separated by commas, in the order in which to run them")
    p.add_argument("--out", default="runs/benchmarks", help="folder to write to")
    p.add_argument("--limit", type=float, default=570, help="seconds of all jobs together")
    p.add_argument("--each", type=float, default=300, help="seconds of one job")
    p.add_argument("--tiny", action="store_true", help="everything as small as it gets, for trying out")
    p.add_argument("--device", choices=["cuda", "cpu"])
    p.add_argument("--devices", type=int, help="how many there are (default: this machine's GPUs; on the CPU, enough)")
    a = p.parse_args(argv)
    a.options = [*(["--tiny"] if a.tiny else []), *(["--device", a.device] if a.device else [])]
    if a.devices is None:
        import torch

        a.devices = torch.cuda.device_count() if torch.cuda.is_available() and a.device != "cpu" else 64
    return a


if __name__ == "__main__":
    main()
