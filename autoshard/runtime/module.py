"""What `parallelize` returns: one rank of a program, that trains like a module and a trainer both.

In: a program (or a `Source` that makes one for a batch), the model, the ranks that talk. Graphs are bound to process groups once
each, compiled on CUDA, and called directly; everything else is `trainable.Trainable`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ..errors import BatchError, CaptureError
from ..lower.early import INDUCTOR, communicates
from ..lower.program import Program, Slot, bind
from .comm import Comm
from .deferred import agree
from .executor import Step
from .generate import generate
from .inputs import torch_dtype
from .lane import Lane, Stream
from .requests import Request
from .trainable import Loaded, Trainable, Wanted, Weights

if TYPE_CHECKING:
    from ..trace.captured import Captured

log = logging.getLogger("autoshard")
Key = tuple[Any, ...]
NOTHING = Wanted()


class Source(Protocol):
    """Makes a program for a batch, on all ranks at once. `like`: a program whose weights must stay where they are."""

    def __call__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool, like: Program | None, wanted: Wanted = NOTHING
    ) -> tuple[Program, Captured]: ...

    @property
    def whole(self) -> nn.Module:
        """The model to capture."""

    def release(self) -> None:
        """The weights are taken: what is the model's own may go."""


class Sharded(Trainable):
    """One rank. Without a program it begins at the first batch, with what `source` makes for it."""

    def __init__(
        self,
        program: Program | None,
        weights: nn.Module | Weights,
        captured: Captured | None = None,
        *,
        comm: Comm | None = None,
        device: torch.device | None = None,
        compile: bool | None = None,
        source: Source | None = None,
    ) -> None:
        self.comm = comm or Comm(device or torch.device("cpu"))
        self.compile = self.comm.device.type == "cuda" if compile is None else compile
        self.bound: dict[fx.GraphModule, Callable[..., Any]] = {}
        self.known: dict[Key, Loaded] = {}
        self.groups: dict[str, str] = {}
        self.lane: Lane = Stream(self.comm.device) if self.comm.device.type == "cuda" and not self.comm.alone else Lane()
        self.source, self.weights = source, weights
        if program is not None:
            self.begin(program, captured)

    def begin(self, program: Program, captured: Captured | None) -> None:
        """Take the weights (rank 0's, so that all ranks start alike) and keep this rank's shards."""
        self.groups = self.comm.prepare(program)
        if self.groups and self.comm.device.type == "cuda":
            log.info("collectives %s", "run beside matmuls" if program.plan.overlap else "are waited for at once (overlap: false)")
        self._agree_on_weights()
        super().__init__(program, self.weights, captured, ranks=[self.comm.rank], device=self.comm.device)
        self.weights = {}
        if self.source is not None:
            self.source.release()

    def __getattr__(self, name: str) -> Any:
        # only what __init__ has not set comes here
        if name in ("program", "states", "training", "holders", "names", "optimizers"):
            raise CaptureError(
                "nothing is captured yet", hint="give parallelize an example batch (args=, kwargs=), or run a train_step first"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _agree_on_weights(self) -> None:
        tensors = self.weights.state_dict(keep_vars=True) if isinstance(self.weights, nn.Module) else self.weights
        if self.comm.alone:
            return
        if isinstance(self.weights, nn.Module):
            agree(self.weights, self.comm)
        with torch.no_grad():
            for name in sorted(tensors):
                tensor = tensors[name]
                if isinstance(tensor, Tensor) and tensor.numel() and not tensor.is_meta:
                    first = self.comm.broadcast(tensor.detach().to(self.comm.device, copy=True), 0)
                    tensor.detach().copy_(first)

    # ---- programs for batches ---------------------------------------------------------------------------------------

    def _for_training(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Wanted) -> Loaded:
        if self.source is None:
            return super()._for_training(args, kwargs, wanted)
        key = ("train", *_key(args, kwargs), wanted.key)
        if key not in self.known:
            self._agree_on_batch(args, kwargs)
            if "training" not in self.__dict__:
                self.begin(*self.source(args, kwargs, training=True, like=None, wanted=wanted))
                self.known[key] = self.training
            elif not wanted and not self.program.kept and _fits(self.training, args, kwargs):
                self.known[key] = self.training
            else:
                self.known[key] = self._another(args, kwargs, wanted, training=True)
        return self.known[key]

    def _for_evaluation(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Wanted) -> Loaded:
        if self.source is None:
            return super()._for_evaluation(args, kwargs, wanted)
        key = ("eval", *_key(args, kwargs), wanted.key)
        if key not in self.known:
            self._agree_on_batch(args, kwargs)
            self.known[key] = self._another(args, kwargs, wanted, training=False)
        return self.known[key]

    def _another(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Wanted, training: bool) -> Loaded:
        assert self.source is not None
        what = "other outputs" if wanted else "a new input shape" if training else "eval mode"
        log.info("%s: capturing and lowering again (%d programs so far)", what, len(self.known) + 1)
        program, captured = self.source(args, kwargs, training=training, like=self.program, wanted=wanted)
        self.groups = self.comm.prepare(program)
        return self.comm.together(lambda: self._load(program, captured))

    def _agree_on_batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Looked at once for each kind of batch: who deals out the batch to the ranks, as other libraries want it, trains on something
        else than meant. Raises BatchError."""
        if self.comm.alone:
            return
        mine = _digest(args, kwargs)
        first = self.comm.share(mine)

        def same() -> None:
            if mine != first:
                raise BatchError(
                    f"rank {self.comm.rank} is given another batch than rank 0",
                    hint="give every rank the whole global batch (each reads its own part of it): the same seed, no DistributedSampler",
                )

        self.comm.together(same)

    def signature(self) -> Callable[..., Any]:
        """The model's forward, for the names of its arguments."""
        if self.source is None:
            raise CaptureError("this program can't be captured again for other arguments", hint="make it with parallelize")
        return self.source.whole.forward

    def generate(self, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None = None, **others: Any) -> Tensor:
        """Continue rows of tokens greedily (a collective call; see `generate.generate`)."""
        return generate(self, input_ids, max_new_tokens, eos_token_id, others)

    # ---- how this rank runs and talks -------------------------------------------------------------------------------

    def _run(self, graph: fx.GraphModule, args: Sequence[Tensor]) -> Generator[Request, Any, tuple[Any, ...]]:
        call = self.bound.get(graph)
        if call is None:
            overlap = self.program.plan.overlap and self.comm.device.type == "cuda"
            call = bind(graph, self.groups, self.comm.device, overlap).forward
            # the method, not the module: its code object is its own, so that graphs don't share dynamo's cache
            options = INDUCTOR if overlap and communicates(graph.graph) else None
            self.bound[graph] = call = torch.compile(call, fullgraph=True, dynamic=False, options=options) if self.compile else call
        results = call(*args)
        return tuple(results) if isinstance(results, (tuple, list)) else (results,)
        yield

    def _lane(self) -> Lane:
        return self.lane

    def _play(self, steps: list[Step]) -> list[Tensor]:
        (step,) = steps
        generator, answer = step.run(), None
        with self.comm.playing(step):
            while True:
                try:
                    request = generator.send(answer)
                except StopIteration as stop:
                    self.comm.land()
                    return [stop.value]
                answer = self.comm.answer(request)

    def _reduce(self, tensor: Tensor, op: str) -> Tensor:
        return self.comm.all_reduce(tensor, op)

    def _fetch(self, rank: int, shard: Tensor | None, slot: Slot) -> Tensor:
        if shard is None:
            shard = torch.empty(slot.local, dtype=torch_dtype(slot.tensor.dtype), device=self.comm.device)
        return self.comm.broadcast(shard, rank) if shard.numel() else shard


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key:
    """What a captured graph depends on: the structure of a call, its tensors' shapes and dtypes, its other arguments."""
    leaves, tree = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
    facts = ((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf)) for leaf in leaves)
    return (str(tree), *facts)


def _digest(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What a batch holds, in a few letters."""
    found = hashlib.blake2b(repr(_key(args, kwargs)).encode(), digest_size=16)
    for leaf in pytree.tree_leaves((args, dict(sorted(kwargs.items())))):
        if isinstance(leaf, Tensor) and leaf.numel() and not leaf.is_meta:
            found.update(leaf.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return found.hexdigest()


def _fits(loaded: Loaded, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is the one that was captured."""
    try:
        loaded.flatten(args, kwargs)
    except ValueError:
        return False
    return True
