"""Local bodies: ops whose work on a shard depends on where the shard lies in the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

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
    per dim), so that every plan draws the same. Philox-2x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    SC11) with the element's index as counter and the seed as key."""
    index = torch.zeros((1,) * len(full), dtype=torch.int64, device=seed.device)
    stride = 1
    for d in reversed(range(len(full))):
        index = index + (at[d] * stride).reshape((-1,) + (1,) * (len(full) - 1 - d))
        stride *= full[d]
    low, high = index & 0xFFFFFFFF, index >> 32 & 0xFFFFFFFF
    drawn = philox(low, high, seed & 0xFFFFFFFF)
    if isinstance(law, tuple):
        return by_law(law, drawn, lambda: philox(low, high, (seed ^ 0x5851F42D) & 0xFFFFFFFF), dtype)
    return (drawn >= int(law * 2**32)).to(dtype) * (1.0 / (1.0 - law) if law < 1 else 0.0)


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


def philox(low: torch.Tensor, high: torch.Tensor, key: torch.Tensor, rounds: int = 10) -> torch.Tensor:
    """32 random bits per counter (low, high), as int64."""
    for _ in range(rounds):
        # 0xD256D193 × a 32-bit word overflows int64's sign, so the product is taken in two halves
        a, b = low & 0xFFFF, low >> 16
        pa, pb = a * 0xD256D193, b * 0xD256D193
        middle = (pa >> 16) + (pb & 0xFFFFFFFFFFFF)
        product_high = middle >> 16 & 0xFFFFFFFF
        product_low = (pa & 0xFFFF) | ((middle & 0xFFFF) << 16)
        low, high = product_high ^ key ^ high, product_low
        key = (key + 0x9E3779B9) & 0xFFFFFFFF
    return low
