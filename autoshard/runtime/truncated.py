"""torch's truncated normal in the memory of its result: the same numbers from the same generator, piece by piece.

torch draws the whole tensor again, and makes a mask of it, while an element is out of bounds. Draws that follow each other in memory
follow each other in the generator, so a piece at a time gives the same. `trunc_normal_` takes torch's own way (and memory)
wherever a trial on a small tensor shows that the two differ: another version of torch, bounds far from the mean.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

_GROUP = 16
"""torch makes normal numbers of so many at a time, and what is left over at the end again."""
_PIECE = _GROUP << 12

theirs: Callable[..., Tensor] = nn.init._no_grad_trunc_normal_


@torch.no_grad()
def trunc_normal_(tensor: Tensor, mean: float, std: float, a: float, b: float, generator: torch.Generator | None = None) -> Tensor:
    """What `nn.init.trunc_normal_` makes, with a piece's memory."""
    if tensor.is_contiguous() and tensor.numel() > _PIECE and _alike(tensor.dtype, mean, std, a, b):
        return by_pieces(tensor, mean, std, a, b, generator, _PIECE)
    return theirs(tensor, mean, std, a, b, generator=generator)


def by_pieces(
    tensor: Tensor, mean: float, std: float, a: float, b: float, generator: torch.Generator | None, most: int
) -> Tensor:  # fmt: skip
    low, high = tensor.new_tensor(a).item(), tensor.new_tensor(b).item()
    flat = tensor.view(-1).normal_(mean, std, generator=generator)
    while any(bool(((piece < low) | (piece > high)).any()) for piece in _pieces(flat, most)):
        for piece in _pieces(flat, most):
            drawn = torch.empty_like(piece).normal_(mean, std, generator=generator)
            torch.where((piece < low) | (piece > high), drawn, piece, out=piece)
    return tensor


def _pieces(flat: Tensor, most: int) -> Iterator[Tensor]:
    """Pieces of whole groups; the last has the rest too."""
    starts = range(0, flat.numel() - _GROUP + 1, most)
    for start in starts:
        yield flat[start:] if start == starts[-1] else flat[start : start + most]


@functools.cache
def _alike(dtype: torch.dtype, mean: float, std: float, a: float, b: float) -> bool:
    mine, other = (torch.Generator().manual_seed(1) for _ in range(2))
    small = torch.empty(15 * 4 * _GROUP + 5, dtype=dtype)
    found = by_pieces(small.clone(), mean, std, a, b, mine, 4 * _GROUP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever fills the tensor warns
        expected = theirs(small, mean, std, a, b, generator=other)
    return torch.equal(found, expected) and torch.equal(mine.get_state(), other.get_state())
