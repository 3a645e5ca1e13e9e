"""An operator against its reference: outputs and every gradient, with the reference in float64; and what tracing sees of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

# Relative to the largest element: a few roundings of the dtype, where sums are made wide. float32's grows with sums of hundreds.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not found.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    if not expected.isfinite().all():
        assert torch.equal(found.isfinite(), expected.isfinite())
        found, expected = found.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0)
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def wide(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    wanted: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    tolerance: float | None = None,
) -> None:
    """`wanted`: positions of the inputs whose gradients are compared (all floating); `outputs`: those differentiated (all)."""
    floating = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    wanted = floating if wanted is None else wanted
    leaves = [leaf(x) if i in wanted else x for i, x in enumerate(inputs)]
    exact = [wide(x).requires_grad_() if i in wanted else wide(x) for i, x in enumerate(inputs)]
    found, expected = tensors(op(*leaves)), tensors(reference(*exact))
    assert len(found) >= len(expected)
    chosen = range(len(expected)) if outputs is None else outputs
    for i in chosen:
        assert relative(found[i], expected[i]) <= (tolerance or TOLERANCE[found[i].dtype]), (i, relative(found[i], expected[i]))
    seeds = [draw(*expected[i].shape, seed=90 + i) for i in chosen]
    if not wanted:
        return
    given = [s.to(found[i].dtype) for i, s in zip(chosen, seeds, strict=True)]
    mine = torch.autograd.grad([found[i] for i in chosen], [leaves[i] for i in wanted], given)
    theirs = torch.autograd.grad([expected[i] for i in chosen], [exact[i] for i in wanted], [g.double() for g in given])
    for i, f, e in zip(wanted, mine, theirs, strict=True):
        assert f.dtype == inputs[i].dtype
        assert relative(f, e) <= (tolerance or TOLERANCE[f.dtype]), (f"gradient of {i}", relative(f, e))


def leaf(x: Tensor) -> Tensor:
    """The same strides, as a leaf."""
    return x.detach().requires_grad_()


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x in memory orders that a program meets: dense, a window of a wider buffer, every second element, transposed twice."""
    wider = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    wider[..., 1:-2] = x
    apart = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    apart[..., ::2] = x
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    return {"window": wider[..., 1:-2], "apart": apart[..., ::2], "turned": turned}


def check_traced(op: Callable[..., Any], inputs: Sequence[Any], names: Sequence[str], wanted: Sequence[int] | None = None) -> None:
    """A joint trace on fakes has these operators and no other of ours; the fakes tell the truth."""
    floating = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    wanted = floating if wanted is None else wanted

    def joint(*given: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() if i in wanted else x for i, x in enumerate(given)]
        outs = [o for o in tensors(op(*leaves)) if o.requires_grad]
        return list(torch.autograd.grad(outs, [leaves[i] for i in wanted], [torch.ones_like(o) for o in outs], allow_unused=True))

    graph = make_fx(joint, tracing_mode="fake")(*inputs)
    seen = [str(n.target) for n in graph.graph.nodes if "autoshard" in str(n.target)]
    assert seen == list(names), seen
    torch.library.opcheck(op, tuple(leaf(x) if i in wanted else x for i, x in enumerate(inputs)),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))  # fmt: skip
