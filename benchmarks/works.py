"""What is measured: named works, their data, and the operations that any implementation of them has to do.

In: a name of `WORKS`, sizes that stand in for its own. Out: a `Work`: the model's shape, where it runs, batches; and `parts`, one device's
share of a step as matmuls, attentions and bytes, from which follow its FLOPs and (with `ceilings`) its floor.

>>> work = find("llama-1.2b")
>>> round(work.flops / 1e12, 1)
67.3
>>> find("llama-8b-layers-12-tp2").mesh
'tp=2'
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from autoshard.mesh import Mesh

from .models import PATCH, Shape

Batch = dict[str, Tensor]
LABELS = 16
"""How many tokens of a sequence are predicted where losses are compared: a mean over few is far from that of other weights (a mean over
thousands is the same for any random weights), and rounding still averages out."""


@dataclass(frozen=True)
class Matmul:
    """rows × inner @ inner × columns, and its two gradients, `times` a step (a part of one, where stages share it)."""

    name: str
    rows: int
    inner: int
    columns: int
    times: float

    @property
    def flops(self) -> float:
        return 6.0 * self.rows * self.inner * self.columns * self.times


@dataclass(frozen=True)
class Attention:
    batch: int
    heads: int
    kv: int
    seq: int
    head_dim: int
    causal: bool
    times: float

    @property
    def flops(self) -> float:
        """Forward and backward, causal ones by half, the backward's recomputation not counted."""
        return 12.0 * self.batch * self.heads * self.seq**2 * self.head_dim * (0.5 if self.causal else 1.0) * self.times


@dataclass(frozen=True)
class Parts:
    """One device's share of a step. `bytes`: what has to be read and written beside the matmuls and attentions, by what for."""

    matmuls: tuple[Matmul, ...]
    attentions: tuple[Attention, ...]
    bytes: Mapping[str, float]

    @property
    def flops(self) -> float:
        return sum(m.flops for m in self.matmuls) + sum(a.flops for a in self.attentions)


