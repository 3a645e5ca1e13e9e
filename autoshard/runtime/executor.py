"""The executor: plays one rank's instruction list, as a generator that pauses where it needs other ranks.

In: a `RankProgram`, the rank's `State`, the step's inputs. Out: the loss, and gradients in `.grad` of the stored parameters.
Both players drive it: `in_process` answers its requests (`Meet`, `Send`, `Receive`) for all ranks in turns, `module` answers
them through torch.distributed. How a module itself runs is the player's too (`Run`).

A step keeps an environment of tensors by name for the step, and one for each microbatch in flight; a value of a microbatch is
dropped after its last use. Gradients of values live in a second environment per microbatch, and are summed over consumers;
gradients of parameters as used are summed over consumers and microbatches, and go through `gathers` backwards once.

What moves parameters runs in a lane beside the loop (`lane.py`): each gather is issued a little before the first block that needs it, and
its backward, the reduction of a bucket's gradients, as soon as the last part of these is there (`gradients.completed`). G waits for all.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import StateError
from ..layout import Type, dim_positions
from ..lower.program import Call, Program, RankProgram
from ..plan.schedules import Action
from ..trace import graph
from .gradients import add, completed, place, sum_dtype, unshared, wide
from .inputs import Reader, StepInputs, torch_dtype
from .lane import Lane
from .requests import Meet, Receive, Request, Send

Results = tuple[Any, ...]
Named = list[tuple[str, Tensor]]
Run = Callable[[fx.GraphModule, Sequence[Tensor]], Generator[Request, Any, Results]]
"""How a player runs one graph of a module."""

AHEAD = 2
"""Gathers that are issued before the block that needs the first of them; the host gets to the loop the sooner the fewer these are."""
BEHIND = 2
"""Reductions under way whose gradients, as accumulated, are still held."""
FORWARD_ONLY = ("P", "D", "F", "SF", "RF", "L")


@dataclass
class State:
    """What a rank keeps between steps: its shards, on its device. `joined`: paths → the buffer in which these parameters lie one below the
    other, each a view of its part (so whoever writes a parameter writes the buffer)."""

    rank: int
    params: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    joined: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    def join(self, paths: tuple[str, ...]) -> None:
        """Let parameters lie in one buffer. They stay the objects that they are. Raises StateError where some lie in another already."""
        if paths in self.joined:
            return
        taken = next((group for group in self.joined if set(group) & set(paths)), None)
        if taken is not None:
            raise StateError(
                f"{', '.join(paths)} should lie in one buffer, but {', '.join(taken)} already do",
                hint='plan it with the same linears merged (pins={"merge": …})',
            )
        parts = [self.params[path] for path in paths]
        with torch.no_grad():
            whole = torch.cat([p.detach() for p in parts])
            for param, piece in zip(parts, whole.split([p.shape[0] for p in parts]), strict=True):
                param.data = piece
        self.joined[paths] = whole


class Executor:
    """One rank's program, with what can be worked out before the first step."""

    def __init__(
        self, program: Program, rank: RankProgram, device: torch.device, run: Run, constants: Mapping[str, Tensor], lane: Lane | None = None
    ) -> None:
        self.program, self.rank, self.run, self.device, self.lane = program, rank, run, device, lane or Lane()
        self.constants = {name: constants[name] for name in rank.constants}
        self.reader = Reader(program, rank, device)
        self.calls = [call for call in (rank.data, *rank.blocks) if call is not None]
        self.maker = {name: g for g, call in enumerate(rank.gathers) for name in call.outputs}
        self.completed = completed(rank.instructions, self.calls, self.maker)
        self.unshared = unshared(self.calls, self.maker)
        self.used = frozenset(self.maker) | {f"param:{path}" for path in rank.params} | set(rank.joined)
        self.sent = frozenset(n for (source, _), names in rank.edges.items() if source == rank.stage for n in names)
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self.drops = self.last_uses()
        self.loss_stage = next((s for s in range(program.mesh.size("pp")) if _makes_loss(program.ranks[self.peer(s)])), 0)
        self.makes_loss = _makes_loss(rank)
        stages = [program.ranks[self.peer(s)] for s in range(program.mesh.size("pp"))]
        shared = [path for path in rank.buffers if all(path in s.buffers for s in stages)]
        makers = {path: [s.stage for s in stages if path in s.updates] for path in shared}
        self.updaters = {path: found[0] for path, found in makers.items() if found and len(found) < len(stages)}
        """Updated buffer that all stages store → the stage that makes its new content, where the others don't."""

    def peer(self, stage: int) -> int:
        """The rank that runs another stage of the same replica."""
        return self.program.mesh.rank({**self.rank.coords, "pp": stage})

    def last_uses(self) -> list[list[str]]:
        """Per call, the values that nothing needs after it (in the forward of one microbatch)."""
        needed = set(self.sent) | set(self.rank.updates.values()) | set(self.rank.kept.values()) | {self.rank.loss}
        drops = []
        for call in reversed(self.calls):
            dead = set(call.inputs).union(call.outputs) - needed
            needed |= dead
            drops.append(sorted(dead))
        return drops[::-1]

    def edge(self, action: Action) -> tuple[str, ...]:
        """The values that a transfer carries: all of the edge forward, those with a gradient backward."""
        source, destination = sorted((action.stage, action.peer))
        names = self.rank.edges.get((source, destination), ())
        return names if action.kind[1] == "F" else tuple(n for n in names if n in self.rank.grad_values)


