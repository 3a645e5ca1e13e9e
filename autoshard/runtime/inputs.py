"""What a rank reads at a step: its part of the global batch, and the small tensors that depend on its place.

In: the whole inputs by value name (`StepInputs`). Out: the tensors that go into a rank's environment, for the whole step
or for one microbatch. Positions are computed once per rank and kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..layout import Cut
from ..lower.program import InputSlice, Program, RankInput, RankProgram, chain_positions
from ..trace import primitives
from ..trace.interpret import call

if TYPE_CHECKING:
    from ..trace.captured import Draw

Chain = tuple[tuple[str, Cut], ...]


@dataclass
class StepInputs:
    """The global batch by value name, the step's seed, and the dropout masks by order (None: no dropout, as in evaluation)."""

    batch: Mapping[str, torch.Tensor]
    seed: int = 0
    masks: Mapping[int, torch.Tensor] | None = None


def draw_masks(ranks: Iterable[RankProgram], draws: Sequence[Draw] = ()) -> dict[int, torch.Tensor]:
    """All dropout masks of a step, whole, drawn from torch's CPU stream exactly as the plain model's dropouts draw them.

    `draws`: everything that the plain model draws, in order; what no mask stands for is drawn too, and dropped.
    """
    wanted = {r.order: r.draw for rank in ranks for r in rank.rank_inputs.values() if r.kind == "dropout"}
    masks = {}
    known = {draw.index: draw for draw in draws}
    for order in [*known, *sorted(wanted.keys() - known)] if wanted else []:
        if order in wanted:
            masks[order] = _mask(*wanted[order][:4])
        else:
            call(known[order].target, known[order].args, known[order].kwargs, "cpu")
    return masks


def _mask(shape: tuple[int, ...], strides: tuple[int, ...], law: primitives.Law, dtype: str) -> torch.Tensor:
    if law in (0, 1):  # torch draws nothing where the outcome is certain
        return torch.full(shape, 1 - law, dtype=torch_dtype(dtype))  # type: ignore[operator]
    return primitives.dropout_mask(shape, law, torch_dtype(dtype), 0, strides or _contiguous(shape))


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    return name if isinstance(name, torch.dtype) else getattr(torch, name.removeprefix("torch."))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))


def mix(seed: int, order: int) -> int:
    """A seed for one random op of a step: 63 bits that look unrelated for neighbouring seeds and ordinals (splitmix64).

    >>> mix(0, 0) != mix(0, 1) != mix(1, 0), 0 <= mix(7, 7) < 2**63
    (True, True)
    """
    z = (seed * 0x9E3779B97F4A7C15 + (order + 1) * 0xD1B54A32D192ED03) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1


class Reader:
    """Reads for one rank."""

    def __init__(self, program: Program, rank: RankProgram, device: torch.device) -> None:
        self.device = device
        self.coords = rank.coords
        self.sizes = {**dict(zip(program.mesh.names, program.mesh.sizes, strict=True)), "mb": program.microbatches}
        self.inputs = {timed: [(n, i) for n, i in rank.inputs.items() if i.timed == timed] for timed in (False, True)}
        self.rank_inputs = {timed: [(n, i) for n, i in rank.rank_inputs.items() if i.timed == timed] for timed in (False, True)}
        self.kept: dict[Any, Any] = {}

    def read(self, step: StepInputs, mb: int | None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that microbatch `mb` brings, or of everything that stays for the step (None)."""
        timed = mb is not None
        for name, part in self.inputs[timed]:
            yield name, self.part(step.batch[part.source], part, mb)
        for name, r in self.rank_inputs[timed]:
            yield name, self.rank_input(r, step, mb)

    def part(self, whole: torch.Tensor, part: InputSlice, mb: int | None) -> torch.Tensor:
        return self.cut(whole, part.cuts, mb).to(self.device, non_blocking=True)

    def cut(self, whole: torch.Tensor, cuts: tuple[Chain, ...], mb: int | None) -> torch.Tensor:
        for dim, chain in enumerate(cuts):
            if chain:
                whole = _take(whole, dim, self.positions(whole.shape[dim], chain, mb))
        return whole

    def positions(self, n: int, cuts: Chain, mb: int | None) -> np.ndarray:
        key = (n, cuts, mb)
        if key not in self.kept:
            self.kept[key] = chain_positions(n, cuts, self.sizes, {**self.coords, "mb": mb or 0})
        return self.kept[key]

    def rank_input(self, r: RankInput, step: StepInputs, mb: int | None) -> torch.Tensor:
        if r.kind == "seed":
            # filled where it lies: a copy from the host would wait for the device
            return torch.full((), mix(step.seed, r.order), dtype=torch.int64, device=self.device)
        if r.kind == "dropout":
            return self.mask(r, step, mb)
        key = (r, mb)
        if key not in self.kept:
            self.kept[key] = r.tensor(self.sizes, {**self.coords, "mb": mb or 0}).to(self.device)
        return self.kept[key]

    def mask(self, r: RankInput, step: StepInputs, mb: int | None) -> torch.Tensor:
        shape, _, _, dtype, cuts = r.draw
        if step.masks is None:
            local = [len(self.positions(n, chain, mb)) if chain else n for n, chain in zip(shape, cuts, strict=True)]
            return torch.ones(local, dtype=torch_dtype(dtype), device=self.device)
        return self.cut(step.masks[r.order], cuts, mb).to(self.device)


def _take(whole: torch.Tensor, dim: int, positions: np.ndarray) -> torch.Tensor:
    """These positions of a dim: a view where they are neighbours."""
    n = len(positions)
    if n and positions[-1] - positions[0] == n - 1:
        return whole.narrow(dim, int(positions[0]), n)
    return whole.index_select(dim, torch.from_numpy(positions).to(whole.device))
