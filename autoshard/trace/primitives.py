"""The ops that ATen lacks: attention, pick, dropout_mask and opaque, as plain torch functions of tensors.

`attention` and `opaque` are `torch.library` custom ops with a registered fake and backward, so that each stays one node under `make_fx`
and `torch.compile`; `pick` is ordinary differentiable torch; `dropout_mask` draws.

>>> import torch
>>> pick(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, -100]))
tensor([2., 0.])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# shapes:  q [b h s e]   k [b hk t e]   v [b hk t f]   out [b h s f]   lse [b h s]   g = h / hk (query heads per key head)


def pick(x: Tensor, labels: Tensor) -> Tensor:
    """x [..., V], labels [...] -> x[..., labels], and 0 (without gradient) where a label lies outside [0, V)."""
    return Pick.apply(x, labels)


class Pick(torch.autograd.Function):
    """`pick`, whose backward is a comparison, that fuses with what else makes x's gradient; gather's own is a scatter into zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(labels)
        ctx.classes = x.shape[-1]
        valid = (labels >= 0) & (labels < x.shape[-1])
        found = x.gather(-1, torch.where(valid, labels, 0).long().unsqueeze(-1)).squeeze(-1)
        return torch.where(valid, found, torch.zeros((), dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (labels,) = ctx.saved_tensors
        here = torch.arange(ctx.classes, device=labels.device) == labels.unsqueeze(-1)
        return torch.where(here, grad.unsqueeze(-1), torch.zeros((), dtype=grad.dtype, device=grad.device)), None


Law = float | tuple[str | float, ...]
"""What a random op draws. A number p: dropout's mask, 0 with probability p, else 1/(1-p). Or ("uniform", low, high), ("normal", mean,
deviation), ("exponential", rate), ("integers", low, high)."""


def dropout_mask(
    shape: Sequence[int], law: Law, dtype: torch.dtype, index: int, strides: Sequence[int], *, device: torch.device | str = "cpu"
) -> Tensor:
    """Draws by `law` from torch's default generator in memory order, as torch's own random ops do; most are masks of dropout.

    `index` is the draw's number; executors that key draws by it (counter-based) replace this function.
    """
    noise = torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device=device)
    if not isinstance(law, tuple):
        return noise.bernoulli_(1 - law).div_(1 - law)
    name, *numbers = law
    if name == "integers":
        return noise.random_(int(numbers[0]), int(numbers[1]))
    draw: dict[str | float, Callable[..., Tensor]]
    draw = {"uniform": noise.uniform_, "normal": noise.normal_, "exponential": noise.exponential_}
    return draw[name](*numbers)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float = 1.0, noise: Tensor | None = None
) -> Tensor:
    """(softmax(scale · q kᵀ + mask) · noise) v. A bool mask keeps where True; causal is aligned top left: query i sees keys ≤ i.

    A fully masked row gives 0. Query head i reads key head i // g. Neither mask nor noise [b h s t], dropout's mask of the probabilities,
    receives a gradient.
    """
    if noise is None:
        return torch.ops.autoshard.attention(q, k, v, mask, causal, scale)[0]
    work = _work_dtype(q)
    scores = _scores(q.to(work), k.to(work), mask, causal, scale)
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros((*scores.shape[:-1], 1))
    e = torch.exp(scores - torch.where(top == -torch.inf, torch.zeros_like(top), top))
    total = e.sum(-1, keepdim=True)
    p = e / torch.where(total == 0, torch.ones_like(total), total)
    return _matmul(p * noise.detach(), v.to(work)).to(q.dtype)


