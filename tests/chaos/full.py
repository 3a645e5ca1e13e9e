"""A disk that is really full: a small tmpfs, in a mount namespace of its own, filled up to a random page or inode before a save.

Each save either succeeds or is one CheckpointError that says "No space left on device", after which the folder holds what it held before
and the earlier checkpoint loads, bit for bit; once there is room again, the next save succeeds. One process plays all ranks, and every
tenth trial has real ones. Where this user may not mount, `why_not` says so.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PAGE = 4096
SIZE, INODES = 256 * PAGE, 400


def namespace() -> list[str]:
    """The command that gives a process mounts of its own; of a user who isn't root, where the system allows that."""
    return ["unshare", "--mount", *([] if os.getuid() == 0 else ["--user", "--map-root-user"])]


@functools.cache
def why_not() -> str:
    """Why no disk can be filled here; empty if one can."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return "there is no unshare or mount"
    tried = subprocess.run(
        [*namespace(), "mount", "-t", "tmpfs", "-o", f"size={PAGE}", "none", "/tmp"], capture_output=True, text=True, timeout=60
    )
    return "" if tried.returncode == 0 else f"mounting isn't allowed: {tried.stderr.strip()}"


def run(folder: Path, count: int, seed: int = 0) -> str:
    """Raises AssertionError where a trial goes wrong. The figures, as a line."""
    if why_not():
        return f"skipped: {why_not()}"
    place = folder / "full"
    place.mkdir()
    done = subprocess.run(
        [*namespace(), sys.executable, "-m", "tests.chaos.full", str(place), str(count), str(seed)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- inside of the namespace --------------------------------------------------------------------------------------------


def within(place: Path, count: int, seed: int) -> str:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE},nr_inodes={INODES}", "none", str(place)], check=True)
    seen: Counter[str] = Counter()
    for i in range(count):
        draw = random.Random(f"{seed} {i}")
        folder = place / "run"
        folder.mkdir()
        if i % 10 == 9:
            from tests.runtime.ranks import ranks

            fill = functools.partial(Ballast, place / "ballast", draw)
            said = set(ranks(4, on_a_rank, folder, fill))
            assert len(said) == 1, said
            seen[f"{said.pop()} on real ranks"] += 1
        else:
            seen[one(folder, Ballast(place / "ballast", draw))] += 1
        shutil.rmtree(folder)
    return f"{count} of {count} saves to a disk that is nearly full: {dict(seen)}; each error is clean, what was saved before loads"


class Ballast:
    """Takes all but a few pages, or all but a few inodes. (A checkpoint here takes about seven of each.)"""

    def __init__(self, path: Path, draw: random.Random) -> None:
        self.path, self.what, self.leave = path, draw.choice(["pages", "pages", "inodes"]), draw.randrange(9)

    def fill(self) -> None:
        self.path.mkdir()
        (self.path / "data").touch()
        found = os.statvfs(self.path)
        if self.what == "pages":
            (self.path / "data").write_bytes(b"x" * PAGE * (found.f_bavail - self.leave))
        for i in range(found.f_favail - self.leave if self.what == "inodes" else 0):
            (self.path / str(i)).touch()

    def drop(self) -> None:
        shutil.rmtree(self.path)


def trainer() -> Any:
    import torch

    from autoshard.runtime.in_process import InProcess
    from autoshard.runtime.module import Sharded
    from tests.runtime.by_hand import Plain, program

    ranked = "RANK" in os.environ
    made = Sharded(program(), Plain(), device=torch.device("cpu"), compile=False) if ranked else InProcess(program(), Plain())
    return made, made.optimizer(torch.optim.AdamW, lr=0.05)


def one(folder: Path, ballast: Ballast, together: Any = lambda work: work(), first: bool = True) -> str:
    """What the second of three saves found: "full" or "room"."""
    from autoshard.errors import CheckpointError
    from tests.runtime.by_hand import batch

    made, optimizer = trainer()
    states = []
    for _ in range(2):
        made.train_step(**batch())
        optimizer.step()
        optimizer.zero_grad()
        states.append({k: t.tolist() for k, t in made.state_dict().items()})
        if len(states) == 1:
            made.save(folder, step=1)
    before = sorted(os.listdir(folder))
    together(lambda: ballast.fill() if first else None)
    try:
        made.save(folder, step=2)
        found = "room"
    except CheckpointError as error:
        found = "full"
        assert "No space left on device" in str(error) and "earlier checkpoints are whole" in str(error), error
        assert not first or sorted(os.listdir(folder)) == before, os.listdir(folder)  # the first rank's to clean
    other, _ = trainer()
    assert other.load(folder).step == (1 if found == "full" else 2)
    assert {k: t.tolist() for k, t in other.state_dict().items()} == states[found == "room"]
    together(lambda: ballast.drop() if first else None)
    made.save(folder, step=3)
    assert other.load(folder).step == 3
    assert {k: t.tolist() for k, t in other.state_dict().items()} == states[1]
    return found


def on_a_rank(folder: Path, fill: Any) -> str:
    import torch

    from autoshard.runtime.comm import Comm

    comm = Comm(torch.device("cpu"))
    return one(folder, fill(), comm.together, comm.rank == 0)


if __name__ == "__main__":
    print(within(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
