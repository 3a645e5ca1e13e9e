"""A folder of checkpoints: step-00000010, step-00000020, …; each appears by one rename, and is whole from then on.

In: a folder, a step. Out: a temporary folder to write into, and its publication. Files and folders are on disk (fsync) before the
rename, so neither a kill nor a loss of power leaves half of one under a checkpoint's name. One job at a time may write: the lock is
the process's own, and goes with it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path

from ...errors import CheckpointError
from .manifest import MANIFEST

log = logging.getLogger("autoshard")
_STEP = re.compile(r"step-([0-9]{8,15})(\+?)")
_LEFTOVER = re.compile(r"\.(tmp|old)-step-[0-9]+-[0-9a-f]{8}")
LOCK = ".lock"
_locks: dict[str, int] = {}
"""Folder → the descriptor that holds its lock, for as long as this process lives (or until `release`)."""


def name(step: int) -> str:
    return f"step-{step:08d}"


def steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, newest first; whole or not. Raises CheckpointError."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                match = _STEP.fullmatch(entry.name)
                if match and entry.is_dir(follow_symlinks=False):
                    found.append(((int(match[1]), match[2]), Path(entry.path)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise refusal(error, folder) from error
    return [(step, path) for (step, _), path in sorted(found, reverse=True)]


def is_checkpoint(path: Path) -> bool:
    """Whether this is one checkpoint (perhaps a damaged one), not a folder of them."""
    return _STEP.fullmatch(path.name) is not None or os.path.lexists(path / MANIFEST)


def refusal(error: OSError, where: Path) -> CheckpointError:
    """What the system said, as one clean error."""
    hint = {
        errno.ENOSPC: "free some space, or keep fewer (keep=); earlier checkpoints are whole",
        errno.EDQUOT: "the quota is used up: keep fewer (keep=); earlier checkpoints are whole",
        errno.EROFS: "give a folder that can be written",
        errno.EACCES: "give a folder that this user may write",
        errno.ENOENT: "all ranks must see the same folder",
    }.get(error.errno or 0, "")
    return CheckpointError(f"the checkpoint can't be written: {error.strerror or error}", where=str(error.filename or where), hint=hint)


# ---- one writer -----------------------------------------------------------------------------------------------------


def lock(folder: Path) -> None:
    """Keep other jobs from writing here. (A POSIX lock: children don't inherit it.) Raises CheckpointError, OSError."""
    key = os.path.realpath(folder)
    if key in _locks:
        return
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
        os.close(fd)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise CheckpointError(
                f"another job writes checkpoints here ({holder or 'it has not said which'})",
                where=str(folder),
                hint="give each job a folder of its own, or end the other one",
            ) from None
        log.warning("%s: no locks on this file system, so two jobs in one folder would go unnoticed (%s)", folder, error.strerror)
        return
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _locks[key] = fd


def release(folder: Path) -> None:
    """Let other jobs write here."""
    fd = _locks.pop(os.path.realpath(folder), None)
    if fd is not None:
        os.close(fd)


def forget_locks() -> None:
    """In a forked child: the parent's locks are not its own. (The descriptors stay open: closing them is harmless here, but useless.)"""
    _locks.clear()


os.register_at_fork(after_in_child=forget_locks)


# ---- publishing -----------------------------------------------------------------------------------------------------


def begin(folder: Path, step: int) -> Path:
    """A new temporary folder beside the checkpoints; what dead runs have left is removed. Raises CheckpointError, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    with os.scandir(folder) as entries:
        leftovers = [Path(e.path) for e in entries if _LEFTOVER.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    for leftover in leftovers:
        log.info("%s: removing what an interrupted run has left", leftover)
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder / f".tmp-{name(step)}-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def put(path: Path, data: bytes) -> None:
    """Write a new file and make sure that it is on disk."""
    with open(path, "xb", buffering=0) as file:
        view = memoryview(data)
        while len(view):
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(temporary: Path, folder: Path, step: int) -> Path:
    """Give it its name. One that is there already under this name goes only when the new one is there as well. Raises OSError."""
    sync(temporary)
    target, beside = folder / name(step), folder / f"{name(step)}+"
    if beside.exists():  # a run died between the two renames below
        remove(target)
        os.rename(beside, target)
    if target.exists():
        os.rename(temporary, beside)  # "+" is read, too, and before the other
        sync(folder)
        remove(target)
        os.rename(beside, target)
    else:
        os.rename(temporary, target)
    sync(folder)
    return target


def remove(path: Path) -> None:
    """Take a checkpoint away: its name first, so that nobody sees half of one. Raises OSError."""
    if not path.exists():
        return
    old = path.with_name(f".old-{path.name.rstrip('+')}-{secrets.token_hex(4)}")
    os.rename(path, old)
    shutil.rmtree(old, ignore_errors=True)


def prune(folder: Path, keep: int, newest: Path) -> None:
    """Keep this many, the one just written among them; a failure is only worth a warning."""
    others = [path for _, path in steps(folder) if path != newest]
    later = [path.name for step, path in steps(folder) if path.name > newest.name]
    if later:
        log.warning("%s holds %s, later than %s, which was just written; loading takes the latest", folder, later[0], newest.name)
    for path in others[max(0, keep - 1) :]:
        try:
            remove(path)
        except OSError as error:
            log.warning("%s can't be removed: %s", path, error.strerror)
    with suppress(OSError):
        sync(folder)


def is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return False