@torch.library.custom_op("autoshard::attention", mutates_args=())
def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the masked scores ([b h s]; -inf where a row is fully masked)."""
    fused = _fused_forward(q, k, v, mask, causal, scale)
    if fused is not None:
        return _heads_inside(fused[0]), fused[1]
    work = _work_dtype(q)
    scores = _scores(q.to(work), k.to(work), mask, causal, scale)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    out = _matmul(_probabilities(scores, lse), v.to(work))
    return _heads_inside(out.to(q.dtype)), lse


@attention_with_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    b, h, s, _ = q.shape
    out = q.new_empty((b, s, h, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((b, h, s), dtype=_work_dtype(q))


@torch.library.custom_op("autoshard::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With P = exp(scores - lse):  dV = Pᵀ dO,  dS = P (dO Vᵀ - rowsum(dO · O)),  dQ = scale dS K,  dK = scale dSᵀ Q."""
    fused = _fused_backward(grad, q, k, v, mask, out, lse, causal, scale)
    if fused is not None:
        dq, dk, dv = fused
        return _heads_inside(dq), _heads_inside(dk), _heads_inside(dv)
    work = _work_dtype(q)
    g, qw, kw, vw = grad.to(work), q.to(work), k.to(work), v.to(work)
    p = _probabilities(_scores(qw, kw, mask, causal, scale), lse)
    delta = (g * out.to(work)).sum(-1, keepdim=True)
    ds = p * (_matmul(g, vw.transpose(-1, -2)) - delta) * scale
    dq = _matmul(ds, kw).to(q.dtype)
    dk, dv = _grouped_transpose_matmul(ds, qw, k), _grouped_transpose_matmul(p, g, v)
    return _heads_inside(dq), _heads_inside(dk), _heads_inside(dv)


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2) for x in (q, k, v))
    return dq, dk, dv


def _attention_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, causal, scale = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.causal, ctx.scale = causal, scale  # type: ignore[attr-defined]


def _attention_grad(ctx, grad: Tensor, _lse: Tensor | None):  # type: ignore[no-untyped-def]
    q, k, v, mask, out, lse = ctx.saved_tensors
    return *torch.ops.autoshard.attention_backward(grad, q, k, v, mask, out, lse, ctx.causal, ctx.scale), None, None, None


attention_with_lse.register_autograd(_attention_grad, setup_context=_attention_context)


def _work_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _heads_inside(x: Tensor) -> Tensor:
    """The memory order b s h e, which is free to reshape to b s (h e); the fakes promise it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [b h s x] @ b [b hk x y] -> [b h s y]: the query heads of one key head are stacked as rows, so that b is never repeated."""
    h, hk = a.shape[1], b.shape[1]
    if h == hk:
        return a @ b
    rows = a.reshape(a.shape[0], hk, h // hk * a.shape[2], a.shape[3])
    return (rows @ b).view(a.shape[0], h, a.shape[2], b.shape[-1])


def _grouped_transpose_matmul(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a [b h s t]ᵀ @ b [b h s e], summed over the query heads of each key head -> the shape and dtype of `like` [b hk t e]."""
    hk, g = like.shape[1], a.shape[1] // like.shape[1]
    stack = [x.reshape(x.shape[0], hk, g * x.shape[2], x.shape[3]) for x in (a, b)]
    return (stack[0].transpose(-1, -2) @ stack[1]).to(like.dtype)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = _matmul(q, k.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if causal:
        s, t = scores.shape[-2:]
        later = torch.arange(t, device=q.device) > torch.arange(s, device=q.device).unsqueeze(-1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # a fully masked row has lse = -inf; subtracting 0 instead leaves exp(-inf) = 0 rather than nan, as torch's SDPA gives
    return torch.exp(scores - torch.where(lse == -torch.inf, torch.zeros_like(lse), lse).unsqueeze(-1))


def _fused_applies(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether a fused kernel computes this: CUDA, half precision, no dense mask, one head size of a multiple of 8 up to 256."""
    return (
        q.device.type == "cuda"
        and mask is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] == v.shape[-1]
        and 0 < q.shape[-1] <= 256
        and q.shape[-1] % 8 == 0
        and 0 not in (*q.shape, *k.shape)
        and (not causal or q.shape[2] == k.shape[2])  # the flash kernel aligns its causal mask bottom right
    )


def _cudnn_applies(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """From Hopper on cuDNN's kernels are about twice as fast as torch's FlashAttention-2. Its log-sum-exp is the same number, so that
    forward and backward may choose apart."""
    if torch.cuda.get_device_capability(q.device)[0] < 9 or q.shape[-1] > 128 or q.shape[2] == 1 or RAGGED:
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])
    return torch.backends.cuda.can_use_cudnn_attention(params)


# an experiment of torch's that stores cuDNN's log-sum-exp as [b s h]
RAGGED = os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "0") != "0"


