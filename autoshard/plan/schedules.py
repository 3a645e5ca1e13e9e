"""The complete instruction list of a training step, as text: one list of actions per pipeline rank.

In: how many stages and microbatches, and which stage hands values to which (`edges`; values may skip stages).
Out: per rank, everything that the executor does in a step, in order. `check` proves that no rank waits for ever.

    P  begin to gather parameters for use      F1.0  forward of stage 1, microbatch 0     SF0>1.3  send values 0 → 1
    D  run the data prologue                   B1.0  backward, inputs and weights         RF0>1.3  receive them
    G  gradients are reduced, and in place     I1.0  backward of the inputs only          SB1>0.3  send gradients 1 → 0
    L  share the loss                          W1.0  backward of the weights only         RB1>0.3  receive them
    U  commit buffer updates

Sends are buffered and never block; a receive blocks until its message is there. Each (source, destination, direction) is one FIFO channel.
Collectives over dp and tp need no action: ranks of such a group run the same stage's list, and issue them at the same places of it.
(Gathers and reductions beside the loop too: when each is issued follows from the list and the calls, `runtime.gradients.completed`.)

>>> lists = build("1f1b", stages=2, microbatches=2, edges=[(0, 1)])
>>> print(to_text(lists))
0: P D F0.0 SF0>1.0 F0.1 SF0>1.1 RB1>0.0 B0.0 RB1>0.1 B0.1 G L U
1: P D RF0>1.0 F1.0 B1.0 SB1>0.0 RF0>1.1 F1.1 B1.1 SB1>0.1 G L U
>>> check(lists, [(0, 1)])
>>> parse(to_text(lists)) == lists
True
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..errors import DeadlockError, PlanFileError

Edge = tuple[int, int]
Lists = list[list["Action"]]

ONCE = ("P", "D", "G", "L", "U")
COMPUTE = ("F", "B", "I", "W")
SENDS = ("SF", "SB")
RECEIVES = ("RF", "RB")
MAX_TEXT = 64 << 20
_PATTERN = re.compile(r"(?:([PDGLU])|([FBIW])(\d{1,6})\.(\d{1,9})|([SR][FB])(\d{1,6})>(\d{1,6})\.(\d{1,9}))\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Action:
    """One instruction. `stage` is always the stage of the rank that runs it, `peer` the other end of a send or receive.

    >>> Action("RF", 1, 3, peer=0)
    RF0>1.3
    >>> Action.parse("RF0>1.3").stage
    1
    """

    kind: str
    stage: int = -1
    mb: int = -1
    peer: int = -1

    @property
    def channel(self) -> tuple[int, int]:
        """(source stage, destination stage) of a send or receive. With the direction (F or B), it names the FIFO."""
        return (self.stage, self.peer) if self.kind[0] == "S" else (self.peer, self.stage)

    def __str__(self) -> str:
        if self.kind in ONCE:
            return self.kind
        if self.kind in COMPUTE:
            return f"{self.kind}{self.stage}.{self.mb}"
        source, destination = self.channel
        return f"{self.kind}{source}>{destination}.{self.mb}"

    __repr__ = __str__

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read what str(action) wrote. Raises PlanFileError."""
        found = _PATTERN.match(text)
        if not found:
            raise PlanFileError(
                f"{text[:40]!r} is no instruction", hint="expected P D G L U, F0.1 B0.1 I0.1 W0.1, or SF0>1.2 RF0>1.2 SB1>0.2 RB1>0.2"
            )
        once, compute, stage, mb, transfer, source, destination, transfer_mb = found.groups()
        if once:
            return cls(once)
        if compute:
            return cls(compute, int(stage), int(mb))
        ends = (int(source), int(destination))
        forward = transfer[1] == "F"
        if ends[0] == ends[1] or forward != (ends[0] < ends[1]):
            raise PlanFileError(f"{text!r} runs the wrong way: values go to a later stage, gradients to an earlier one")
        own, peer = ends if transfer[0] == "S" else ends[::-1]
        return cls(transfer, own, int(transfer_mb), peer)


def to_text(lists: Sequence[Sequence[Action]]) -> str:
    """One line per rank: `0: P D F0.0 …`."""
    return "\n".join(f"{rank}: {' '.join(map(str, actions))}" for rank, actions in enumerate(lists))


def parse(text: str) -> Lists:
    """Read what `to_text` wrote. Raises PlanFileError."""
    if len(text) > MAX_TEXT:
        raise PlanFileError(f"an instruction list of {len(text)} characters; at most {MAX_TEXT} are read")
    lists: Lists = []
    known: dict[str, Action] = {}
    for number, line in enumerate(line for line in text.splitlines() if line.strip()):
        head, colon, body = line.partition(":")
        if not colon or head.strip() != str(number):
            raise PlanFileError(
                f"an instruction list's line begins with {line[:20]!r}", hint=f"expected '{number}: ' and that rank's actions"
            )
        words = body.split()
        for word in words:
            if word not in known:
                known[word] = Action.parse(word)
        lists.append([known[word] for word in words])
    return lists


