"""Says within seconds which rank keeps the others waiting, in which action and at which source line; and ends them all if it goes on.

In: the job's store, and the step that the player is in. A thread on each rank looks at its own main thread twice a second and puts a
short `Report` into the store. A rank that has waited in communication for a few seconds reads everyone's: who doesn't report any more
is stopped (or dead), who is anywhere but in communication keeps the others waiting, and where all wait, those that are furthest behind
are named. The lowest rank that waits speaks, the others keep quiet. After `stop_after` seconds (sooner for a rank that doesn't report)
every waiting rank exits with code 6, and kills a stopped one on its own host, so that a launcher can start them again.

The first failure is kept too (`failed`): when a connection breaks, the ranks that only notice it say whose failure came first.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import linecache
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Any, Protocol

from ..errors import AutoshardError, RankError

log = logging.getLogger("autoshard")

TICK = 0.5
NAME_AFTER = 3.0
"""Seconds of waiting after which the rank that is waited for is named."""
SILENT = 1.75
"""Seconds without a report after which a rank counts as stopped: more than three ticks."""
STOP_AFTER = 600.0
"""Seconds of waiting for a rank that is alive (it may be writing a checkpoint, or compiling) after which all ranks end."""
STOPPED_AFTER = 30.0
"""Seconds of waiting for a rank that doesn't report."""
COMPUTING_AFTER = 60.0
"""Seconds after which it is said that all wait and some of them for their devices: a step may take long. (It ends nothing: if the
devices are in communication, the backend's own timeout does.)"""
ANSWER = 30.0
"""Seconds after which a call of the store gives up (it must be made with this timeout)."""


class Store(Protocol):
    """What is used of a torch.distributed store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


@dataclass(frozen=True)
class Report:
    """What a rank last said of itself. `tick` counts its reports; `action`: of the instruction list, empty between steps."""

    rank: int
    tick: int
    step: int
    action: str
    place: str
    waiting: float
    """Seconds that its main thread has stood at one place in communication; 0 if it is elsewhere."""
    pid: int
    host: str
    device: bool = False
    """Whether it waits for its device (which may be in communication, or compute) rather than in communication itself."""

    def said(self) -> str:
        where = f"in action {self.action} of step {self.step}" if self.action else f"between steps {self.step} and {self.step + 1}"
        return f"{where}, at {self.place}"


@dataclass(frozen=True)
class Verdict:
    """Whose fault a wait is: `text` says it, `stopped` are those that don't report."""

    text: str
    stopped: tuple[Report, ...] = ()
    computing: bool = False
    """Whether it may be nobody's fault: all wait, some of them for their devices, which may have much to do."""


def judge(reports: Sequence[Report], silent: frozenset[int]) -> Verdict:
    """Who keeps the others waiting. `silent`: ranks that have not reported for `SILENT` seconds.

    >>> base = dict(tick=9, step=4, action="", place="train.py:7 in load", pid=1, host="a")
    >>> judge([Report(rank=0, waiting=3.0, **base), Report(rank=1, waiting=0.0, **base)], frozenset()).text
    'rank 1 keeps rank 0 waiting: it is between steps 4 and 5, at train.py:7 in load'
    """
    stopped = tuple(r for r in reports if r.rank in silent)
    waiting = [r for r in reports if r.rank not in silent and r.waiting]
    busy = [r for r in reports if r.rank not in silent and not r.waiting]
    held = _ranks([r.rank for r in waiting])
    if stopped:
        who = "; ".join(f"rank {r.rank} ({_process(r)}) was {r.said()}" for r in stopped[:8])
        verb = "no longer reports, and keeps" if len(stopped) == 1 else "no longer report, and keep"
        return Verdict(f"{_ranks([r.rank for r in stopped])} {verb} {held} waiting: {who}", stopped)
    if busy:
        who = f"it is {busy[0].said()}" if len(busy) == 1 else "; ".join(f"rank {r.rank} is {r.said()}" for r in busy[:8])
        return Verdict(f"{_ranks([r.rank for r in busy])} keep{'s' * (len(busy) == 1)} {held} waiting: {who}")
    last = sorted(waiting, key=lambda r: (r.step, r.action == ""))  # furthest behind first
    who = "; ".join(f"rank {r.rank} is {r.said()}" for r in last[:16])
    if any(r.device for r in waiting):
        return Verdict(f"every rank waits for another or for its device: {who}", computing=True)
    return Verdict(f"every rank waits for another: {who}")


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''}"


