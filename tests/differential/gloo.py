"""Real ranks: 8 processes over gloo, started once, that serve many trials.

    python -m tests.differential.gloo TRIALS.jsonl ROWS.jsonl

Everything heavy is imported before the ranks are forked. Each trial gets as many ranks as its mesh has, those with the least
work so far; they form a process group of just themselves, so trials of few ranks run beside each other. The first of them makes the
plan and sends it to the others; all call `autoshard.parallelize`, train, and the first compares the outcome with the same plan
played in process.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from .matrix import Row, Trial, plan_of, play, subject
from .reference import RANKS, build, follow, precision

WORLD = 8
PATIENCE = datetime.timedelta(seconds=120)
"""How long a rank waits for another before it gives the trial up."""


def assign(trials: list[Trial]) -> list[tuple[Trial, list[int]]]:
    """The processes of each trial, the least loaded first. All processes walk this list in order, so none waits in a circle."""
    load = [0] * WORLD
    plan = []
    for trial in sorted(trials, key=lambda trial: -trial.ranks):
        members = sorted(sorted(range(WORLD), key=lambda process: load[process])[: trial.ranks])
        for process in members:
            load[process] += 1
        plan.append((trial, members))
    return plan


def train(trial: Trial, rank: int) -> Row:
    """One rank's part of one trial; only rank 0's row judges the numbers."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from autoshard.api import parallelize
    from tests import zoo

    from .compare import compare

    case = zoo.case(trial.family)
    box: list[Any] = [None]
    with precision(RANKS):
        if rank == 0:
            box = [plan_of(trial, subject(trial.family, RANKS).captured.graph)]
        dist.broadcast_object_list(box)
        model, kwargs = build(case, RANKS)
        mesh = init_device_mesh("cpu", tuple(trial.axes.values()), mesh_dim_names=tuple(trial.axes))
        options = {"exact_random": True} if case.random else {}
        sharded = parallelize(model, mesh, kwargs=kwargs, loss=case.loss, plan=box[0], **options)
        found = follow(sharded, kwargs, RANKS)
    if rank:
        return Row(trial, "ok")
    worst = compare(play(subject(trial.family, RANKS), box[0], RANKS), found, RANKS)[0]
    return Row(trial, "ok" if worst.ratio <= 1 else "fail", worst.ratio, str(worst))


def attempt(trial: Trial, members: list[int], process: int, meeting: Path) -> Row:
    """Join the trial's own process group, train, leave."""
    import torch.distributed as dist

    rank, start = members.index(process), time.monotonic()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(trial.ranks), LOCAL_WORLD_SIZE=str(trial.ranks))
    try:
        store = dist.FileStore(str(meeting), trial.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=trial.ranks, timeout=PATIENCE)
        row = train(trial, rank)
        dist.barrier()
    except Exception as error:
        row = Row(trial, "error", math.inf, f"rank {rank}: {type(error).__name__}: {error}", trace=traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return dataclasses.replace(row, seconds=time.monotonic() - start)


def serve(process: int, work: list[tuple[Trial, list[int]]], folder: Path) -> None:
    """One process: its part of every trial that it belongs to, rows to a file of its own."""
    with (folder / f"rows{process}.jsonl").open("w") as file:
        for index, (trial, members) in enumerate(work):
            if process in members:
                row = attempt(trial, members, process, folder / f"meeting{index}")
                print(json.dumps(dataclasses.asdict(row)), file=file, flush=True)


def together(rows: list[Row], trial: Trial) -> Row:
    """One row of all ranks' rows: the first that went wrong by itself, else rank 0's."""
    mine = [row for row in rows if row.trial == trial]
    if len(mine) < trial.ranks:
        mine.append(Row(trial, "error", math.inf, f"only {len(mine)} of {trial.ranks} ranks reported"))
    wrong = sorted((row for row in mine if not row.passed), key=lambda row: (row.status != "fail", row.seconds))
    return wrong[0] if wrong else max(mine, key=lambda row: (row.worst != "", row.seconds))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.differential.gloo", description=__doc__)
    parser.add_argument("trials", type=Path)
    parser.add_argument("rows", type=Path)
    args = parser.parse_args()
    trials = [Trial(**json.loads(line)) for line in args.trials.read_text().splitlines()]
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    import torch
    import transformers  # noqa: F401  (imported once, before the fork)

    torch.set_num_threads(1)
    work = assign(trials)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=serve, args=(process, work, folder)) for process in range(WORLD)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        lines = [line for path in folder.glob("rows*.jsonl") for line in path.read_text().splitlines()]
    values = [json.loads(line) for line in lines]
    rows = [Row(**value | {"trial": Trial(**value["trial"])}) for value in values]
    args.rows.write_text("".join(json.dumps(dataclasses.asdict(together(rows, trial))) + "\n" for trial in trials))


if __name__ == "__main__":
    main()