# ---- building ------------------------------------------------------------------------------------------------------


def _gpipe(stage: int, stages: int, microbatches: int) -> list[tuple[str, int]]:
    return [("F", m) for m in range(microbatches)] + [("B", m) for m in range(microbatches)]


def _one_f_one_b(stage: int, stages: int, microbatches: int) -> list[tuple[str, int]]:
    warm = min(stages - stage - 1, microbatches)
    order = [("F", m) for m in range(warm)]
    for m in range(microbatches - warm):
        order += [("F", warm + m), ("B", m)]
    return order + [("B", m) for m in range(microbatches - warm, microbatches)]


def _forward(stage: int, stages: int, microbatches: int) -> list[tuple[str, int]]:
    return [("F", m) for m in range(microbatches)]


KINDS: dict[str, Callable[[int, int, int], list[tuple[str, int]]]] = {"gpipe": _gpipe, "1f1b": _one_f_one_b, "forward": _forward}
"""Schedule name → the order of a stage's computations. Transfers follow from the edges, whatever the order.

"forward" is evaluation: no gradients, so neither G nor U."""


def build(kind: str, stages: int, microbatches: int, edges: Sequence[Edge], grad_edges: Sequence[Edge] | None = None) -> Lists:
    """The lists of all pipeline ranks, stage s on rank s.

    `edges`: (source, destination) stages between which values pass. `grad_edges`: those whose values carry a gradient (default: all).
    """
    if kind not in KINDS:
        raise PlanFileError(f"unknown schedule {kind!r}", hint=f"expected one of {', '.join(KINDS)}")
    if stages < 1 or microbatches < 1:
        raise PlanFileError(f"a schedule of {stages} stages and {microbatches} microbatches", hint="both must be at least 1")
    wiring = _Wiring(edges, grad_edges)
    assert all(0 <= a < b < stages for a, b in wiring.forward), f"edges {edges} of {stages} stages"
    lists: Lists = []
    for stage in range(stages):
        actions = [Action("P"), Action("D")]
        for step, mb in KINDS[kind](stage, stages, microbatches):
            actions += wiring.around(step, stage, mb)
        lists.append(actions + [Action(k) for k in (("L",) if kind == "forward" else ("G", "L", "U"))])
    return lists


class _Wiring:
    """Which stages each stage hears from and speaks to, in each direction."""

    def __init__(self, edges: Sequence[Edge], grad_edges: Sequence[Edge] | None) -> None:
        self.forward = sorted(set(edges))
        self.backward = sorted(set(edges if grad_edges is None else grad_edges))
        assert set(self.backward) <= set(self.forward), f"gradients flow over {grad_edges}, values only over {edges}"
        self.before: dict[int, list[int]] = {}
        self.after: dict[int, list[int]] = {}
        self.grad_before: dict[int, list[int]] = {}
        self.grad_after: dict[int, list[int]] = {}
        for a, b in self.forward:
            self.before.setdefault(b, []).append(a)
            self.after.setdefault(a, []).append(b)
        for a, b in self.backward:
            self.grad_before.setdefault(b, []).append(a)
            self.grad_after.setdefault(a, []).append(b)

    def around(self, step: str, stage: int, mb: int) -> list[Action]:
        """A computation with the receives that it needs before it and the sends that it allows after it."""
        if step == "F":
            sources, targets, way = self.before, self.after, "F"
        elif step in ("B", "I"):
            sources, targets, way = self.grad_after, self.grad_before, "B"
        else:
            return [Action(step, stage, mb)]
        return [
            *(Action("R" + way, stage, mb, peer) for peer in sources.get(stage, ())),
            Action(step, stage, mb),
            *(Action("S" + way, stage, mb, peer) for peer in targets.get(stage, ())),
        ]


# ---- checking ------------------------------------------------------------------------------------------------------


def placement(lists: Sequence[Sequence[Action]]) -> dict[int, int]:
    """Stage → the rank that runs its forwards. Raises DeadlockError if one stage's actions stand on several ranks."""
    home: dict[int, int] = {}
    for rank, actions in enumerate(lists):
        for step, action in enumerate(actions):
            if action.stage >= 0 and home.setdefault(action.stage, rank) != rank:
                _fail(
                    lists,
                    [step if r == rank else -1 for r in range(len(lists))],
                    rank,
                    f"stage {action.stage} is on rank {home[action.stage]}",
                )
    return home