def _process(report: Report) -> str:
    if report.host != socket.gethostname():
        return f"process {report.pid} on {report.host}, stopped or dead"
    return f"process {report.pid}, {'stopped' if _alive(report.pid) else 'dead'}"


def _alive(pid: int) -> bool:
    return _state(pid) != "X"


def _state(pid: int) -> str:
    """The system's letter for a process of this host: T is stopped; X, dead, also where it is gone or a zombie; R if that can't be told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "X"
    except PermissionError:
        return "R"
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        letter = stat.read().rpartition(")")[2].split()[0]
        return "X" if letter in "ZXx" else letter
    return "R"


# ---- where a thread stands ------------------------------------------------------------------------------------------

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_COLLECTIVE = ("c10d", "wait_tensor", ".wait(", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier")


def _line(name: str, line: int) -> str:
    """The text of a source line. The main thread may be filling the cache of sources at this moment: then it is unknown, once."""
    try:
        return linecache.getline(name, line).strip()
    except Exception:
        return ""


def stands(frame: FrameType | None) -> tuple[str, bool]:
    """("file:line in function", whether that is communication): the innermost line of the user's, or of a generated graph."""
    waiting, place, depth = False, "", 0
    while frame is not None:
        name, line = frame.f_code.co_filename, frame.f_lineno
        text = _line(name, line)
        generated = name.startswith("<")
        inside = "torch/distributed" in name or "torch/_ops" in name
        if depth < 8 and not waiting and not place:
            ours = name.startswith(_OURS) and name.endswith("comm.py")
            waiting = "torch/distributed" in name or ((ours or generated) and any(word in text for word in _COLLECTIVE))
        if generated and not place and text:
            place = f"{text[:100]} (line {line} of a graph)"
        elif not inside and not generated and not name.startswith((_OURS, sys.prefix, sys.base_prefix)):
            user = f"{name}:{line} in {frame.f_code.co_name}"
            return (f"{place}, called from {user}" if place else user), waiting
        frame, depth = frame.f_back, depth + 1
    return place or "its start or end", waiting


class Queue(Protocol):
    """What is used of a `torch.cuda.Stream`."""

    def query(self) -> bool: ...


def unfinished(queue: Queue) -> bool:
    """Whether a device still works on what was given to it. (One that can't be asked, as while a graph is captured, counts as idle.)"""
    try:
        return not queue.query()
    except RuntimeError:
        return False


class Playing(Protocol):
    """What is being played (an `executor.Step`): it says in which action it is."""

    at: str


