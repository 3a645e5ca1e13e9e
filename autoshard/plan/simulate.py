"""Plays an instruction list event by event: when does each rank do what, and how long is the step.

In: the lists that the executor will run, seconds of each (stage, kind), seconds of each transfer. Out: a `Simulation`.

A rank has one compute stream, which runs its list in order, and one outgoing link, on which its sends queue; a send costs the compute
stream nothing but contention, a receive makes it wait until the message is there. L, the loss shared, waits for all ranks; so do G and P
if `barriers` says so.

>>> from autoshard.plan.schedules import build
>>> lists = build("1f1b", 2, 4, [(0, 1)])
>>> result = simulate(lists, {(s, k): t for s in (0, 1) for k, t in (("F", 1.0), ("B", 2.0))})
>>> result.step_seconds, round(result.bubble, 3), result.in_flight
(15.0, 0.2, [2, 1])
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import DeadlockError
from .schedules import ONCE, Action, placement

Edge = tuple[int, int]


class Event(NamedTuple):
    """One action on a rank's compute stream, from `start` to `end`; a receive's time is its waiting."""

    action: Action
    start: float
    end: float


@dataclass
class Simulation:
    """What a played list did. `starts` and `ends` stand beside `lists`, entry by entry.

    `busy`: seconds of computation per rank. `in_flight`: per rank, the most microbatches (counted once per stage) whose forward has run
    and whose backward hasn't.
    """

    lists: Sequence[Sequence[Action]]
    starts: list[list[float]]
    ends: list[list[float]]
    busy: list[float]
    in_flight: list[int]
    step_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.step_seconds = max((ends[-1] for ends in self.ends if ends), default=0.0)

    @property
    def timelines(self) -> list[list[Event]]:
        return [
            [Event(*entry) for entry in zip(actions, starts, ends, strict=True)]
            for actions, starts, ends in zip(self.lists, self.starts, self.ends, strict=True)
        ]

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which they don't compute."""
        total = self.step_seconds * len(self.lists)
        return 1.0 - sum(self.busy) / total if total else 0.0


def simulate(
    lists: Sequence[Sequence[Action]],
    seconds: Mapping[tuple[int, str], float],
    p2p: Mapping[Edge, float] | None = None,
    *,
    contention: float = 0.0,
    barriers: Sequence[str] = ("L",),
) -> Simulation:
    """Play the lists.

    `seconds`: (stage, "F" | "B" | "I" | "W") → seconds of one microbatch; (rank, "P" | "D" | "G" | "L" | "U") → seconds; what is missing
    takes none. `p2p`: (source, destination) stage → seconds of one message; gradients take what the values of their edge take unless
    (later, earlier) says otherwise. `contention`: the part of each transfer's seconds that the computation at both ends loses.
    Raises DeadlockError.
    """
    return _Machine(lists, seconds, p2p or {}, contention, frozenset(barriers)).run()


class _Machine:
    def __init__(
        self,
        lists: Sequence[Sequence[Action]],
        seconds: Mapping[tuple[int, str], float],
        p2p: Mapping[Edge, float],
        contention: float,
        barriers: frozenset[str],
    ) -> None:
        count = len(lists)
        self.lists, self.seconds, self.contention, self.barriers = lists, seconds, contention, barriers
        self.transfer = {**{(b, a): t for (a, b), t in p2p.items()}, **p2p}
        self.home = placement(lists)
        self.starts: list[list[float]] = [[] for _ in range(count)]
        self.ends: list[list[float]] = [[] for _ in range(count)]
        self.clock = [0.0] * count
        self.link = [0.0] * count
        self.busy = [0.0] * count
        self.live = [0] * count
        self.peak = [0] * count
        # messages under way, by (source stage, destination stage): the two directions are different pairs
        self.mail: dict[Edge, deque[float]] = {}
        self.sleeping: dict[Edge, int] = {}
        self.waiting: dict[str, list[int]] = {}
        self.ready = deque(range(count))

    def run(self) -> Simulation:
        while self.ready:
            self.advance(self.ready.popleft())
        stuck = {rank: actions[len(self.ends[rank])] for rank, actions in enumerate(self.lists) if len(self.ends[rank]) < len(actions)}
        if stuck:
            rank = min(stuck, key=lambda r: (stuck[r].kind in ONCE, r))
            raise DeadlockError(f"rank {rank} waits for ever at {stuck[rank]}", hint="schedules.check shows where")
        return Simulation(self.lists, self.starts, self.ends, self.busy, self.peak)

    def advance(self, rank: int) -> None:
        """Run a rank until it must wait."""
        actions, starts, ends = self.lists[rank], self.starts[rank], self.ends[rank]
        seconds, transfer, contention = self.seconds, self.transfer, self.contention
        now = self.clock[rank]
        for at in range(len(ends), len(actions)):
            action = actions[at]
            kind = action.kind
            begin = now
            if kind[0] == "S":
                self.send(rank, action.stage, action.peer, now)
                now += contention * transfer.get((action.stage, action.peer), 0.0) if contention else 0.0
            elif kind[0] == "R":
                arrival = self.receive(rank, (action.peer, action.stage))
                if arrival is None:
                    break
                if arrival > now:
                    now = arrival
                now += contention * transfer.get((action.peer, action.stage), 0.0) if contention else 0.0
            elif kind in ONCE:
                spent = seconds.get((rank, kind), 0.0)
                if kind in self.barriers and not self.meet(rank, kind, now):
                    break
                now = max(now, self.clock[rank]) + spent
                self.busy[rank] += spent
            else:
                spent = seconds.get((action.stage, kind), 0.0)
                now += spent
                self.busy[rank] += spent
                self.count(rank, kind)
            starts.append(begin)
            ends.append(now)
        self.clock[rank] = max(now, self.clock[rank])

    def count(self, rank: int, kind: str) -> None:
        if kind == "F":
            self.live[rank] += 1
            self.peak[rank] = max(self.peak[rank], self.live[rank])
        elif kind != "I":
            self.live[rank] -= 1

    def send(self, rank: int, source: int, destination: int, now: float) -> None:
        edge = (source, destination)
        arrival = max(now, self.link[rank]) + self.transfer.get(edge, 0.0)
        self.link[rank] = arrival
        mail = self.mail.get(edge)
        if mail is None:
            mail = self.mail[edge] = deque()
        mail.append(arrival)
        sleeper = self.sleeping.pop(edge, None)
        if sleeper is not None:
            self.ready.append(sleeper)

    def receive(self, rank: int, edge: Edge) -> float | None:
        mail = self.mail.get(edge)
        if not mail:
            self.sleeping[edge] = rank
            return None
        return mail.popleft()

    def meet(self, rank: int, kind: str, now: float) -> bool:
        """Whether all ranks have reached this barrier; the last to come wakes the others, at its own time."""
        arrived = self.waiting.setdefault(kind, [])
        if rank in arrived:
            return len(arrived) == len(self.lists)
        arrived.append(rank)
        self.clock[rank] = now
        if len(arrived) < len(self.lists):
            return False
        latest = max(self.clock[r] for r in arrived)
        for other in arrived:
            self.clock[other] = latest
        self.ready.extend(other for other in arrived if other != rank)
        return True