def check(lists: Sequence[Sequence[Action]], edges: Sequence[Edge], grad_edges: Sequence[Edge] | None = None) -> None:
    """Raise DeadlockError unless every rank can run its list to the end and all the work is done exactly once.

    Plays the lists under the rules of the module docstring; P, D, G, L and U wait for all ranks (they may hold collectives across stages).
    Lists without any backward are evaluation's, and need no G and no U.
    """
    player = _Player(lists, _Wiring(edges, grad_edges))
    player.play()
    player.finish()


@dataclass
class _Player:
    """Runs all lists, one rank as far as it goes at a time, and verifies what each action needs."""

    lists: Sequence[Sequence[Action]]
    wiring: _Wiring
    position: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.home = placement(self.lists)
        self.position = [0] * len(self.lists)
        self.done: set[tuple[str, int, int]] = set()
        self.received: set[tuple[str, int, int, int]] = set()
        self.sent: set[tuple[str, int, int, int]] = set()
        self.channels: dict[tuple[str, int, int], deque[int]] = {}
        self.sleeping: dict[tuple[str, int, int], int] = {}
        self.barriers: dict[str, list[int]] = {}
        self.closed = [False] * len(self.lists)
        self.ready = deque(range(len(self.lists)))

    def play(self) -> None:
        while self.ready:
            rank = self.ready.popleft()
            actions = self.lists[rank]
            while self.position[rank] < len(actions) and self.step(rank, actions[self.position[rank]]):
                self.position[rank] += 1
        stuck = [rank for rank, at in enumerate(self.position) if at < len(self.lists[rank])]
        if stuck:
            # the rank to show: one whose message will never be sent says more than one that waits in a cycle
            rank = min(stuck, key=lambda r: (self.waits_for_peer(r), r))
            action = self.lists[rank][self.position[rank]]
            why = "every rank must reach it, and some never do" if action.kind in ONCE else "its message is never sent"
            if self.waits_for_peer(rank) and action.kind not in ONCE:
                why = "the rank that would send it waits too"
            self.fail(rank, f"rank {rank} waits for ever at {action}: {why}")

    def waits_for_peer(self, rank: int) -> bool:
        """Whether what this stuck rank waits for still stands in the list of another stuck rank."""
        action = self.lists[rank][self.position[rank]]
        if action.kind in ONCE or action.peer not in self.home:
            return action.kind in ONCE
        peer = self.home[action.peer]
        send = Action("S" + action.kind[1], action.peer, action.mb, action.stage)
        return send in self.lists[peer][self.position[peer] :]

    def step(self, rank: int, action: Action) -> bool:
        """Run one action; False if it must wait (the rank is then woken by what it waits for)."""
        if action.kind in ONCE:
            return self.once(rank, action)
        if self.closed[rank] and action.kind in COMPUTE:
            self.fail(rank, f"{action} stands after the end of the loop (G, L or U)")
        if action.kind in COMPUTE:
            self.compute(rank, action)
            return True
        edge = (action.stage, action.peer) if action.stage < action.peer else (action.peer, action.stage)
        if edge not in (self.wiring.forward if action.kind[1] == "F" else self.wiring.backward):
            self.fail(rank, f"{action}: nothing passes between stages {edge[0]} and {edge[1]}")
        if self.home.get(action.peer) == rank:
            self.fail(rank, f"{action}: both stages are on rank {rank}, nothing is to be sent")
        return self.send(rank, action) if action.kind in SENDS else self.receive(rank, action)

    def once(self, rank: int, action: Action) -> bool:
        arrived = self.barriers.setdefault(action.kind, [])
        if rank in arrived and len(arrived) == len(self.lists):
            # woken by the last arrival, or a repeat of something already done
            if (action.kind, -1, rank) in self.done:
                self.fail(rank, f"{action} a second time")
            self.done.add((action.kind, -1, rank))
            self.closed[rank] |= action.kind in ("G", "L", "U")
            return True
        if rank not in arrived:
            arrived.append(rank)
            if len(arrived) == len(self.lists):
                self.ready.extend(arrived)
        return False

    def compute(self, rank: int, action: Action) -> None:
        kind, stage, mb = action.kind, action.stage, action.mb
        covered = {"B": ("B", "I", "W"), "I": ("B", "I"), "W": ("B", "W"), "F": ("F",)}[kind]
        if any((k, stage, mb) in self.done for k in covered):
            self.fail(rank, f"{action} a second time")
        missing = [k for k in ("P", "D") if (k, -1, rank) not in self.done]
        if missing and kind == "F":
            self.fail(rank, f"{action} before {missing[0]}")
        needed = {"B": "F", "I": "F", "W": "I"}.get(kind)
        if needed and (needed, stage, mb) not in self.done:
            self.fail(rank, f"{action} before {needed}{stage}.{mb}")
        if kind != "W":
            way, peers = ("F", self.wiring.before) if kind == "F" else ("B", self.wiring.grad_after)
            for peer in peers.get(stage, ()):
                self.has_input(rank, action, way, peer)
        self.done.add((kind, stage, mb))

    def has_input(self, rank: int, action: Action, way: str, peer: int) -> None:
        """Fail unless what stage `peer` hands to this computation is there."""
        stage, mb = action.stage, action.mb
        if self.home.get(peer) == rank:
            if not any((k, peer, mb) in self.done for k in (("F",) if way == "F" else ("B", "I"))):
                self.fail(rank, f"{action} before {way}{peer}.{mb}")
        elif (way, peer, stage, mb) not in self.received:
            self.fail(rank, f"{action} before {Action('R' + way, stage, mb, peer)}")

    def send(self, rank: int, action: Action) -> bool:
        way, stage, mb = action.kind[1], action.stage, action.mb
        if not any((k, stage, mb) in self.done for k in (("F",) if way == "F" else ("B", "I"))):
            self.fail(rank, f"{action} before {way}{stage}.{mb}")
        key = (way, *action.channel)
        if (*key, mb) in self.sent:
            self.fail(rank, f"{action} a second time")
        self.sent.add((*key, mb))
        self.channels.setdefault(key, deque()).append(mb)
        if key in self.sleeping:
            self.ready.append(self.sleeping.pop(key))
        return True

    def receive(self, rank: int, action: Action) -> bool:
        key = (action.kind[1], *action.channel)
        channel = self.channels.setdefault(key, deque())
        if not channel:
            self.sleeping[key] = rank
            return False
        mb = channel.popleft()
        if mb != action.mb:
            self.fail(rank, f"{action} takes what was sent for microbatch {mb}: channels are first in, first out")
        self.received.add((*key, mb))
        return True

    def finish(self) -> None:
        """Everything ran; was it all the work there is?"""
        microbatches = {a.mb for actions in self.lists for a in actions if a.kind == "F"}
        if microbatches != set(range(len(microbatches))):
            self.fail(0, f"microbatches are numbered {sorted(microbatches)[:8]}…, not from 0 on")
        training = any(k in ("B", "I", "W") for k, _, _ in self.done)
        for stage, rank in sorted(self.home.items()):
            for mb in range(len(microbatches)):
                whole = ("B", stage, mb) in self.done
                halves = [(k, stage, mb) in self.done for k in ("I", "W")]
                if ("F", stage, mb) not in self.done or (training and not (whole or all(halves))):
                    what = "F" if ("F", stage, mb) not in self.done else "W" if halves[0] else "B"
                    self.fail(rank, f"{what}{stage}.{mb} is missing")
        for rank in range(len(self.lists)):
            for kind in ONCE if training else ("P", "D", "L"):
                if (kind, -1, rank) not in self.done:
                    self.fail(rank, f"{kind} is missing on rank {rank}")
        for (way, source, destination), left in self.channels.items():
            if left:
                self.fail(self.home[source], f"{Action('S' + way, source, left[0], destination)} is never received")

    def fail(self, rank: int, message: str) -> None:
        _fail(self.lists, self.position, rank, message)


