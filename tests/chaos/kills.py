"""Training that is killed (SIGKILL) at random moments, saves included, and started again: real processes, the real checkpoint code.

Each life loads, trains and saves until it is killed. Every loss must be the unbroken run's, bit for bit; every start must succeed at the
first attempt, from a step no earlier than the last whose `save` had returned (with wait=False, that the
next `save` has waited for). Lives are forked from here, so that torch is imported once.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autoshard.runtime import checkpoint
from autoshard.runtime.in_process import InProcess
from autoshard.runtime.module import Sharded
from tests.runtime.by_hand import BATCH, Plain, program

STEPS, EVERY = 24, 2
LEAVES = 17
"""How a life ends that failed to start."""


def trainer(ranks: int) -> Any:
    made = InProcess(program(), Plain()) if ranks == 1 else Sharded(program(), Plain(), device=torch.device("cpu"), compile=False)
    optimizer = made.optimizer(torch.optim.AdamW, lr=0.05)
    return made, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.7)


def train(made: Any, optimizer: Any, scheduler: Any) -> float:
    """A step on data drawn from torch's generator: a resumed run has to draw what comes next."""
    loss = made.train_step(x=torch.randn(BATCH, 4), y=torch.randn(BATCH, 2))
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    return float(loss)


def unbroken(ranks: int) -> list[str]:
    torch.manual_seed(3)
    run = trainer(1)
    return [train(*run).hex() for _ in range(STEPS)]


def life(folder: Path, log: int, wait: bool) -> None:
    """What a job does; every rank does the same, the first one writes the log."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(3)
    made, optimizer, scheduler = trainer(ranks)
    first = ranks == 1 or made.comm.rank == 0
    step = 0
    # as a launcher does: all ranks go by what the first one sees
    there = checkpoint.newest(folder) is not None if first else False
    if (made.comm.share("x" if there else "") == "x") if ranks > 1 else there:
        found = made.load(folder, scheduler=scheduler)
        step = found.step
        assert found.data == {"seen": step * BATCH}
    say = (lambda text: os.write(log, (text + "\n").encode())) if first else (lambda text: 0)
    say(f"start {step}")
    begun = 0
    while step < STEPS:
        loss = train(made, optimizer, scheduler)
        say(f"loss {step} {loss.hex()}")
        step += 1
        if step % EVERY == 0:
            made.save(folder, step=step, scheduler=scheduler, data={"seen": step * BATCH}, keep=2, wait=wait)
            # without waiting, the one before it is there now
            done, begun = (step, 0) if wait else (begun, step)
            say(f"saved {done}" if done else "begun")
    made.saved()
    say(f"saved {STEPS}")
    say("end")


def fork(ranks: int, folder: Path, log: int, wait: bool) -> list[int]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = LEAVES
        try:
            torch.set_num_threads(1)
            if ranks > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
                )
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                dist.init_process_group("gloo")
            life(folder, log, wait)
            if ranks > 1:
                dist.destroy_process_group()
            code = 0
        except BaseException:
            (folder / f"failed-{rank}.txt").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    return children


@dataclass
class Figures:
    kills: int = 0
    while_saving: int = 0
    runs: int = 0
    lost: int = 0
    resumed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.while_saving} while saving) in {self.runs} runs of {STEPS} steps: "
            f"{self.resumed} starts from a checkpoint, each at the first attempt; "
            f"{self.lost} acknowledged steps lost; all losses the unbroken run's"
        )


def run(folder: Path, count: int, seed: int = 0, ranks: int = 1, wait: bool = True) -> str:
    """Raises AssertionError at the first life that goes wrong. A line of figures."""
    expected, figures, draw = unbroken(ranks), Figures(), random.Random(seed)
    (folder / "measured").mkdir(parents=True)
    _, lines, last = one_life(folder / "measured", 60.0, ranks, draw, wait)  # how long an undisturbed life takes
    assert lines[-1] == "end"
    while figures.kills < count:
        figures.runs += 1
        here = folder / f"run{figures.runs}"
        here.mkdir()
        acknowledged, ended = 0, False
        while not ended:
            killed, lines, _ = one_life(here, draw.uniform(0, 1.1 * last) if figures.kills < count else 60.0, ranks, draw, wait)
            figures.kills += killed
            for words in map(str.split, lines):
                if words[0] == "start":
                    assert int(words[1]) >= acknowledged, f"{acknowledged - int(words[1])} acknowledged steps lost: {here}"
                    figures.resumed += int(words[1]) > 0
                elif words[0] == "loss":
                    assert words[2] == expected[int(words[1])], f"step {words[1]} of {here} differs"
                elif words[0] == "saved":
                    acknowledged = int(words[1])
            ended = bool(lines) and lines[-1] == "end"
            last_words = lines[-1].split() if lines else ["none"]
            in_save = last_words[0] == "loss" and (int(last_words[1]) + 1) % EVERY == 0
            figures.while_saving += killed and (in_save or not wait)  # the thread may be at it at any time
            assert killed or ended, f"a life ended by itself: {lines[-3:]}"
    return str(figures)


def one_life(folder: Path, until: float, ranks: int, draw: random.Random, wait: bool) -> tuple[bool, list[str], float]:
    """(whether it was killed, what it said, how long it took)."""
    reading, writing = os.pipe()
    start = time.monotonic()
    children = fork(ranks, folder, writing, wait)
    os.close(writing)
    os.set_blocking(reading, False)
    said, left, killed = b"", set(children), False
    while left:
        if not killed and time.monotonic() - start > until:
            killed = True
            for child in draw.sample(sorted(left), len(left)):  # one after another, as machines die
                os.kill(child, signal.SIGKILL)
                time.sleep(draw.choice((0, 0, 0.01)) if ranks > 1 else 0)
        said += drain(reading)
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.discard(child)
                code = os.waitstatus_to_exitcode(status)
                assert code in ((0, -signal.SIGKILL) if not killed or ranks == 1 else (0, -signal.SIGKILL, LEAVES)), story(folder)
        time.sleep(0.0005)
    said += drain(reading)
    os.close(reading)
    return killed, said.decode().splitlines(), time.monotonic() - start


def story(folder: Path) -> str:
    return "\n".join(["a life failed", *(file.read_text() for file in sorted(folder.glob("failed-*.txt")))])


def drain(fd: int) -> bytes:
    found = b""
    try:
        while data := os.read(fd, 1 << 16):
            found += data
    except BlockingIOError:
        pass
    return found
