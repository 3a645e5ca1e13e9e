"""search(graph, cluster) → Plan: every mesh shape and microbatch count, placements exact within each, the fastest that fits.

In order: fold the layers that are alike (`fold`), bound each candidate (pp × dp × tp, microbatches) without solving it, choose placements
for those that may win (`candidate`: placements, stages, simulation), squeeze those that don't fit (`squeeze`), keep the fastest. Cutting
the batch finer can't make a microbatch's work cheaper in sum, so what a coarse count costs bounds all finer ones. What was looked at and
lost, and why, is in `Plan.runners_up`.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import NoPlanError
from ..mesh import Mesh
from ..trace.blocks import data_only, find_blocks
from ..trace.graph import Graph
from . import pins as pinning
from .candidate import Bound, Candidate, Candidates, Open, Refused, gib
from .cluster import Cluster
from .finish import finish
from .microbatch import TimeSplit
from .plan import Plan
from .solve import TooWide
from .whole import Unlike

RUNNERS = 24
"""Candidates that lost and are kept in the plan."""
SAME = 1e-3
"""Step times that differ by less are the same, and the plainer plan is taken: fewer stages, then less inside of layers."""


def search(
    graph: Graph,
    cluster: Cluster | None = None,
    mesh: Mapping[str, int] | Mesh | None = None,
    microbatches: int | None = None,
    pins: Mapping[str, Any] | None = None,
    memory: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """The fastest plan under the cost model.

    `mesh` pins the degrees (otherwise every split of the cluster's ranks is tried), `microbatches` their count. `pins`:
    "schedule" (gpipe, 1f1b), "cuts" (first block of each stage), "zero" (bool: store what dp replicates in shards),
    "storage" (parameter path → type on tp, as text), "ops" (op → strategy on tp, as text), "divide" (bool: divide parameters and
    matmuls over tp wherever that is possible, whatever it costs; the default where `mesh` is given), "merge" (linears of one input
    as one matmul: all that may be, none, or lists of their weights' paths), "buckets" (bytes of parameters, as used, that travel
    together; 0: each alone), "kernels" (names: put these where the model computes what they do), "overlap" (bool: collectives run beside
    matmuls; the default), "precision" (a recipe of `plan.precision`: linears multiply in fp8 where that pays). `memory`: bytes per rank.
    `progress` is told what is being looked at. Raises PinError for pins that can't be, and NoPlanError with the reasons of the nearest
    candidates; `candidates` has all.
    """
    pins = dict(pins or {})
    if isinstance(mesh, Mesh):
        mesh = dict(zip(mesh.names, mesh.sizes, strict=True))
    wanted = Mesh.of(mesh) if mesh is not None else None
    cluster = cluster or Cluster.local(wanted.ranks if wanted else 1)
    meshes = [wanted] if wanted else list(_meshes(cluster.ranks, graph))
    limit = memory or cluster.device.usable
    # a pin may name what folding leaves out
    folding = not any(pins.get(p) for p in ("storage", "ops")) and isinstance(pins.get("merge", True), bool)
    checked = not pins
    while True:
        candidates = Candidates(graph, cluster, pins, limit, pinned=wanted is not None, folding=folding)
        if not checked:
            blocks = candidates.folded.blocks or len(find_blocks(candidates.folded.graph, data_only(candidates.folded.graph)))
            pinning.check(pins, graph, blocks, meshes, functools.partial(_trials, candidates, meshes, microbatches))
            checked = True
        if "cuts" in pins:
            meshes = [m for m in meshes if m.size("pp") == len(pins["cuts"])]
        try:
            return _Race(candidates, meshes, microbatches, progress or (lambda _: None)).run()
        except Unlike:
            folding = False


def random_plan(graph: Graph, mesh: Mapping[str, int], microbatches: int = 1, seed: int = 0) -> Plan:
    """A legal plan with random placements, storage, cuts and schedule, for tests. Raises NoPlanError."""
    shape = Mesh.of(mesh)
    rng = np.random.default_rng(seed)
    pins = {"schedule": str(rng.choice(["gpipe", "1f1b"])), "zero": bool(rng.integers(2))}
    candidates = Candidates(graph, Cluster.local(shape.ranks), pins, math.inf, seed)
    counts, note = candidates.counts(shape, microbatches)
    found = candidates.open(shape, counts[0])
    if found.found is None:
        raise found.refused or NoPlanError("no random plan")
    plan = finish(candidates, found.found)
    plan.notes += note
    return plan


def _meshes(ranks: int, graph: Graph) -> list[Mesh]:
    """The plain ones first: few stages, little inside of layers."""
    found = []
    batch = max((v.tensor.shape[v.batch_dim] for v in graph.sources("input") if v.batch_dim is not None), default=1)
    for pp, tp in itertools.product(_divisors(ranks), repeat=2):
        if ranks % (pp * tp) == 0 and ranks // (pp * tp) <= batch:
            found.append(Mesh.of({"pp": pp, "dp": ranks // (pp * tp), "tp": tp}))
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _trials(candidates: Candidates, meshes: Sequence[Mesh], microbatches: int | None) -> Iterator[tuple[Mesh, TimeSplit]]:
    """Each (dp, tp) once, those that divide most inside of layers first, with one split each."""
    seen = set()
    for mesh in sorted(meshes, key=lambda m: -m.size("tp")):
        key = (mesh.size("dp"), mesh.size("tp"))
        if key not in seen:
            seen.add(key)
            split = candidates.split(candidates.counts(mesh, microbatches)[0][0])
            if isinstance(split, TimeSplit):
                yield mesh, split


class _Race:
    """Candidates in the order of what they are likely to take, until lower bounds say that none can win.

    Of each mesh the finest count is settled first: if that doesn't fit however it is placed, no other does (a microbatch holds less, and
    no more of them are in flight than there are stages). Then the coarsest is solved, which bounds the time of all others; of a mesh that
    is unlikely to win, that comes first.
    """

    def __init__(
        self, candidates: Candidates, meshes: Sequence[Mesh], microbatches: int | None, progress: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.candidates, self.meshes, self.progress = candidates, meshes, progress
        self.bounds: list[list[Bound]] = [[] for _ in meshes]
        self.tries = [candidates.counts(shape, microbatches) for shape in meshes]
        self.too_large = [0] * len(meshes)  # the finest count that is known not to fit
        self.open: dict[tuple[int, int], Open | None] = {}  # None: settled
        self.found: list[tuple[float, int, int, Candidate]] = []
        self.lost: list[dict[str, Any]] = []
        self.best = math.inf

    def run(self) -> Plan:
        queue = [(self.priority(m, count), m, count) for m in range(len(self.meshes)) for count in self.floors(m)]
        heapq.heapify(queue)
        left = []
        while queue:
            before, m, count = heapq.heappop(queue)
            if count <= self.too_large[m] or self.open.get((m, count), 1) is None:
                continue
            now = self.priority(m, count)
            if self.bound(m, count) > self.best:
                left.append((m, count))
            elif now > before:
                heapq.heappush(queue, (now, m, count))
            else:
                first = self.first(m, count)
                self.settle(m, first) if self.open.get((m, first)) else self.attempt(m, first)
                heapq.heappush(queue, (now, m, count))
        return self.result([(m, count) for m, count in left if count > self.too_large[m]])

    def priority(self, m: int, count: int) -> float:
        """Seconds a step that this candidate is likely to take."""
        opened = self.open.get((m, count))
        guess = 0.0 if opened is not None else self.candidates.guess(self.meshes[m], count)
        return max(guess, self.bound(m, count))

    def floors(self, m: int) -> list[int]:
        """Counts that may fit; what a step of each can't be shorter than is noted."""
        shape = self.meshes[m]
        found: list[int] = []
        for count in reversed(self.tries[m][0]):
            try:
                self.bounds[m].append(self.candidates.floor(shape, count))
            except Refused as error:
                # nor does a coarser count fit
                self.too_large[m] = count
                if not found:
                    self.lose(m, count, error.reason, error.facts)
                break
            found.append(count)
        return found

    def first(self, m: int, count: int) -> int:
        """What has to be settled before this count is looked at: it, or one that says more about the mesh."""
        counts = [c for c in self.tries[m][0] if c > self.too_large[m]]
        coarsest, finest = counts[0], counts[-1]
        if (m, finest) not in self.open:
            unlikely = self.candidates.guess(self.meshes[m], finest) > self.best and (m, coarsest) not in self.open
            return coarsest if unlikely else finest
        if self.open[m, finest] is not None and self.bound(m, finest) <= self.best:
            return finest
        return coarsest if (m, coarsest) not in self.open else count

    def bound(self, m: int, count: int) -> float:
        """Seconds that a step can't be shorter than: by the work of a coarser count, or by all work evenly divided."""
        pp = self.meshes[m].size("pp")
        known = [b for b in self.bounds[m] if count % b.count == 0]
        return max((b.step(pp, count) for b in known), default=0.0)

    def attempt(self, m: int, count: int) -> None:
        """Solve one candidate for time alone."""
        shape = self.meshes[m]
        self.tell(f"{shape} × {count}")
        self.open[m, count] = None
        try:
            found = self.candidates.open(shape, count)
        except TooWide as error:
            self.lose(m, count, f"too many placements to choose from: {error}")
        except Refused as error:
            self.too_large[m] = max(self.too_large[m], count)
            self.lose(m, count, error.reason, error.facts)
        except NoPlanError as error:
            self.lose(m, count, str(error))
        else:
            if not self.candidates.pinned:  # under pins, placements are chosen for other than seconds
                self.bounds[m].append(found.bound)
            if found.found is not None:
                self.win(m, count, found.found)
            else:
                self.open[m, count] = found

    def settle(self, m: int, count: int) -> None:
        """Squeeze a candidate that doesn't fit as it is."""
        opened = self.open[m, count]
        assert opened is not None
        self.open[m, count] = None
        self.tell(f"{self.meshes[m]} × {count}, for memory")
        try:
            self.win(m, count, self.candidates.squeeze(opened))
        except Refused as error:
            self.too_large[m] = max(self.too_large[m], count)
            self.lose(m, count, error.reason, error.facts)

    def win(self, m: int, count: int, found: Candidate) -> None:
        self.found.append((found.seconds, m, count, found))
        self.best = min(self.best, found.seconds)

    def lose(self, m: int, count: int, reason: str, facts: Mapping[str, Any] | None = None) -> None:
        self.lost.append({"mesh": str(self.meshes[m]), "microbatches": count, **(facts or {}), "reason": reason, "fits": False})

    def tell(self, what: str) -> None:
        self.progress(what + (f", best so far {self.best:.4g} s a step" if self.best < math.inf else ""))

    def result(self, left: Sequence[tuple[int, int]]) -> Plan:
        self.lost.sort(key=lambda row: row.get("missing_bytes", math.inf))
        if not self.found:
            raise self.nothing()
        self.found.sort(key=lambda f: f[:3])
        same = [f for f in self.found if f[0] <= self.best * (1 + SAME)]
        chosen = min(same, key=lambda f: (f[1], f[0]))
        best, m, _, winner = chosen
        plan = finish(self.candidates, winner)
        plan.notes += self.tries[m][1]
        rows = [
            {"mesh": str(f.mesh), "microbatches": f.count, "step_seconds": t, "memory_bytes": f.memory,
             "reason": f"{100 * (t / best - 1):.1f} % slower" if t > best * (1 + SAME) else "as fast; the plainer was taken", "fits": True}
            for t, _, _, f in self.found if f is not winner
        ]  # fmt: skip
        unsolved: dict[int, tuple[float, int]] = {}
        for at, count in left:
            unsolved[at] = min(unsolved.get(at, (math.inf, 0)), (self.bound(at, count), count))
        bounded = [
            {"mesh": str(self.meshes[at]), "microbatches": count, "at_least_seconds": bound,
             "reason": f"at least {100 * (bound / best - 1):.1f} % slower, so not solved", "fits": None}
            for at, (bound, count) in sorted(unsolved.items(), key=lambda u: u[1])
        ]  # fmt: skip
        plan.runners_up = rows[:RUNNERS] + bounded[: RUNNERS // 2] + self.lost[: RUNNERS // 2]
        return plan

    def nothing(self) -> NoPlanError:
        lines = [f"{row['mesh']} × {row['microbatches']} microbatches: {row['reason']}" for row in self.lost]
        more = f"\n  and {len(lines) - 6} more" if len(lines) > 7 else ""
        missing = next((row["missing_bytes"] for row in self.lost if "missing_bytes" in row), None)
        near = f": the nearest needs {gib(missing)} more than the {gib(self.candidates.limit)} of a rank" if missing else ""
        hint = "more ranks, a shorter sequence or a smaller batch need less memory" if missing else ""
        error = NoPlanError(f"no plan fits{near}:\n  " + "\n  ".join(lines[: 6 if more else 7] or ["nothing to try"]) + more, hint=hint)
        error.candidates = self.lost
        return error


__all__ = ["Cluster", "random_plan", "search"]