def _fail(lists: Sequence[Sequence[Action]], position: Sequence[int], rank: int, message: str) -> None:
    raise DeadlockError(f"{message}\n{grid(lists, position, rank)}", hint="this list can't run; build it anew")


def grid(lists: Sequence[Sequence[Action]], position: Sequence[int], rank: int, width: int = 4, rows: int = 12) -> str:
    """Ranks × steps around the step where `rank` stands, that cell marked with brackets, as are the cells where the others stand.

    >>> print(grid(parse("0: P D F0.0\\n1: P D RF0>1.0"), [3, 2], 1))
             step 0 step 1    step 2
      rank 0      P      D      F0.0
    > rank 1      P      D [RF0>1.0]
    """
    at = min(position[rank], max(len(lists[rank]) - 1, 0))
    steps = range(max(0, at - width), max(1, min(max(map(len, lists)), at + width + 1)))
    first = max(0, min(rank - rows // 2, len(lists) - rows))
    shown = range(first, min(len(lists), first + rows))

    def cell(r: int, step: int) -> str:
        text = str(lists[r][step]) if step < len(lists[r]) else ""
        return f"[{text}]" if text and step == position[r] else text

    columns = [[f"step {step}", *(cell(r, step) for r in shown)] for step in steps]
    columns = [[text.rjust(max(map(len, column))) for text in column] for column in columns]
    heads = [f"{'>' if r == rank else ' '} rank {r:<{len(str(shown[-1]))}}" for r in shown]
    lines = [" ".join([head, *cells]).rstrip() for head, *cells in zip([" " * len(heads[0]), *heads], *columns, strict=True)]
    if len(shown) < len(lists):
        lines.append(f"  (ranks {shown[0]} to {shown[-1]} of {len(lists)})")
    return "\n".join(lines)
