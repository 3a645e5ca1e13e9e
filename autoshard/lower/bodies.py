"""Local bodies: ops whose work on a shard depends on where the shard lies in the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..kernels import draws
from ..kernels import dropout_attention as _operator  # noqa: F401  (registers it)
from ..trace import primitives


def embedding(table: torch.Tensor, ids: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Rows [offset, offset + n) of a table are here; other ids give zeros. Summed over the shards it is the whole lookup."""
    at = ids - offset
    here = (at >= 0) & (at < table.shape[0])
    found = torch.ops.aten.embedding.default(table, torch.where(here, at, 0))
    return torch.where(here.unsqueeze(-1), found, 0)


def pick(x: torch.Tensor, labels: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """x[…, labels - offset] where the last dim holds that label, else 0."""
    return primitives.pick(x, labels - offset)


def mean(x: torch.Tensor, dims: Sequence[int], keep: bool, count: int) -> torch.Tensor:
    """This shard's term of a mean over `count` elements."""
    return x.sum(list(dims), keep) / count


def dropout_mask(
    seed: torch.Tensor, at: Sequence[torch.Tensor], full: tuple[int, ...], law: primitives.Law, dtype: torch.dtype
) -> torch.Tensor:
    """A draw by `law` (see `primitives.Law`) for each element from the seed and its global index alone (`at`: global positions
    per dim), so that every plan draws the same; `kernels.draws` says which. A mask's bits are what a backward keeps of it: their unpacking
    fuses with whatever it multiplies."""
    shape = tuple(len(positions) for positions in at)
    at, full = (at, full) if full else ((seed.new_zeros(1),), (1,))
    rows, columns = draws.rows_of(at, full), full[-1]
    column = None if len(at[-1]) == columns else at[-1]
    if not isinstance(law, tuple):
        kept = draws.unpacked(torch.ops.autoshard.keep_bits(seed, rows, columns, float(law)), column, columns)
        zero, one = (torch.scalar_tensor(x, dtype=dtype, device=seed.device) for x in (0.0, draws.scale(float(law))))
        return torch.where(kept, one, zero).reshape(shape)

    def bits(stream: int) -> torch.Tensor:
        found = torch.ops.autoshard.random_bits(seed, rows, columns, stream)
        return (found if column is None else found.index_select(1, column)).to(torch.int64) & draws.LOW

    return by_law(law, bits(0), lambda: bits(1), dtype).reshape(shape)


def dropout_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    seed: torch.Tensor,
    at: Sequence[torch.Tensor],
    full: tuple[int, ...],
    p: float,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """`primitives.attention` whose noise is `dropout_mask` at these positions of a whole matrix, which holds every key that there is."""
    assert len(at[3]) == full[3] == k.shape[2], "keys aren't cut"
    return torch.ops.autoshard.dropout_attention(q, k, v, mask, seed, *at[:3], full, p, causal, scale)[0]


def by_law(law: tuple[str | float, ...], bits: torch.Tensor, more: Callable[[], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """32 random bits an element (`more()`: as many again) as numbers of a law."""
    name, *numbers = law
    a, b = (*map(float, numbers), 0.0)[:2]
    if name == "integers":
        return (bits % (int(b) - int(a)) + int(a)).to(dtype)
    # as many bits as the dtype has digits, so that nothing rounds up to 1
    digits = {torch.float64: 32, torch.float32: 24, torch.float16: 11}.get(dtype, 8)
    if name == "uniform":
        return ((bits >> (32 - digits)).to(dtype) * 2.0**-digits) * (b - a) + a
    wide = torch.promote_types(dtype, torch.float32)
    logarithm = ((bits >> 8).to(wide) + 1).mul(2.0**-24).log()  # of a number in (0, 1]
    if name == "exponential":
        return (logarithm / -a).to(dtype)
    assert name == "normal", law
    turn = (more() >> 8).to(wide) * (2 * math.pi * 2.0**-24)  # Box and Muller, 1958
    return ((logarithm * -2).sqrt() * turn.cos() * b + a).to(dtype)
