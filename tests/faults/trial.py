"""One trial: ranks train, one of them is stopped, killed, stuck or fails; what do the others say, how soon, and do all end?

Ranks are forked from here, where everything is imported already. Each writes to a file of its own.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoshard.runtime.comm import Comm
from autoshard.runtime.module import Sharded
from tests.runtime.by_hand import Plain, batch, program

KINDS = ("stopped", "killed", "stuck", "raises")
RANKS = 4
LIMIT = 60.0


@dataclass
class Found:
    """`said`: what all ranks together printed; `after`: seconds from the fault to the guilty rank's name; `codes`: exit codes."""

    kind: str
    victim: int
    said: str
    after: float
    codes: list[int]
    seconds: float

    @property
    def named(self) -> bool:
        if self.kind == "raises":
            return f"fault on rank {self.victim}" in self.said
        return bool(re.search(rf"ranks? {self.victim}\b.*(keeps|no longer)", self.said))

    @property
    def messages(self) -> int:
        """Failures told: lines of ours, and tracebacks."""
        return len(re.findall(r"^(autoshard: .*every rank ends|RankError: |Traceback )", self.said, re.M))


def stuck_loading() -> None:
    """What a user's data loader does when its disk has gone."""
    while True:
        time.sleep(0.05)


def rank(index: int, port: int, folder: Path, kind: str, victim: int, at: int, stop_after: float) -> None:
    out = os.open(folder / f"rank{index}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)  # a test runner may have put something else there
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    sharded = Sharded(program(dtype="float64"), Plain(torch.float64), comm=Comm(torch.device("cpu"), stop_after=stop_after))
    for step in range(100_000):
        if index == victim and step == at:
            (folder / "fault").write_text(str(time.time()))
            if kind == "stuck":
                stuck_loading()
            if kind == "raises":
                raise KeyError(f"fault on rank {index}")
            os.kill(os.getpid(), signal.SIGSTOP if kind == "stopped" else signal.SIGKILL)
        sharded.train_step(**batch(torch.float64))
        time.sleep(0.01)


def run(seed: int, kind: str | None = None, stop_after: float = 8.0) -> Found:
    rng = random.Random(seed)
    kind, victim, at = kind or KINDS[seed % len(KINDS)], rng.randrange(RANKS), rng.randrange(1, 60)
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        folder = Path(name)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        start = time.time()
        pids = [_fork(rank, i, port, folder, kind, victim, at, stop_after) for i in range(RANKS)]
        return _watch(pids, folder, kind, victim, start)


def _fork(function: Any, *args: Any) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*args)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _watch(pids: list[int], folder: Path, kind: str, victim: int, start: float) -> Found:
    codes: dict[int, int] = {}
    after = float("inf")
    while len(codes) < len(pids) and time.time() - start < LIMIT:
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        found = Found(kind, victim, _said(folder), after, [], 0.0)
        if after == float("inf") and found.named:
            after = time.time() - float((folder / "fault").read_text())
        time.sleep(0.05)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return Found(kind, victim, _said(folder), after, [codes.get(pid, -99) for pid in pids], time.time() - start)


def _said(folder: Path) -> str:
    return "".join(p.read_text(errors="replace") for p in sorted(folder.glob("rank*")))