class Watchdog:
    """One rank's; `playing` is the step that its player is in, the `number`th."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        name_after: float = NAME_AFTER,
        stop_after: float = STOP_AFTER,
        stopped_after: float | None = None,
        pending: Callable[[], bool] = lambda: False,
    ) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.playing: Playing | None = None
        self.number = 0
        self.name_after, self.stop_after = name_after, stop_after
        self.stopped_after = min(STOPPED_AFTER, stop_after) if stopped_after is None else stopped_after
        self.pending = pending
        """Whether the device still works on what was given to it, so that a host that stands still waits for that (`unfinished`)."""
        self.main = threading.main_thread().ident or 0
        self.ticks, self.since, self.stood = 0, time.monotonic(), ("", 0, "")
        self.heard: dict[int, tuple[int, float]] = {}
        self.named: tuple[str, int, str] | None = None
        self.ending = threading.Event()
        self.over = False
        """Whether this process is about to end because of a hang."""
        self.blamed = False
        """Whether others have named this rank as the one they wait for."""
        self.lock = threading.Lock()
        self.latest = self.look()
        self.reports: list[Report] = []
        self.answered = time.monotonic()
        self.exchange()
        # one thread looks, one talks: the rank that holds the store may be the one that is stopped
        self.threads = [threading.Thread(target=f, name=f"autoshard-{f.__name__}", daemon=True) for f in (self.watch, self.talk)]
        for thread in self.threads:
            thread.start()
        # a thread that comes back from the store's C++ into an interpreter that is ending would abort the process
        atexit.register(self.close)

    def close(self) -> None:
        """End both threads. One that is in a call of the store is waited for: on a busy machine that takes a while."""
        atexit.unregister(self.close)
        self.ending.set()
        for thread in self.threads:
            thread.join(ANSWER + 2 * TICK)

    def talk(self) -> None:
        while not self.ending.wait(TICK):
            try:
                self.exchange()
            except Exception as error:  # its holder has ended
                log.debug("the watchdog's store is gone: %s", error)
                if self.blamed:
                    os._exit(RankError.exit_code)  # the others have given this rank up
                self.ending.set()

    def exchange(self) -> None:
        """Tell the store of this rank; hear of the others, if this one waits for them."""
        with self.lock:
            self.store.set(f"watch/{self.rank}", json.dumps(asdict(self.latest)))
            if self.store.check(["watch/over"]):  # seen by a rank that isn't waiting itself, as the one that is stuck
                self.over = True
                os._exit(RankError.exit_code)
            self.blamed = self.store.check([f"watch/blamed/{self.rank}"])
        if self.latest.waiting > self.name_after - SILENT - 2 * TICK or len(self.reports) < self.size:
            self.reports = self.everyone()
        self.answered = time.monotonic()

    def watch(self) -> None:
        while not self.ending.wait(TICK):
            self.latest = self.look()
            if self.latest.waiting >= self.name_after - SILENT:
                self.consider(self.latest)

    # ---- this rank --------------------------------------------------------------------------------------------------

    def look(self) -> Report:
        frame = sys._current_frames().get(self.main)
        place, waiting = stands(frame)
        playing, number = self.playing, self.number
        action = playing.at if playing is not None else ""
        stood = (place, number, action)
        now = time.monotonic()
        device = stood == self.stood and not waiting and self.pending()
        if stood != self.stood or not (waiting or device):
            self.stood, self.since = stood, now
        self.ticks += 1
        return Report(self.rank, self.ticks, number, action, place, now - self.since, os.getpid(), socket.gethostname(), device)

    # ---- the others -------------------------------------------------------------------------------------------------

    def everyone(self) -> list[Report]:
        with self.lock:
            keys = [key for key in (f"watch/{r}" for r in range(self.size)) if self.store.check([key])]
            return [Report(**json.loads(text)) for text in self.store.multi_get(keys)]

    def silent(self, reports: Sequence[Report]) -> frozenset[int]:
        now, found = time.monotonic(), set()
        for r in reports:
            tick, when = self.heard.get(r.rank, (-1, now))
            if r.host == socket.gethostname() and not _alive(r.pid):
                found.add(r.rank)
            elif r.tick != tick:
                self.heard[r.rank] = (r.tick, now)
            elif now - when >= SILENT and r.rank != self.rank:
                found.add(r.rank)
        return frozenset(found)

    def consider(self, mine: Report) -> None:
        """Called at every tick while this rank waits: name who is waited for, once; end it all in the end."""
        reports = self.reports
        silent = self.silent(reports)
        if mine.waiting < self.name_after:
            return
        deaf = time.monotonic() - self.answered
        if deaf > SILENT:
            text = f"rank 0, or the launcher that holds the job's store, no longer answers, and keeps rank {mine.rank} waiting"
            holder = tuple(r for r in reports if r.rank == 0 and r.host == mine.host and _state(r.pid) in "TX")
            verdict, speaks = Verdict(text, holder), mine.rank <= 1
        else:
            verdict = judge(reports, silent)
            if verdict.computing and mine.waiting < COMPUTING_AFTER:
                return
            speaks = mine.rank == min((r.rank for r in reports if r.waiting and r.rank not in silent), default=mine.rank)
        limit = self.stopped_after if verdict.stopped or deaf > SILENT else self.stop_after
        over = mine.waiting >= limit and not verdict.computing
        if speaks and (over or self.named != self.stood):
            self.named = self.stood
            ends = f"; every rank ends now, after {mine.waiting:.0f} s" if over else f"; all ranks end if this lasts {limit:.0f} s"
            ends = "" if verdict.computing else ends
            print(f"autoshard: {verdict.text} ({mine.waiting:.0f} s{ends})", file=sys.stderr, flush=True)
            if deaf <= SILENT:
                self.tell(*(f"blamed/{r.rank}" for r in reports if not r.waiting))
        if over:
            self.end(verdict, mine, deaf > SILENT)

    def tell(self, *keys: str) -> None:
        with self.lock, contextlib.suppress(Exception):
            for key in keys:
                self.store.set(f"watch/{key}", "1")

    def end(self, verdict: Verdict, mine: Report, deaf: bool) -> None:
        self.over = True
        if not deaf:
            self.tell("over")
        for r in verdict.stopped:
            if r.host == mine.host and _alive(r.pid):
                os.kill(r.pid, signal.SIGKILL)
        time.sleep(2 * TICK if self.rank == 0 and not deaf else 0)  # the store may live in rank 0, and the others read it once more
        os._exit(RankError.exit_code)

    # ---- failures ---------------------------------------------------------------------------------------------------

    def fail(self, text: str, rank: int | None = None) -> str:
        """Keep a rank's failure (this one's), unless another came first. The first one, its rank before it."""
        with self.lock:
            return self.store.compare_set("watch/first", "", f"{self.rank if rank is None else rank} {text[:4000]}").decode()

    def first(self, patience: float = 2 * SILENT) -> tuple[int, str]:
        """(rank, what it said) of the failure that came first, if one is told of or a rank falls silent in `patience` s; else (-1, "")."""
        end = time.monotonic() + patience
        with contextlib.suppress(Exception):  # the store's host may be the rank that died
            while time.monotonic() < end:
                with self.lock:
                    if self.store.check(["watch/first"]):
                        rank, _, text = self.store.get("watch/first").decode().partition(" ")
                        return int(rank), text
                reports = self.everyone()
                silent = self.silent(reports)
                for r in reports:
                    if r.rank in silent:  # told to all: this rank ends too, and must not be taken for the first
                        text = f"rank {r.rank} ({_process(r)}) no longer reports; it was {r.said()}"
                        first = self.fail(text, r.rank)
                        return int(first.partition(" ")[0]), first.partition(" ")[2]
                time.sleep(TICK / 2)
        return -1, ""


@contextlib.contextmanager
def blame(watchdog: Watchdog | None) -> Iterator[None]:
    """Around what talks to other ranks. An error is kept as this rank's failure, unless another failed first: then RankError says whose."""
    if watchdog is None:
        yield
        return
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        if watchdog.over:
            time.sleep(60)  # its thread has told why, and ends the process
        if _broken(error):
            rank, text = watchdog.first()
            if rank == -1:  # the store is gone as well, and with it the rank that holds it
                rank, text = (0, "rank 0 no longer answers, nor does its store") if watchdog.rank else (-1, "")
            if rank not in (-1, watchdog.rank):
                alive = [r for r in range(watchdog.size) if r != rank]
                heard = RankError(text if text.startswith("rank") else f"rank {rank} failed: {text}")
                heard.quiet = watchdog.rank != min(alive, default=watchdog.rank) or "no longer" not in text
                raise heard from None
        with contextlib.suppress(Exception):
            watchdog.fail(f"{type(error).__name__}: {error}")
        raise


def _broken(error: Exception) -> bool:
    """Whether an error is only the noise of a connection that another rank's end has broken."""
    names = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
    if any(cls.__name__ in names for cls in type(error).__mro__):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "connection", "nccl", "socket", "broken pipe"))


def keep_quiet(watchdog: Watchdog) -> None:
    """One message a failure: an uncaught error that only tells of another rank's isn't printed, and ends the process with its exit code."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        told = isinstance(error, RankError) and error.quiet
        if not isinstance(error, RankError):
            with contextlib.suppress(Exception):
                text = f"{kind.__name__}: {error}"
                first, _, said = watchdog.fail(text).partition(" ")
                # a mistake that every rank finds by itself (a wrong mesh) is told by one
                told = isinstance(error, AutoshardError) and first != str(watchdog.rank) and said == text[: len(said)] != ""
        if not told:
            if isinstance(error, AutoshardError):
                print(f"{kind.__name__}: {error}", file=sys.stderr, flush=True)
            else:
                before(kind, error, trace)
        if isinstance(error, AutoshardError):
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(error.exit_code)

    sys.excepthook = hook