@dataclass
class Step:
    """One step of one rank. `run` is the generator; `at` says where it stands, for messages."""

    x: Executor
    state: State
    inputs: StepInputs
    train: bool = True
    at: str = "start"
    env: dict[str, Tensor] = field(default_factory=dict)
    envs: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    grads: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)
    owned: set[str] = field(default_factory=set)
    saved: dict[tuple[int, int], Results] = field(default_factory=dict)
    """(microbatch, call) → what its backward needs; the gathers' are at (-1, i)."""
    issued: int = 0
    """Gathers that are issued, or done."""
    gathered: dict[int, Any] = field(default_factory=dict)
    """Gathers that the loop hasn't waited for → their tickets."""
    reduced: dict[int, Named] = field(default_factory=dict)
    """Gather → the gradients that its backward made."""
    reducing: deque[tuple[Any, Results]] = field(default_factory=deque)
    """Reductions that the loop hasn't waited for: ticket, and what they read."""
    loss: Tensor | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    """What the step hands out besides the loss: whole tensors at the end, parts by microbatch until then."""

    def run(self) -> Generator[Request, Any, Tensor]:
        rank = self.x.rank
        actions = [a for a in rank.instructions if self.train or a.kind in FORWARD_ONLY]
        self.pending = Counter(a.mb for a in actions if a.kind == "SF")
        self.env |= {f"param:{path}": p.detach() for path, p in self.state.params.items()}
        self.env |= {name: self.state.joined[paths] for name, paths in rank.joined.items()}
        self.env |= {f"buffer:{path}": b for path, b in self.state.buffers.items()}
        self.env |= self.x.constants
        self.env.update(self.x.reader.read(self.inputs, None))
        for action in actions:
            self.at = str(action)
            yield from getattr(self, action.kind)(action)
        self.land()
        self.at = "the end of its step"
        assert not self.saved and self.loss is not None, f"rank {rank.rank}: microbatches without a backward: {sorted(self.saved)}"
        return self.loss

    # ---- before the loop --------------------------------------------------------------------------------------------

    def P(self, action: Action) -> Generator[Request, Any, None]:
        self.x.lane.follow()  # the optimizer has written what is gathered
        yield from self.gather(AHEAD)

    def D(self, action: Action) -> Generator[Request, Any, None]:
        if self.x.rank.once:
            yield from self.ready(self.x.rank.once)
            yield from self.forward(self.x.rank.once, self.env, None)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def F(self, action: Action) -> Generator[Request, Any, None]:
        mb, rank = action.mb, self.x.rank
        env = self.envs.setdefault(mb, {})
        env.update(self.x.reader.read(self.inputs, mb))
        for i, call in enumerate(self.x.calls):
            yield from self.ready(call)
            yield from self.forward(call, env, (mb, i))
            for name in self.x.drops[i]:
                env.pop(name, None)
        if self.x.makes_loss:
            loss = self.value(env, rank.loss)
            self.x.shapes[rank.loss] = loss.shape, loss.dtype
            self.loss = loss if self.loss is None else self.loss + loss
        for label, name in rank.kept.items():
            self.kept.setdefault(label, []).append((mb, self.value(env, name).detach()))
        if mb == self.x.program.microbatches - 1:
            self.env |= {name: env[name] for name in rank.updates.values() if name in env}
        if not self.pending[mb]:
            del self.envs[mb]

    def I(self, action: Action) -> Generator[Request, Any, None]:  # noqa: E743
        yield from self.backward(action, weights=False)

    def W(self, action: Action) -> Generator[Request, Any, None]:
        for i in reversed(range(len(self.x.calls))):
            if (action.mb, i) in self.saved:
                yield from self.weights(self.x.calls[i], self.saved.pop((action.mb, i)))
                yield from self.complete(action, i)

    def B(self, action: Action) -> Generator[Request, Any, None]:
        yield from self.backward(action, weights=True)

    def SF(self, action: Action) -> Generator[Request, Any, None]:
        env = self.envs[action.mb]
        yield Send(self.x.peer(action.peer), [self.value(env, name) for name in self.x.edge(action)], self.at)
        self.pending[action.mb] -= 1
        if not self.pending[action.mb]:
            del self.envs[action.mb]

    def RF(self, action: Action) -> Generator[Request, Any, None]:
        names = self.x.edge(action)
        tensors = yield Receive(self.x.peer(action.peer), [self.x.rank.values[n] for n in names], self.at)
        self.envs.setdefault(action.mb, {}).update(zip(names, tensors, strict=True))

    def SB(self, action: Action) -> Generator[Request, Any, None]:
        grads = self.grads[action.mb]
        gone = [self.gradient(grads, name) for name in self.x.edge(action)]
        yield Send(self.x.peer(action.peer), gone, self.at)

    def RB(self, action: Action) -> Generator[Request, Any, None]:
        names = self.x.edge(action)
        tensors = yield Receive(self.x.peer(action.peer), [self.x.rank.values[n] for n in names], self.at)
        for name, grad in zip(names, tensors, strict=True):
            self.add(name, grad, self.grads.setdefault(action.mb, {}))

    # ---- after the loop ---------------------------------------------------------------------------------------------

    def G(self, action: Action) -> Generator[Request, Any, None]:
        stored: dict[str, Tensor] = {}
        for i in reversed(range(len(self.x.rank.gathers))):  # what no backward has completed
            if (-1, i) in self.saved:
                yield from self.reduce(i)
        self.land()
        for i in sorted(self.reduced, reverse=True):  # sums have one order, whichever bucket was complete first
            for name, grad in self.reduced.pop(i):
                add(stored, name, grad)
        for name in [*self.x.rank.joined, *(f"param:{path}" for path in self.state.params)]:
            direct = self.totals.pop(name, None)
            if direct is not None:
                add(stored, name, direct)
        for name, paths in self.x.rank.joined.items():
            whole = stored.pop(name, None)
            if whole is not None:
                parts = whole.split([self.state.params[path].shape[0] for path in paths])
                stored |= {f"param:{path}": part for path, part in zip(paths, parts, strict=True)}
        placed: list[tuple[nn.Parameter, Tensor]] = []
        for path, param in self.state.params.items():
            total = stored.pop(f"param:{path}", None)
            if path in self.x.rank.tied and param.requires_grad:
                total = yield from self.tied(path, torch.zeros_like(param) if total is None else total)
            if total is not None and param.requires_grad:
                placed.append((param, total))
        place(placed)

    def tied(self, path: str, grad: Tensor) -> Generator[Request, Any, Tensor]:
        """The sum over the ranks that store the same shard."""
        ranks = tuple(sorted({self.x.rank.rank, *self.x.rank.tied[path]}))
        if len(ranks) > 1:
            grad = yield Meet("all_reduce", ranks, wide(grad).contiguous(), ("sum",), f"tied {path}")
        return grad

    def L(self, action: Action) -> Generator[Request, Any, None]:
        whole = self.x.program.graph.values[self.x.program.graph.loss].tensor
        if self.loss is None:
            self.loss = torch.zeros(whole.shape, dtype=torch_dtype(whole.dtype), device=self.x.device)
        self.loss = self.loss.to(torch_dtype(whole.dtype))
        if self.x.program.mesh.size("pp") > 1:
            self.loss = yield Meet("broadcast", "pp", self.loss, (self.x.loss_stage,), "the loss")
        for label, time in self.x.program.kept.items():
            self.kept[label] = yield from self.hand_out(label, time)

    def hand_out(self, label: str, time: Type) -> Generator[Request, Any, Tensor]:
        """A kept value whole, on every stage."""
        assert self.x.program.captured is not None
        graph = self.x.program.captured.graph
        spec, count = graph.values[graph.kept[label]].tensor, self.x.program.microbatches
        whole = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=self.x.device)
        parts = self.kept.get(label, [])
        for i, (mb, part) in enumerate(parts):
            if time.kind == "S":
                at = dim_positions(spec.shape[time.dim], time.dim, (time,), (count,), (mb,))
                whole.index_copy_(time.dim, torch.from_numpy(at).to(self.x.device), part.to(whole.dtype))
            elif time.kind == "P" and i:
                whole = torch.maximum(whole, part) if time.reduce == "max" else whole + part
            else:
                whole.copy_(part)
        stages = range(self.x.program.mesh.size("pp"))
        makers = [s for s in stages if label in self.x.program.ranks[self.x.peer(s)].kept]
        if len(makers) < len(stages):
            whole = yield Meet("broadcast", "pp", whole, (makers[0],), f"the output {label}")
        return whole

    def U(self, action: Action) -> Generator[Request, Any, None]:
        for path, buffer in self.state.buffers.items():
            mine = self.x.rank.updates.get(path)
            new = buffer if mine is None else self.env[mine]
            if path in self.x.updaters:  # every stage stores the buffer, and may read it in the next step
                new = yield Meet("broadcast", "pp", new.to(buffer.dtype).clone(), (self.x.updaters[path],), f"the update of {path}")
            if new is not buffer:
                buffer.copy_(new)

    # ---- beside the loop --------------------------------------------------------------------------------------------

    def gather(self, upto: int) -> Generator[Request, Any, None]:
        """Issue gathers, in order."""
        lane, gathers = self.x.lane, self.x.rank.gathers
        while self.issued < min(upto, len(gathers)):
            i, self.issued = self.issued, self.issued + 1
            with lane.inside():
                yield from self.forward(gathers[i], self.env, (-1, i))
            self.gathered[i] = lane.mark()

    def ready(self, call: Call) -> Generator[Request, Any, None]:
        """Before a call: the parameters that it uses are there, and the next ones on their way."""
        last = max((self.x.maker[name] for name in call.inputs if name in self.x.maker), default=-1)
        if last < 0:
            return
        yield from self.gather(last + AHEAD)
        for i in [i for i in self.gathered if i <= last]:
            self.x.lane.wait(self.gathered.pop(i))

    def complete(self, action: Action, i: int) -> Generator[Request, Any, None]:
        """After a call has run backward: reduce what is complete now."""
        for gather in self.x.completed.get((action, i), ()):
            yield from self.reduce(gather)

    def reduce(self, i: int) -> Generator[Request, Any, None]:
        """The backward of a gather, on the gradients accumulated. The loop takes back what an older one has read."""
        call, lane = self.x.rank.gathers[i], self.x.lane
        saved, names = self.saved.pop((-1, i)), [call.outputs[k] for k in call.module.grad_outputs]
        held = (*saved, *(self.totals[name] for name in names if name in self.totals))
        own = all(name in self.owned or name in self.x.unshared for name in names if name in self.totals)
        at, self.at = self.at, f"{self.at}, reducing bucket {i}"
        lane.follow()
        with lane.inside():
            _, self.reduced[i] = yield from self.whole_backward(call, saved, self.totals, own)
        self.reducing.append((lane.mark(), held))
        self.at = at
        while len(self.reducing) > BEHIND:
            lane.wait(self.reducing.popleft()[0])

    def land(self) -> None:
        """The loop waits for all that runs beside it."""
        for ticket in (*self.gathered.values(), *(ticket for ticket, _ in self.reducing)):
            self.x.lane.wait(ticket)
        self.gathered.clear()
        self.reducing.clear()

    # ---- modules ----------------------------------------------------------------------------------------------------

    def value(self, env: dict[str, Tensor], name: str) -> Tensor:
        return env[name] if name in env else self.env[name]

    def forward(self, call: Call, env: dict[str, Tensor], key: tuple[int, int] | None) -> Generator[Request, Any, None]:
        """Run a call; put its outputs into `env` and, if it has a backward, what that needs under `key`."""
        module = call.module
        results = yield from self.x.run(module.forward, [self.value(env, name) for name in call.inputs])
        env.update(zip(call.outputs, results[: module.outputs], strict=True))
        if self.train and key is not None and module.backward_input is not None:
            self.saved[key] = results[module.outputs :]
            for k in module.grad_outputs:
                self.x.shapes[call.outputs[k]] = results[k].shape, results[k].dtype

    def backward(self, action: Action, weights: bool) -> Generator[Request, Any, None]:
        """All calls in reverse. Without `weights`, what the weights' gradients need stays in `saved`, for W."""
        mb = action.mb
        grads = self.grads.setdefault(mb, {})
        if self.x.makes_loss:
            shape, dtype = self.x.shapes[self.x.rank.loss]
            self.add(self.x.rank.loss, torch.ones(shape, dtype=dtype, device=self.x.device), grads)
        for i in reversed(range(len(self.x.calls))):
            call = self.x.calls[i]
            if (mb, i) not in self.saved:
                continue
            saved = self.saved.pop((mb, i))
            of_params: Named = []
            sums = self.sums(call) if weights else None
            if sums is not None:
                of_inputs, _ = yield from self.inputs_backward(call, saved, grads, call.module.accumulate, sums)
            elif weights:
                of_inputs, of_params = yield from self.whole_backward(call, saved, grads)
            else:
                of_inputs, self.saved[mb, i] = yield from self.inputs_backward(call, saved, grads)
            del saved, sums
            for name, grad in of_inputs:
                self.add(name, grad, grads)
            for name, grad in of_params:
                self.total(name, grad)
            del of_inputs, of_params
            yield from self.complete(action, i)

    def whole_backward(
        self, call: Call, saved: Results, grads: dict[str, Tensor], own: bool = False
    ) -> Generator[Request, Any, tuple[Named, Named]]:
        """(name, gradient) of the inputs that have one, and of the parameters. `own`: the gradients given may be overwritten."""
        module = call.module
        whole = (module.backward_in_place if own else None) or module.backward
        results, rest = yield from self.inputs_backward(call, saved, grads, whole)
        if whole is None:
            rest = (yield from self.x.run(module.backward_weight, rest)) if module.backward_weight is not None else ()
        return results, [(call.inputs[k], grad) for k, grad in zip(module.grad_params, rest, strict=True)]

    def inputs_backward(
        self, call: Call, saved: Results, grads: dict[str, Tensor], graph: fx.GraphModule | None = None, sums: Sequence[Tensor] = ()
    ) -> Generator[Request, Any, tuple[Named, Results]]:
        """(name, gradient) of the inputs that have one, and what `weights` needs. With a whole backward as `graph`, the parameters'
        gradients instead, or none where it adds them to `sums`."""
        module = call.module
        graph = graph or module.backward_input
        assert graph is not None
        given = [self.gradient(grads, call.outputs[k]) for k in module.grad_outputs]
        results = yield from self.x.run(graph, [*saved, *given, *sums])
        n = len(module.grad_inputs)
        return [(call.inputs[k], g) for k, g in zip(module.grad_inputs, results[:n], strict=True)], results[n:]

    def weights(self, call: Call, kept: Results) -> Generator[Request, Any, None]:
        module = call.module
        if module.backward_weight is None:
            return
        results = yield from self.x.run(module.backward_weight, kept)
        for k, grad in zip(module.grad_params, results, strict=True):
            self.total(call.inputs[k], grad)

    # ---- gradients --------------------------------------------------------------------------------------------------

    def add(self, name: str, grad: Tensor | None, grads: dict[str, Tensor]) -> None:
        if name in self.x.used:
            self.total(name, grad)
        else:
            add(grads, name, grad)

    def total(self, name: str, grad: Tensor | None) -> None:
        """Accumulate the gradient of a parameter as used; the second one makes a tensor of our own, which the others go into."""
        if grad is None or name not in self.totals:
            add(self.totals, name, grad)
        elif name in self.owned:
            self.totals[name].add_(grad)
        else:
            self.totals[name] = wide(self.totals[name]) + grad
            self.owned.add(name)

    def sums(self, call: Call) -> list[Tensor] | None:
        """The tensors of our own in which a call's gradients of parameters gather, where its module adds to them by itself."""
        names = [call.inputs[k] for k in call.module.grad_params]
        if call.module.accumulate is None or len(set(names)) < len(names):
            return None
        for name in names:
            if name not in self.owned:
                so_far, like = self.totals.get(name), self.env[name]
                fresh = torch.zeros_like(like, dtype=sum_dtype(like.dtype), memory_format=torch.contiguous_format)
                self.totals[name] = fresh if so_far is None else fresh.add_(so_far)
                self.owned.add(name)
        return [self.totals[name] for name in names]

    def gradient(self, grads: dict[str, Tensor], name: str) -> Tensor:
        """What has gathered for a value; zeros if nothing uses it."""
        if name in grads:
            return grads.pop(name)
        if name in self.x.shapes:
            shape, dtype = self.x.shapes[name]
        else:
            spec: graph.Tensor = self.x.rank.values[name]
            shape, dtype = torch.Size(spec.shape), torch_dtype(spec.dtype)
        return torch.zeros(shape, dtype=dtype, device=self.x.device)


def _makes_loss(rank: RankProgram) -> bool:
    calls = [call for call in (rank.once, rank.data, *rank.blocks) if call is not None]
    return any(rank.loss in call.outputs for call in calls)