@dataclass(frozen=True)
class Work:
    """A step to measure. `models`: the spellings there are of it, the first is the default. `peers`: what it is compared with unless told
    otherwise."""

    name: str
    shape: Shape
    models: tuple[str, ...] = ("hf", "plain")
    mesh: str = "dp=1"
    microbatches: int | None = None
    peers: tuple[str, ...] = ("plain-compile", "megatron")
    about: str = ""
    axes: Mesh = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", Mesh.parse(self.mesh))

    @property
    def ranks(self) -> int:
        return self.axes.ranks

    @property
    def count(self) -> int:
        return self.microbatches or 1

    @property
    def flops(self) -> float:
        """Of the whole step, on all devices: 6 for each matmul weight and token, attention counted causally."""
        return replace(self, mesh="dp=1").parts().flops

    @property
    def bubble(self) -> float:
        """How much longer a pipeline's step takes than its busiest stage works, if nothing else is lost."""
        return (self.count + self.axes.size("pp") - 1) / self.count

    def half(self) -> Work:
        return replace(self, name=f"{self.name}/2", shape=replace(self.shape, layers=self.shape.layers // 2), mesh="dp=1")

    def parts(self) -> Parts:
        """One device's share, if the mesh divides everything evenly."""
        return _parts(self.shape, self.axes, self.count)

    def batch(self, index: int, device: torch.device, dtype: torch.dtype, few: bool = False) -> Batch:
        """A global batch; the same on every machine. `few`: with LABELS labels a sequence."""
        c, generator = self.shape, torch.Generator().manual_seed(1 + index)
        if c.family == "vit":
            side = PATCH * math.isqrt(c.seq)
            pixels = torch.randn(c.batch, 3, side, side, generator=generator)
            return {
                "pixel_values": pixels.to(device, dtype),
                "labels": torch.randint(0, c.vocab, (c.batch,), generator=generator).to(device),
            }
        ids = torch.randint(0, c.vocab, (c.batch, c.seq), generator=generator)
        labels = ids.clone()
        kept = min(LABELS, c.seq - 1) if few else c.seq if c.family != "bert" else max(1, c.seq * 15 // 100)
        if kept < c.seq:
            # the first token is nobody's next
            places = torch.stack([1 + torch.randperm(c.seq - 1, generator=generator)[:kept] for _ in range(c.batch)])
            mask = torch.ones_like(labels, dtype=torch.bool).scatter_(1, places, False)
            labels[mask] = -100
        return {"input_ids": ids.to(device), "labels": labels.to(device)}


# ---- what a step consists of ----------------------------------------------------------------------------------------


def _parts(c: Shape, mesh: Mesh, microbatches: int) -> Parts:
    tp, pp, dp = mesh.size("tp"), mesh.size("pp"), mesh.size("dp")
    replicas = dp * microbatches
    rows, layers = c.tokens // replicas, c.layers * microbatches / pp
    qkv = (c.heads + 2 * c.kv) * c.head_dim
    gated = c.family == "llama"
    into = c.ffn * (2 if gated else 1) // tp
    matmuls = [Matmul("qkv", rows, c.hidden, qkv // tp, layers), Matmul("out", rows, c.heads * c.head_dim // tp, c.hidden, layers)]
    if c.experts:
        each = max(1, rows * c.topk // c.experts)
        matmuls += [Matmul("router", rows, c.hidden, c.experts, layers)]
        matmuls += [Matmul("expert up", each, c.hidden, into, layers * c.experts)]
        matmuls += [Matmul("expert down", each, c.ffn // tp, c.hidden, layers * c.experts)]
    else:
        matmuls += [Matmul("up", rows, c.hidden, into, layers), Matmul("down", rows, c.ffn // tp, c.hidden, layers)]
    # a vit looks at one token an image, and its patches are a matmul
    predicted = c.batch // replicas if c.family == "vit" else rows
    matmuls.append(Matmul("head", predicted, c.hidden, c.vocab // tp, microbatches / pp))
    if c.family == "bert":
        matmuls.append(Matmul("head transform", rows, c.hidden, c.hidden, microbatches / pp))
    if c.family == "vit":
        matmuls.append(Matmul("patches", c.batch * c.seq // replicas, 3 * PATCH * PATCH, c.hidden, microbatches / pp))
    seq = c.tokens // c.batch
    causal = c.family in ("llama", "gpt2")
    attention = Attention(max(1, c.batch // replicas), c.heads // tp, max(1, c.kv // tp), seq, c.head_dim, causal, layers)
    return Parts(tuple(matmuls), (attention,), _bytes(c, rows * microbatches / tp, mesh, predicted * microbatches))


def _bytes(c: Shape, tokens: float, mesh: Mesh, predicted: float, item: int = 2) -> dict[str, float]:
    """Each tensor once, in half precision. `tokens`: those that this device's pointwise work sees (tp divides it too)."""
    layers, gated = c.layers / mesh.size("pp"), c.family == "llama"
    wide = c.ffn * (c.topk if c.experts else 1)
    norms = 2 * 8 * c.hidden  # x and the residual read, both written; the same backwards
    activation = (8 if gated else 5) * wide  # gated: two read, one written; backwards three read, two written
    rotary = 4 * (c.heads + c.kv) * c.head_dim if gated else 0
    routing = 8 * c.topk * c.hidden if c.experts else 0  # to the experts and back, both ways
    logits = 3 * predicted * c.vocab / mesh.size("tp") / mesh.size("pp")  # read; backwards read, and the gradient written
    return {
        "pointwise": item * tokens * layers * (norms + activation + rotary + routing) + item * logits,
        # parameter, gradient and two moments read, all but the gradient written
        "optimizer": item * 7 * parameters(c) / mesh.ranks,
    }


def parameters(c: Shape) -> int:
    """How many there are, biases and norms apart."""
    attention = c.hidden * c.head_dim * (2 * c.heads + 2 * c.kv)
    mlp = (3 if c.family == "llama" else 2) * c.hidden * c.ffn
    mlp = mlp * c.experts + c.hidden * c.experts if c.experts else mlp
    outside = {"llama": 2 * c.vocab * c.hidden, "gpt2": (c.vocab + c.seq) * c.hidden, "bert": (c.vocab + c.seq + c.hidden) * c.hidden}
    return c.layers * (attention + mlp) + outside.get(c.family, (c.vocab + c.seq + 3 * PATCH * PATCH) * c.hidden)


# ---- the works ------------------------------------------------------------------------------------------------------

_8B = Shape(layers=6, hidden=4096, ffn=14336, heads=32, kv=8, vocab=32000, seq=4096, batch=2)
_12 = replace(_8B, layers=12)
_350M = Shape(layers=24, hidden=1024, ffn=4096, heads=16, kv=16, dropout=0.1)
_FP8 = ("plain-compile", "megatron", "ours-fp8", "megatron-fp8-delayed", "megatron-fp8-tensorwise")

WORKS: dict[str, Work] = {
    work.name: work
    for work in (
        Work("llama-8b-layers", _8B, peers=_FP8, about="six layers of an 8B"),
        Work("llama-8b-layers-s16k", replace(_8B, seq=16384, batch=1)),
        Work("llama-8b-layers-s32k", replace(_8B, seq=32768, batch=1)),
        Work("llama-1.2b", Shape(), about="a large vocabulary"),
        Work("moe-8x2", replace(_8B, layers=8, hidden=2048, ffn=4096, batch=4, experts=8), about="8 experts, top 2"),
        Work(
            "gpt2-350m", replace(_350M, vocab=50304, seq=1024, batch=16, family="gpt2"), ("hf",),
            about="LayerNorm, GELU, learned positions, tied embeddings, dropout",
        ),
        Work("bert-350m", replace(_350M, vocab=30522, seq=512, batch=32, family="bert"), ("hf",), peers=("plain-compile",)),
        Work(
            "vit-350m", replace(_350M, vocab=1000, seq=196, batch=64, family="vit", dropout=0.0), ("hf",), peers=("plain-compile",),
        ),
        Work("llama-8b-layers-mb8", replace(_8B, batch=16), microbatches=8, peers=("plain-compile",), about="8 microbatches on one device"),
        Work("llama-8b-layers-12-tp2", _12, mesh="tp=2", peers=("plain-compile", "megatron"), about="sequence parallel beside it"),
        Work("llama-8b-layers-12-dp2", replace(_12, batch=4), mesh="dp=2", peers=("ddp-compile", "fsdp2-compile")),
        Work(
            "llama-8b-layers-12-pp2", replace(_12, batch=16), mesh="pp=2", microbatches=8, peers=("half-compile", "plain-compile"),
            about="beside one device with half the layers and the same microbatches",
        ),
    )
}  # fmt: skip


def find(name: str, sizes: Mapping[str, int | None] | None = None, tiny: bool = False) -> Work:
    """A work by its name, with `sizes` of its shape changed. `tiny`: as small as its structure permits, for trying out."""
    work = WORKS[name]
    if tiny:
        c = work.shape
        small = replace(
            c, layers=2, hidden=32, ffn=48, heads=4, kv=2 if c.kv < c.heads else 4, vocab=64, seq=16,
            batch=2 * work.count if work.count > 1 else 4, experts=4 if c.experts else 0,
        )  # fmt: skip
        work = replace(work, shape=small)
    return replace(work, shape=replace(work.shape, **{k: v for k, v in (sizes or {}).items() if v is not None}))