def _fused_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor] | None:
    if not _fused_applies(q, k, v, mask, causal):
        return None
    q, k, v = _rows(q), _rows(k), _rows(v)
    if _cudnn_applies(q, k, v, causal):
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return found[0], found[1].reshape(q.shape[:3])  # [b h s 1]
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def _fused_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    if not _fused_applies(q, k, v, mask, causal):
        return None
    q, k, v = _rows(q), _rows(k), _rows(v)
    # both kernels want dO laid out as O is; cuDNN's cache of graphs doesn't even look
    grad, out, lse = _heads_inside(grad), _heads_inside(out), lse.contiguous()
    unused = torch.empty(2, dtype=torch.int64, device=q.device)  # the dropout seed and offset, read only with dropout
    s, t = q.shape[2], k.shape[2]
    if _cudnn_applies(q, k, v, causal):
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.unsqueeze(-1), unused, unused, None, None, None, s, t, 0.0, causal, scale=scale
        )
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, s, t, 0.0, causal, unused, unused, scale=scale
        )
    return found[0], found[1], found[2]


def _rows(x: Tensor) -> Tensor:
    """With the last dim dense, as the kernels demand."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- opaque: any differentiable callable of tensors as one op


@dataclass(frozen=True)
class Opaque:
    """A callable(*tensors) -> tuple of tensors, and what it returns for the shapes that it was captured with.

    `identity`: what the callable was made of; two with equal identities compute the same.
    """

    identity: object
    fn: Callable[..., tuple[Tensor, ...]] = field(compare=False)
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


# The callables of every capture in this process, by key. A custom op's arguments can't be python callables, so the op carries a key
# (a content hash, see `register_opaque`) and looks it up here, in its fake too. Written by `register_opaque` alone.
OPAQUE: dict[str, Opaque] = {}


def register_opaque(key: str, entry: Opaque) -> str:
    """Store under `key`, or under `key~2`, `key~3`, … where another entry holds it already. Returns the key to use."""
    name, n = key, 1
    while name in OPAQUE and OPAQUE[name] != entry:
        n += 1
        name = f"{key}~{n}"
    OPAQUE[name] = entry
    return name


def opaque(key: str, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Call the function registered under `key`. Its backward recomputes it, so it must be deterministic."""
    return tuple(torch.ops.autoshard.opaque(key, list(tensors)))


@torch.library.custom_op("autoshard::opaque", mutates_args=())
def opaque_op(key: str, tensors: list[Tensor]) -> list[Tensor]:
    outs = OPAQUE[key].fn(*(t.detach() for t in tensors))
    return [out.detach().clone(memory_format=torch.contiguous_format) for out in outs]


@opaque_op.register_fake
def _(key: str, tensors: list[Tensor]) -> list[Tensor]:
    entry = OPAQUE[key]
    return [tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in zip(entry.shapes, entry.dtypes, strict=True)]


@torch.library.custom_op("autoshard::opaque_backward", mutates_args=())
def opaque_backward(key: str, grads: list[Tensor], tensors: list[Tensor], needs: list[bool]) -> list[Tensor]:
    """Gradients of the floating tensors flagged in `needs`, by running the function again under autograd."""
    # inside a custom op the dispatcher skips autograd, so that nothing would be recorded and every gradient be 0
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded & torch._C._after_autograd_keyset), torch.enable_grad():
        inputs = [t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        outs = OPAQUE[key].fn(*inputs)
        pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
        wanted = [t for t, n in zip(inputs, needs, strict=True) if n]
        if not pairs:
            return [torch.zeros_like(t) for t in wanted]
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    filled = [torch.zeros_like(t) if f is None else f for t, f in zip(wanted, found, strict=True)]
    return [f.clone(memory_format=torch.contiguous_format) for f in filled]


@opaque_backward.register_fake
def _(key: str, grads: list[Tensor], tensors: list[Tensor], needs: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, n in zip(tensors, needs, strict=True) if n]


def _opaque_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: list[Tensor]) -> None:
    key, tensors = inputs
    ctx.key = key  # type: ignore[attr-defined]
    ctx.needs = [t.is_floating_point() and t.requires_grad for t in tensors]  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(*(o for o in output if not o.is_floating_point()))
    ctx.outs = [(o.shape, o.dtype, o.device) for o in output]  # type: ignore[attr-defined]


def _opaque_grad(ctx, grads):  # type: ignore[no-untyped-def]
    filled = [torch.zeros(s, dtype=t, device=d) if g is None else g for g, (s, t, d) in zip(grads, ctx.outs, strict=True)]
    found = iter(torch.ops.autoshard.opaque_backward(ctx.key, filled, list(ctx.saved_tensors), ctx.needs))
    return None, [next(found) if n else None for n in ctx.needs]


opaque_op.register_autograd(_opaque_grad, setup_context=_opaque_context)
